"Whole runs, as a user starts them: papermill on reproduce.ipynb, in a project of its own."
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
from her2_mil.study import StudyConfig

SMALL = PhantomWorld(size=(700.0, 560.0))
TINY = dict(n_folds=3, seeds=1, patches_per_slide=10, bag_size=8, mil_epochs=2, inner_folds=2, permutations=2, pretrain_patches=64, pretrain_epochs=1, n_jobs=2)
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def command(out, **parameters):
    "The papermill command of a run; values pass as YAML."
    return [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "reproduce.ipynb"), str(out), "-k", "python3", "--no-progress-bar", "-y", yaml.safe_dump(parameters)]


def project(folder: Path) -> Path:
    "A folder that her2_mil takes for the root of a project, with twelve small phantom slides and two external ones."
    folder.mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    phantom_cohort(3, seed=7, world=SMALL, n_external=2).to_csv(folder / "data_manifest.csv", index=False)
    return folder


def run(folder: Path, out="out.ipynb", env=QUIET, **parameters):
    "Run the paper in a project."
    return subprocess.run(command(folder / out, **parameters), cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


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
    assert features == {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()}, "a second run makes nothing anew"
    return folder


def test_defaults_are_the_phantom_profile():
    inferred = {k: yaml.safe_load(v["default"]) for k, v in papermill.inspect_notebook(str(ROOT / "nbs/reproduce.ipynb")).items()}
    profile = yaml.safe_load((ROOT / "profiles/phantom.yaml").read_text())
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(StudyConfig()).items()}
    assert inferred == profile == config


def test_parameters_are_typed_and_explained():
    for name, p in papermill.inspect_notebook(str(ROOT / "nbs/reproduce.ipynb")).items():
        assert p["inferred_type_name"] != "None" and p["help"], name


def test_paper_profile_names_the_same_settings():
    profiles = [yaml.safe_load((ROOT / f"profiles/{p}.yaml").read_text()) for p in ("phantom", "paper")]
    assert profiles[0].keys() == profiles[1].keys()
    StudyConfig(**profiles[1])


def test_committed_manifest_is_the_phantom_cohort():
    pd.testing.assert_frame_equal(
        pd.read_csv(ROOT / "data_manifest.csv", dtype=str, keep_default_na=False),
        phantom_cohort(20, seed=2411, n_external=12).astype(str),
    )


def test_a_run_is_whole(done):
    book = nbformat.read(done / "out.ipynb", as_version=4)
    assert not [o for c in book.cells for o in c.get("outputs", []) if o.output_type == "error"]
    made = {p.name for p in (done / "runs/phantom").iterdir()}
    assert {"config.json", "manifest.csv", "environment.json", "predictions.csv", "predictions.parquet", "metrics.csv", "attention",
            "figures", "failures.csv", "timings.csv", "log.txt", "table.csv", "model"} <= made
    assert not list(done.rglob("*.part"))
    table = pd.read_csv(done / "runs/phantom/table.csv")
    assert len(table) == 7 and all("phantom" in c for c in table.columns[2:3])


def test_the_same_run_gives_the_same_table_bit_for_bit(done):
    assert (done / "first.csv").read_bytes() == (done / "runs/phantom/predictions.csv").read_bytes()


def test_predictions_follow_the_contract(done):
    t = pd.read_csv(done / "runs/phantom/predictions.csv", dtype=dict(slide_id=str))
    assert list(t.columns) == ("run arm embedder pretrain_seed seed repeat fold split cohort site slide_id patient_id y "
                               "logit0 logit1 logit2 logit3 p0 p1 p2 p3 n_patches attention_entropy").split()
    test = t[t.split == "test"]
    assert (test.groupby(["arm", "pretrain_seed", "seed", "repeat", "slide_id"]).size() == 1).all()
    assert (t[t.cohort == "external"].split == "external").all()
    both = t[t.split.isin(["train", "test"])].groupby(["arm", "seed", "repeat", "fold", "patient_id"]).split.nunique()
    assert (both == 1).all(), "a patient is never on both sides of a fold"


def test_a_killed_run_is_taken_up_again(done, tmp_path):
    folder = project(tmp_path / "killed")
    process = subprocess.Popen(command(folder / "out.ipynb", **TINY), cwd=folder, env=QUIET, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.h5")}.items(), "what was whole is reused"
    assert (folder / "runs/phantom/predictions.csv").read_bytes() == (done / "first.csv").read_bytes()


def test_paper_profile_names_everything_that_is_missing(tmp_path):
    folder = project(tmp_path / "bare")
    env = {**QUIET, "TORCH_HOME": str(tmp_path / "torch"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    start = time.time()
    failed = run(folder, env=env, **yaml.safe_load((ROOT / "profiles/paper.yaml").read_text()))
    assert failed.returncode != 0 and time.time() - start < 120
    book = nbformat.read(folder / "out.ipynb", as_version=4)
    text = next(o.evalue for c in book.cells for o in c.get("outputs", []) if o.output_type == "error")
    for word in ("rows are phantom slides", "alexnet-owt-7be5be79.pth", "camelyonpatch_level_2_split_train_x.h5", "IHC patches are not at", "4 things are missing"):
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
