"Commands as a user calls them: help at once, exit codes, files."

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from her2_mil.bags import read_bag
from her2_mil.phantom import PhantomWorld, phantom_slide

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
COMMANDS = {
    line.split("=")[0]: line.split("=")[1]
    for line in (ROOT / "settings.ini").read_text().split("console_scripts = ")[1].splitlines()[0].split()
}
REAL = Path(os.environ.get("HER2_MIL_REAL_DATA") or ROOT.parent / "shared/data")


def call(name, *args, cwd):
    "A command by its entry in settings.ini, installed or not"
    module, function = COMMANDS[name].split(":")
    script = Path(cwd) / f"{name}.entry.py"
    script.write_text(f"from {module} import {function}\n{function}()\n")
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def quickest(name, cwd):
    "The best of three: the machine may be busy"
    best = None
    for _ in range(3):
        begin = time.perf_counter()
        result = call(name, "--help", cwd=cwd)
        best = min(best or 1e9, time.perf_counter() - begin)
    return result, best


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_within_two_seconds(name, tmp_path):
    result, seconds = quickest(name, tmp_path)
    assert result.returncode == 0 and "not a medical device" in " ".join(result.stdout.split())
    assert seconds < 2


def test_doctor_names_everything_and_counts_what_is_missing(tmp_path):
    result = call("her2_mil_doctor", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert all(any(word in line for line in lines) for word in ("Python", "packages", "OpenSlide", "device", "disk"))
    assert result.returncode == int(any(line.startswith("missing") for line in lines))


def test_features_of_a_folder(tmp_path):
    (tmp_path / "slides").mkdir()
    phantom_slide(tmp_path / "slides" / "HE 1.tif", 2, 11, PhantomWorld(size=(700.0, 560.0)))
    args = ("slides", "--embedder", "random", "--out", "features", "--n-jobs", 2)
    result = call("her2_mil_features", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row = pd.read_csv(tmp_path / "features/summary.csv").iloc[0]
    assert row["slide_id"] == "HE_1" and abs(row["mpp_read"] / row["mpp_asked"] - 1) < 0.01
    assert len(read_bag(tmp_path / "features" / row["features"]).features) == row["patches"]
    assert (tmp_path / "features" / row["overlay"]).read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "slides" / "broken.svs").write_text("not a slide")
    again = call("her2_mil_features", *args, cwd=tmp_path)
    assert again.returncode == 1 and "broken" in again.stderr and "Traceback" not in again.stderr
    assert "1 kept as they were" in again.stdout
    assert list(pd.read_csv(tmp_path / "features/failures.csv")["slide_id"]) == ["broken"]


def test_features_forecast_and_refusals(tmp_path):
    phantom_slide(tmp_path / "a.tif", 2, 11, PhantomWorld(size=(700.0, 560.0)))
    dry = call("her2_mil_features", "a.tif", "--embedder", "random", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and "forecast:" in dry.stdout and not list(tmp_path.rglob("features_*"))
    for args, word in (
        (["nowhere"], "no such file"),
        (["a.tif", "--embedder", "nobody"], "nobody"),
        (["a.tif", "--patch", 0], "patch"),
        (["a.tif", "--embedder", "random", "--out", "a.tif"], "is a file"),
    ):
        result = call("her2_mil_features", *args, cwd=tmp_path)
        assert result.returncode == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_features_of_a_real_slide(tmp_path):
    slide = REAL / "wsi/CMU-1-Small-Region.svs"
    if not slide.exists():
        pytest.skip(f"{slide.name} is not at hand: set HER2_MIL_REAL_DATA to the folder that holds wsi/")
    result = call("her2_mil_features", slide, "--embedder", "random", "--out", "features", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row = pd.read_csv(tmp_path / "features/summary.csv").iloc[0]
    assert abs(row["mpp"] - 0.499) < 1e-3 and 0.2 < row["tissue_mm2"] < 1.64 and row["patches"] > 20
