"""Cross-validation as one stack against the usual loop: model by model, fold by fold, bag by bag."""

import statistics
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from her2_mil.members import Bank, Feed, Member, TrainConfig, set_moments
from her2_mil.stack import _groups, _set_rate, _side_by_side, fit_stack
from her2_mil.training import SHARED, cross_validate, predict


def _study(n_slides=80, dim=256, arms=4, folds=5, seeds=5, patches=(100, 150)):
    "Features and members of a study: folds x arms x seeds models"
    rng, y = np.random.default_rng(0), np.arange(n_slides) % 4
    n = rng.integers(*patches, n_slides)  # every embedder sees the same patches
    features = {
        f"arm{a}": [rng.normal(0.3 * s, 1, (k, dim)).astype(np.float32) for s, k in zip(y, n)] for a in range(arms)
    }
    members = [
        Member(a, np.setdiff1d(np.arange(n_slides), np.arange(k, n_slides, folds)), y, (s, k))
        for a in features
        for s in range(seeds)
        for k in range(folds)
    ]
    return features, members


def _loop(member, bank, cfg):
    "Train one model bag by bag, with gradients summed over the bags of each batch"
    feed = Feed(member, bank, cfg)
    model = cfg.model(bank.x.shape[1]).reset(torch.Generator().manual_seed(feed.init))
    set_moments(model, bank, member.rows)
    opt, step = torch.optim.AdamW(_groups(model.named_parameters(), cfg, 2)), 0
    for _ in range(cfg.epochs):
        for index, order, drop in feed.epoch():
            y, weight = feed.targets(order)
            opt.zero_grad()
            for i in range(len(y)):
                bag = bank.x[torch.from_numpy(index[i])][None]
                mask = torch.from_numpy(index[i] >= 0)[None]
                logits, _ = model(bag, mask, torch.as_tensor(drop[i : i + 1], dtype=bag.dtype))
                loss = F.cross_entropy(logits, torch.tensor(y[i : i + 1]), label_smoothing=cfg.label_smoothing)
                (loss * weight[i] / weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            _set_rate(opt, cfg, step)
            opt.step()
            step += 1
    return model.eval()


def _loops(members, banks, cfg):
    "Train some models one after another"
    return [_loop(m, banks[m.arm], cfg) for m in members]


def _products(members, features, cfg, stack=8):
    "The two large matrix products of every step alone, in the same stacks on the same threads"
    dim, rows = next(iter(features.values()))[0].shape[1], len(members[0].rows) // cfg.batches * cfg.bag_size

    def alone(part):
        x, v, g = (torch.randn(len(part), *s) for s in [(rows, dim), (cfg.width, dim), (cfg.width, rows)])
        for _ in range(cfg.epochs * cfg.batches):
            torch.bmm(v, x.mT)
            torch.bmm(g, x)

    _side_by_side(alone, [(members[i : i + stack],) for i in range(0, len(members), stack)])


def _threads_for_loop(member, bank, cfg):
    "Threads with which the loop is faster on this machine: one or all; its tensors are often too small to share"
    counts, took = (1, torch.get_num_threads()), {}
    for count in counts:
        torch.set_num_threads(count)
        t = time.perf_counter()
        _loop(member, bank, replace(cfg, epochs=2))
        took[count] = time.perf_counter() - t
    torch.set_num_threads(counts[1])
    return min(took, key=took.get)


def _timed(threads, f, *args):
    "Seconds of a call on so many threads, and what it returns"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    t = time.perf_counter()
    out = f(*args)
    seconds = time.perf_counter() - t
    torch.set_num_threads(before)
    return seconds, out


def cv_stacked(n=3, loop_members=6):
    "Train 100 models as a stack and, in the same run, a sample of them in a loop; compare predictions"
    (features, members), cfg, cores = _study(), TrainConfig(), torch.get_num_threads()
    banks = {a: Bank(a, f, torch.float32) for a, f in features.items()}
    fit_stack(features, members[:8], replace(cfg, epochs=1))
    threads = _threads_for_loop(members[0], banks[members[0].arm], cfg)
    took, apart = {k: [] for k in ("ours", "loop", "products", "one thread")}, 0.0
    for k in range(n):
        seconds, stacked = _timed(cores, fit_stack, features, members, cfg)
        took["ours"].append(seconds)
        sample = range(k, len(members), len(members) // loop_members + 1)
        seconds, loop = _timed(threads, _loops, [members[i] for i in sample], banks, cfg)
        took["loop"].append(seconds * len(members) / len(sample))
        took["products"].append(_timed(cores, _products, members, features, cfg)[0])
        took["one thread"].append(_timed(1, fit_stack, features, members, cfg)[0])
        for i, model in zip(sample, loop):
            bags = features[members[i].arm]
            apart = max(apart, np.abs(predict(stacked[i], bags) - predict(model, bags)).max())
    ours, reference, products, single = (statistics.median(t) for t in took.values())
    note = (
        f"{len(members)} models; largest difference of a logit {apart:.1e}; ours on {cores} threads, "
        f"on one {single:.1f} s (ratio {reference / single:.1f}); "
        f"loop on {threads}, whichever is faster, timed on {len(sample)} models and scaled; "
        f"the two matrix products alone {products:.1f} s, ours is {ours / products:.1f} times that"
    )
    return [dict(name="cv_stacked", ours=ours, reference=reference, unit="s", ratio=reference / ours, n=n, note=note)]


def _cohort(n_slides=80):
    "A cohort of the size of the study's, one slide a patient"
    ids = [f"s{i}" for i in range(n_slides)]
    return pd.DataFrame(dict(slide_id=ids, patient_id=ids, y=np.arange(n_slides) % 4, cohort="main", site=""))


def _bags(counts, dim=256):
    "Features of each slide, which shift with its score"
    rng = np.random.default_rng(0)
    return [rng.normal(0.3 * (i % 4), 1, (k, dim)).astype(np.float32) for i, k in enumerate(counts)]


def _turns(n, ours, reference):
    "Median seconds of two calls, made in turn"
    took = [(_timed(torch.get_num_threads(), ours)[0], _timed(torch.get_num_threads(), reference)[0]) for _ in range(n)]
    return (statistics.median(t) for t in zip(*took))


def permutations_float32(n=3, permutations=8, seeds=1):
    "Permuted labels: members that share bags in one product, against the same members with draws of their own"
    cohort, features, cfg = _cohort(), {"a": _bags([110] * 80)}, TrainConfig(ordinal=True)
    train = lambda numbers: cross_validate(
        features, cohort, cfg, seeds=range(seeds), permutations=numbers, splits=("test",)
    )
    train([1])
    ours, reference = _turns(
        n, lambda: train(range(1, permutations + 1)), lambda: train(range(1, 1 + SHARED * permutations, SHARED))
    )
    bank, member = Bank("a", features["a"], torch.float32), Member("a", np.arange(64), cohort.y.to_numpy())
    plain = (
        _timed(1, _loop, member, bank, replace(cfg, epochs=3))[0]
        * cfg.epochs
        / 3
        * 5
        * seeds
        * permutations
        / torch.get_num_threads()
    )
    note = (
        f"{permutations} permutations x 5 folds x {seeds} seeds; ours on shared bags, "
        f"reference with draws of its own for each; "
        f"one model and one bag at a time {plain:.0f} s (ratio {plain / ours:.1f}), timed on one model and scaled; "
        f"200 permutations and 3 seeds: {ours * 200 / permutations * 3 / seeds:.0f} s"
    )
    return [
        dict(
            name="permutations_float32",
            ours=ours,
            reference=reference,
            unit="s",
            ratio=reference / ours,
            n=n,
            note=note,
        )
    ]


def cv_ragged(n=3):
    "Bags of 1 to 122 patches, median 26, as they are against the same bags padded to 100"
    counts = np.clip(np.random.default_rng(0).lognormal(np.log(26), 0.8, 80), 1, 122).astype(int)
    features, cfg, y = {"a": _bags(counts)}, TrainConfig(ordinal=True), np.arange(80) % 4
    members = [
        Member("a", np.setdiff1d(np.arange(80), np.arange(k, 80, 5)), y, (s, k)) for s in range(2) for k in range(5)
    ]
    padded = {"a": _bags([100] * 80)}
    fit_stack(features, members[:2], cfg)
    ours, reference = _turns(n, lambda: fit_stack(features, members, cfg), lambda: fit_stack(padded, members, cfg))
    note = (
        f"{len(members)} models; bags of {counts.min()} to {counts.max()} patches, median {np.median(counts):.0f}; "
        "the reference computes as many patches as padding to 100 gives"
    )
    return [dict(name="cv_ragged", ours=ours, reference=reference, unit="s", ratio=reference / ours, n=n, note=note)]


if __name__ == "__main__":
    for row in cv_stacked():
        print(row)
