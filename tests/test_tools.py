"The scripts that make needs: README, offline site, report."

import importlib.util
import re
import subprocess

import nbformat
from conftest import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_up_to_date_and_its_links_leave_the_repository():
    readme = load("readme")
    assert (ROOT / "README.md").read_text() == readme.readme()
    assert f"]({readme.site_url()}/cohort.html)" in readme.readme()
    assert ".ipynb)" not in readme.readme()


def test_offline_page_asks_no_other_host():
    offline = load("offline")
    url = offline.site_url()
    page = (
        '<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="x" crossorigin="anonymous"></script>\n'
        '<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js"></script>\n'
        "<script type=\"application/javascript\">define('jquery', [],function() {return window.jQuery;})</script>\n"
        f'<a href="{url}/mil.html#attentionmil">m</a><a href="https://github.com/x/y/mil.py#LNone">s</a>'
    )
    clean = offline.offline(page, 1, url)
    assert clean == '<a href="../mil.html#attentionmil">m</a><a href="https://github.com/x/y/mil.py">s</a>'
    assert 'href="./mil.html' in offline.offline(page, 0, url)
    assert offline.offline(clean, 1, url) == clean


def test_exported_source_is_folded_and_signatures_are_code():
    offline = load("offline")
    fold = '<details {}class="code-fold"><summary>{}</summary>x</details>'
    page = fold.format('open="" ', "Exported source") + fold.format("open ", "Code")
    page += "<pre># see [`TileSpec`](https://host/tiling.html#tilespec)</pre><p>[`kept`](https://host/a)</p>"
    clean = offline.offline(page, 0, offline.site_url())
    assert fold.format("", "Exported source") in clean
    assert fold.format("open ", "Code") in clean
    assert "<pre># see TileSpec</pre>" in clean and "[`kept`]" in clean


def test_report_turns_quarto_into_plain_markdown():
    report = load("report")
    new = nbformat.v4
    book = new.new_notebook(
        cells=[
            new.new_raw_cell("---\nskip_exec: true\n---"),
            new.new_markdown_cell("See @fig-roc, [@ilse2018attention].\n\n::: {.callout-note}\nmind\n:::"),
            new.new_code_cell('#| label: fig-roc\n#| fig-cap: "ROC, as @ilse2018attention"\n#| echo: false\n1+1'),
            new.new_code_cell("#| hide\nsecret"),
        ]
    )
    text = "\n".join(c.source for c in report.prepare(book, report.references(ROOT / "references.bib")).cells)
    for raw in ("@fig", "[@", ":::", "#|", "skip_exec", "secret"):
        assert raw not in text
    assert "See Figure 1, [Ilse et al. (2018)](https://arxiv.org/abs/1802.04712)." in text
    assert "*Figure 1. ROC, as [Ilse" in text and "mind" in text


def test_report_is_self_contained(tmp_path):
    report = load("report")
    cells = [nbformat.v4.new_markdown_cell("# T\n\n> d"), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    report.convert(tmp_path / "a.ipynb", tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    assert "<h1" in html and "prefers-color-scheme: dark" in html
    folded = re.search(r'<details class="code"><summary>Code</summary>(.*?)</details>', html, re.S)[1]
    assert "highlight" in folded and "<details open" not in html
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+', html)
    assert not list(tmp_path.glob("*.part"))


def test_check_sees_a_module_edited_by_hand(tmp_path):
    check = load("check")
    check.copy_tree(ROOT, tmp_path)
    with (tmp_path / "her2_mil" / "cohort.py").open("a") as f:
        f.write("\n# edited by hand\n")
    assert check.stale(tmp_path) == ["her2_mil/cohort.py"]


def test_make_help_lists_the_targets():
    out = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("reproduce", "test", "lab", "site", "bench", "clean"):
        assert f"make {name}" in out
