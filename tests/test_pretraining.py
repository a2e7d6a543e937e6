"Pre-training as a user meets it: files as they are downloaded, a run that is killed, sources that must be alike."
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torchvision

from her2_mil.embedding import get_embedder, load_weights, weights_folder
from her2_mil.phantom import WORLDS
from her2_mil.pretraining import (PatchSet, SourceError, make_embedder, match_sources, pcam_patches, phantom_pair,
                                  pretrain, pretrain_matched)

PCAM = torchvision.datasets.PCAM


def patches(n, seed=0, size=64, groups=8, mpp=0.97):
    "Random pixels, brighter where the label is 1."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = (rng.integers(0, 128, (n, size, size, 3)) + 100 * y[:, None, None, None]).astype(np.uint8)
    return PatchSet(images, y, ("dark", "light"), np.array([f"{seed}-{k % groups}" for k in range(n)]), mpp, "noise", "none: computed")


@pytest.fixture
def packed_pcam(tmp_path, monkeypatch):
    "PatchCamelyon's six files as its host gives them: .h5.gz whose MD5 torchvision knows; returns the pixels by part."
    folder, files, truth = tmp_path / "pcam", {}, {}
    folder.mkdir()
    for k, (split, n) in enumerate(dict(train=24, val=12, test=8).items()):
        rng = np.random.default_rng(k)
        truth[split] = rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 2
        files[split] = {}
        for part, key, value in (("images", "x", truth[split][0]), ("targets", "y", truth[split][1].reshape(n, 1, 1, 1))):
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
    assert make_embedder("pcam", root / "weights", root=root, epochs=1, batch=8).card["valid"]["n"] == 12


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
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(Path(__file__).parent), str(epochs)], env=env,
                            cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
    with pytest.raises(RuntimeError):
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
    table = pretrain_matched(pairs, tmp_path, seeds=(0, 1), epochs=1, batch=16)
    cards = [load_weights(f)[1] for f in table.folder]
    start = pd.Series([c["parent"]["sha256"] for c in cards]).groupby(table.seed).unique()
    assert [len(s) for s in start] == [1, 1] and start[0][0] != start[1][0]
    assert table.steps.nunique() == 1
    assert len({(f / "model.safetensors").read_bytes() for f in table.folder}) == 4


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
