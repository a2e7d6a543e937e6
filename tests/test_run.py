"Whole runs, as a user starts them: papermill on reproduce.ipynb, in a project of its own."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from her2_mil.phantom import PhantomWorld, parse_phantom_uri, phantom_cohort, phantom_patches, phantom_slide
from her2_mil.config import StudyError
from her2_mil.study import Run, StudyConfig, run_study

SMALL = PhantomWorld(size=(700.0, 560.0))
TINY = dict(
    n_folds=3,
    seeds=1,
    patches_per_slide=10,
    bag_size=8,
    mil_epochs=2,
    inner_folds=2,
    permutations=2,
    pretrain_patches=64,
    pretrain_epochs=1,
    n_jobs=2,
)
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def command(out, **parameters):
    "The papermill command of a run; values pass as YAML."
    return [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "nbs" / "reproduce.ipynb"),
        str(out),
        "-k",
        "python3",
        "--no-progress-bar",
        "-y",
        yaml.safe_dump(parameters),
    ]


def project(folder: Path) -> Path:
    "A folder that her2_mil takes for the root of a project, with twelve small phantom slides and two external ones."
    folder.mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    phantom_cohort(3, seed=7, world=SMALL, n_external=2).to_csv(folder / "data_manifest.csv", index=False)
    return folder


def run(folder: Path, out="out.ipynb", env=QUIET, **parameters):
    "Run the paper in a project."
    return subprocess.run(
        command(folder / out, **parameters),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    "A project whose study has run, twice."
    folder = project(tmp_path_factory.mktemp("run") / "project")
    first = run(folder, **TINY)
    assert first.returncode == 0, first.stderr[-3000:]
    shutil.copy(folder / "runs/phantom/predictions.csv", folder / "first.csv")
    features = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()}
    second = run(folder, **TINY)
    assert second.returncode == 0, second.stderr[-3000:]
    assert features == {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()}, (
        "a second run makes nothing anew"
    )
    return folder


def test_defaults_are_the_phantom_profile():
    inferred = {
        k: yaml.safe_load(v["default"])
        for k, v in papermill.inspect_notebook(str(ROOT / "nbs/reproduce.ipynb")).items()
    }
    profile = yaml.safe_load((ROOT / "profiles/phantom.yaml").read_text())
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(StudyConfig()).items()}
    assert inferred == profile == config


def test_parameters_are_typed_and_explained():
    for name, p in papermill.inspect_notebook(str(ROOT / "nbs/reproduce.ipynb")).items():
        assert p["inferred_type_name"] != "None" and p["help"], name


def test_paper_profile_names_the_same_settings():
    profiles = [yaml.safe_load((ROOT / f"profiles/{p}.yaml").read_text()) for p in ("phantom", "paper", "tcga")]
    assert profiles[0].keys() == profiles[1].keys() == profiles[2].keys()
    assert all(StudyConfig(**p) for p in profiles)


def test_committed_manifest_is_the_phantom_cohort():
    pd.testing.assert_frame_equal(
        pd.read_csv(ROOT / "data_manifest.csv", dtype=str, keep_default_na=False),
        phantom_cohort(20, seed=2411, n_external=12).astype(str),
    )


def test_a_run_is_whole(done):
    book = nbformat.read(done / "out.ipynb", as_version=4)
    assert not [o for c in book.cells for o in c.get("outputs", []) if o.output_type == "error"]
    made = {p.name for p in (done / "runs/phantom").iterdir()}
    assert {
        "config.json",
        "manifest.csv",
        "environment.json",
        "predictions.csv",
        "predictions.parquet",
        "metrics.csv",
        "attention",
        "figures",
        "failures.csv",
        "timings.csv",
        "log.txt",
        "table.csv",
        "model",
    } <= made
    assert not list(done.rglob("*.part"))
    table = pd.read_csv(done / "runs/phantom/table.csv")
    assert len(table) == 7 and all("phantom" in c for c in table.columns[2:3])


def test_the_same_run_gives_the_same_table_bit_for_bit(done):
    assert (done / "first.csv").read_bytes() == (done / "runs/phantom/predictions.csv").read_bytes()


def test_predictions_follow_the_contract(done):
    t = pd.read_csv(done / "runs/phantom/predictions.csv", dtype=dict(slide_id=str))
    assert (
        list(t.columns)
        == (
            "run arm embedder pretrain_seed variant seed repeat fold folds_by split cohort site scanner ish slide_id patient_id y "
            "logit0 logit1 logit2 logit3 p0 p1 p2 p3 n_patches attention_entropy"
        ).split()
    )
    test = t[t.split == "test"]
    assert (test.groupby(["arm", "pretrain_seed", "seed", "repeat", "slide_id"]).size() == 1).all()
    assert (t[t.cohort == "external"].split == "external").all()
    both = t[t.split.isin(["train", "test"])].groupby(["arm", "seed", "repeat", "fold", "patient_id"]).split.nunique()
    assert (both == 1).all(), "a patient is never on both sides of a fold"


def test_a_killed_run_is_taken_up_again(done, tmp_path):
    folder = project(tmp_path / "killed")
    process = subprocess.Popen(
        command(folder / "out.ipynb", **TINY),
        cwd=folder,
        env=QUIET,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.time() + 300
    while not list((folder / "cache").rglob("features*/*.h5")) and time.time() < until and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("features*/*.h5")}
    assert kept and not (folder / "runs/phantom/predictions.csv").exists()
    for file in kept:
        with h5py.File(file) as f:
            assert np.isfinite(f["features"][:]).all()
    again = run(folder, **TINY)
    assert again.returncode == 0, again.stderr[-3000:]
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.h5")}.items(), (
        "what was whole is reused"
    )
    assert (folder / "runs/phantom/predictions.csv").read_bytes() == (done / "first.csv").read_bytes()


def test_paper_profile_names_everything_that_is_missing(tmp_path):
    folder = project(tmp_path / "bare")
    env = {
        **QUIET,
        "TORCH_HOME": str(tmp_path / "torch"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    start = time.time()
    failed = run(folder, env=env, **yaml.safe_load((ROOT / "profiles/paper.yaml").read_text()))
    assert failed.returncode != 0 and time.time() - start < 120
    book = nbformat.read(folder / "out.ipynb", as_version=4)
    text = next(o.evalue for c in book.cells for o in c.get("outputs", []) if o.output_type == "error")
    for word in (
        "rows are phantom slides",
        "alexnet-owt-7be5be79.pth",
        "camelyonpatch_level_2_split_train_x.h5",
        "IHC patches are not at",
        "4 things are missing",
    ):
        assert word in text, text
    assert not list((folder / "runs/paper").glob("predictions*"))


def test_paper_profile_runs_unchanged_on_slides_and_sources(tmp_path):
    "Real loaders on files made in their layout; ImageNet is left out, since its weights are checked by hash."
    folder = project(tmp_path / "real")
    cohort = pd.read_csv(folder / "data_manifest.csv", dtype=str, keep_default_na=False)
    for i, uri in enumerate(cohort.uri):
        phantom_slide(folder / f"{i}.tif", *parse_phantom_uri(uri))
    cohort.assign(uri=[f"{i}.tif" for i in range(len(cohort))]).to_csv(folder / "data_manifest.csv", index=False)
    (folder / "data/pcam").mkdir(parents=True)
    for split, seed, name in (("train", 1, "train"), ("val", 2, "valid")):
        images, y = phantom_patches("he", 64, seed)
        for key, values in (("x", images), ("y", y.reshape(-1, 1, 1, 1))):
            with h5py.File(folder / f"data/pcam/camelyonpatch_level_2_split_{name}_{key}.h5", "w") as f:
                f[key] = values
    images, y = phantom_patches("ihc", 120, 3)
    for i, (image, score) in enumerate(zip(images, y)):
        to = folder / f"data/ihc/{('0', '1+', '2+', '3+')[score]}/s{i % 10}_{i}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(to)
    profile = yaml.safe_load((ROOT / "profiles/paper.yaml").read_text())
    small = {**profile, **TINY, "repeats": 2, "pretrain_seeds": 1, "embedders": ["random", "ihc", "pcam"]}
    finished = run(folder, **small)
    assert finished.returncode == 0, finished.stderr[-3000:]
    table = pd.read_csv(folder / "runs/paper/table.csv")
    assert {"random", "ihc", "pcam"} <= set(table.arm) and not any("phantom" in c for c in table.columns)


def test_a_bad_slide_costs_only_itself(done, tmp_path):
    folder = project(tmp_path / "bad")
    shutil.copytree(done / "cache", folder / "cache")
    (folder / "broken.tif").write_bytes(b"II*\0 not a slide")
    cohort = pd.read_csv(folder / "data_manifest.csv", dtype=str, keep_default_na=False)
    extra = cohort.iloc[:1].assign(slide_id="broken", patient_id="broken", uri="broken.tif")
    pd.concat([cohort, extra]).to_csv(folder / "data_manifest.csv", index=False)
    assert run(folder, **TINY).returncode != 0
    assert pd.read_csv(folder / "runs/phantom/failures.csv").slide_id.tolist() == ["broken"]
    assert (folder / "runs/phantom/table.csv").exists(), "everything that could be computed was"
    assert run(folder, **TINY, allow_failures=True).returncode == 0


# Settings as papermill, YAML and Python give them.


@pytest.mark.parametrize(
    "value, meant",
    [("False", False), ("false", False), ("no", False), ("0", False), ("true", True), ("Yes", True), ("1", True)],
)
def test_a_truth_on_papermills_command_line_means_what_it_says(value, meant):
    from papermill.cli import _resolve_type

    assert StudyConfig(allow_failures=_resolve_type(value)).allow_failures is meant


@pytest.mark.parametrize(
    "name, value",
    [
        ("mpp", "0,5"),
        ("seed", "abc"),
        ("seed", 1.5),
        ("seed", -1),
        ("n_folds", True),
        ("cache", None),
        ("name", 7),
        ("mpp", float("nan")),
        ("pretrain_lr", -1e-4),
        ("real_slides", "perhaps"),
        ("permutations", 1e300),
        ("embedders", "random,,x"),
        ("precision", "half"),
        ("folds_by", "hospital"),
        ("patch", 8),
        ("name", "a" * 300),
        ("layer", 5),
        ("data", "a\0b"),
        ("head", None),
        ("mil_epochs", [3]),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(name, value):
    with pytest.raises(StudyError) as caught:
        StudyConfig(**{name: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name} is {value!r:.80}") and (
        "allowed" in problem or "wanted" in problem or "must be" in problem
    )


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(StudyError, match="4 settings") as caught:
        StudyConfig(seeds=0, mpp="x", head="y", allow_failures="z")
    assert len(caught.value.problems) == 4


# Nothing stale is reused.

KEYS = """
import json, sys
from pathlib import Path
from her2_mil.core import code_sha256
from her2_mil.arms import train_arms
from her2_mil.nuisance import slide_nuisance
here = Path(sys.argv[1])/"her2_mil"
def keys(): return [code_sha256(train_arms), code_sha256(slide_nuisance)]
before, out = keys(), {}
for name, (file, old, new) in json.loads(sys.argv[2]).items():
    text = (here/file).read_text()
    assert old in text, (file, old)
    (here/file).write_text(text.replace(old, new))
    out[name] = [a != b for a, b in zip(before, keys())]
    (here/file).write_text(text)
    assert keys() == before
print(json.dumps(out))
"""


def copied(folder: Path) -> Path:
    "A copy of the package that may be edited."
    shutil.copytree(ROOT / "her2_mil", folder / "her2_mil", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_keys_follow_the_code_that_makes_a_table(tmp_path):
    place, edits = (
        copied(tmp_path),
        {
            "the optimiser's default": ("members.py", "weight_decay: float = 0.01", "weight_decay: float = 0.02"),
            "a variant of the study": ("arms.py", "('mean', 'max')", "('mean', 'top')"),
            "a comment": ("training.py", "\n# %% ", "\n# a remark\n\n# %% "),
            "a docstring": (
                "training.py",
                '"Train every arm, repeat, fold and seed in stacks',
                '"In other words: train every arm',
            ),
            "a figure": ("training.py", "'training loss (cross-entropy, nats)'", "'loss'"),
            "another module": ("attention.py", "Attention against truth", "Truth against attention"),
            "the verdict": ("report.py", "'above chance' if", "'beyond chance' if"),
            "the density of a slide": ("nuisance.py", "astype(np.float32) + 1)/256)", "astype(np.float32) + 2)/257)"),
            "the mask": ("tiling.py", "if spec.mpp < .8*max(slide.mpp)", "if spec.mpp < .9*max(slide.mpp)"),
        },
    )
    env = {**QUIET, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", KEYS, str(place), json.dumps(edits)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "the optimiser's default": [True, False],
        "a variant of the study": [True, False],
        "a comment": [False, False],
        "a docstring": [False, False],
        "a figure": [False, False],
        "another module": [False, False],
        "the verdict": [False, False],
        "the density of a slide": [False, True],
        "the mask": [False, True],
    }


STUDY = """
import sys
from her2_mil.study import StudyConfig, run_study
run_study(StudyConfig(embedders=("random",), primary="random", n_folds=3, seeds=1, patches_per_slide=8, bag_size=6, mil_epochs=2, inner_folds=0,
                      permutations=1, n_jobs=1), sys.argv[1])
"""


def test_an_edit_of_the_trainer_trains_again(tmp_path):
    place, folder = copied(tmp_path), project(tmp_path / "project")
    env, table = {**QUIET, "PYTHONPATH": str(place)}, folder / "runs/phantom/predictions.parquet"

    def study():
        done = subprocess.run(
            [sys.executable, "-c", STUDY, str(folder)], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return table.stat().st_mtime_ns, pd.read_parquet(table)

    (first, before), trainer = study(), place / "her2_mil/members.py"
    trainer.write_text("# a remark\n" + trainer.read_text())
    assert study()[0] == first, "a comment changes nothing"
    trainer.write_text(trainer.read_text().replace("batches: int = 4", "batches: int = 2"))
    second, after = study()
    assert second != first and not np.array_equal(before.logit0, after.logit0)


# What makes the end impossible is said at the beginning, and leaves nothing behind.


def said(folder: Path, **change) -> list:
    "The problems of a run that cannot start; no folder is made."
    before = sorted(folder.rglob("*"))
    settings = {**TINY, "embedders": ("random",), "primary": "random", "name": "mine", **change}
    with pytest.raises(StudyError) as caught:
        run_study(StudyConfig(**settings), folder)
    assert sorted(folder.rglob("*")) == before
    return caught.value.problems


def test_what_cannot_end_does_not_start(tmp_path):
    folder = project(tmp_path / "project")
    cohort = pd.read_csv(folder / "data_manifest.csv", dtype=str, keep_default_na=False)

    def problem(table, **change):
        table.to_csv(folder / "mine.csv", index=False)
        (one,) = said(folder, manifest="mine.csv", **change)
        return one

    assert "3 folds need 3 patients of each of the four scores" in problem(cohort[cohort.her2_score != "3+"])
    assert "3+: 0" in problem(cohort[cohort.her2_score != "3+"])
    assert "outside the external rows" in problem(cohort.assign(cohort="external"))
    assert "2 inner folds need 2" in problem(cohort, n_folds=2, inner_folds=2)
    assert "folds by site" in problem(cohort.assign(site="A"), folds_by="site")
    assert f"looked for at {folder / 'outline.geojson'}" in problem(cohort.assign(roi="outline.geojson"))
    assert "conv9" in problem(cohort, layer="conv9")
    (folder / "runs").touch()
    assert "is a file where a folder is needed" in problem(cohort)


def test_a_manifest_is_looked_for_where_the_message_says(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    (tmp_path / "analysis").mkdir()
    monkeypatch.chdir(tmp_path / "analysis")
    with pytest.raises(StudyError) as caught:
        run_study(StudyConfig(embedders=("random",), primary="random"))
    assert f"not in {tmp_path / 'analysis'} (the current folder, for no settings.ini of her2_mil" in str(caught.value)
    assert str(caught.value).startswith("phantom: 1 thing is missing") and not list((tmp_path / "analysis").iterdir())


def test_public_weights_have_one_pretraining_seed(tmp_path):
    run = Run(
        StudyConfig(
            embedders=("random", "imagenet", "phantom-he", str(tmp_path / "mine")), primary="random", pretrain_seeds=3
        ),
        tmp_path,
    )
    assert [len(run.pretrain_seeds(name)) for name in run.cfg.embedders] == [3, 1, 3, 1]


def test_tables_describe_the_patches_that_were_read(tmp_path):
    "With a region of interest, nuisance, score and heatmap see the patches that were embedded and no others."
    folder = project(tmp_path / "project")
    cohort = pd.read_csv(folder / "data_manifest.csv", dtype=str, keep_default_na=False)
    left = [[[0, 0], [700, 0], [700, 5000], [0, 5000], [0, 0]]]
    feature = dict(
        type="Feature",
        geometry=dict(type="Polygon", coordinates=left),
        properties=dict(classification=dict(name="Tumor")),
    )
    (folder / "left.geojson").write_text(json.dumps(dict(type="FeatureCollection", features=[feature])))
    cohort.assign(roi="left.geojson").to_csv(folder / "data_manifest.csv", index=False)
    settings = {
        **TINY,
        "embedders": ("random",),
        "primary": "random",
        "patches_per_slide": 1000,
        "inner_folds": 0,
        "permutations": 0,
    }
    done = run_study(StudyConfig(**settings), folder)
    n = done.table.drop_duplicates("slide_id").set_index("slide_id").n_patches
    seen = pd.read_parquet(folder / "runs/phantom/nuisance_slides.parquet")
    assert seen.n_patches.tolist() == [n[s] for s in done.cohort.slide_id]
    assert (seen.tumour_mm2 > 0).all() and (seen.tissue_mm2 < 0.2).all(), "the left half of 0.39 mm2"
    assert done.example["n_patches"] == n[done.example["slide_id"]]
    assert "nuisance: tumour_mm2" in set(done.nuisances.arm) or seen.tumour_mm2.nunique() == 1
