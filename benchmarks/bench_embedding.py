"""Patches to features, and slide file to feature file, against the usual way: OpenSlide per patch, PIL, float32 eager, in sequence."""
import copy
import math
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

from her2_mil.embedding import EmbedderError, PixelConv, embed_slide, feature_cosines, get_embedder, normalise_patches
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


def _patches(n, side=224):
    "n patches (n, side, side, 3) of the blotchy picture."
    k = math.ceil(n**.5)
    return _tissue(side*k).reshape(k, side, k, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)[:n].copy()


def _convolutions(module, x):
    "AlexNet's convolutions with what each is given and the operations it needs for one patch: (convolution, input, FLOP)."
    found = []
    hooks = [m.register_forward_hook(lambda m, i, o: found.append((m, i[0], 2*o[0].numel()*m.weight[0].numel()))) for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    module(x)
    for h in hooks: h.remove()
    return found


def _fast(conv, x, dtype):
    "A convolution and its input in the embedder's precision and layout."
    return copy.deepcopy(conv).to(dtype, memory_format=torch.channels_last), x.to(dtype, memory_format=torch.channels_last)


@torch.inference_mode()
def embed_alexnet(n=256, repeats=5):
    "AlexNet conv5 features of 224 px patches in memory: ours against float32 eager and against the arithmetic's limit; the smallest cosine between the two."
    patches, ours, compiled = _patches(n), get_embedder('random'), get_embedder('random', compile=True)
    dtype, layers = getattr(torch, ours.precision), _convolutions(ours.module, normalise_patches(patches[:16]).contiguous())
    (second, x, work), flop = layers[1], sum(f for *_, f in layers)
    fast, y = _fast(second, x, dtype)
    runs = dict(ours=lambda: ours(patches), eager=lambda: _eager(ours.module, patches), compiled=lambda: compiled(patches), second=lambda: fast(y), second32=lambda: second(x))
    try: compiled(patches[:64])
    except EmbedderError as e: del runs['compiled']; print(f'torch.compile is not measured: {e}')
    s = _in_turn(runs, repeats)
    rate = len(x)*work/s['second']
    reference, limit, threads = n/s['eager'], rate/flop, torch.get_num_threads()
    note = f'{{}}, {threads} threads; reference is float32 eager'
    most = f"; {limit/reference:.1f} would be reached if its {flop/1e9:.2f} GFLOP a patch ran at the {rate/1e9:.0f} GFLOP/s of its second convolution and all else were free"
    rows = [dict(name='embed_alexnet', ours=n/s['ours'], reference=reference, unit='patches/s', ratio=s['eager']/s['ours'], n=n, note=note.format(ours.precision) + most),
            dict(name='embed_alexnet_of_limit', ours=n/s['ours'], reference=limit, unit='patches/s', ratio=n/s['ours']/limit, n=n,
                 note=f"fraction of that limit; the second convolution is {s['second32']/s['second']:.1f} times as fast in {ours.precision} as in float32 here")]
    if 'compiled' in s:
        rows.append(dict(name='embed_alexnet_compiled', ours=n/s['compiled'], reference=reference, unit='patches/s', ratio=s['eager']/s['compiled'], n=n, note=note.format(f'{ours.precision} under torch.compile')))
    exact = _eager(ours.module, patches)
    cosine, centred = (feature_cosines(ours(patches), exact, c).min() for c in (False, True))
    rows.append(dict(name='embed_min_cosine', ours=float(cosine), reference=1., unit='cosine', ratio=float(cosine), n=n, note=f'smallest over patches, {ours.precision} against float32; {centred:.5f} with the mean taken off'))
    return rows
embed_alexnet.names = ['embed_alexnet', 'embed_alexnet_of_limit', 'embed_alexnet_compiled', 'embed_min_cosine']


@torch.inference_mode()
def embed_layers(n=16, repeats=9):
    "Each of AlexNet's convolutions alone, in the embedder's precision and layout against float32 eager: what the ratio of the whole is made of."
    ours, rows = get_embedder('random'), []
    dtype = getattr(torch, ours.precision)
    for k, (conv, x, flop) in enumerate(_convolutions(ours.module, normalise_patches(_patches(n)).contiguous()), 1):
        fast, y = _fast(conv, x, dtype)
        run = lambda: fast(y)
        if k == 1 and ours.takes_pixels:
            fast, y = PixelConv(conv, ours.preprocessing).to(dtype, memory_format=torch.channels_last), torch.from_numpy(_patches(n))
            run = lambda: fast(fast.columns(y))
        s = _in_turn(dict(ours=run, eager=lambda: conv(x)), repeats)
        rows.append(dict(name=f'embed_conv{k}', ours=n/s['ours'], reference=n/s['eager'], unit='patches/s', ratio=s['eager']/s['ours'], n=n,
                         note=f"{flop/1e9:.2f} GFLOP a patch: {flop*n/s['ours']/1e9:.0f} GFLOP/s in {ours.precision}{', bytes to map' if k == 1 and ours.takes_pixels else ''}; {flop*n/s['eager']/1e9:.0f} in float32"))
    return rows
embed_layers.names = [f'embed_conv{k}' for k in range(1, 6)]


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
    read, net = n/seconds['read'], len(patches)/seconds['net']
    limit, shared = min(read, net), read*net/(read + net)
    return [dict(name='slide_to_features', ours=n/seconds['ours'], reference=n/seconds['usual'], unit='patches/s', ratio=seconds['usual']/seconds['ours'], n=n,
                 note=f'{ours.precision}, {threads} workers; reference is OpenSlide, PIL, float32 eager in sequence'),
            dict(name='slide_to_features_of_limit', ours=n/seconds['ours'], reference=limit, unit='patches/s', ratio=n/seconds['ours']/limit, n=n,
                 note=f"reading alone {read:.0f}, network alone {net:.0f} patches/s; both keep all {threads} cores busy, so together at most {shared:.0f}, {shared/limit:.2f} of the slower: {n/seconds['ours']/shared:.2f} of that is reached")]
slide_to_features.names = ['slide_to_features', 'slide_to_features_of_limit']
