"Embedders and feature files beyond what a notebook can hold: kills, other tools, clusters, every kind of backbone."

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision

from her2_mil import embedding, features
from her2_mil.embedding import feature_cosines, get_embedder
from her2_mil.features import embed_cohort, embed_slide, read_bag, read_features
from her2_mil.weights import EmbedderError, load_weights, save_weights
from her2_mil.core import Her2Error
from her2_mil.phantom import PhantomWorld, phantom_cohort, phantom_slide
from her2_mil.slide import WholeSlide
from her2_mil.tiling import TileSpec, tile_slide

WORLD = PhantomWorld(size=(420.0, 360.0))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    return phantom_cohort(n_per_score=1, seed=3, world=WORLD), tmp_path_factory.mktemp("phantoms")


def _same(a, b):
    "Byte for byte."
    return all(Path(p).read_bytes() == Path(q).read_bytes() for p, q in zip(a.path, b.path, strict=True))


@pytest.mark.parametrize(
    "name, dim",
    [
        ("resnet18", 512),
        ("vgg11", 4096),
        ("mobilenet_v3_small", 1024),
        ("densenet121", 1024),
        ("convnext_tiny", 768),
        ("swin_t", 768),
        ("vit_b_32", 768),
        ("efficientnet_b0", 1280),
        ("squeezenet1_1", 512),
    ],
)
def test_torchvision_backbone(name, dim, tmp_path):
    "Saved, loaded and run: the same features as the network with its head cut off."
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    folder = save_weights(
        tmp_path / name, net, dict(name=name, architecture=name, source="a random draw", licence="CC0-1.0")
    )
    e = get_embedder(folder, precision="float32")
    assert e.dim == dim and get_embedder(folder).sha256 == get_embedder(folder).sha256
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    last = [n for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    if last:
        net.set_submodule(last[-1], torch.nn.Identity())
        with torch.inference_mode():
            np.testing.assert_allclose(e(patches), net(e.normalise(patches)).numpy(), atol=1e-4)


def _timm_folder(model, folder, **config):
    "A timm model with random weights, kept as Hugging Face keeps it; the model without its classifier."
    torch.manual_seed(0)
    net = timm.create_model(model, pretrained=False)
    net.pretrained_cfg |= config
    timm.models.save_for_hf(net, folder, safe_serialization=True)
    net.reset_classifier(0)
    return net.eval()


@pytest.mark.parametrize("model, dim", [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_timm_from_a_folder(model, dim, tmp_path):
    "The route of a gated model on a machine without internet: config.json and model.safetensors fetched by hand."
    mean, std = (0.7, 0.57, 0.7), (0.21, 0.23, 0.17)
    net = _timm_folder(model, tmp_path / "here", mean=mean, std=std, license="cc-by-nc-nd-4.0")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    e, elsewhere = (
        get_embedder(f"timm:local-dir:{tmp_path / where}", precision="float32") for where in ("here", "there")
    )
    assert e.dim == dim and e.sha256 == elsewhere.sha256 and str(tmp_path) not in str(e.card)
    assert (e.preprocessing["mean"], e.preprocessing["std"], e.card["licence"]) == (
        list(mean),
        list(std),
        "cc-by-nc-nd-4.0",
    )
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        x = (torch.from_numpy(patches).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
            std
        ).view(3, 1, 1)
        np.testing.assert_allclose(e(patches), net(x).numpy(), atol=1e-4)
    folder = save_weights(tmp_path / "weights", net, e.card | dict(name="mine"))
    assert np.array_equal(get_embedder(folder, precision="float32")(patches), e(patches))
    with pytest.raises(EmbedderError, match="'penultimate' only"):
        get_embedder(folder, layer="conv5")


def test_timm_says_what_to_do(tmp_path, monkeypatch):
    "An unknown name, and a known one that cannot be fetched."
    import huggingface_hub

    with pytest.raises(EmbedderError, match="timm could not load 'no_such_model'.*list_pretrained"):
        get_embedder("timm:no_such_model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbedderError, match="timm could not load 'resnet18'.*licence.*timm:local-dir:<folder>"):
        get_embedder("timm:resnet18")


def test_without_bfloat16_the_reference_path_runs(monkeypatch):
    monkeypatch.setattr(embedding, "_cpu_has_bfloat16", lambda: False)
    e, reference = get_embedder("random", device="cpu"), get_embedder("random", precision="float32", device="cpu")
    patches = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    assert e.precision == "float32" and not e.takes_pixels and e.sha256 == reference.sha256
    assert np.array_equal(e(patches), reference(patches))


def test_pixels_in_memory_are_bounded_by_the_batch(tmp_path, monkeypatch):
    "Patches alive at once while a slide of any length is embedded: a piece for each worker."
    alive, most, lock, read = [0], [0], threading.Lock(), features.read_patches

    def add(n):
        with lock:
            alive[0] += n
            most[0] = max(most[0], alive[0])

    def counted(*args):
        patches = read(*args)
        add(len(patches))
        weakref.finalize(patches, add, -len(patches))
        return patches

    monkeypatch.setattr(features, "read_patches", counted)
    phantom_slide(tmp_path / "slide.tif", 2, 3, WORLD)
    spec, workers = TileSpec(patch=64), 2
    with WholeSlide(tmp_path / "slide.tif") as s:
        coords = tile_slide(s, spec).coords
        for n in (200, 1600):
            most[0] = 0
            embed_slide(
                s, np.resize(coords, (n, 2)), get_embedder("random"), tmp_path / "f.h5", spec, batch=4, threads=workers
            )
            assert 16 <= most[0] <= 16 * max(workers, torch.get_num_threads())
            assert alive[0] == 0


def test_progress_counts_slides_and_patches(cohort, tmp_path, capsys):
    table, cache = cohort
    embed_cohort(table, get_embedder("random"), tmp_path / "f", bag=2, cache=cache, progress=True)
    shown = capsys.readouterr().err
    assert f"{len(table)}/{len(table)}" in shown and "patches/s" in shown and "0 failed" in shown
    embed_cohort(table, get_embedder("random"), tmp_path / "f", bag=2, cache=cache, progress=False)
    assert capsys.readouterr().err == ""


def test_all_patches_or_a_sample(cohort, tmp_path):
    table, cache = cohort
    every, some = (
        embed_cohort(table, get_embedder("random"), tmp_path / "f", bag=bag, cache=cache)[0] for bag in (None, 3)
    )
    for whole, part in zip(every.path, some.path, strict=True):
        whole, part = read_features(whole), read_features(part)
        at = {tuple(c): f for c, f in zip(whole.coords, whole.features, strict=True)}
        assert len(part.coords) == 3 < len(whole.coords)
        assert all(np.array_equal(at[tuple(c)], f) for c, f in zip(part.coords, part.features, strict=True))


def test_killed_in_the_middle(tmp_path):
    "SIGKILL while writing: no file under the final name; the next run makes it whole."
    phantom_slide(tmp_path / "slide.tif", 2, 3, PhantomWorld(size=(700.0, 600.0)))
    program = """if True:
        import sys, time, numpy as np
        from her2_mil.embedding import Embedder, get_embedder
        from her2_mil.features import embed_slide
        from her2_mil.slide import WholeSlide
        from her2_mil.tiling import TileSpec, tile_slide
        e = get_embedder('random')
        class Slow(Embedder):
            def __call__(self, patches, batch=64):
                print('batch', flush=True); time.sleep(60)
        slow = Slow(e.module, e.card, e.layer)
        with WholeSlide(sys.argv[1]) as s: embed_slide(s, tile_slide(s).coords, slow, sys.argv[2])"""
    out = tmp_path / "features" / "slide.h5"
    run = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "slide.tif", out], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "batch\n"
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not out.exists() and all(p.name.startswith(".") for p in out.parent.iterdir())
    with WholeSlide(tmp_path / "slide.tif") as s:
        coords = tile_slide(s).coords
        embed_slide(s, coords, get_embedder("random"), out)
    assert len(read_features(out).features) == len(coords)


def test_interrupted_cohort_leaves_whole_files_only(cohort, tmp_path):
    table, cache = cohort
    program = """if True:
        import sys, pandas as pd
        from her2_mil.embedding import get_embedder
        from her2_mil.features import embed_cohort
        embed_cohort(pd.read_pickle(sys.argv[1]), get_embedder('random'), sys.argv[2], bag=6, cache=sys.argv[3])"""
    table.to_pickle(tmp_path / "t.pkl")
    out = tmp_path / "f"
    run = subprocess.Popen([sys.executable, "-c", program, tmp_path / "t.pkl", out, cache])
    deadline = time.time() + 120
    while run.poll() is None and not list(out.rglob("features_*/*.h5")) and time.time() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    run.wait()
    done = list(out.rglob("features_*/*.h5"))
    assert done and all(len(read_features(p).features) == 6 for p in done)
    assert not list(out.rglob(".*.part"))
    files, failures = embed_cohort(table, get_embedder("random"), out, bag=6, cache=cache)
    assert not len(failures) and files.reused.sum() == len(done)


def test_same_files_on_every_backend(cohort, tmp_path):
    table, cache = cohort
    e = get_embedder("random")
    one, _ = embed_cohort(table, e, tmp_path / "one", bag=6, cache=cache)
    import distributed
    import joblib

    two, _ = embed_cohort(table, e, tmp_path / "two", bag=6, cache=cache, n_jobs=2)
    assert _same(one, two)
    with joblib.parallel_config("loky"):
        apart, _ = embed_cohort(table, e, tmp_path / "apart", bag=6, cache=cache, n_jobs=2)
    assert _same(one, apart)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        three, failures = embed_cohort(table, e, tmp_path / "three", bag=6, cache=cache, n_jobs=2)
    assert not len(failures) and _same(one, three)


def test_torchmil_reads_our_files(cohort, tmp_path):
    "Folder names, file names, datasets: torchmil's reader for TRIDENT's folders finds features, grid, labels."
    from torchmil.datasets import TridentWSIDataset

    table, cache = cohort
    files, _ = embed_cohort(table, get_embedder("random"), tmp_path / "f", cache=cache)
    labels = table[["slide_id"]].assign(y=range(len(table)))
    labels.to_csv(tmp_path / "y.csv", index=False)
    folder, attrs = Path(files.path[0]).parent, read_features(files.path[0]).attrs
    assert (
        folder.parent.name == f"{attrs['target_magnification']}x_{attrs['patch_size']}px_{attrs['overlap']}px_overlap"
    )
    sizes = pd.Series({f.slide_id: read_features(f.path).attrs["patch_size_level0"] for f in files.itertuples()})
    seen, neighbours = [], 0
    for size, names in sizes.groupby(sizes).groups.items():  # torchmil takes one patch size for all slides of a dataset
        data = TridentWSIDataset(
            base_path=f"{folder.parent}/",
            labels_path=str(tmp_path / "y.csv"),
            feature_extractor=folder.name.removeprefix("features_"),
            wsi_names=list(names),
            patch_size=int(size),
            bag_keys=["X", "Y", "coords", "adj"],
            load_at_init=False,
            wsi_name_col="slide_id",
            wsi_label_col="y",
        )
        for i, name in enumerate(data.bag_names):
            ours, bag = read_features(files.set_index("slide_id").path[name]), data[i]
            assert (
                np.array_equal(bag["X"].numpy(), ours.features)
                and int(bag["Y"]) == labels.set_index("slide_id").y[name]
            )
            grid, adjacent = ours.coords // size, bag["adj"].to_dense().numpy()
            assert np.array_equal(bag["coords"].numpy() - bag["coords"].numpy().min(0), grid - grid.min(0))
            assert not adjacent[np.abs(grid[:, None] - grid[None]).max(-1) > 1].any()
            seen, neighbours = [*seen, name], neighbours + np.count_nonzero(adjacent)
    assert sorted(seen) == sorted(table.slide_id) and neighbours


def test_compiled_features_are_the_same_to_rounding():
    patches = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), dtype=np.uint8)
    plain, compiled = get_embedder("random"), get_embedder("random", compile=True)
    try:
        got = compiled(patches, batch=8)
    except EmbedderError as e:
        pytest.skip(f"torch.compile does not work here: {e}")
    assert feature_cosines(got, plain(patches)).min() > 0.999 and plain.sha256 != compiled.sha256


# Feature files: what makes one stale, who is read once


def test_reused_only_if_slide_code_and_views_are_the_same(tmp_path, monkeypatch):
    "um/px along either axis, code, versions, augmented views and their seed; what was there is then replaced"
    phantom_slide(tmp_path / "slide.tif", 2, 3, WORLD)
    e, out = get_embedder("random"), tmp_path / "f.h5"

    def made(mpp=None, **kwargs):
        before = out.stat().st_mtime_ns if out.exists() else 0
        with WholeSlide(tmp_path / "slide.tif", mpp=mpp) as s:
            embed_slide(s, np.array([(0, 0), (300, 300)]), e, out, TileSpec(patch=64), **kwargs)
        return out.stat().st_mtime_ns != before

    with WholeSlide(tmp_path / "slide.tif") as s:
        x, y = s.mpp
    assert made() and not made()
    for changed in (
        dict(mpp=(x * 1.01, y)),
        dict(mpp=(x, y * 1.01)),
        dict(views=1),
        dict(views=2),
        dict(views=2, seed=1),
    ):
        assert made(**changed) and not made(**changed), changed
    assert made() and not made()
    with h5py.File(out, "a") as f:
        f.attrs["versions"] = json.dumps(dict(torch="1.0", numpy="1.0"))
    assert made() and not made()
    monkeypatch.setattr(features, "features_code", lambda: "of another function")
    assert made() and not made()


def test_code_that_makes_features_counts_and_comments_do_not(tmp_path):
    "A copy of the library, edited: a comment, a module that takes no part, an augmentation, a layer"
    package = tmp_path / "her2_mil"
    shutil.copytree(Path(features.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    program = """if True:
        import os, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import her2_mil.features as f
        from her2_mil import core
        folder = Path(f.__file__).parent
        assert folder == Path(sys.argv[1])/'her2_mil'
        def edit(name, old, new):
            file = folder/name
            text = file.read_text()
            assert old in text, (name, old)
            file.write_text(text.replace(old, new, 1))
            core._parsed.cache_clear()
            f.features_code.cache_clear()
            return f.features_code()
        first = f.features_code()
        print(edit('stain.py', 'def augment(', '# a remark\\ndef augment(') == first,
              edit('evaluation.py', '__all__', 'of_no_use = 1\\n__all__') == first,
              edit('embedding.py', "if layer == 'flat5'", "if layer == 'flat6'") == first,
              edit('features.py', '(x.clamp(0, 1)*255)', '(x.clamp(0, 1)*254)') == first)"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert run.stdout.split() == ["True", "True", "False", "False"], run.stderr


def test_a_slide_is_read_once_for_all_embedders(cohort, tmp_path, monkeypatch):
    "Every patch once, whatever the number of embedders"
    table, cache = cohort
    seen, read = [], features.read_patches

    def counted(slide, coords, *args):
        seen.extend((slide.name, *c) for c in coords.tolist())
        return read(slide, coords, *args)

    monkeypatch.setattr(features, "read_patches", counted)
    three = [get_embedder("random", seed=s) for s in range(3)]
    files, failures = embed_cohort(table, three, tmp_path, bag=6, cache=cache, progress=False)
    assert not len(failures) and len(seen) == len(set(seen)) == files.n_patches.sum() // 3
    seen.clear()
    again, _ = embed_cohort(table, three, tmp_path, bag=6, cache=cache, progress=False)
    assert again.reused.all() and not seen


def test_pixels_that_are_not_square(tmp_path):
    "um/px of x and y stay two numbers, from file to file"
    phantom_slide(tmp_path / "slide.tif", 2, 3, WORLD)
    table = pd.DataFrame([dict(slide_id="a", patient_id="p", uri="slide.tif", sha256="")])
    with WholeSlide(tmp_path / "slide.tif") as s:
        x, y = s.mpp
    with WholeSlide(tmp_path / "slide.tif", mpp=(x, 0.75 * y)) as s:
        grid = tile_slide(s)
        f = read_features(embed_slide(s, grid.coords, get_embedder("random"), tmp_path / "a.h5"))
    a = f.attrs
    assert (a["mpp"], a["mpp_y"]) == (x, 0.75 * y) and {"mpp_read", "mpp_read_y", "target_mpp"} <= set(a)
    assert a["patch_size_level0"] == round(112 / x) and a["patch_size_level0_y"] == round(112 / y / 0.75)
    assert np.array_equal(f.coords, grid.coords) and table.shape == (1, 4)


def test_flat5_has_as_many_features_as_the_patch_gives(tmp_path):
    "1,024 for 96 px, in files as in memory"
    phantom_slide(tmp_path / "slide.tif", 2, 3, WORLD)
    e = get_embedder("random", "flat5", precision="float32")
    at = np.array([(0, 0), (100, 100), (200, 200)])
    for side, dim in ((96, 1024), (224, 9216)):
        with WholeSlide(tmp_path / "slide.tif") as s:
            f = read_features(embed_slide(s, at, e, tmp_path / f"{side}.h5", TileSpec(patch=side)))
            patches = s.fields(at, side, 0.5)
        assert f.features.shape == (3, dim)
        with torch.inference_mode():
            last = e.module[0](e.normalise(patches))
        assert last.shape[1] == 256
        np.testing.assert_allclose(f.features, last.contiguous().flatten(1).numpy(), atol=1e-4)
        pooled = get_embedder("random", precision="float32")(patches)
        np.testing.assert_allclose(f.features.reshape(3, 256, -1).mean(2), pooled, atol=1e-4)


# Bags that others made

GOOD = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
AT = np.stack(np.divmod(np.arange(12), 4), 1) * 1024


def _h5(path, datasets, **attrs):
    with h5py.File(path, "w") as f:
        for name, a in datasets.items():
            f[name] = a
        f.attrs.update(attrs)
    return path


def _stamp(path, **attrs):
    "As STAMP writes: feats, coords in um"
    return _h5(
        path,
        dict(feats=GOOD.astype(np.float16), coords=AT * 0.25),
        stamp_version="2.1.0",
        extractor="chief",
        unit="um",
        tile_size_um=256.0,
        tile_size_px=224,
        **attrs,
    )


def _saved(path, what):
    torch.save(what, path)
    return path


@pytest.mark.parametrize(
    "make, coords",
    [
        (lambda p: _h5(p / "trident.h5", dict(features=GOOD, coords=AT)), True),
        (lambda p: _h5(p / "clam.hdf5", dict(features=GOOD[None], coords=AT[None])), True),
        (lambda p: _h5(p / "float_coords.h5", dict(features=GOOD.astype(float), coords=AT.astype(float))), True),
        (lambda p: _h5(p / "no_coords.h5", dict(features=GOOD)), False),
        (lambda p: _saved(p / "tensor.pt", torch.from_numpy(GOOD)), False),
        (lambda p: _saved(p / "grad.pth", torch.from_numpy(GOOD)[None, None].requires_grad_()), False),
        (
            lambda p: _saved(
                p / "dict.pt", dict(feats=torch.from_numpy(GOOD).double(), coords=torch.from_numpy(AT), encoder="x")
            ),
            True,
        ),
        (lambda p: np.save(p / "array.npy", GOOD[None]) or p / "array.npy", False),
    ],
    ids=lambda m: None,
)
def test_bags_of_other_tools(tmp_path, make, coords):
    bag = read_bag(make(tmp_path))
    assert bag.features.dtype == np.float32 and np.allclose(bag.features, GOOD)
    if coords:
        assert bag.coords.dtype == np.int64 and np.array_equal(bag.coords, AT) and "no_map" not in bag.attrs
    else:
        assert bag.coords is None and "no map can be drawn" in bag.attrs["no_map"]


def test_half_precision_is_read(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        bag = read_bag(_saved(tmp_path / "half.pt", torch.from_numpy(GOOD).to(dtype)))
        assert bag.features.dtype == np.float32 and np.allclose(bag.features, GOOD, atol=0.02)


def test_stamp_counts_in_um(tmp_path):
    path = _stamp(tmp_path / "stamp.h5")
    with pytest.raises(Her2Error, match="stamp.h5.*um"):
        read_bag(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for bag in (read_bag(path, mpp=0.25), read_features(path, mpp=(0.25, 0.25))):
            assert np.array_equal(bag.coords, AT) and bag.attrs["unit"] == "px" and bag.attrs["extractor"] == "chief"


class _Code:
    def __reduce__(self):
        return os.getcwd, ()


BAD = {
    "nan.npy": np.where(np.arange(8) == 3, np.nan, GOOD),
    "infinite.npy": np.full((3, 8), np.inf),
    "too_large.npy": np.full((3, 8), 1e300),
    "empty.npy": GOOD[:0],
    "no_features.npy": GOOD[:, :0],
    "slide.npy": GOOD[0],
    "number.npy": GOOD[0, 0],
    "stack.npy": GOOD.reshape(2, 6, 8),
    "whole.npy": AT,
    "words.npy": np.array([["a", "b"]]),
    "code.npy": np.array([_Code()]),
    "complex.npy": GOOD.astype(complex),
    "nan.pt": torch.full((3, 8), torch.nan),
    "code.pt": _Code(),
    "list.pt": [torch.ones(3, 8)],
    "names.pt": dict(embedding=torch.ones(3, 8)),
    "numpy.pt": dict(features=[1.0, 2.0]),
    "mismatch.pt": dict(features=torch.ones(3, 8), coords=torch.ones(2, 2)),
    "mismatch.h5": dict(features=GOOD, coords=AT[1:]),
    "fractions.h5": dict(features=GOOD, coords=AT + 0.4),
    "nan_coords.h5": dict(features=GOOD, coords=AT * np.nan),
    "three.h5": dict(features=GOOD, coords=np.ones((12, 3))),
    "flat_coords.h5": dict(features=GOOD, coords=np.arange(12)),
    "names.h5": dict(embeddings=GOOD),
    "group.h5": {"features/a": GOOD},
    "empty.h5": dict(features=GOOD[:0], coords=AT[:0]),
    "vector.h5": dict(features=GOOD[0], coords=AT[:1]),
    "word_coords.h5": dict(features=GOOD, coords=[b"a"] * 12),
    "nothing.h5": {},
    "table.csv": b"1,2",
    "damaged.h5": b"\x89HDF\r\n\x1a\n" + bytes(900),
    "damaged.pt": b"PK\x03\x04" + bytes(90),
    "damaged.npy": b"\x93NUMPY",
    "none.h5": b"",
    "none.pt": b"",
    "none.npy": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bag_is_one_sentence(tmp_path, name):
    what, path = BAD[name], tmp_path / name
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif name.endswith(".npy"):
        np.save(path, what, allow_pickle=True)
    elif name.endswith(".pt"):
        torch.save(what, path)
    else:
        _h5(path, what)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Her2Error, match=name.replace(".", r"\.")) as refused:
            read_bag(path)
    assert "\n" not in str(refused.value)


def test_a_missing_bag_and_a_folder(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("gone.h5", "gone.pt", "gone.npy", "folder.pt"):
        with pytest.raises(EmbedderError, match=f"{name}: no such feature file"):
            read_bag(tmp_path / name)


@pytest.mark.parametrize(
    "number, remedy",
    [
        (37, "HDF5_USE_FILE_LOCKING=FALSE"),
        (38, "HDF5_USE_FILE_LOCKING=FALSE"),
        (95, "HDF5_USE_FILE_LOCKING=FALSE"),
        (11, "another program"),
    ],
)
def test_file_systems_without_locks(cohort, tmp_path, monkeypatch, number, remedy):
    "What h5py says there, wherever we open a file: reading, and each slide of a cohort"
    path = _h5(tmp_path / "a.h5", dict(features=GOOD, coords=AT))

    def no_lock(*args, **kwargs):
        raise OSError(
            number,
            f"Unable to synchronously open file (unable to lock file, errno = {number}, "
            f"error message = '{os.strerror(number)}')",
        )

    table, cache = cohort
    monkeypatch.setattr(h5py, "File", no_lock)
    for read in (read_bag, read_features):
        with pytest.raises(EmbedderError, match=remedy):
            read(path)
    files, failures = embed_cohort(
        table[:1], get_embedder("random"), tmp_path / "f", bag=2, cache=cache, progress=False
    )
    remedies = f"{remedy}|HDF5_USE_FILE_LOCKING=FALSE"
    assert not len(files) and failures.error.str.contains(remedies).all() and not list((tmp_path / "f").rglob("*.part"))


def test_published_bags(real):
    "1,038 real slides"
    paths = sorted((real / "tcga_brca/hipt_vit256mean").glob("*.pt"))
    sizes = [read_bag(p).features.shape for p in paths]
    assert len(paths) == 1038 and {d for _, d in sizes} == {192} and (min(sizes)[0], max(sizes)[0]) == (1, 122)


# The paper's ImageNet embedder


def test_imagenet_from_its_convolutions(real):
    "By folder of folders, by folder, and by path; the numbers of the convolutions themselves; no fully connected layer"
    folder = real / "weights/alexnet-imagenet"
    a, b, c = (
        get_embedder(name, weights=weights, precision="float32")
        for name, weights in (("imagenet", folder.parent), ("imagenet", folder), (folder, None))
    )
    assert a.sha256 == b.sha256 == c.sha256 and (a.name, a.layer, a.dim) == ("imagenet", "conv5", 256)
    net = torchvision.models.alexnet().features
    net.load_state_dict({k.removeprefix("features."): v for k, v in load_weights(folder)[0].items()})
    patches = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    with torch.inference_mode():
        x = net(a.normalise(patches).contiguous())
    flat = get_embedder("imagenet", "flat5", weights=folder, precision="float32")
    np.testing.assert_allclose(a(patches), x.mean((2, 3)).numpy(), atol=1e-4)
    np.testing.assert_allclose(flat(patches), x.flatten(1).numpy(), atol=1e-4)
    assert [get_embedder("imagenet", f"conv{k}", weights=folder).dim for k in range(1, 6)] == [64, 192, 384, 256, 256]
    for layer in ("fc6", "fc7"):
        with pytest.raises(EmbedderError, match=f"no weights for classifier.1.bias, which layer '{layer}' needs"):
            get_embedder("imagenet", layer, weights=folder)
