"A whole study on bags of features that others made: no slide, no pixel, no network that embeds."

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from her2_mil.cohort import read_manifest
from her2_mil.core import Her2Error
from her2_mil.score import score_slide
from her2_mil.study import StudyConfig, StudyError, result_table, run_study, verdict

SMALL = dict(n_folds=4, seeds=1, mil_epochs=6, inner_folds=0, permutations=19, bag_size=8, n_jobs=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "48 patients of four hospitals; 3+ is written in every patch; one bag is broken, one has no coordinates"
    root, rng = tmp_path_factory.mktemp("bags"), np.random.default_rng(0)
    (root / "bags").mkdir()
    rows = []
    for i in range(48):
        y, name = i % 4, f"s{i:02d}"
        bag = rng.normal(size=(int(rng.integers(3, 20)), 6)).astype(np.float32)
        bag[:, y] += 2
        np.save(root / "bags" / f"{name}.npy", bag)
        score = ("0", "1+", "2+", "3+")[y]
        site = f"hospital {rng.integers(4)}"
        rows.append(
            dict(slide_id=name, patient_id=f"p{i}", her2_score=score, uri="", features=f"bags/{name}.npy", site=site)
        )
    np.save(root / "bags" / "s05.npy", np.full((4, 6), np.nan))
    np.save(root / "bags" / "s06.npy", rng.normal(size=(4, 5)))
    pd.DataFrame(rows).to_csv(root / "data_manifest.csv", index=False)
    return root


@pytest.fixture(scope="module", params=["features", "features:bags"])
def run(made, request):
    name = request.param
    cfg = StudyConfig(name=name.replace(":", "-"), embedders=(name,), primary=name, allow_failures=True, **SMALL)
    return run_study(cfg, made)


def test_the_signal_is_found_and_the_hospital_stands_beside_it(run):
    own = run.metrics[run.metrics["primary"]].set_index("arm").loc[run.cfg.primary]
    assert own["low"] > 0.7 and own["n_patients"] == 46
    assert run.sites["what"].tolist() == ["as the run deals its folds", "whole sites in one fold", "pairs of one site"]
    assert run.sites.set_index("what").loc["pairs of one site", "auc"] > 0.7
    assert run.sites["p"].dropna().between(0, 0.06).all()
    assert (run.folder / "sites.csv").exists()


def test_a_bag_that_cannot_be_read_is_a_row_of_failures_and_nothing_else(run):
    failed = run.failures.set_index("slide_id")["error"]
    assert set(failed.index) == {"s05", "s06"}
    assert "NaN" in failed["s05"] and "5 features per patch where most bags have 6" in failed["s06"]


def test_what_needs_pixels_says_so(run):
    assert "need pixels" in (run.folder / "log.txt").read_text()
    assert set(run.nuisances["arm"]) >= {"nuisance: bag_size", "nuisance: site"}
    assert not run.nuisances["arm"].str.contains("file_bytes|tissue").any()
    assert not len(run.localised) and run.example["heatmap"] is None
    assert any("pairs of one site" in s for s in verdict(run))
    assert len(result_table(run))


def test_the_model_scores_a_bag_and_refuses_another_encoder_and_a_slide(run, made, tmp_path):
    said = score_slide(made / "bags" / "s03.npy", run.folder / "model")
    assert abs(sum(said["probabilities"].values()) - 1) < 1e-5 and "not a medical device" in said["notice"]
    np.save(tmp_path / "other.npy", np.ones((4, 9)))
    with pytest.raises(StudyError, match="9 features per patch, the model reads 6"):
        score_slide(tmp_path / "other.npy", run.folder / "model")
    card = json.loads((run.folder / "model" / "card.json").read_text())
    assert card["embedder"]["name"] == run.cfg.primary and not (run.folder / "model" / "embedder").exists()


def test_a_second_run_computes_nothing_anew(run, made):
    before = {p: p.stat().st_mtime_ns for p in run.folder.glob("*.parquet")}
    run_study(run.cfg, made)
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.glob("*.parquet")}


def test_a_folder_without_a_bag_fails_that_slide_and_says_where_it_looked(made):
    cfg = dict(name="lost", embedders=("features:bags",), primary="features:bags", **SMALL)
    manifest = read_manifest(made / "data_manifest.csv")[["slide_id", "patient_id", "her2_score", "site"]]
    manifest.assign(uri="", features="bags/s00.npy", slide_id=["none", *manifest["slide_id"][1:]]).to_csv(
        made / "lost.csv", index=False
    )
    found = run_study(StudyConfig(manifest="lost.csv", **cfg), made)
    assert found.failures.set_index("slide_id").loc["none", "error"].startswith("none: has no bag in")
    with pytest.raises(StudyError, match="3 slides failed"):
        found.finish()


def test_settings_survive_the_configuration_file(run):
    kept = json.loads((run.folder / "config.json").read_text())
    assert StudyConfig(**kept) == run.cfg and asdict(run.cfg)["embedders"] == tuple(kept["embedders"])
    assert issubclass(StudyError, Her2Error)
