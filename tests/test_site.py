"What Quarto would pass over in silence: citations, references, links, anchors and the bibliography itself."

import ast
import importlib.util
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT
from pybtex.database import parse_file

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
VENUE = {"article": "journal", "inproceedings": "booktitle", "book": "publisher", "phdthesis": "school"}


def cells(path):
    return nbformat.read(path, as_version=4).cells


def prose(path) -> str:
    "Markdown of a notebook without code, and the captions of its figures and tables"
    book = cells(path)
    text = "\n\n".join(c.source for c in book if c.cell_type == "markdown")
    captions = re.findall(
        r"^#\|\s*(?:fig|tbl)-cap:(.*)$", "\n".join(c.source for c in book if c.cell_type == "code"), re.M
    )
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S) + "\n\n" + "\n\n".join(captions)


def labels(path) -> list[str]:
    return re.findall(r"^#\|\s*label:\s*(\S+)", "\n".join(c.source for c in cells(path) if c.cell_type == "code"), re.M)


def slug(heading: str) -> str:
    "The identifier that pandoc gives a heading"
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))


def exported(source: str) -> list[str]:
    "Headings that nbdev gives the public functions, classes and patched methods of an exported cell"
    if not re.search(r"^#\|\s*exports?\b", source, re.M):
        return []
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        patched = isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list)
        owner = f"{ast.unparse(node.args.args[0].annotation)}.".lower() if patched else ""
        found.append(owner + node.name.lower())
    return found


def anchors(path) -> set[str]:
    "Everything on a page that a link can point to"
    found = set(labels(path))
    for cell in cells(path):
        if cell.cell_type == "code":
            found.update(exported(cell.source))
            continue
        text = re.sub(r"```.*?```", "", cell.source, flags=re.S)
        for heading in re.findall(r"^#{1,6} +(.+?)\s*$", text, re.M):
            named = re.search(r"\{[^}]*#([\w-]+)[^}]*\}", heading)
            found.add(named[1] if named else slug(heading))
    return found


def test_the_bibliography_parses_and_its_entries_are_whole():
    "Quarto stops on the first page where it does not"
    entries = parse_file(str(ROOT / "references.bib")).entries
    assert len(entries) == (ROOT / "references.bib").read_text().count("\n@") + 1
    bad = []
    for key, entry in entries.items():
        wanted = ["title", "year", *([VENUE[entry.type]] if entry.type in VENUE else [])]
        bad += [f"{key}: no {field}" for field in wanted if not entry.fields.get(field)]
        bad += [] if entry.persons.get("author") else [f"{key}: no author"]
        bad += (
            [] if re.fullmatch(r"\d{4}", entry.fields.get("year", "")) else [f"{key}: year {entry.fields.get('year')}"]
        )
    assert not bad


def test_a_lost_brace_is_found(tmp_path):
    text = (ROOT / "references.bib").read_text()
    (tmp_path / "broken.bib").write_text(text.replace("\n}\n@", "\n@", 1))
    with pytest.raises(Exception, match="syntax error"):
        parse_file(str(tmp_path / "broken.bib"))


def test_every_citation_is_in_the_bibliography_and_every_entry_is_cited():
    keys, cited, bad = set(parse_file(str(ROOT / "references.bib")).entries), set(), []
    for path in NOTEBOOKS:
        for key in re.findall(r"(?<![\w.@])@([A-Za-z][\w-]*\w)", prose(path)):
            if not key.startswith(("fig-", "tbl-", "sec-", "eq-")):
                cited.add(key)
                bad += [] if key in keys else [f"{path.name}: @{key}"]
    assert not bad
    assert not keys - cited, "entries that no page cites"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_figures_and_tables_are_labelled_once_and_referred_to_rightly(path):
    own, text = labels(path), prose(path)
    assert len(own) == len(set(own)), "a label is given twice"
    assert not set(re.findall(r"@((?:fig|tbl)-[\w-]*\w)", text)) - set(own)
    bare = [m for m in re.findall(r"(?<![@#\w-])((?:fig|tbl)-[a-z][\w-]*)", re.sub(r"\]\([^)]*\)", "]", text))]
    assert not bare, "a reference lacks its @"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    bad = []
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", prose(path)):
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            bad.append(target)
        elif anchor and file.suffix == ".ipynb" and anchor not in anchors(file):
            bad.append(f"{target}#{anchor}")
    assert not bad


def test_sidebar_names_each_notebook_once():
    def leaves(items):
        for item in items:
            if isinstance(item, str):
                yield item
            elif "contents" in item:
                yield from leaves(item["contents"])
            else:
                yield item["href"]

    listed = list(leaves(yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS)


def test_the_list_of_public_names_is_up_to_date():
    "nbs/api.ipynb was executed after the last name was exported"
    shown = "".join(str(o.get("data", "")) for c in cells(ROOT / "nbs/api.ipynb") for o in c.get("outputs", []))
    for path in sorted((ROOT / "her2_mil").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text())
        listed = [
            n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ]
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        names = set(ast.literal_eval(listed[0])) & defined if listed else set()
        assert not [n for n in names if f"[{n}](" not in shown], path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_no_list_stands_in_the_title_cell(path):
    "nbdev takes the lines `- key: value` of that cell for front matter, and drops them from the page"
    title = next(c.source for c in cells(path) if c.cell_type == "markdown")
    assert not re.findall(r"^- .*:", title, re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_prose_names_nothing_private(path):
    "nbdev links every exported name that stands in backticks; a private one has no place on any page"
    text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
    assert not re.findall(r"`_[a-z]\w*`", re.sub(r"```.*?```", "", text, flags=re.S))


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "The half of `nbdev_docs` that needs no Quarto: what Quarto would be given"
    folder = tmp_path_factory.mktemp("site") / "her2_mil"
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    check.copy_tree(ROOT, folder)
    code = (
        "import nbdev.quarto, nbdev.serve\n"
        "if __name__ == '__main__':\n"
        "    nbdev.quarto.refresh_quarto_yml()\n"
        "    nbdev.serve.proc_nbs(n_workers=2, force=True)\n"
    )
    (folder / "proc.py").write_text(code)
    subprocess.run([sys.executable, "proc.py"], cwd=folder, check=True, capture_output=True, text=True)
    return folder / "_proc"


def page(path, root) -> str:
    "Address of a notebook's page below the site: nbdev drops the number in front of a name"
    relative = path.relative_to(root)
    return relative.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", relative.name)).with_suffix(".html").as_posix()


def test_each_page_of_the_site_is_made(processed):
    made = {page(p, processed) for p in processed.rglob("*.ipynb")}
    assert {page(p, ROOT / "nbs") for p in NOTEBOOKS} == made
    assert (processed / "_quarto.yml").exists()


def test_links_that_nbdev_adds_lead_somewhere(processed):
    "A name in backticks becomes a link to where its module documents it"
    text, found = {}, {}
    for path in processed.rglob("*.ipynb"):
        book = cells(path)
        shown = [
            o["data"]["text/markdown"]
            for c in book
            for o in c.get("outputs", [])
            if "text/markdown" in o.get("data", {})
        ]
        text[path] = "\n".join([*(c.source for c in book if c.cell_type == "markdown"), *shown])
        headings = re.findall(r"^#{1,6} +(.+?)\s*$", text[path], re.M)
        found[page(path, processed)] = {slug(h) for h in headings} | set(labels(path))
    links = [(p.name, *link) for p, t in text.items() for link in re.findall(r"her2_mil/([\w/]+\.html)#([\w.-]+)\)", t)]
    assert len(links) > 50
    assert not [link for link in links if link[2].lower() not in found.get(link[1], ())]


WIDE = {"sources.ipynb": 4}  # tables of more than seven columns, to be narrowed when their page is next executed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_every_table_has_a_caption_and_at_most_seven_columns(path):
    "Seven beside the index"
    bare, wide = [], 0
    for cell in cells(path):
        tables = [str(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", [])]
        for table in (t for t in tables if "<table" in t and "#| hide" not in cell.source):
            head = re.search(r"<thead>(.*?)</thead>", table, re.S)
            rows = re.findall(r"<tr.*?</tr>", head[1], re.S) if head else []
            bare += [] if "#| tbl-cap:" in cell.source or "<caption" in table else [cell.source[-80:]]
            wide += max([len(re.findall(r"<th[ >]", r)) for r in rows] or [0]) > 8
    assert not bare and wide <= WIDE.get(path.name, 0)


def test_the_site_says_what_readers_need():
    "Keys that Quarto passes over in silence where they are misspelt"
    here = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert here == yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text())
    html, site = here["format"]["html"], here["website"]
    assert set(here) == {"project", "bibliography", "execute", "format", "website", "metadata-files"}
    assert set(html["theme"]) == {"light", "dark"} and html["respect-user-color-scheme"] is True
    assert all((ROOT / "nbs" / f).exists() for f in (html["css"], "custom.scss", site["favicon"], "sidebar.yml"))
    assert site["page-navigation"] is True and set(site["repo-actions"]) <= {"source", "issue", "edit", "none"}
    assert here["execute"]["enabled"] is False, "the pages are executed before they are rendered"
    assert (ROOT / "nbs" / here["project"]["post-render"]).resolve().exists()
    sections = [s["section"] if isinstance(s, dict) else s for s in sidebar()]
    wanted = "index reproduce Findings Ablations How-to Step Supplement api About"
    assert [next(w for w in wanted.split() if w.lower() in s.lower()) for s in sections] == wanted.split()


def sidebar() -> list:
    return yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
