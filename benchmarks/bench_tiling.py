"""Speed and memory of slides and tiling: each function returns rows (name, ours, reference, unit, ratio, n, note). Both sides are measured in turn in the same run; medians."""

import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest import mock

import cv2
import imagecodecs
import numpy as np
import openslide
import pandas as pd
import tifffile
from PIL import Image

from her2_mil.cohort import SCORES, read_manifest
from her2_mil.phantom import PhantomWorld, phantom_slide
from her2_mil.slide import WholeSlide
from her2_mil.tiles import memory_for
from her2_mil.tiling import TileSpec, read_patches, tile_slide

SCAN = (
    Path(os.environ.get("HER2_MIL_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    / "wsi"
    / "CMU-1-Small-Region.svs"
)
FOLDER = Path(tempfile.gettempdir()) / f"her2_mil_bench_{os.getuid() if hasattr(os, 'getuid') else 0}"


def _row(name, ours, reference, unit, ratio, n, note=""):
    "One measurement"
    return dict(name=name, ours=ours, reference=reference, unit=unit, ratio=ratio, n=n, note=note)


def _encode(tile):
    "A tile as a JPEG, YCbCr 4:2:0"
    return imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile), level=80, colorspace="rgb", outcolorspace="ycbcr", subsampling="420"
    )


def _phantom_pixels():
    "A rendered phantom field of 2048 x 2048 px at 0.25 um/px, whole tiles of tissue"
    path = FOLDER / "field.tif"
    if not path.exists():
        phantom_slide(path, 2, 17, PhantomWorld(size=(900.0, 900.0), mpp=0.25, site="A"))
    with WholeSlide(path) as s:
        mid = [v // 2 - 1024 for v in s.size]
        return s.read(*mid, 2048, s.mpp[0])


def _big_slide(side, tissue=1.0):
    "A pyramid of `side` px at 0.25 um/px; a phantom field repeated over a centred square of `tissue` of the side, elsewhere one glass tile again and again"
    path = FOLDER / f"big-{side}-{tissue:g}.tif"
    if path.exists():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    field, part = _phantom_pixels(), path.with_suffix(".part")
    with tifffile.TiffWriter(part, bigtiff=True) as t:
        for d in (1, 4, 16):
            px = cv2.resize(field, None, fx=1 / d, fy=1 / d, interpolation=cv2.INTER_AREA)
            if len(px) < 256:
                px = np.tile(px, (-(-256 // len(px)),) * 2 + (1,))
            k = len(px) // 256
            tiles = [
                [_encode(px[256 * j : 256 * j + 256, 256 * i : 256 * i + 256]) for i in range(k)] for j in range(k)
            ]
            n, white = -(-side // d // 256), _encode(np.full((256, 256, 3), (243, 240, 242), np.uint8))
            lo, hi = (1 - tissue) / 2 * n, (1 + tissue) / 2 * n
            inside = lambda v: lo <= v < hi
            data = (tiles[j % k][i % k] if inside(i) and inside(j) else white for j in range(n) for i in range(n))
            t.write(
                data,
                shape=(side // d, side // d, 3),
                dtype="uint8",
                tile=(256, 256),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
                resolution=(1e4 / (0.25 * d),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(d > 1),
            )
    os.replace(part, path)
    return path


def _usual(path, coords, spec, mpp):
    "Patches the usual way: OpenSlide read_region at level 0 and PIL resize"
    size = round(spec.patch * spec.mpp / mpp)
    with openslide.OpenSlide(path) as s:
        return np.stack(
            [
                np.asarray(
                    s.read_region(tuple(map(int, c)), 0, (size, size))
                    .convert("RGB")
                    .resize((spec.patch,) * 2, Image.BOX)
                )
                for c in coords
            ]
        )


def _timed(f):
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out


def _reading(name, path, coords, spec, repeats=5):
    "Ours against the usual way, 128 patches a call"
    cv2.setNumThreads(1)
    batches = [coords[i : i + 128] for i in range(0, len(coords), 128)]
    with WholeSlide(path) as s:
        mpp, pairs = s.mpp[0], []
        for _ in range(repeats):
            a, ours = _timed(lambda: [read_patches(s, c, spec) for c in batches][0])
            b, _ = _timed(lambda: [_usual(path, c, spec, mpp) for c in batches][0])
            pairs.append((len(coords) / a, len(coords) / b))
        exact = np.stack([s.read(*c.tolist(), spec.patch, spec.mpp) for c in coords[:50]])
    error = np.abs(ours[:50].astype(int) - exact).mean()
    ours, theirs = (median(v) for v in zip(*pairs))
    return [
        _row(
            name,
            ours,
            theirs,
            "patches/s",
            ours / theirs,
            len(coords),
            f"per core; mean difference to level-0 area averaging {error:.2f} of 255",
        )
    ]


def read_patches_tiled_jpeg():
    "A phantom slide of 16,384^2 px, 0.25 to 0.5 um/px, a block of neighbouring patches"
    path, spec = _big_slide(16384), TileSpec()
    with WholeSlide(path) as s:
        coords = tile_slide(s, spec).coords
    near = coords[(coords < 448 * 16).all(1)]
    return _reading("read_patches_tiled_jpeg", path, near, spec)


def read_patches_svs():
    "The real Aperio scan; skipped where it is absent"
    if not SCAN.exists():
        print("read_patches_svs: skipped, the real scan is not here")
        return []
    spec = TileSpec(overlap=112)
    with WholeSlide(SCAN) as s:
        coords = tile_slide(s, spec).coords
    return _reading("read_patches_svs", SCAN, coords, spec, 5)


def read_patches_fallback():
    "A slide that the fast path does not take (tiles compressed without loss): OpenSlide reads, and must not be slower for it"
    path, spec = FOLDER / "lossless.tif", TileSpec()
    if not path.exists():
        px, part = np.tile(_phantom_pixels(), (2, 2, 1)), path.with_suffix(".part")
        tifffile.imwrite(
            part,
            px,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            metadata=None,
            resolution=(4e4,) * 2,
            resolutionunit="CENTIMETER",
        )
        os.replace(part, path)
    with WholeSlide(path) as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _reading("read_patches_fallback", path, tile_slide(s, spec).coords, spec, 5)


def read_patches_two_threads():
    "Two threads over one, same patches, 128 a call: larger arrays are new memory at every call, which the system has to clear; the note says what two processes that share nothing gain, in turn with them"
    path, spec = _big_slide(16384), TileSpec()
    cv2.setNumThreads(1)
    with WholeSlide(path) as s:
        coords = tile_slide(s, spec).coords
        calls = np.split(coords[(coords < 448 * 16).all(1)], 2)

        def read(n):
            for c in calls:
                read_patches(s, c, spec, threads=n)

        def cpu(n):
            start = time.process_time()
            seconds = _timed(lambda: read(n))[0]
            return seconds, time.process_time() - start

        ask, asked = mp.Pipe()
        other = mp.get_context("fork").Process(
            target=lambda: [asked.send(read_patches(s, calls[1], spec).shape) for _ in iter(asked.recv, None)],
            daemon=True,
        )
        other.start()

        def processes():
            ask.send(1)
            read_patches(s, calls[0], spec)
            ask.recv()

        rounds = [(*cpu(2), *cpu(1), _timed(processes)[0]) for _ in range(50)]
        ask.send(None)
    (two, cpu_two, one, cpu_one, apart), n = (median(v) for v in zip(*rounds)), sum(map(len, calls))
    return [
        _row(
            "read_patches_two_threads",
            n / two,
            n / one,
            "patches/s",
            one / two,
            n,
            f"{os.cpu_count()} CPUs; two processes gain {one / apart:.2f}; CPU time {cpu_two / cpu_one:.2f} of one thread's, {cpu_two / two:.2f} CPUs at work",
        )
    ]


def _decoder_alone(slide, coords, spec):
    "Seconds to decode each tile that the patches touch once, and nothing else; the number of tiles"
    level = slide.plan(spec.mpp, spec.snap).level
    tiles, side = slide._native(level), spec.patch * spec.mpp / slide.mpp[0] / slide.level_downsamples[level]
    at = np.asarray(coords) / slide.level_downsamples[level]
    touched = sorted(
        {
            (ty, tx)
            for x, y in at
            for ty in range(int(y // tiles.tile[1]), int(-(-(y + side) // tiles.tile[1])))
            for tx in range(int(x // tiles.tile[0]), int(-(-(x + side) // tiles.tile[0])))
        }
    )
    into = memory_for((*tiles.tile[::-1], 3))

    def run():
        for ty, tx in touched:
            tiles.decode(tx, ty, into)

    return _timed(run)[0], len(touched)


def decode_memory():
    "The same tiles decoded to where our reader has them decoded and to memory on a multiple of 64; both averaged after"
    cv2.setNumThreads(1)
    with WholeSlide(_big_slide(16384)) as s:
        tiles = s._native(0)
        shape = (*tiles.tile[::-1], 3)
        room = np.empty(np.prod(shape) + 64, np.uint8)
        aligned = room[-room.ctypes.data % 64 :][: np.prod(shape)].reshape(shape)

        def run(into):
            for i in range(256):
                tiles.decode(i % 64, i // 64, into)
                cv2.resize(into, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)

        ours, theirs = (
            median(v)
            for v in zip(
                *[(_timed(lambda: run(memory_for(shape)))[0], _timed(lambda: run(aligned))[0]) for _ in range(15)]
            )
        )
    return [
        _row(
            "decode_memory",
            256 / ours,
            256 / theirs,
            "tiles/s",
            theirs / ours,
            256,
            "reference: memory aligned to 64 bytes, which libjpeg-turbo writes past the cache",
        )
    ]


def read_patches_of_limit():
    "Reading against the decoder alone, and where the rest of the time goes"
    path, spec = _big_slide(16384), TileSpec()
    cv2.setNumThreads(1)
    with WholeSlide(path) as s:
        coords = tile_slide(s, spec).coords
        coords = coords[(coords < 448 * 16).all(1)]
        tiles, decoded, spent = s._native(0), [], dict(decoding=0.0, averaging=0.0)

        def timed(f, what):
            def g(*args, **kw):
                seconds, out = _timed(lambda: f(*args, **kw))
                spent[what] += seconds
                return out

            return g

        ours, limit = [], []
        for _ in range(15):
            ours.append(_timed(lambda: read_patches(s, coords, spec))[0])
            limit.append(_decoder_alone(s, coords, spec)[0])
        n_tiles, decode = _decoder_alone(s, coords, spec)[1], tiles.decode
        tiles.decode = lambda *a: (decoded.append(a[:2]), decode(*a))
        with (
            mock.patch.object(imagecodecs, "jpeg8_decode", timed(imagecodecs.jpeg8_decode, "decoding")),
            mock.patch.object(cv2, "resize", timed(cv2.resize, "averaging")),
        ):
            whole = sum(_timed(lambda: read_patches(s, coords, spec))[0] for _ in range(5))
        del tiles.decode
    ours, limit = median(ours), median(limit)
    return [
        _row(
            "read_patches_of_limit",
            len(coords) / ours,
            len(coords) / limit,
            "patches/s",
            limit / ours,
            len(coords),
            f"reference: each tile decoded once and nothing else; ours decodes {len(decoded) // 5} times for {n_tiles} tiles; of its time {spent['decoding'] / whole:.0%} is decoding, "
            f"{spent['averaging'] / whole:.0%} averaging, {1 - sum(spent.values()) / whole:.0%} file, copies and Python",
        )
    ]


def mask_and_grid_100k():
    "Mask and grid of a 100,000 x 100,000 px slide, tissue over a tenth of it; the reference is the 2 s asked for"
    path = _big_slide(100_000, 0.3)

    def once():
        with WholeSlide(path) as s:
            return len(tile_slide(s))

    times = [_timed(once) for _ in range(3)]
    seconds = median(t for t, _ in times)
    return [
        _row(
            "mask_and_grid_100k", seconds, 2.0, "s", 2 / seconds, times[0][1], "reference: the limit of 2 s; n patches"
        )
    ]


PEAK = """
import sys
if sys.argv[3] != 'alone': import her2_mil.features  # a study tiles in the process that embeds
from her2_mil.slide import WholeSlide
from her2_mil.tiling import tile_slide, read_patches, sample_bag
if sys.argv[2] == 'pyvips': from pyvips import Image, Region
with WholeSlide(sys.argv[1]) as s:
    grid = tile_slide(s)
    bags = [grid.coords[sample_bag(len(grid), 100, i)] for i in range(3)]
    if sys.argv[2] == 'ours':
        for bag in bags: read_patches(s, bag, grid.spec)
    else:
        region = Region.new(Image.tiffload(sys.argv[1]))
        for x, y in sum([b.tolist() for b in bags], []): region.fetch(x, y, 448, 448)
print(int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024)
"""


def _peaks(reader, beside="the embedder"):
    "Peak resident memory, MB, of tiling and of reading three bags, on 100,000 px and on 8,192 px"
    run = lambda path: (
        subprocess.run(
            [sys.executable, "-c", PEAK, str(path), reader, beside], capture_output=True, text=True, check=True
        ).stdout
    )
    return [float(run(_big_slide(side, 0.3)).split()[-1]) for side in (100_000, 8192)]


def tiling_memory_100k():
    "Peak memory at 100,000 px over that at 8,192 px, in a process that can embed as a study's does, and in one that tiles alone"
    rows = []
    for name, beside in (("tiling_memory_100k", "the embedder"), ("tiling_memory_100k_alone", "alone")):
        large, small = _peaks("ours", beside)
        note = f"bags of 100, {beside} loaded; {large - small:.0f} MB more, of which the overview at 8 um/px is 29"
        rows.append(
            _row(name, large, small, "MB", large / small, 3, note.replace("alone loaded", "nothing else loaded"))
        )
    return rows


def tiling_memory_pyvips():
    "The same where pyvips reads; skipped where it is not installed"
    if find_spec("pyvips") is None:
        print("tiling_memory_pyvips: skipped, pyvips is not installed")
        return []
    large, small = _peaks("pyvips")
    return [
        _row("tiling_memory_pyvips", large, small, "MB", large / small, 3, f"pyvips {version('pyvips')} reads the bags")
    ]


def read_manifest_100k():
    "A manifest of 100,000 rows, every cell checked; the reference is pandas' own reading of the file, unchecked"
    path = FOLDER / "manifest.csv"
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = (
        f"s{i},p{i // 2},{SCORES[i // 2 % 4]},slides/s{i}.svs,{i:064x},0.25,site{i % 9},GT450" for i in range(100_000)
    )
    path.write_text("\n".join(["slide_id,patient_id,her2_score,uri,sha256,mpp,site,scanner", *rows]))
    pairs = [
        (_timed(lambda: read_manifest(path))[0], _timed(lambda: pd.read_csv(path, dtype=str))[0]) for _ in range(5)
    ]
    ours, theirs = (median(v) for v in zip(*pairs))
    return [
        _row(
            "read_manifest_100k",
            ours,
            theirs,
            "s",
            theirs / ours,
            100_000,
            "every cell checked; reference: pandas reads the file and checks nothing",
        )
    ]


def _other_readers(path):
    "Other readers that are installed: name -> function (x, y, side) -> level-0 pixels"

    def tiffslide():
        from tiffslide import TiffSlide

        s = TiffSlide(path)
        return lambda x, y, n: s.read_region((x, y), 0, (n, n), as_array=True)

    def fastslide():
        from fastslide import FastSlide

        s = FastSlide.from_file_path(str(path))
        return lambda x, y, n: s.read_region((x, y), 0, (n, n)).numpy()

    def cucim():
        from cucim import CuImage

        s = CuImage(str(path))
        return lambda x, y, n: np.asarray(s.read_region((x, y), (n, n), 0))

    def pyvips():
        from pyvips import Image, Region

        s = Region.new(Image.tiffload(str(path)))
        return lambda x, y, n: np.frombuffer(s.fetch(x, y, n, n), np.uint8).reshape(n, n, 3)

    found = {}
    for make in (tiffslide, fastslide, cucim, pyvips):
        try:
            found[make.__name__] = make()
        except ImportError:
            print(f"read_patches_other_readers: {make.__name__} is not installed")
    return found


def read_patches_other_readers():
    "Maintained readers in the place of ours, each field averaged by OpenCV from 0.25 to 0.5 um/px; one line for each that is installed"
    path, rows = _big_slide(16384), []
    cv2.setNumThreads(1)
    with WholeSlide(path) as s:
        coords = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2) * 448 + 448
        for name, read in _other_readers(path).items():
            theirs = lambda: np.stack(
                [cv2.resize(read(*c, 448)[..., :3], (224, 224), interpolation=cv2.INTER_AREA) for c in coords.tolist()]
            )
            rounds = [(_timed(lambda: s.fields(coords, 224, 2 * s.mpp[0]))[0], _timed(theirs)[0]) for _ in range(7)]
            ours, other = (len(coords) / median(v) for v in zip(*rounds))
            error = np.abs(s.fields(coords, 224, 2 * s.mpp[0]).astype(int) - theirs()).mean()
            rows.append(
                _row(
                    f"read_patches_{name}",
                    ours,
                    other,
                    "patches/s",
                    ours / other,
                    len(coords),
                    f"{name} {version(name)}, averaged by OpenCV, one core; mean difference of pixels {error:.2f} of 255",
                )
            )
    return rows


read_patches_other_readers.names = ["read_patches_other_readers"]
