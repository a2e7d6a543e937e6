"""Cross-validation as one stack against the usual loop: model by model, fold by fold, bag by bag."""
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from her2_mil.training import Member, TrainConfig, _Bank, _Feed, _groups, _set_rate, _standardise, fit_stack, predict


def _study(n_slides=80, dim=256, arms=4, folds=5, seeds=5, patches=(100, 150)):
    "Features and members of a study: folds x arms x seeds models"
    rng, y = np.random.default_rng(0), np.arange(n_slides) % 4
    features = {f'arm{a}': [rng.normal(.3*s, 1, (rng.integers(*patches), dim)).astype(np.float32) for s in y] for a in range(arms)}
    members = [Member(a, np.setdiff1d(np.arange(n_slides), np.arange(k, n_slides, folds)), y, (s, k))
               for a in features for s in range(seeds) for k in range(folds)]
    return features, members


def _loop(member, bank, cfg):
    "Train one model bag by bag, with gradients summed over the bags of each batch"
    feed = _Feed(member, bank, cfg)
    model = cfg.model(bank.x.shape[1]).reset(torch.Generator().manual_seed(feed.init))
    _standardise(model, bank, member.rows)
    opt, step = torch.optim.AdamW(_groups(model.named_parameters(), cfg, 2)), 0
    for _ in range(cfg.epochs):
        for index, y, weight, drop in feed.epoch():
            opt.zero_grad()
            for i in range(len(y)):
                bag = bank.x[torch.from_numpy(index[i])][None]
                mask = torch.from_numpy(index[i] >= 0)[None]
                logits, _ = model(bag, mask, torch.as_tensor(drop[i:i+1], dtype=bag.dtype))
                loss = F.cross_entropy(logits, torch.tensor(y[i:i+1]), label_smoothing=cfg.label_smoothing)
                (loss*weight[i]/weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            _set_rate(opt, cfg, step)
            opt.step()
            step += 1
    return model.eval()


def _products(members, features, cfg):
    "Seconds that the two large matrix products of every step would cost alone"
    dim = next(iter(features.values()))[0].shape[1]
    rows = len(members[0].rows)//cfg.batches*cfg.bag_size
    x, v, g = torch.randn(8, rows, dim), torch.randn(8, dim, cfg.width), torch.randn(8, rows, cfg.width)
    once = []
    for _ in range(7):
        t = time.perf_counter()
        torch.bmm(x, v)
        torch.bmm(x.transpose(1, 2), g)
        once.append(time.perf_counter() - t)
    return statistics.median(once)/8*len(members)*cfg.epochs*cfg.batches


def cv_stacked(n=3, loop_members=6):
    "Train 100 models as a stack and, in the same run, a sample of them in a loop; compare predictions"
    features, members = _study()
    cfg = TrainConfig()
    ours, reference, apart = [], [], 0.
    banks = {a: _Bank(a, f, torch.float32) for a, f in features.items()}
    fit_stack(features, members[:8], TrainConfig(epochs=1))
    for k in range(n):
        t = time.perf_counter()
        stacked = fit_stack(features, members, cfg)
        ours.append(time.perf_counter() - t)
        sample = range(k, len(members), len(members)//loop_members)
        t = time.perf_counter()
        loop = [_loop(members[i], banks[members[i].arm], cfg) for i in sample]
        reference.append((time.perf_counter() - t)*len(members)/len(sample))
        for i, model in zip(sample, loop):
            bags = features[members[i].arm]
            apart = max(apart, np.abs(predict(stacked[i], bags) - predict(model, bags)).max())
    ours, reference, products = statistics.median(ours), statistics.median(reference), _products(members, features, cfg)
    note = (f'{len(members)} models, largest difference of a logit {apart:.1e}; the two matrix products alone {products:.1f} s '
            f'({products/ours:.0%} of ours); loop timed on {loop_members + 1} models and scaled')
    return [dict(name='cv_stacked', ours=ours, reference=reference, unit='s', ratio=reference/ours, n=n, note=note)]


if __name__ == '__main__':
    for row in cv_stacked(): print(row)
