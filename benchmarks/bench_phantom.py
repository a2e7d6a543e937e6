"""Speed and memory of the phantom: each function returns rows (name, ours, reference, unit, ratio, n, note). Both sides are measured in turn in the same run; medians."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from her2_mil.phantom import PhantomWorld, phantom_image, phantom_slide, streams
from her2_mil.phantom_layout import place_nuclei
from her2_mil.phantom_nuclei import PAD, nuclear_canvas, sprites
from her2_mil.phantom_render import scene


def _row(name, ours, reference, unit, ratio, n, note=""):
    "One measurement"
    return dict(name=name, ours=ours, reference=reference, unit=unit, ratio=ratio, n=n, note=note)


def _cpu(f):
    "Seconds of one core, and the result"
    t = time.process_time()
    out = f()
    return time.process_time() - t, out


def _plain(plan, shape, rng):
    "The canvas of nuclei without an atlas: each nucleus is drawn where it lies"
    canvas = np.zeros([v + 2 * PAD for v in shape], np.uint8)
    for atlas, xs, ys, *_ in plan:
        s = atlas.shape[1]
        for x, y in zip(xs.tolist(), ys.tolist()):
            v = canvas[y : y + s, x : x + s]
            np.maximum(v, sprites(1, s, s / 2.15, 0.12, 1.28, 0.35, 0.3, 0.95, rng)[0], out=v)
    return canvas


def _render(name, world):
    "A slide in memory; the reference draws every nucleus anew and does all else as we do"
    cv2.setNumThreads(1)
    phantom_image(2, 2, replace(world, size=(300.0, 300.0)))  # textures are cached
    pairs = []
    for seed in (3, 4, 5):
        ours, (image, truth) = _cpu(lambda: phantom_image(2, seed, world))
        L, p, clones, _ = scene(2, seed, world)
        rng, shape = streams(seed)[3], image.shape[:2]
        stamped, (plan, _) = _cpu(lambda: place_nuclei(L, p, clones, rng))
        stamped += _cpu(lambda: nuclear_canvas(plan, shape[1], 0, shape[0]))[0]
        plain = _cpu(lambda: _plain(plan, shape, rng))[0]
        pixels, nuclei = image.shape[0] * image.shape[1] / 1e6, sum(len(put[1]) for put in plan)
        pairs.append((pixels / ours, pixels / (ours - stamped + plain)))
    ours, theirs = (median(v) for v in zip(*pairs))
    return [
        _row(
            name,
            ours,
            theirs,
            "Mpx/s",
            ours / theirs,
            3,
            f"per core at {truth.mpp:g} um/px, {nuclei / pixels:.0f} nuclei a megapixel; reference: each nucleus drawn anew",
        )
    ]


def phantom_render():
    "At the um/px of a slide of the study"
    return _render("phantom_render", PhantomWorld(site="A"))


def phantom_render_40x():
    "At 0.25 um/px, where a nucleus covers four times as many pixels"
    return _render("phantom_render_40x", PhantomWorld(site="A", mpp=0.25, size=(900.0, 900.0)))


def phantom_write():
    "From a seed to the file, strip by strip; the reference is rendering in memory, without a file"
    cv2.setNumThreads(1)
    world, pairs = PhantomWorld(site="A"), []
    phantom_image(2, 2, replace(world, size=(300.0, 300.0)))  # textures are cached
    with tempfile.TemporaryDirectory() as folder:
        for seed in (3, 4, 5):
            ours, truth = _cpu(lambda: phantom_slide(Path(folder) / "slide.tif", 2, seed, world))
            alone = _cpu(lambda: phantom_image(2, seed, world))[0]
            pixels = truth.size[0] * truth.size[1] / 1e6
            pairs.append((pixels / ours, pixels / alone))
    ours, alone = (median(v) for v in zip(*pairs))
    return [
        _row(
            "phantom_write",
            ours,
            alone,
            "Mpx/s",
            ours / alone,
            3,
            "per core; reference: rendering in memory alone; ratio: fraction of it",
        )
    ]


PEAK = """
import sys
from her2_mil.phantom import PhantomWorld, phantom_slide
peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024
before = peak()
truth = phantom_slide(sys.argv[1], 2, 3, PhantomWorld(site='B', mpp=.46, size=(float(sys.argv[2])*.46,)*2))
print(peak() - before, *truth.size)
"""


def phantom_memory_16k():
    "Peak resident memory, above the interpreter's, of writing a dense slide of 16,384 px a side, over the bytes of the picture"
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            [sys.executable, "-c", PEAK, str(Path(folder) / "slide.tif"), "16384"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout.split()
    peak, picture = float(out[-3]), int(out[-2]) * int(out[-1]) * 3 / 2**20
    return [
        _row(
            "phantom_memory_16k",
            peak,
            picture,
            "MB",
            peak / picture,
            1,
            f"{out[-2]} x {out[-1]} px; mostly the layout, at a sixteenth of the pixels",
        )
    ]
