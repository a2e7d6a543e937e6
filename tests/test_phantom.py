"The phantom as an instrument: files written strip by strip, memory, and pixels that must stay what they are."

import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from her2_mil import phantom as ph, phantom_file, phantom_layout, phantom_nuclei, phantom_patches as cut
from her2_mil.phantom import (
    RENDERER,
    SITES,
    PhantomWorld,
    phantom_image,
    phantom_key,
    phantom_patches,
    phantom_slide,
    phantom_truth,
)

SIZES = [("A", (700.0, 600.0)), ("B", (1003.0, 777.0)), ("C", (1013.0, 777.0)), ("B", (250.0, 1500.0))]


def write_whole(path, image, mpp, quality, levels):
    "The same file, from the whole picture."
    with tifffile.TiffWriter(path) as tw:
        for f in levels:
            im = (
                image
                if f == 1
                else cv2.resize(image, (image.shape[1] // f, image.shape[0] // f), interpolation=cv2.INTER_AREA)
            )
            tw.write(
                phantom_file.jpeg_tiles(im, quality),
                shape=im.shape,
                dtype="uint8",
                tile=(256, 256),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
                software="her2_mil phantom",
                resolution=(1e4 / (mpp * f),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(f > 1),
            )


@pytest.mark.parametrize("defects", ["", "fold+blood", "focus+pen"])
@pytest.mark.parametrize("site, size", SIZES)
def test_strips_give_the_bytes_of_the_whole(tmp_path, site, size, defects):
    world = PhantomWorld(site=site, size=size, defects=defects)
    truth = phantom_slide(tmp_path / "strips.tif", 2, 7, world)
    image, _ = phantom_image(2, 7, world)
    write_whole(tmp_path / "whole.tif", image, truth.mpp, truth.params["jpeg"], SITES[site]["levels"])
    assert image.shape[1::-1] == truth.size
    assert (tmp_path / "strips.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def peak_above_imports(code, *args):
    "MB that a process takes at its peak, above what it takes after its imports."
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc, which this system does not have")
    head = "import sys\nfrom her2_mil.phantom import *\npeak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024\nbefore = peak()\n"
    run = subprocess.run(
        [sys.executable, "-c", head + code + "\nprint(peak() - before)", *map(str, args)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


DENSE = "phantom_slide(sys.argv[1], 2, 3, PhantomWorld(site='B', mpp=.46, size=(1884., float(sys.argv[2]))))"


def test_memory_of_a_dense_slide_is_less_than_its_picture_twice_over(tmp_path):
    "A slide of 4,096 x 16,384 px: rendered whole, it took three times the picture and more."
    peak = peak_above_imports(DENSE, tmp_path / "dense.tif", 16384 * 0.46)
    with openslide.OpenSlide(tmp_path / "dense.tif") as s:
        width, height = s.dimensions
    assert (width, height) == (4096, 16384)
    assert peak < 2 * width * height * 3 / 2**20


SPARSE = "phantom_sparse(sys.argv[1], 2, 6, side=int(sys.argv[2]), fragments=2, world=PhantomWorld(size=(600., 500.)))"


def test_memory_of_a_sparse_slide_does_not_grow_with_its_glass(tmp_path):
    "100,000 px are 28 GB of pixels; what they may take beyond 20,000 px is the list of tiles."
    small, large = (peak_above_imports(SPARSE, tmp_path / f"{side}.tif", side) for side in (20_000, 100_000))
    with openslide.OpenSlide(tmp_path / "100000.tif") as s:
        assert s.dimensions == (100_000, 100_000)
    assert large < small + 150


# What the renderer shows: a sample of the pixels of three slides and of three domains of patches, kept beside this file. Features and numbers of the study depend on them,
# and rendered slides are kept under a name that holds RENDERER. On x86 processors with AVX2 all six agree; elsewhere floating point may move a decision of the layout in
# some of them, so that half must.
PIXELS = Path(__file__).with_name(f"renderer_{RENDERER}.png")
SLIDES = [
    (
        2,
        5,
        PhantomWorld(site="A", size=(500.0, 400.0)),
        (1004, 800),
        (33120, 7853, 6599),
        [
            [238, 213, 201, 192, 200, 241],
            [195, 194, 184, 170, 162, 223],
            [186, 169, 147, 181, 164, 211],
            [234, 195, 176, 189, 210, 235],
        ],
    ),
    (
        3,
        6,
        PhantomWorld(site="B", size=(500.0, 400.0), mpp=0.25),
        (2000, 1600),
        (152907, 54200, 48226),
        [
            [230, 154, 166, 162, 167, 214],
            [223, 157, 150, 143, 125, 134],
            [188, 184, 181, 149, 149, 153],
            [203, 187, 179, 169, 179, 214],
        ],
    ),
    (
        1,
        8,
        PhantomWorld(site="C", size=(500.0, 400.0), defects="pen+fold+blood+dust+adipose+pink+focus"),
        (996, 796),
        (36147, 7035, 4356),
        [
            [182, 172, 173, 186, 149, 207],
            [169, 118, 46, 170, 234, 191],
            [185, 156, 95, 79, 196, 231],
            [196, 173, 176, 105, 205, 241],
        ],
    ),
]
PATCHES = {
    "he": [
        [175, 180, 177, 173, 172, 169],
        [165, 173, 171, 177, 178, 176],
        [162, 163, 171, 174, 174, 184],
        [159, 160, 157, 165, 166, 164],
    ],
    "ihc": [
        [177, 177, 179, 172, 179, 182],
        [165, 159, 157, 160, 172, 173],
        [193, 189, 184, 182, 178, 191],
        [180, 182, 180, 171, 173, 177],
    ],
    "natural": [
        [97, 101, 101, 102, 101, 101],
        [87, 86, 85, 86, 86, 88],
        [97, 100, 102, 102, 101, 97],
        [85, 88, 84, 85, 85, 87],
    ],
}
image_of = lru_cache(phantom_image)
patches_of = lru_cache(phantom_patches)


def sampled(image=image_of, patches=patches_of):
    "A sample of every rendering: uint8 (6, 40, 48, 3)."
    images = [image(*slide[:3])[0] for slide in SLIDES] + [np.concatenate(patches(d, 24, 3)[0]) for d in PATCHES]
    return np.stack([im[:: im.shape[0] // 40, :: im.shape[1] // 48][:40, :48] for im in images])


def check_pixels(seen, kept, at_least=6):
    "Refuse pixels that are not those of the renderer of this number."
    other = (np.abs(seen.astype(int) - kept).max(-1) > 1).mean((1, 2))
    assert (other < 0.005).sum() >= at_least, (
        f"pixels changed: raise RENDERER and renew this hash ({PIXELS.name}, by python tests/test_phantom.py); share of pixels that differ: {other.round(3)}"
    )


def test_pixels_are_those_of_this_renderer():
    seen = sampled()
    kept = cv2.imread(str(PIXELS))[..., ::-1].reshape(seen.shape) if PIXELS.exists() else np.full_like(seen, 128)
    check_pixels(
        seen, kept, 6 if platform.machine().lower() in ("x86_64", "amd64") and cv2.checkHardwareSupport(11) else 3
    )  # 11: AVX2


@pytest.mark.parametrize(
    "module, name, value",
    [
        (cut, "_DAB", cut._DAB * 1.02),
        (phantom_nuclei, "_BINS", 23),
        (phantom_layout, "MEASURE", ph.MEASURE | dict(fibroblast_density=1290)),
    ],
)
def test_a_change_of_the_renderer_is_noticed(monkeypatch, module, name, value):
    kept = sampled()
    monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError, match="pixels changed: raise RENDERER"):
        check_pixels(sampled(phantom_image, phantom_patches), kept)


def grey(image):
    return cv2.resize(image.mean(-1, dtype=np.float32), (6, 4), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("score, seed, world, size, areas, seen", SLIDES)
def test_slides_of_renderer_3(score, seed, world, size, areas, seen):
    assert RENDERER == 3
    image, truth = image_of(score, seed, world)
    assert truth.size == size
    assert [m.sum() for m in (truth.tissue, truth.tumour, truth.bearing)] == pytest.approx(areas, rel=0.002)
    assert np.abs(grey(image) - seen).max() < 1.5
    np.testing.assert_array_equal(phantom_truth(score, seed, world).bearing, truth.bearing)


@pytest.mark.parametrize("domain", PATCHES)
def test_patches_of_renderer_3(domain):
    x, y = patches_of(domain, 24, 3)
    assert y.tolist() == [k % (2 if domain == "he" else 4) for k in range(24)]
    assert np.abs(grey(x.reshape(-1, 96, 3)) - PATCHES[domain]).max() < 1.5


def test_key_of_a_rendering(monkeypatch):
    "It follows the URI's meaning and the renderer's number, and nothing else: no comment, no order of fields."
    uri = "phantom:score=2;seed=17;mpp=0.25;site=A"
    key = phantom_key(uri)
    assert key == phantom_key("phantom:site=A; mpp=.25;seed=17;score=2;effect=1.0")
    changed = [uri.replace(*c) for c in (("score=2", "score=1"), ("17", "18"), ("0.25", "0.2500001"), ("=A", "=B"))] + [
        uri + ";defects=pen",
        uri + ";label_noise=.1",
    ]
    assert len({key, *map(phantom_key, changed)}) == 7
    monkeypatch.setattr(ph, "RENDERER", RENDERER + 1)
    assert phantom_key(uri) != key


if __name__ == "__main__":
    assert cv2.imwrite(str(PIXELS), sampled().reshape(-1, 48, 3)[..., ::-1])
