"""Patches to features, and slide file to feature file, against the usual way: OpenSlide per patch, PIL, float32 eager, in sequence."""
import os
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import openslide
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from her2_mil.embedding import EmbedderError, embed_slide, feature_cosines, get_embedder, normalise_patches
from her2_mil.slide import WholeSlide
from her2_mil.tiling import TileSpec, read_patches


def _tissue(side, seed=0):
    "A blotchy purple picture (side, side, 3), uint8, as hard to compress as stained tissue."
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.normal(0, 300, (side//4, side//4, 3)).astype(np.float32), (4, 4, 0)).repeat(4, 0).repeat(4, 1)
    fine = gaussian_filter(rng.normal(0, 60, (side, side, 3)).astype(np.float32), (1, 1, 0))
    return np.clip([190, 120, 180] + coarse + fine, 0, 255).astype(np.uint8)


def _slide(path, side):
    "A tiled JPEG TIFF at 0.25 um/px with one coarser level."
    image = _tissue(side)
    kw = dict(tile=(256, 256), photometric='rgb', compression='jpeg', compressionargs=dict(level=80), resolutionunit='CENTIMETER')
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(image, resolution=(40000, 40000), **kw)
        small = image.reshape(side//4, 4, side//4, 4, 3).mean((1, 3)).astype(np.uint8)
        tif.write(small, subfiletype=1, resolution=(10000, 10000), **kw)
    return path


def _in_turn(runs, repeats):
    "Median seconds of each function, called in turn; the first round warms up and is not counted."
    times = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i: times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


@torch.inference_mode()
def _eager(module, patches, batch=64):
    "The usual way: float32 in the order NCHW, batch by batch."
    out = []
    for i in range(0, len(patches), batch):
        out.append(module(normalise_patches(np.asarray(patches[i:i+batch])).contiguous()).numpy())
    return np.concatenate(out)


def embed_alexnet(n=256, repeats=5):
    "AlexNet conv5 features of 224 px patches in memory: ours against float32 eager, and the smallest cosine between the two."
    side = 224
    picture = _tissue(side*16)
    patches = picture.reshape(16, side, 16, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)[:n].copy()
    ours = get_embedder('random')
    compiled = get_embedder('random', compile=True)
    runs = dict(ours=lambda: ours(patches), eager=lambda: _eager(ours.module, patches), compiled=lambda: compiled(patches))
    try: compiled(patches[:64])
    except EmbedderError as e: del runs['compiled']; print(f'torch.compile is not measured: {e}')
    seconds = _in_turn(runs, repeats)
    reference, threads = n/seconds['eager'], torch.get_num_threads()
    note = f'{{}}, {threads} threads; reference is float32 eager'
    rows = [dict(name='embed_alexnet', ours=n/seconds['ours'], reference=reference, unit='patches/s', ratio=seconds['eager']/seconds['ours'], n=n, note=note.format(ours.precision))]
    if 'compiled' in seconds:
        rows.append(dict(name='embed_alexnet_compiled', ours=n/seconds['compiled'], reference=reference, unit='patches/s', ratio=seconds['eager']/seconds['compiled'], n=n, note=note.format(f'{ours.precision} under torch.compile')))
    exact = _eager(ours.module, patches)
    cosine, centred = (feature_cosines(ours(patches), exact, c).min() for c in (False, True))
    rows.append(dict(name='embed_min_cosine', ours=float(cosine), reference=1., unit='cosine', ratio=float(cosine), n=n, note=f'smallest over patches, {ours.precision} against float32; {centred:.5f} with the mean taken off'))
    return rows
embed_alexnet.names = ['embed_alexnet', 'embed_alexnet_compiled', 'embed_min_cosine']


def _usual(path, coords, module, spec, out):
    "OpenSlide per patch, PIL resize, float32 eager, one after the other, then one file."
    slide = openslide.OpenSlide(str(path))
    level = round(spec.patch*spec.mpp/0.25)
    patches = (np.asarray(slide.read_region((int(x), int(y)), 0, (level, level)).convert('RGB').resize((spec.patch, spec.patch), Image.Resampling.BOX)) for x, y in coords)
    features, batch = [], []
    for p in patches:
        batch.append(p)
        if len(batch) == 64: features.append(_eager(module, batch)); batch = []
    if batch: features.append(_eager(module, batch))
    with h5py.File(out, 'w') as f: f['features'], f['coords'] = np.concatenate(features), coords


def slide_to_features(side=8064, repeats=3):
    "Slide file to feature file, and as a fraction of what the slower of reading and network reaches alone."
    spec, ours, threads = TileSpec(), get_embedder('random'), os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as tmp:
        path, out = _slide(Path(tmp)/'slide.tif', side), Path(tmp)/'ours.h5'
        step = round(spec.patch*spec.mpp/0.25)
        coords = np.array([(x, y) for y in range(0, side-step+1, step) for x in range(0, side-step+1, step)])
        n = len(coords)
        with WholeSlide(path) as slide:
            slide.sha256  # known before: a run hashes each slide once, when it is fetched
            patches = read_patches(slide, coords[:128], spec, threads)

            def whole():
                out.unlink(missing_ok=True)
                embed_slide(slide, coords, ours, out, spec, threads=threads)

            def reading():
                for i in range(0, n, 64): read_patches(slide, coords[i:i+64], spec, threads)

            seconds = _in_turn(dict(ours=whole, usual=lambda: _usual(path, coords, ours.module, spec, Path(tmp)/'usual.h5'), read=reading, net=lambda: ours(patches)), repeats)
        with h5py.File(out) as a, h5py.File(Path(tmp)/'usual.h5') as b: cosine = feature_cosines(a['features'][:], b['features'][:]).min()
    assert cosine > 0.995, f'features of the two ways differ: smallest cosine {cosine:.4f}'
    limit = min(n/seconds['read'], len(patches)/seconds['net'])
    return [dict(name='slide_to_features', ours=n/seconds['ours'], reference=n/seconds['usual'], unit='patches/s', ratio=seconds['usual']/seconds['ours'], n=n,
                 note=f'{ours.precision}, {threads} workers; reference is OpenSlide, PIL, float32 eager in sequence'),
            dict(name='slide_to_features_of_limit', ours=n/seconds['ours'], reference=limit, unit='patches/s', ratio=n/seconds['ours']/limit, n=n,
                 note=f"reading alone {n/seconds['read']:.0f}, network alone {len(patches)/seconds['net']:.0f} patches/s")]
slide_to_features.names = ['slide_to_features', 'slide_to_features_of_limit']
