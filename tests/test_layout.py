"The house plan: what must be where, and what Quarto and nbdev would not complain of."

import ast
import importlib
import json
import re
import subprocess
from configparser import ConfigParser

import nbformat
import pytest

from conftest import ROOT

# the names that other people's code may rely on, by the module that gives them
NAMES = {
    "core": "Her2Error atomic_path file_sha256 code_sha256",
    "tcga": "tcga_table fetch_tcga gdc_slides",
    "public": "public_cohorts write_public Columns",
    "cohort": "SCORES read_manifest ManifestError patient_folds tcga_cohort",
    "phantom": "PhantomWorld phantom_slide phantom_cohort phantom_patches oracle",
    "slide": "WholeSlide SlideError fetch_slide open_row",
    "tissue": "TissueSpec tissue_mask",
    "tiling": "TileSpec TileGrid tile_slide read_patches sample_bag read_roi row_grid",
    "stain": "hed_jitter augment StainNormalizer",
    "embedding": "Embedder get_embedder list_embedders",
    "features": "embed_slide embed_cohort read_features read_bag",
    "pretraining": "pretrain make_embedder pcam_patches ihc_patches folder_patches",
    "mil": "AttentionMIL attention_pool",
    "training": "Arm TrainConfig fit_mil fit_stack cross_validate predict",
    "fine_tuning": "fine_tune",
    "evaluation": "auc_table auc_interval compare_arms delong_test ordinal_metrics calibration permutation_test detectable_difference",
    "attention": "attention_map plot_attention to_geojson write_viewer localisation_auc faithfulness",
    "study": "StudyConfig run_study score_slide",
}
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CODE = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
LONG = {}  # modules that are longer than 500 lines: none


def cells(path):
    return nbformat.read(path, as_version=4).cells


def exported(path):
    "Index and source of the exported cells of a notebook"
    return [
        (i, c.source)
        for i, c in enumerate(cells(path))
        if c.cell_type == "code" and re.search(r"^#\|\s*export[is]?\b", c.source, re.M)
    ]


def chapters() -> dict[str, int]:
    "Number of the chapter that each module belongs to"
    found = {}
    for path in CODE:
        text = "\n".join(c.source for c in cells(path) if c.cell_type == "code")
        for name in re.findall(r"^#\|\s*(?:default_exp|exports?) +(\w+)", text, re.M):
            found[name] = int(path.name[:2])
    return found


CHAPTER = chapters()


def imports(module) -> list[tuple[str, str]]:
    "(module, name) of everything that a module takes from its neighbours"
    tree = ast.parse((ROOT / "her2_mil" / f"{module}.py").read_text())
    inside = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("her2_mil"))
    ]
    return [((n.module or a.name).split(".")[-1], a.name) for n in inside for a in n.names]


@pytest.mark.parametrize("name", "nbs her2_mil settings.ini setup.py data_manifest.csv _quarto.yml README.md".split())
def test_top_level(name):
    assert (ROOT / name).exists()


def test_no_program_left_its_log_at_the_top():
    "Libraries write logs to where they are started from; what is tracked there is named here"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    known = (
        "nbs her2_mil tests benchmarks tools profiles .ci .github .gitattributes .gitignore settings.ini setup.py constraints.txt Makefile data_manifest.csv _quarto.yml "
        "README.md references.bib LICENSE CITATION.cff CONTRIBUTING.md MODEL_CARD.md CHANGELOG.md ruff.toml"
    )
    assert {f.split("/")[0] for f in listed.stdout.splitlines()} <= set(known.split())


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there(module):
    found = importlib.import_module(f"her2_mil.{module}")
    missing = [n for n in NAMES[module].split() if not hasattr(found, n)]
    assert not missing, f"her2_mil.{module} lacks {missing}"


def test_public_names_are_unique():
    "Source links go to where a name is defined: two things of one name would lead astray"
    owners = {}
    for module in CHAPTER:
        found = importlib.import_module(f"her2_mil.{module}")
        for name in found.__all__:
            owners.setdefault(name, {})[id(getattr(found, name))] = module
    assert not {n: list(m.values()) for n, m in owners.items() if len(m) > 1}


def test_every_module_is_made_by_a_chapter():
    assert {p.stem for p in (ROOT / "her2_mil").glob("*.py") if not p.stem.startswith("_")} == set(CHAPTER)


@pytest.mark.parametrize("module", CHAPTER)
def test_a_module_imports_only_lower_ones(module):
    higher = {m for m, _ in imports(module) if CHAPTER.get(m, -1) > CHAPTER[module]}
    assert not higher

    def reach(name, seen=()):
        for m in {m for m, _ in imports(name) if CHAPTER.get(m) == CHAPTER[module]}:
            assert m != module, f"{module} imports itself by way of {(*seen, name)}"
            if m not in seen:
                reach(m, (*seen, name))

    reach(module)


@pytest.mark.parametrize("module", CHAPTER)
def test_no_module_takes_what_is_private_to_another(module):
    assert not [(m, n) for m, n in imports(module) if n.startswith("_")]


@pytest.mark.parametrize("module", CHAPTER)
def test_no_module_is_too_long(module):
    lines = (ROOT / "her2_mil" / f"{module}.py").read_text().count("\n")
    assert lines <= LONG.get(module, 500)


def test_only_slide_names_openslide():
    users = [
        p.stem
        for p in (ROOT / "her2_mil").glob("*.py")
        if re.search(r"^\s*(?:import|from) openslide", p.read_text(), re.M)
    ]
    assert users == ["slide"]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_a_chapter_is_no_longer_than_one_reads(path):
    book = cells(path)
    words = sum(len(c.source.split()) for c in book if c.cell_type == "markdown")
    assert len(book) <= 100 and words <= 2500, f"{len(book)} cells, {words} words"
    pictures = [
        i
        for i, c in enumerate(book)
        if any(k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {}))
    ]
    assert not pictures or pictures[0] <= 15, f"the first picture is cell {pictures[0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_every_figure_has_alternative_text(path):
    silent = [
        i
        for i, c in enumerate(cells(path))
        if "fig-alt" not in c.source
        and any(k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {}))
    ]
    assert not silent


def test_source_is_shown_where_it_is_the_point():
    assert sum(bool(re.search(r"^#\|\s*exports\b", source, re.M)) for path in CODE for _, source in exported(path)) < 60


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_parameters_say_what_they_are(path):
    "One a line, each with a comment: of every function with more than one parameter, and of public ones with one"
    bad = []
    for i, source in exported(path):
        lines = source.splitlines()
        for node in [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]:
            given = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
            if len(given) > 1 or (given and not node.name.startswith("_")):
                bad += [f"cell {i}: {node.name}({a.arg})" for a in given if "#" not in lines[a.lineno - 1]]
    assert not bad


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
            text = json.dumps({k: v for k, v in (out.get("data") or {}).items() if k.startswith("text")}) + str(
                out.get("text", "")
            )
            assert not re.search(r"/(?:home|root|tmp|Users)/[\w.-]+", text), f"cell {i}: {text[:200]}"


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_exported_cells_are_small_and_documented(path):
    for i, source in exported(path):
        lines = [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]
        fields = {
            n.lineno
            for c in ast.walk(ast.parse(source))
            if isinstance(c, ast.ClassDef)
            for n in c.body
            if isinstance(n, ast.AnnAssign)
        }
        fields |= {
            a.lineno
            for f in ast.walk(ast.parse(source))
            if isinstance(f, ast.FunctionDef)
            for a in (*f.args.args, *f.args.kwonlyargs)
        }
        fields |= {
            k for n in ast.parse(source).body if isinstance(n, ast.Assign) for k in range(n.lineno, n.end_lineno + 1)
        }  # tables
        code = [
            x
            for k, x in enumerate(source.splitlines(), 1)
            if x.strip() and k not in fields and not re.match(r"\s*(?:import|from|#)", x)
        ]
        assert len(code) <= (30 if "autograd.Function" in source else 25), f"cell {i} has {len(code)} lines"
        assert not [x for x in lines if len(x) > 120], f"cell {i} is wider than 120 columns"
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"cell {i}: {node.name} has no docstring"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_imports_are_not_mixed_with_other_code(path):
    "The site's build executes every cell that imports, and nothing else but exported ones."
    for i, cell in enumerate(cells(path)):
        if (
            cell.cell_type != "code"
            or re.search(r"^#\|\s*(?:exports?\b|eval: false)", cell.source, re.M)
            or "nbdev_export" in cell.source
        ):
            continue
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}), (
            f"cell {i}: {cell.source[:80]}"
        )


def test_library_is_python_3_10():
    for path in (ROOT / "her2_mil").glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_settings_are_the_only_list_of_requirements():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    section = config["DEFAULT"]
    assert {"fastcore<2", "execnb<0.2", "nbdev==2.4.14"} <= set(section["requirements"].split())
    assert section["allowed_cell_metadata_keys"].strip() == "tags"
    pinned = {
        re.split(r"[=<> ;]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    }
    named = {
        re.split(r"[=<>]", r)[0].lower() for r in (section["requirements"] + " " + section["dev_requirements"]).split()
    }
    assert named <= pinned, named - pinned
