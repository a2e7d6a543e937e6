"her2_mil_score as a user calls it, on good input and bad."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import tifffile
from test_run import QUIET, SMALL, done  # noqa: F401  (a fixture)

import her2_mil.zoom
from her2_mil.phantom import phantom_slide
from her2_mil.score import load_model, score_slide

COMMAND = str(Path(sys.executable).parent / "her2_mil_score")


def score(*args, cwd):
    return subprocess.run(
        [COMMAND, *map(str, args)], cwd=cwd, env=QUIET, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def refused(result, *words):
    "Exit code 2, one sentence on standard error, nothing else."
    assert result.returncode == 2 and not result.stdout
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("her2_mil_score: "), result.stderr
    assert all(w in lines[0] for w in words), lines[0]


def write_tiff(path, image, **kwargs):
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None, **kwargs)
    return path


def test_json_and_heatmap(done, tmp_path):  # noqa: F811
    phantom_slide(tmp_path / "slide.tif", 2, 11, SMALL)
    result = score(tmp_path / "slide.tif", "--model", done / "runs/phantom/model", "--out", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert list(out["probabilities"]) == ["0", "1+", "2+", "3+"] and abs(sum(out["probabilities"].values()) - 1) < 1e-5
    assert "not a medical device" in out["notice"] and "phantom" in out["warning"] and out["model"]["phantom"] is True
    assert out["model"]["run"] == "phantom" and out["model"]["embedder"]["name"] == "phantom-he"
    assert Path(out["heatmap"]).read_bytes()[:4] == b"\x89PNG"
    boxes = json.loads(Path(out["geojson"]).read_text())["features"]
    assert len(boxes) == out["n_patches"] and out["tissue_mm2"] > 0 and 0 < out["entropy"] <= 1
    page = Path(out["viewer"]).read_text()
    assert "not a medical device" in page


HOSTILE = "<img src=x onerror=alert(1)>'\"&#35;%20.tif"


def test_a_hostile_name_stays_text_and_its_tiles_are_found(done, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(her2_mil.zoom, "INSIDE", 0)  # all tiles beside the page
    phantom_slide(tmp_path / HOSTILE, 2, 11, SMALL)
    model = load_model(done / "runs/phantom/model")
    out = score_slide(tmp_path / HOSTILE, model, out=tmp_path / "o", files=True, zoom=0.15)
    text, tiles = Path(out["viewer"]).read_text(), Path(out["tiles"])
    said = re.search(r'"folder": ?"([^"]*)"', text)[1]
    assert Path(out["viewer"]).parent / unquote(said) == tiles and list(tiles.glob("0/*.jpg"))
    assert "<img" not in text.split('id="data">')[0] and "&lt;img" in text
    assert score_slide(tmp_path / HOSTILE, model, out=tmp_path / "o", files=True, zoom=0.15) == out
    none = score_slide(tmp_path / HOSTILE, model, out=tmp_path / "o", files=True, zoom=0)
    assert none["tiles"] is None and '"zoom": null' in Path(none["viewer"]).read_text()
    shutil.rmtree(tiles)
    assert score_slide(tmp_path / HOSTILE, model, out=tmp_path / "o", files=True, zoom=0.15) == out
    assert list(tiles.glob("0/*.jpg")), "a result without its tiles is made again"


def test_several_slides_give_a_table_and_are_not_scored_twice(done, tmp_path):  # noqa: F811
    for name, seed in (("a", 11), ("b", 12)):
        phantom_slide(tmp_path / f"{name}.tif", 2, seed, SMALL)
    (tmp_path / "c.svs").write_text("not a slide")
    many = [f"{n}" for n in ("a.tif", "b.tif", "c.svs")]
    model = ("--model", done / "runs/phantom/model", "--out", "scored")
    result = score(*many, *model, cwd=tmp_path)
    assert result.returncode == 1 and "2 scored, 1 failed" in result.stdout and "Traceback" not in result.stderr
    assert "not a medical device" in result.stdout and "c.svs" in result.stderr
    table = (tmp_path / "scored/scores.csv").read_text().splitlines()
    assert len(table) == 3 and table[0].startswith("slide_id,predicted,entropy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "scored").rglob("*") if p.suffix != ".csv"}
    assert score(*many, *model, "--n-jobs", 2, cwd=tmp_path).returncode == 1
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "scored").rglob("*") if p.suffix != ".csv"}
    assert (tmp_path / "scored/scores.csv").read_text().splitlines() == table


def test_missing_file(done, tmp_path):  # noqa: F811
    refused(score("none.svs", "--model", done / "runs/phantom/model", cwd=tmp_path), "none.svs", "no such file")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_slide(done, tmp_path):  # noqa: F811
    (tmp_path / "notes.svs").write_text("not a slide")
    refused(score("notes.svs", "--model", done / "runs/phantom/model", cwd=tmp_path), "notes.svs")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.svs"]


def test_no_um_per_px(done, tmp_path):  # noqa: F811
    image = np.random.default_rng(0).integers(90, 200, (512, 512, 3), dtype=np.uint8)
    write_tiff(tmp_path / "bare.tif", image)
    refused(score("bare.tif", "--model", done / "runs/phantom/model", cwd=tmp_path), "bare.tif", "mpp")


def test_no_tissue(done, tmp_path):  # noqa: F811
    write_tiff(
        tmp_path / "glass.tif",
        np.full((1024, 1024, 3), 244, np.uint8),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    refused(score("glass.tif", "--model", done / "runs/phantom/model", cwd=tmp_path), "glass.tif", "tissue")
    assert [p.name for p in tmp_path.iterdir()] == ["glass.tif"]


def test_two_slides_of_one_name_give_two_heatmaps(done, tmp_path):  # noqa: F811
    for place, seed in (("a", 11), ("b", 12)):
        (tmp_path / place).mkdir()
        phantom_slide(tmp_path / place / "HE.tif", 2, seed, SMALL)
    for place in "aba":
        result = score(f"{place}/HE.tif", "--model", done / "runs/phantom/model", "--out", "maps", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "maps").glob("*-attention.png"))) == 2


def test_a_place_that_cannot_be_written_is_refused_before_the_work(done, tmp_path):  # noqa: F811
    phantom_slide(tmp_path / "slide.tif", 2, 11, SMALL)
    (tmp_path / "notafolder").touch()
    model = done / "runs/phantom/model"
    refused(
        score("slide.tif", "--model", model, "--out", "notafolder", cwd=tmp_path),
        "notafolder",
        "is a file where a folder is needed",
    )
    refused(score("slide.tif", "--model", model, "--out", "notafolder/deeper", cwd=tmp_path), "is a file")
    refused(score("slide.tif", "--model", tmp_path / "slide.tif", cwd=tmp_path), "is no model folder")


@pytest.mark.parametrize("text", ["0,5", "0.5um", "0", "-1", "nan", "inf", "0.25,0.5", ""])
def test_mpp_that_is_no_number(tmp_path, text):
    refused(score("slide.tif", f"--mpp={text}", cwd=tmp_path), "--mpp", "decimal point")


def test_help_says_that_mpp_overrides_and_is_quick(tmp_path):
    result = score("--help", cwd=tmp_path)
    assert result.returncode == 0 and "in place of what their files say" in " ".join(result.stdout.split())
    heavy = "import sys, her2_mil.score; print([m for m in ('torch', 'pandas', 'fastai', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], env=QUIET, capture_output=True, text=True).stdout == "[]\n"


def test_warnings_are_sentences(capsys):
    import warnings

    from her2_mil.score import warnings_as_sentences

    told = []
    with warnings_as_sentences(told.append):
        for _ in range(2):
            warnings.warn("a slide\nlacks a level", UserWarning, stacklevel=1)
    assert told == ["a slide lacks a level"] and not capsys.readouterr().err


def test_no_model(tmp_path):
    phantom_slide(tmp_path / "slide.tif", 2, 11, SMALL)
    refused(score("slide.tif", "--model", "nowhere", cwd=tmp_path), "nowhere", "card.json")


@pytest.mark.parametrize("value, word", [("4+", "4+"), ("ultralow", "ultralow")])
def test_manifest_with_an_unknown_score(tmp_path, value, word):
    from her2_mil.cohort import ManifestError, read_manifest

    (tmp_path / "m.csv").write_text(f"slide_id,patient_id,her2_score,uri\na,a,0,a.svs\nb,b,{value},b.svs\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "m.csv")
    assert "row 3" in str(caught.value) and "her2_score" in str(caught.value) and word in str(caught.value)
