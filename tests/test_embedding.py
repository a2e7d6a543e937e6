"Embedders and feature files beyond what a notebook can hold: kills, other tools, clusters, every kind of backbone."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from her2_mil.embedding import EmbedderError, embed_cohort, embed_slide, feature_cosines, get_embedder, read_features, save_weights
from her2_mil.phantom import PhantomWorld, phantom_cohort, phantom_slide
from her2_mil.slide import WholeSlide
from her2_mil.tiling import tile_slide

WORLD = PhantomWorld(size=(420.0, 360.0))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    return phantom_cohort(n_per_score=1, seed=3, world=WORLD), tmp_path_factory.mktemp("phantoms")


def _same(a, b):
    return all(np.array_equal(read_features(p).features, read_features(q).features) for p, q in zip(a.path, b.path, strict=True))


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


def test_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    with pytest.raises(EmbedderError, match="timm could not load"):
        get_embedder("timm:no_such_model")
    assert timm.__version__


def test_killed_in_the_middle(tmp_path):
    "SIGKILL while writing: no file under the final name; the next run makes it whole."
    phantom_slide(tmp_path / "slide.tif", 2, 3, PhantomWorld(size=(700.0, 600.0)))
    program = """if True:
        import sys, time, numpy as np
        from her2_mil.embedding import Embedder, embed_slide, get_embedder
        from her2_mil.slide import WholeSlide
        from her2_mil.tiling import tile_slide
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
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed: pip install dask distributed")
    import joblib
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        three, failures = embed_cohort(table, e, tmp_path / "three", bag=6, cache=cache, n_jobs=2)
    assert not len(failures) and _same(one, three)


def test_torchmil_reads_our_files(cohort, tmp_path):
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed: pip install torchmil (test environment only)")
    table, cache = cohort
    files, _ = embed_cohort(table, get_embedder("random"), tmp_path / "f", bag=6, cache=cache)
    pd.DataFrame(dict(slide_id=table.slide_id, y=range(len(table)))).to_csv(tmp_path / "y.csv", index=False)
    features = Path(files.path[0]).parent
    data = datasets.TridentWSIDataset(base_path=f"{features.parent}/", labels_path=str(tmp_path / "y.csv"), feature_extractor=features.name.removeprefix("features_"),
                                      patch_size=int(read_features(files.path[0]).attrs["patch_size_level0"]), bag_keys=["X", "Y", "coords", "adj"],
                                      load_at_init=False, wsi_name_col="slide_id", wsi_label_col="y")
    assert len(data) == len(table)
    for i, name in enumerate(sorted(table.slide_id)):
        ours = read_features(files.set_index("slide_id").path[name])
        assert np.array_equal(data[i]["X"].numpy(), ours.features) and len(data[i]["coords"]) == len(ours.coords)


def test_compiled_features_are_the_same_to_rounding():
    patches = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), dtype=np.uint8)
    plain, compiled = get_embedder("random"), get_embedder("random", compile=True)
    try:
        got = compiled(patches, batch=8)
    except EmbedderError as e:
        pytest.skip(f"torch.compile does not work here: {e}")
    assert feature_cosines(got, plain(patches)).min() > 0.999 and plain.sha256 != compiled.sha256
