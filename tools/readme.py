"""Make README.md from nbs/index.ipynb.

python tools/readme.py            write README.md
python tools/readme.py --check    exit 1 if README.md differs from what would be written
"""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def site_url() -> str:
    "Address of the rendered site, from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    section = config["DEFAULT"]
    return section["doc_host"] + section["doc_baseurl"]


def page(match: re.Match) -> str:
    "Link to a notebook -> link to its page: nbdev drops the number in front of the name."
    folder, name, anchor = match["folder"] or "", re.sub(r"^\d+[a-zA-Z0-9]*_", "", match["name"]), match["anchor"] or ""
    return f"]({site_url()}/{folder}{name}.html{anchor})"


def shown(cell):
    "A cell whose code is not to be shown, as the Markdown that it made"
    if cell.cell_type != "code" or not re.search(r"^#\|\s*echo:\s*false\s*$", cell.source, re.M):
        return cell
    made = ["".join(o["data"]["text/markdown"]) for o in cell.outputs if "text/markdown" in o.get("data", {})]
    return nbformat.v4.new_markdown_cell("\n\n".join(made))


def readme() -> str:
    "Markdown of index.ipynb with links to the site and images below nbs/."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    hidden = re.compile(r"^#\|\s*hide\s*$", re.M)
    notebook.cells = [shown(c) for c in notebook.cells if not (c.cell_type == "code" and hidden.search(c.source))]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"\]\((?!https?:)(?P<folder>(?:[\w-]+/)*)(?P<name>[\w-]+)\.ipynb(?P<anchor>#[\w-]+)?\)", page, body)
    body = re.sub(r"(!\[[^\]]*\]\()(?!https?:|data:|nbs/)", r"\1nbs/", body)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return "<!-- Made from nbs/index.ipynb by tools/readme.py: edit that. -->\n\n" + body


def main(check: bool) -> int:
    target, text = ROOT / "README.md", readme()
    if check:
        same = target.exists() and target.read_text(encoding="utf-8") == text
        print("README.md is up to date" if same else "README.md differs from nbs/index.ipynb: run tools/readme.py")
        return not same
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
