"Real tissue and real ImageNet weights, where this machine has them. No HER2 figure comes of it: the tissue has no HER2 score."

import json
import warnings
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import torch
from test_run import done  # noqa: F401  (a fixture)
from test_score import refused, score

from her2_mil.attention import attention_map, save_attention
from her2_mil.embedding import caffe_squeezenet, embed_cohort, get_embedder, read_features, save_weights
from her2_mil.mil import AttentionMIL
from her2_mil.pretraining import folder_patches, pretrain
from her2_mil.slide import SlideError, WholeSlide
from her2_mil.tiling import survey, tile_slide
from her2_mil.training import predict

SLIDES = ("wsi/CMU-1-Small-Region.svs", "bcss/wsi/bcss_1008.tif", "bcss/wsi/bcss_1015.tif", "bcss/wsi/bcss_1019.tif")
IMAGES = ("1008", "1015", "1019")


@pytest.fixture(scope="session")
def squeezenet(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squeezenet")
    save_weights(folder, *caffe_squeezenet(real / "weights/squeezenet_v1.0_deepcompression.npz"))
    return get_embedder(folder)


def test_slides_to_heatmaps(real, squeezenet, tmp_path):
    "Tiling, a real pre-trained network, attention (not trained: there is no score to train on), heatmap."
    cohort = pd.DataFrame(
        dict(
            slide_id=[Path(s).stem for s in SLIDES],
            patient_id=list("abcd"),
            uri=SLIDES,
            sha256="",
            mpp=np.nan,
            cohort="main",
        )
    )
    files, failures = embed_cohort(cohort, squeezenet, tmp_path, bag=None, root=real, n_jobs=2, progress=False)
    assert not len(failures) and len(files) == len(SLIDES)
    torch.manual_seed(0)
    model = AttentionMIL(squeezenet.dim).eval()
    for row, path in zip(cohort.itertuples(), files.set_index("slide_id").path[cohort.slide_id]):
        f = read_features(path)
        assert f.features.shape == (len(f.coords), 512) and np.isfinite(f.features).all()
        assert f.features.std(0).max() > 0.05, "patches of tissue differ"
        logits, attention = predict(model, [f.features], return_attention=True)
        assert abs(attention[0].sum() - 1) < 1e-5 and logits.shape == (1, 4)
        with WholeSlide(real / row.uri) as slide:
            amap = attention_map(f.coords, attention[0], f.attrs["patch_size_level0"], slide.size)
            png = save_attention(
                tmp_path / f"{row.slide_id}.png",
                slide.thumbnail(4.0),
                amap,
                slide.size,
                slide.mpp,
                len(f.coords),
                title=row.slide_id,
            )
            assert (f.coords >= 0).all() and (
                f.coords + int(f.attrs["patch_size_level0"]) <= np.array(slide.size) + 1
            ).all()
        assert png.stat().st_size > 20_000


@pytest.mark.parametrize("held_out", IMAGES)
def test_he_embedder_from_real_patches(real, tmp_path, held_out, capsys):
    "AlexNet from scratch on tumour in two source images, tested on the third; the AUC is printed as it is."
    patches = folder_patches(
        real / "bcss/patches96_0.5mpp",
        real / "bcss/labels.csv",
        label="tumour_centre",
        group="image",
        mpp=0.5,
        source="BCSS",
        licence="CC0-1.0",
    )
    assert len(patches.y) == 652 and set(map(str, patches.groups)) == set(IMAGES)
    train, valid = patches.leave_out(held_out)
    folder = pretrain(train, valid, tmp_path, "bcss", epochs=12, seed=0)
    card = json.loads((folder / "card.json").read_text())
    m = card["metric"]
    assert m["n"] == (patches.groups == held_out).sum() and 0 <= m["low"] <= m["value"] <= m["high"] <= 1
    assert card["learning_curve"][-1]["train_loss"] < card["learning_curve"][0]["train_loss"]
    assert np.isfinite(get_embedder(folder)(valid.images[:4])).all()
    with capsys.disabled():
        print(
            f"\nBCSS, tumour in {held_out} after training on the other two: AUC {m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f}), {m['n']} patches of one image"
        )


def test_score_a_real_scan(real, done, tmp_path):  # noqa: F811
    result = score(real / SLIDES[0], "--model", done / "runs/phantom/model", "--out", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert len(out["probabilities"]) == 4 and "mean nothing" in out["warning"] and out["model"]["run"] == "phantom"
    assert Path(out["heatmap"]).exists()


def test_a_scan_without_um_per_px(real, done, tmp_path):  # noqa: F811
    scan = real / "wsi/TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match="mpp"):
        WholeSlide(scan)
    refused(score(scan, "--model", done / "runs/phantom/model", cwd=tmp_path), scan.name, "mpp")
    assert not list(tmp_path.iterdir())
    with WholeSlide(scan, mpp=0.5) as slide:
        assert len(tile_slide(slide)) > 50


def test_label_and_macro_are_never_asked_for(real, monkeypatch):
    "A real scan that holds both: opening, tiling and reading it leave them alone"

    def asked(self):
        raise AssertionError("associated images were asked for")

    with openslide.OpenSlide(real / SLIDES[0]) as s:
        assert {"label", "macro"} <= set(s.associated_images)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(asked))
    found = survey(pd.DataFrame([dict(slide_id="scan", uri=str(real / SLIDES[0]))]))
    assert (found.problem == "").all() and found.patches[0] > 20
    with WholeSlide(real / SLIDES[0]) as slide:
        assert len(slide.sha256) == 64 and slide.fields(tile_slide(slide).coords[:3], 224, 0.5).shape == (
            3,
            224,
            224,
            3,
        )


@pytest.mark.parametrize(
    "path, mpp", [(SLIDES[0], None), ("wsi/TCGA-CR-7395-01A-01-TS1.svs", 0.5), *[(s, None) for s in SLIDES[1:]]]
)
def test_reading_equals_level_0_area_averages(real, path, mpp):
    "Real JPEG and JPEG 2000, fast path or fallback: block means of level 0, to less than a grey level in the mean"
    with WholeSlide(real / path, mpp=mpp) as slide, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        k, target = 2, 2 * slide.mpp[0]
        at = np.array([(100, 60), (slide.size[0] // 2, slide.size[1] // 2)])
        ours = slide.fields(at, 200, target, threads=2, snap=-1).astype(float)
        for field, (x, y) in zip(ours, at.tolist()):
            level0 = np.asarray(slide._osr.read_region((x, y), 0, (200 * k, 200 * k)).convert("RGB"), float)
            assert np.abs(field - level0.reshape(200, k, 200, k, 3).mean((1, 3))).mean() < 1


def test_a_file_cut_short(real, tmp_path):
    scan = real / SLIDES[0]
    (tmp_path / "cut.svs").write_bytes(scan.read_bytes()[:200_000])
    with pytest.raises(SlideError, match="cut.svs"):
        with WholeSlide(tmp_path / "cut.svs") as slide:
            slide.read(0, 0, slide.size, slide.mpp[0])
