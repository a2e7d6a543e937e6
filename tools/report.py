"""Executed notebook -> one self-contained HTML file, and the result table on standard output.

    python tools/report.py runs/phantom/reproduce.ipynb runs/phantom/report.html

nbconvert knows nothing of Quarto's additions, so they are turned into plain Markdown first: front matter,
`#|` lines, `:::` fences, `@fig-` references and `[@citations]`.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parents[1]
FOLDED = """{% extends 'lab/index.html.j2' %}
{% block input_group %}<details class="code"><summary>Code</summary>{{ super() }}</details>{% endblock %}
{% block html_head_css %}{{ super() }}<style>
main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
details.code > summary { cursor: pointer; color: #5c636a; font: .85rem system-ui, sans-serif; margin: .4rem 0; }
.jp-RenderedHTMLCommon table { display: block; max-width: 100%; overflow-x: auto; }
.jp-RenderedText pre, .highlight pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  :root, body { --jp-layout-color0: #16181d; --jp-layout-color1: #16181d; --jp-layout-color2: #1f232b;
    --jp-content-font-color0: #e8e9ec; --jp-content-font-color1: #e8e9ec; --jp-content-font-color2: #c9ccd3;
    --jp-ui-font-color0: #e8e9ec; --jp-ui-font-color1: #e8e9ec; --jp-content-link-color: #7ab8ff;
    --jp-cell-editor-background: #1f232b; --jp-rendermime-table-row-background: #1f232b;
    --jp-rendermime-table-row-hover-background: #2b3035; --jp-border-color0: #3a3f4a; --jp-border-color1: #3a3f4a;
    --jp-border-color2: #3a3f4a; background: #16181d; color-scheme: dark; }
  details.code > summary { color: #adb5bd; }
  .highlight span { color: inherit !important; }
  .jp-OutputArea-output img { background: #fff; }
}
</style>{% endblock %}"""


def references(path: Path) -> dict[str, str]:
    "Citation key -> 'First author et al. (year)', linked where the entry has a URL."
    entries = {}
    for key, body in re.findall(r"@\w+\{([^,]+),(.*?)\n\}", path.read_text(encoding="utf-8"), re.S):
        field = {k: re.sub(r"[{}\\]", "", v) for k, v in re.findall(r"(\w+)\s*=\s*\{(.*)\},?", body)}
        people = field["author"].split(" and ")
        short = f"{people[0].split(',')[0]}{' et al.' if len(people) > 1 else ''} ({field['year']})"
        entries[key] = f"[{short}]({field['url']})" if "url" in field else short
    return entries


def directives(source: str) -> dict[str, str]:
    "The `#| key: value` lines of a cell."
    return dict(re.findall(r"^#\|\s*([\w-]+):?\s*(.*)$", source, re.M))


def prepare(notebook: nbformat.NotebookNode, bib: dict[str, str]) -> nbformat.NotebookNode:
    "Quarto's Markdown -> plain Markdown; figures numbered in order; captions below their figures."
    labels = [directives(c.source).get("label", "") for c in notebook.cells if c.cell_type == "code"]
    number = {label: f"Figure {i}" for i, label in enumerate([x for x in labels if x.startswith("fig-")], 1)}
    number |= {label: f"Table {i}" for i, label in enumerate([x for x in labels if x.startswith("tbl-")], 1)}

    def plain(text: str) -> str:
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
        text = re.sub(r"^:::.*\n?", "", text, flags=re.M)
        text = re.sub(r"@((?:fig|tbl)-[\w-]+)", lambda m: number.get(m[1], m[1]), text)
        cite = lambda m: "; ".join(bib.get(k, k) for k in re.findall(r"@([\w-]+)", m[0]))
        text = re.sub(r"\[@[\w-]+(?:;\s*@[\w-]+)*\]", cite, text)
        return re.sub(r"(?<![\w\[])@([\w-]+)", lambda m: bib.get(m[1], m[0]), text)

    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "raw" or (cell.cell_type == "markdown" and not plain(cell.source).strip()):
            continue
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
            cells.append(cell)
            continue
        marks = directives(cell.source)
        if "hide" in marks or marks.get("include") == "false":
            continue
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        cell.metadata["tags"] = [
            *cell.metadata.get("tags", []),
            *(["remove_input"] if marks.get("echo") == "false" else []),
        ]
        cells.append(cell)
        caption = marks.get("fig-cap") or marks.get("tbl-cap")
        if caption:
            title = number.get(marks.get("label", ""), "")
            cells.append(
                nbformat.v4.new_markdown_cell(f"*{title}{'. ' if title else ''}{plain(caption.strip(chr(34)))}*")
            )
    notebook.cells = cells
    return notebook


def convert(notebook: Path, report: Path) -> None:
    "Write the report to a temporary name, then rename."
    node = prepare(nbformat.read(notebook, as_version=4), references(ROOT / "references.bib"))
    folded = dict(extra_loaders=[DictLoader({"folded.html.j2": FOLDED})], template_file="folded.html.j2")
    exporter = HTMLExporter(require_js_url="", jquery_url="", mathjax_url="", embed_images=True, **folded)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"remove_input"}), enabled=True)
    html, _ = exporter.from_notebook_node(node, {"metadata": {"name": "her2_mil: report"}})
    part = report.with_suffix(".part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, report)


def main(notebook: str, report: str) -> int:
    convert(Path(notebook), Path(report))
    table = Path(report).parent / "table.csv"
    if table.exists():
        print(pd.read_csv(table, dtype=str, keep_default_na=False).to_string(index=False))
    print(f"\nReport: {report}\nSoftware for research, not a medical device.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
