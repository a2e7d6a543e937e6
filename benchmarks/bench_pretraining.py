"""Pre-training on a machine without bfloat16: an epoch of ours against the plain way and against the arithmetic of the convolutions.

`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` makes a newer processor compute as most readers' do."""

import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from her2_mil import pretraining
from her2_mil.embedding import get_embedder
from her2_mil.pretraining import Recipe
from her2_mil.sources import PatchSet
from her2_mil.stain import augment


def _patches(n, size=96):
    "Random pixels, two classes."
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return PatchSet(images, np.arange(n) % 2, ("a", "b"), np.arange(n).astype(str))


def _plain(patches, normalise, batch=64):
    "The plain way: torchvision's whole AlexNet in the order NCHW, with its 57 million weights under Adam."
    net = torchvision.models.alexnet(num_classes=2)
    opt = torch.optim.Adam(net.parameters(), 1e-4)

    def epoch():
        for i in torch.randperm(len(patches)).split(batch):
            x = torch.from_numpy(patches.images[i.numpy()]).permute(0, 3, 1, 2).float().contiguous() / 255
            loss = F.cross_entropy(net(normalise(augment(x))), torch.from_numpy(patches.y[i.numpy()]))
            opt.zero_grad()
            loss.backward()
            opt.step()

    return epoch


def _ours(patches, start, recipe):
    "An epoch as `pretrain` runs it."
    net = pretraining._network(start, 2, recipe)
    opt, rate = pretraining._optimiser(net, recipe, 10_000)
    return net, lambda: pretraining._epoch(
        net, pretraining._batches(patches, start.normalise, recipe, 0), opt, rate, recipe
    )


def pretrain_float32(n=256, repeats=3):
    "Patches a second of pre-training in float32; the limit is the forward and backward pass of the convolutions alone."
    patches, start, recipe = (
        _patches(n),
        get_embedder("random", precision="float32"),
        Recipe(lr=1e-4, precision="float32", start_seed=0, order_seed=0),
    )
    net, ours = _ours(patches, start, recipe)
    x, y = next(pretraining._batches(patches, start.normalise, recipe, 0))

    def limit():
        for _ in range(n // len(x)):
            F.cross_entropy(net(x), y).backward()
            net.zero_grad()

    runs, times = dict(ours=ours, plain=_plain(patches, start.normalise), limit=limit), {}
    for k in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if k:
                times.setdefault(name, []).append(time.perf_counter() - begin)
    s = {name: statistics.median(t) for name, t in times.items()}
    note = f"96 px, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [
        dict(
            name="pretrain_float32",
            ours=n / s["ours"],
            reference=n / s["plain"],
            unit="patches/s",
            ratio=s["plain"] / s["ours"],
            n=n,
            note=f"{note}; reference: torchvision's whole AlexNet, NCHW, Adam",
        ),
        dict(
            name="pretrain_float32_of_limit",
            ours=n / s["ours"],
            reference=n / s["limit"],
            unit="patches/s",
            ratio=s["limit"] / s["ours"],
            n=n,
            note=f"{note}; fraction of the rate of the convolutions' forward and backward pass alone",
        ),
    ]


pretrain_float32.names = ["pretrain_float32", "pretrain_float32_of_limit"]
