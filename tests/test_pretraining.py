"Pre-training as a user meets it: files as they are downloaded, a run that is killed, sources that must be alike."

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from her2_mil import pretraining, sources
from her2_mil.embedding import EmbedderError, get_embedder, load_weights, weights_folder
from her2_mil.phantom import WORLDS
from her2_mil.pretraining import make_embedder, pretrain
from her2_mil.sources import PatchSet, SourceError, add_source, match_sources, pcam_patches, phantom_pair

PCAM = torchvision.datasets.PCAM


def patches(n, seed=0, size=64, groups=8, mpp=0.97):
    "Random pixels, brighter where the label is 1."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = (rng.integers(0, 128, (n, size, size, 3)) + 100 * y[:, None, None, None]).astype(np.uint8)
    return PatchSet(
        images,
        y,
        ("dark", "light"),
        np.array([f"{seed}-{k % groups}" for k in range(n)]),
        mpp,
        "noise",
        "none: computed",
    )


@pytest.fixture
def packed_pcam(tmp_path, monkeypatch):
    "PatchCamelyon's six files as its host gives them: .h5.gz whose MD5 torchvision knows; returns the pixels by part."
    folder, files, truth = tmp_path / "pcam", {}, {}
    folder.mkdir()
    for k, (split, n) in enumerate(dict(train=24, val=12, test=8).items()):
        rng = np.random.default_rng(k)
        truth[split] = rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 2
        files[split] = {}
        for part, key, value in (
            ("images", "x", truth[split][0]),
            ("targets", "y", truth[split][1].reshape(n, 1, 1, 1)),
        ):
            name, google, _ = PCAM._FILES[split][part]
            with h5py.File(folder / name, "w") as f:
                f[key] = value
            raw = gzip.compress((folder / name).read_bytes(), 1)
            (folder / name).unlink()
            (folder / f"{name}.gz").write_bytes(raw)
            files[split][part] = name, google, hashlib.md5(raw).hexdigest()
    monkeypatch.setattr(PCAM, "_FILES", files)
    return tmp_path, truth


def test_pcam_from_packed_files(packed_pcam):
    root, truth = packed_pcam
    for split, (x, y) in truth.items():
        got = pcam_patches(root, split)
        assert (got.images[np.arange(len(got))] == x).all() and (got.y == y).all() and got.mpp == 0.97
        theirs = PCAM(root, split)
        assert (np.array(theirs[3][0]) == got.images[3]).all() and theirs[3][1] == got.y[3]
    assert not list((root / "pcam").glob("*.part"))
    card = make_embedder("pcam", root / "weights", root=root, epochs=1, batch=8).card
    assert (card["source"], card["licence"], card["mpp"], card["valid"]["n"]) == (
        "PatchCamelyon train",
        "CC0 1.0",
        0.97,
        12,
    )


def test_pcam_meta_file_names_the_slides(packed_pcam):
    root, _ = packed_pcam
    pcam_patches(root, "val")
    meta = root / "pcam" / PCAM._FILES["val"]["images"][0].replace("_x.h5", "_meta.csv")
    meta.write_text("\n".join(["wsi", *(f"camelyon16_train_normal_{k // 6:03d}" for k in range(12))]))
    assert sorted(set(pcam_patches(root, "val").groups)) == [
        "camelyon16_train_normal_000",
        "camelyon16_train_normal_001",
    ]
    meta.write_text("wsi\none_only\n")
    with pytest.raises(SourceError, match=r"names the slides \(column wsi\) of 1 patches"):
        pcam_patches(root, "val")


def test_pcam_refused_by_its_host(tmp_path, monkeypatch):
    def quota(*args, **kwargs):
        raise RuntimeError("The daily quota of the file camelyonpatch is exceeded and it can't be downloaded.")

    monkeypatch.setattr(PCAM, "_download", quota)
    with pytest.raises(SourceError, match="the download from Google Drive failed .The daily quota.*licence CC0 1.0"):
        pcam_patches(tmp_path, "test", download=True)


def test_pcam_damaged_in_transit(packed_pcam):
    root, _ = packed_pcam
    packed = root / "pcam" / (PCAM._FILES["train"]["images"][0] + ".gz")
    raw = bytearray(packed.read_bytes())
    raw[len(raw) // 2] ^= 1
    packed.write_bytes(raw)
    with pytest.raises(SourceError, match=f"{packed.name} has MD5 .*, expected .*fetch it again"):
        pcam_patches(root, "train")
    assert not packed.with_suffix("").exists()


RUN = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from test_pretraining import patches, pretrain
pretrain(patches(256), patches(32, 1), sys.argv[1], 'noise', epochs=int(sys.argv[3]), batch=8)
"""


def start(folder, epochs):
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(Path(__file__).parent), str(epochs)],
        env=env,
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_and_taken_up(tmp_path):
    "SIGKILL after a checkpoint: no weights folder that could be mistaken for whole; the same weights in the end."
    epochs = 6
    whole = start(tmp_path / "whole", epochs)
    assert whole.wait(300) == 0, whole.stderr.read().decode()
    run = start(tmp_path / "killed", epochs)
    out = weights_folder("noise", tmp_path / "killed", 0)
    limit = time.monotonic() + 300
    while not (out / "checkpoint.pt").exists() and run.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (out / "card.json").exists()
    with pytest.raises(EmbedderError):
        get_embedder(out)
    again = start(tmp_path / "killed", epochs)
    assert again.wait(300) == 0, again.stderr.read().decode()
    (a, card), (b, other) = (load_weights(weights_folder("noise", tmp_path / k, 0)) for k in ("whole", "killed"))
    assert all((a[k] == b[k]).all() for k in a) and card["learning_curve"] == other["learning_curve"]
    assert [e["epoch"] for e in other["learning_curve"]] == list(range(1, epochs + 1))
    assert sorted(p.name for p in out.iterdir()) == ["card.json", "model.safetensors"]


def test_matched_design_of_every_world():
    "Same number of unique patches, classes, bits a label, px; nothing shared between training and held out."
    for name, world in WORLDS.items():
        facts = set()
        for domain in ("he", "ihc", "natural"):
            train, valid = phantom_pair(domain, n=96, n_valid=48, seed=3, world=world)
            pixels = [im.tobytes() for s in (train, valid) for im in s.images]
            assert len(set(pixels)) == 144, f"{name}, {domain}: a patch occurs twice"
            assert not set(train.groups) & set(valid.groups)
            facts.add((len(train), len(valid), len(train.classes), train.entropy, valid.entropy, train.images.shape))
        assert len(facts) == 1, f"{name}: {facts}"


def test_one_start_for_all_sources(tmp_path):
    pairs = {k: (patches(64, s), patches(16, s + 10)) for k, s in (("a", 0), ("b", 1))}
    folders = [
        pretrain(*pair, tmp_path, name, seed, epochs=1, batch=16) for seed in (0, 1) for name, pair in pairs.items()
    ]
    cards = [load_weights(f)[1] for f in folders]
    start = pd.Series([c["parent"]["sha256"] for c in cards]).groupby([c["seed"] for c in cards]).unique()
    assert [len(s) for s in start] == [1, 1] and start[0][0] != start[1][0]
    assert len({c["steps"] for c in cards}) == 1
    assert len({(f / "model.safetensors").read_bytes() for f in folders}) == 4


def test_a_copy_is_no_new_patch():
    one = patches(16)
    copied = PatchSet(np.concatenate([one.images[:8]] * 2), one.y, one.classes, one.groups, source="copied")
    with pytest.raises(SourceError, match="copied: 8 of its 16 patches are different"):
        match_sources(dict(one=one, copied=copied))


def test_um_per_px_in_the_card(tmp_path):
    pair = patches(32), patches(16, 1)
    plain, near = (load_weights(pretrain(*pair, tmp_path, f"m{m}", epochs=1, match_mpp=m))[1] for m in (False, True))
    assert (plain["mpp"], plain["target_mpp"], plain["patch_px"]) == (0.97, 0.5, 64)
    assert (near["mpp"], near["target_mpp"], near["patch_px"]) == (0.5, 0.5, 124)
    assert near["changes"] == ["resampled from 0.97 to 0.5 um/px"]
    assert plain["identity"] != near["identity"]


def test_worlds_table(root):
    "Committed results: every world and source, at least two cohorts and three seeds, every AUC within its range."
    t = pd.read_csv(root / "nbs/data/worlds.csv")
    trained = t[t.source != "oracle"]
    assert set(t.run) == {"worlds"} and t.cohort.nunique() >= 2
    assert (trained.groupby(["source", "world"]).pretrain_seed.nunique() >= 3).all()
    assert set(trained.source) == {"he", "ihc", "natural", "random", "shuffled-he", "fast-he"}
    assert set(trained[trained.source == "he"].world) == set(WORLDS)
    assert trained[["auc_slide", "auc_bearing"]].stack().between(0, 1).all()
    assert not trained.duplicated(["source", "world", "pretrain_seed", "cohort"]).any()
    assert not 9001 in set(t.cohort), "the rate was chosen on that cohort"


@pytest.fixture
def fits(monkeypatch):
    "Counts the trainings that really run."
    seen, fit = [], pretraining._fit
    monkeypatch.setattr(pretraining, "_fit", lambda *a: seen.append(1) or fit(*a))
    return seen


def test_weights_follow_what_makes_them(tmp_path, fits, monkeypatch):
    "Reused for the same pixels, seeds, recipe and code; made anew where any of them differs, if only one pixel late in the set."
    train, valid, settings = patches(600, size=64), patches(16, 1), dict(epochs=1, batch=300, folder=tmp_path)
    pretrain(train, valid, **settings)
    pretrain(train, valid, **settings)
    assert len(fits) == 1
    images = train.images.copy()
    images[501, 3, 3, 1] ^= 1
    changes = [dict(train=replace(train, images=images)), dict(lr=2e-3), dict(start_seed=1), dict(order_seed=1)]
    for k, change in enumerate(changes, 2):
        pretrain(**dict(train=train, valid=valid, **settings) | change)
        assert len(fits) == k, f"{list(change)}: old weights were taken"
    monkeypatch.setattr(pretraining, "code_sha256", lambda *f: "another")
    pretrain(train, valid, **settings, order_seed=1)
    assert len(fits) == len(changes) + 2


def test_named_phantom_source_follows_the_renderer(tmp_path, fits, monkeypatch):
    "Another renderer: patches are made again, and their pixels decide."
    few = dict(source=dict(n=48, n_valid=24), epochs=1, weights=tmp_path)
    made = make_embedder("phantom-natural", **few).sha256
    monkeypatch.setattr(pretraining, "RENDERER", 99)
    assert make_embedder("phantom-natural", **few).sha256 == made and len(fits) == 1
    monkeypatch.setattr(sources, "phantom_source", lambda *a, **k: 1 / 0)
    assert make_embedder("phantom-natural", **few).sha256 == made, "the card took note of the new request"
    monkeypatch.undo()
    assert make_embedder("phantom-natural", **few, patch_seed=1).sha256 != made
    assert make_embedder("phantom-natural", **few, precision="float32").card["recipe"]["precision"] == "float32"


def test_named_real_source_follows_its_files(packed_pcam, fits):
    "A file that was only touched is read again; one that holds another pixel is learned from again."
    root, _ = packed_pcam
    ask = dict(weights=root / "weights", root=root, epochs=1, batch=8)
    first = make_embedder("pcam", **ask)
    file = root / "pcam" / PCAM._FILES["train"]["images"][0]
    os.utime(file, ns=(1, 1))
    assert make_embedder("pcam", **ask).sha256 == first.sha256 and len(fits) == 1
    with h5py.File(file, "r+") as f:
        f["x"][20, 0, 0, 0] ^= 1
    os.utime(file, ns=(2, 2))
    make_embedder("pcam", **ask)
    assert len(fits) == 2
    assert make_embedder("pcam", weights=root / "weights").card["valid"]["n"] == 12 and len(fits) == 2


def test_a_source_of_ones_own(tmp_path, fits):
    "Added by a function; kept for the same code, options and files, made anew for others."
    options = dict(weights=tmp_path / "weights", root=tmp_path / "mine", epochs=1)
    (tmp_path / "mine").mkdir()
    add_source("mine", lambda root, seed, n=32: (patches(n, seed), patches(8, seed + 50)))
    try:
        assert make_embedder("mine", **options).sha256 == make_embedder("mine", **options).sha256
        assert len(fits) == 1
        make_embedder("mine", **options, source=dict(n=48))
        assert len(fits) == 2
        (tmp_path / "mine" / "new.txt").write_text("other files, same patches")
        make_embedder("mine", **options, source=dict(n=48))
        assert len(fits) == 2
        add_source("mine", lambda root, seed, n=32: (patches(n, seed + 1), patches(8, seed + 51)))
        make_embedder("mine", **options, source=dict(n=48))
        assert len(fits) == 3
    finally:
        pretraining.SOURCES.pop("mine")


def test_no_foreign_or_damaged_checkpoint_is_taken_up(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(dict(identity="another run", notes=[1, 2]), checkpoint)
    assert pretraining._take_up(checkpoint, "this run") == []
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert pretraining._take_up(checkpoint, "this run") == []
