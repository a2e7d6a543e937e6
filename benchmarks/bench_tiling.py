"""Speed and memory of slides and tiling: each function returns rows (name, ours, reference, unit, ratio, n, note). Both sides are measured in turn in the same run; medians."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from her2_mil.phantom import PhantomWorld, phantom_slide
from her2_mil.slide import WholeSlide
from her2_mil.tiling import TileSpec, read_patches, tile_slide

SCAN = Path(os.environ.get('HER2_MIL_REAL_DATA', Path(__file__).parents[2]/'shared'/'data'))/'wsi'/'CMU-1-Small-Region.svs'
FOLDER = Path(tempfile.gettempdir())/f'her2_mil_bench_{os.getuid() if hasattr(os, "getuid") else 0}'


def _row(name, ours, reference, unit, ratio, n, note=''):
    "One measurement"
    return dict(name=name, ours=ours, reference=reference, unit=unit, ratio=ratio, n=n, note=note)


def _encode(tile):
    "A tile as a JPEG, YCbCr 4:2:0"
    return imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=80, colorspace='rgb', outcolorspace='ycbcr', subsampling='420')


def _phantom_pixels():
    "A rendered phantom field of 2048 x 2048 px at 0.25 um/px, whole tiles of tissue"
    path = FOLDER/'field.tif'
    if not path.exists():
        phantom_slide(path, 2, 17, PhantomWorld(size=(900., 900.), mpp=0.25, site='A'))
    with WholeSlide(path) as s:
        mid = [v//2 - 1024 for v in s.size]
        return s.read(*mid, 2048, s.mpp[0])


def _big_slide(side, tissue=1.):
    "A pyramid of `side` px at 0.25 um/px; a phantom field repeated over a centred square of `tissue` of the side, elsewhere one glass tile again and again"
    path = FOLDER/f'big-{side}-{tissue:g}.tif'
    if path.exists(): return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    field, part = _phantom_pixels(), path.with_suffix('.part')
    with tifffile.TiffWriter(part, bigtiff=True) as t:
        for d in (1, 4, 16):
            px = cv2.resize(field, None, fx=1/d, fy=1/d, interpolation=cv2.INTER_AREA)
            if len(px) < 256: px = np.tile(px, (-(-256//len(px)),)*2 + (1,))
            k = len(px)//256
            tiles = [[_encode(px[256*j:256*j+256, 256*i:256*i+256]) for i in range(k)] for j in range(k)]
            n, white = -(-side//d//256), _encode(np.full((256, 256, 3), (243, 240, 242), np.uint8))
            lo, hi = (1 - tissue)/2*n, (1 + tissue)/2*n
            inside = lambda v: lo <= v < hi
            data = (tiles[j % k][i % k] if inside(i) and inside(j) else white for j in range(n) for i in range(n))
            t.write(data, shape=(side//d, side//d, 3), dtype='uint8', tile=(256, 256), photometric='ycbcr', subsampling=(2, 2), compression='jpeg',
                    metadata=None, resolution=(1e4/(.25*d),)*2, resolutionunit='CENTIMETER', subfiletype=int(d > 1))
    os.replace(part, path)
    return path


def _usual(path, coords, spec, mpp):
    "Patches the usual way: OpenSlide read_region at level 0 and PIL resize"
    size = round(spec.patch*spec.mpp/mpp)
    with openslide.OpenSlide(path) as s:
        return np.stack([np.asarray(s.read_region(tuple(map(int, c)), 0, (size, size)).convert('RGB').resize((spec.patch,)*2, Image.BOX)) for c in coords])


def _timed(f):
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out


def _reading(name, path, coords, spec, repeats=3):
    cv2.setNumThreads(1)
    with WholeSlide(path) as s:
        mpp, pairs = s.mpp[0], []
        for _ in range(repeats):
            a, ours = _timed(lambda: read_patches(s, coords, spec))
            b, theirs = _timed(lambda: _usual(path, coords, spec, mpp))
            pairs.append((len(coords)/a, len(coords)/b))
        exact = np.stack([s.read(*c.tolist(), spec.patch, spec.mpp) for c in coords[:50]])
    error = np.abs(ours[:50].astype(int) - exact).mean()
    ours, theirs = (median(v) for v in zip(*pairs))
    return [_row(name, ours, theirs, 'patches/s', ours/theirs, len(coords), f'per core; mean difference to level-0 area averaging {error:.2f} of 255')]


def read_patches_tiled_jpeg():
    "A phantom slide of 16,384^2 px, 0.25 to 0.5 um/px, a block of neighbouring patches"
    path, spec = _big_slide(16384), TileSpec()
    with WholeSlide(path) as s: coords = tile_slide(s, spec).coords
    near = coords[(coords < 448*16).all(1)]
    return _reading('read_patches_tiled_jpeg', path, near, spec)


def read_patches_svs():
    "The real Aperio scan; skipped where it is absent"
    if not SCAN.exists():
        print('read_patches_svs: skipped, the real scan is not here')
        return []
    spec = TileSpec(overlap=112)
    with WholeSlide(SCAN) as s: coords = tile_slide(s, spec).coords
    return _reading('read_patches_svs', SCAN, coords, spec, 5)


def read_patches_two_threads():
    "Two threads over one, same patches"
    path, spec = _big_slide(16384), TileSpec()
    cv2.setNumThreads(1)
    with WholeSlide(path) as s:
        coords = tile_slide(s, spec).coords
        coords = coords[(coords < 448*24).all(1)]
        pairs = [(_timed(lambda: read_patches(s, coords, spec, threads=2))[0], _timed(lambda: read_patches(s, coords, spec))[0]) for _ in range(3)]
    two, one = (len(coords)/median(v) for v in zip(*pairs))
    return [_row('read_patches_two_threads', two, one, 'patches/s', two/one, len(coords), f'{os.cpu_count()} CPUs')]


def mask_and_grid_100k():
    "Mask and grid of a 100,000 x 100,000 px slide, tissue over a tenth of it; the reference is the 2 s asked for"
    path = _big_slide(100_000, .3)
    def once():
        with WholeSlide(path) as s: return len(tile_slide(s))
    times = [_timed(once) for _ in range(3)]
    seconds = median(t for t, _ in times)
    return [_row('mask_and_grid_100k', seconds, 2., 's', 2/seconds, times[0][1], 'reference: the limit of 2 s; n patches')]


PEAK = '''
import sys
from her2_mil.slide import WholeSlide
from her2_mil.tiling import tile_slide, read_patches, sample_bag
with WholeSlide(sys.argv[1]) as s:
    grid = tile_slide(s)
    for i in range(3): read_patches(s, grid.coords[sample_bag(len(grid), 100, i)], grid.spec)
print(int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024)
'''


def tiling_memory_100k():
    "Peak resident memory of tiling and of reading three bags, 100,000 px over 8,192 px"
    def peak(path): return float(subprocess.run([sys.executable, '-c', PEAK, str(path)], capture_output=True, text=True, check=True).stdout.split()[-1])
    large, small = peak(_big_slide(100_000, .3)), peak(_big_slide(8192, .3))
    return [_row('tiling_memory_100k', large, small, 'MB', large/small, 3, 'bags of 100')]
