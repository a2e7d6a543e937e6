"The house plan: what must be where, and what Quarto and nbdev would not complain of."
import ast
import importlib
import json
import re
import subprocess
from configparser import ConfigParser

import nbformat
import pytest
import yaml

from conftest import ROOT

NAMES = {
    "cohort": "SCORES read_manifest ManifestError patient_folds",
    "phantom": "PhantomWorld phantom_slide phantom_cohort phantom_patches oracle",
    "slide": "WholeSlide SlideError fetch_slide",
    "tiling": "TileSpec TileGrid tissue_mask tile_slide read_patches sample_bag read_roi",
    "stain": "hed_jitter augment StainNormalizer",
    "embedding": "Embedder get_embedder list_embedders embed_slide embed_cohort read_features",
    "pretraining": "pretrain make_embedder pcam_patches ihc_patches folder_patches",
    "mil": "AttentionMIL attention_pool",
    "training": "TrainConfig fit_mil fit_stack fine_tune cross_validate predict",
    "evaluation": "auc_table auc_interval compare_arms delong_test ordinal_metrics calibration permutation_test detectable_difference",
    "attention": "attention_map plot_attention to_geojson write_viewer localisation_auc faithfulness",
    "study": "StudyConfig run_study score_slide",
}
ORDER = list(NAMES)
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CODE = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]


def cells(path):
    return nbformat.read(path, as_version=4).cells


@pytest.mark.parametrize("name", "nbs her2_mil settings.ini setup.py data_manifest.csv _quarto.yml README.md".split())
def test_top_level(name):
    assert (ROOT / name).exists()


def test_no_program_left_its_log_at_the_top():
    "Libraries write logs to where they are started from; what is tracked there is named here"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    known = "nbs her2_mil tests benchmarks tools profiles .ci .gitignore settings.ini setup.py constraints.txt Makefile data_manifest.csv _quarto.yml " \
            "README.md references.bib LICENSE CITATION.cff CONTRIBUTING.md MODEL_CARD.md"
    assert {f.split("/")[0] for f in listed.stdout.splitlines()} <= set(known.split())


@pytest.mark.parametrize("module", ORDER)
def test_names_are_exported(module):
    exported = importlib.import_module(f"her2_mil.{module}").__all__
    missing = set(NAMES[module].split()) - set(exported)
    assert not missing, f"her2_mil.{module} lacks {missing}"


def test_public_names_are_unique():
    owners = {}
    for module in ORDER:
        for name in importlib.import_module(f"her2_mil.{module}").__all__:
            owners.setdefault(name, []).append(module)
    assert not {n: m for n, m in owners.items() if len(m) > 1}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_lower_ones(module):
    tree = ast.parse((ROOT / "her2_mil" / f"{module}.py").read_text())
    used = {n.module.split(".")[-1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and (n.level or n.module.startswith("her2_mil"))}
    assert all(ORDER.index(u) < ORDER.index(module) for u in used & set(ORDER)), used


def test_only_slide_names_openslide():
    users = [p.stem for p in (ROOT / "her2_mil").glob("*.py") if re.search(r"^\s*(?:import|from) openslide", p.read_text(), re.M)]
    assert users == ["slide"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_reads_as_an_article(path):
    book = cells(path)
    first = next(c.source for c in book if c.cell_type == "markdown" and "# " in c.source)
    assert re.search(r"^# \S.*\n+> \S", first, re.M), "starts with a title and a one-line description"
    prose = sum(c.cell_type == "markdown" for c in book)
    assert prose * 4 >= len(book), f"{prose} prose cells of {len(book)}"
    assert path.stat().st_size < 1_000_000
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_outputs_hold_no_error_no_stderr_no_machine_path(path):
    for i, cell in enumerate(cells(path)):
        for out in cell.get("outputs", []):
            assert out.output_type != "error", f"cell {i}"
            assert out.get("name") != "stderr", f"cell {i}: {out.get('text', '')[:200]}"
            text = json.dumps({k: v for k, v in (out.get("data") or {}).items() if k.startswith("text")}) + str(out.get("text", ""))
            assert not re.search(r"/(?:home|root|tmp|Users)/[\w.-]+", text), f"cell {i}: {text[:200]}"


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_exported_cells_are_small_and_documented(path):
    for i, cell in enumerate(cells(path)):
        if cell.cell_type != "code" or not re.search(r"^#\|\s*exports?\b", cell.source, re.M):
            continue
        lines = [x for x in cell.source.splitlines() if x.strip() and not x.startswith("#|")]
        assert len(lines) <= 35, f"cell {i} has {len(lines)} lines"
        for node in ast.parse(cell.source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"cell {i}: {node.name} has no docstring"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_imports_are_not_mixed_with_other_code(path):
    "The site's build executes every cell that imports, and nothing else but exported ones."
    for i, cell in enumerate(cells(path)):
        if cell.cell_type != "code" or re.search(r"^#\|\s*(?:exports?\b|eval: false)", cell.source, re.M) or "nbdev_export" in cell.source:
            continue
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}), f"cell {i}: {cell.source[:80]}"


def test_library_is_python_3_10():
    for path in (ROOT / "her2_mil").glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_links_citations_and_references_resolve():
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), re.M))
    labels = {p: set(re.findall(r"^#\|\s*label:\s*(\S+)", "\n".join(c.source for c in cells(p) if c.cell_type == "code"), re.M)) for p in NOTEBOOKS}
    bad = []
    for path in NOTEBOOKS:
        text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        bad += [f"{path.name}: @{r}" for r in re.findall(r"@((?:fig|tbl|sec|eq)-[\w-]+)", text) if r not in labels[path]]
        bad += [f"{path.name}: citation {k}" for c in re.findall(r"\[(@[^\]]+)\]", text) for k in re.findall(r"@([\w-]+)", c) if k not in keys and not k.startswith(("fig-", "tbl-"))]
        for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#\s]+)(#[\w-]+)?\)", text):
            file = path.parent / target
            if not file.exists():
                bad.append(f"{path.name}: {target}")
            elif anchor and anchor.startswith(("#fig-", "#tbl-")) and anchor[1:] not in labels.get(file.resolve(), ()):
                bad.append(f"{path.name}: {target}{anchor}")
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


def test_settings_are_the_only_list_of_requirements():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    section = config["DEFAULT"]
    assert {"fastcore<2", "execnb<0.2", "nbdev==2.4.14"} <= set(section["requirements"].split())
    assert section["allowed_cell_metadata_keys"].strip() == "tags"
    pinned = {re.split(r"[=<> ;]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    named = {re.split(r"[=<>]", r)[0].lower() for r in (section["requirements"] + " " + section["dev_requirements"]).split()}
    assert named <= pinned, named - pinned
