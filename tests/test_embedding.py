"Embedders and feature files beyond what a notebook can hold: kills, other tools, clusters, every kind of backbone."
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision

from her2_mil import embedding
from her2_mil.embedding import EmbedderError, embed_cohort, embed_slide, feature_cosines, get_embedder, read_features, save_weights
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


@pytest.mark.parametrize("name, dim", [("resnet18", 512), ("vgg11", 4096), ("mobilenet_v3_small", 1024), ("densenet121", 1024),
                                       ("convnext_tiny", 768), ("swin_t", 768), ("vit_b_32", 768), ("efficientnet_b0", 1280), ("squeezenet1_1", 512)])
def test_torchvision_backbone(name, dim, tmp_path):
    "Saved, loaded and run: the same features as the network with its head cut off."
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    folder = save_weights(tmp_path / name, net, dict(name=name, architecture=name, source="a random draw", licence="CC0-1.0"))
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
    e, elsewhere = (get_embedder(f"timm:local-dir:{tmp_path / where}", precision="float32") for where in ("here", "there"))
    assert e.dim == dim and e.sha256 == elsewhere.sha256 and str(tmp_path) not in str(e.card)
    assert (e.preprocessing["mean"], e.preprocessing["std"], e.card["licence"]) == (list(mean), list(std), "cc-by-nc-nd-4.0")
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        x = (torch.from_numpy(patches).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
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
    alive, most, lock, read = [0], [0], threading.Lock(), embedding.read_patches

    def add(n):
        with lock:
            alive[0] += n
            most[0] = max(most[0], alive[0])

    def counted(*args):
        patches = read(*args)
        add(len(patches))
        weakref.finalize(patches, add, -len(patches))
        return patches

    monkeypatch.setattr(embedding, "read_patches", counted)
    phantom_slide(tmp_path / "slide.tif", 2, 3, WORLD)
    spec, workers = TileSpec(patch=64), 2
    with WholeSlide(tmp_path / "slide.tif") as s:
        coords = tile_slide(s, spec).coords
        for n in (200, 1600):
            most[0] = 0
            embed_slide(s, np.resize(coords, (n, 2)), get_embedder("random"), tmp_path / "f.h5", spec, batch=4, threads=workers)
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
    every, some = (embed_cohort(table, get_embedder("random"), tmp_path / "f", bag=bag, cache=cache)[0] for bag in (None, 3))
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
        from her2_mil.embedding import Embedder, embed_slide, get_embedder
        from her2_mil.slide import WholeSlide
        from her2_mil.tiling import TileSpec, tile_slide
        e = get_embedder('random')
        class Slow(Embedder):
            def __call__(self, patches, batch=64):
                print('batch', flush=True); time.sleep(60)
        slow = Slow(e.module, e.card, e.layer)
        with WholeSlide(sys.argv[1]) as s: embed_slide(s, tile_slide(s).coords, slow, sys.argv[2])"""
    out = tmp_path / "features" / "slide.h5"
    run = subprocess.Popen([sys.executable, "-c", program, tmp_path / "slide.tif", out], stdout=subprocess.PIPE, text=True)
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
    program = "import sys, pandas as pd\nfrom her2_mil.embedding import *\nembed_cohort(pd.read_pickle(sys.argv[1]), get_embedder('random'), sys.argv[2], bag=6, cache=sys.argv[3])"
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
    assert not list(out.rglob(".*.tmp"))
    files, failures = embed_cohort(table, get_embedder("random"), out, bag=6, cache=cache)
    assert not len(failures) and files.reused.sum() == len(done)


def test_same_files_on_every_backend(cohort, tmp_path):
    table, cache = cohort
    e = get_embedder("random")
    one, _ = embed_cohort(table, e, tmp_path / "one", bag=6, cache=cache)
    two, _ = embed_cohort(table, e, tmp_path / "two", bag=6, cache=cache, n_jobs=2)
    assert _same(one, two)
    import distributed
    import joblib
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        three, failures = embed_cohort(table, e, tmp_path / "three", bag=6, cache=cache, n_jobs=2)
    assert not len(failures) and _same(one, three)


def test_torchmil_reads_our_files(cohort, tmp_path):
    "Folder names, file names, datasets: torchmil's reader for TRIDENT's folders finds features, grid, neighbours and labels."
    from torchmil.datasets import TridentWSIDataset
    table, cache = cohort
    files, _ = embed_cohort(table, get_embedder("random"), tmp_path / "f", cache=cache)
    labels = table[["slide_id"]].assign(y=range(len(table)))
    labels.to_csv(tmp_path / "y.csv", index=False)
    features, attrs = Path(files.path[0]).parent, read_features(files.path[0]).attrs
    assert features.parent.name == f"{attrs['target_magnification']}x_{attrs['patch_size']}px_{attrs['overlap']}px_overlap"
    sizes = pd.Series({f.slide_id: read_features(f.path).attrs["patch_size_level0"] for f in files.itertuples()})
    seen, neighbours = [], 0
    for size, names in sizes.groupby(sizes).groups.items():  # torchmil takes one patch size for all slides of a dataset
        data = TridentWSIDataset(base_path=f"{features.parent}/", labels_path=str(tmp_path / "y.csv"), feature_extractor=features.name.removeprefix("features_"), wsi_names=list(names),
                                 patch_size=int(size), bag_keys=["X", "Y", "coords", "adj"], load_at_init=False, wsi_name_col="slide_id", wsi_label_col="y")
        for i, name in enumerate(data.bag_names):
            ours, bag = read_features(files.set_index("slide_id").path[name]), data[i]
            assert np.array_equal(bag["X"].numpy(), ours.features) and int(bag["Y"]) == labels.set_index("slide_id").y[name]
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
