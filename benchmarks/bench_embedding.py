"""Patches to features, and slide file to feature file, against the usual way: OpenSlide, PIL, float32 eager."""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
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

from her2_mil.embedding import PixelConv, feature_cosines, get_embedder, normalise_patches
from her2_mil.features import embed_slide
from her2_mil.slide import WholeSlide
from her2_mil.tiling import TileSpec, read_patches
from her2_mil.weights import EmbedderError

# what most readers' CPUs have: no bfloat16, no AVX-512
AVX2 = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2")


def _tissue(side, seed=0):
    "A blotchy purple picture (side, side, 3), uint8, as hard to compress as stained tissue."
    rng = np.random.default_rng(seed)
    blobs = rng.normal(0, 300, (side // 4, side // 4, 3)).astype(np.float32)
    coarse = gaussian_filter(blobs, (4, 4, 0)).repeat(4, 0).repeat(4, 1)
    fine = gaussian_filter(rng.normal(0, 60, (side, side, 3)).astype(np.float32), (1, 1, 0))
    return np.clip([190, 120, 180] + coarse + fine, 0, 255).astype(np.uint8)


def _slide(path, side):
    "A tiled JPEG TIFF at 0.25 um/px with one coarser level."
    image = _tissue(side)
    kw = dict(
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        compressionargs=dict(level=80),
        resolutionunit="CENTIMETER",
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(image, resolution=(40000, 40000), **kw)
        small = image.reshape(side // 4, 4, side // 4, 4, 3).mean((1, 3)).astype(np.uint8)
        tif.write(small, subfiletype=1, resolution=(10000, 10000), **kw)
    return path


def _in_turn(runs, repeats):
    "Median seconds of each function, called in turn; the first round warms up and is not counted."
    times = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


@torch.inference_mode()
def _eager(module, patches, batch=64):
    "The usual way: float32 in the order NCHW, batch by batch."
    out = []
    for i in range(0, len(patches), batch):
        out.append(module(normalise_patches(np.asarray(patches[i : i + batch])).contiguous()).numpy())
    return np.concatenate(out)


def _patches(n, side=224):
    "n patches (n, side, side, 3) of the blotchy picture."
    k = math.ceil(n**0.5)
    return _tissue(side * k).reshape(k, side, k, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)[:n].copy()


def _row(name, ours, reference, n, note):
    "A line of the table: rates in patches per second, how many times faster ours is."
    return dict(name=name, ours=ours, reference=reference, unit="patches/s", ratio=ours / reference, n=n, note=note)


def _convolutions(module, x):
    "AlexNet's convolutions, what each is given and what it needs for one patch: (convolution, input, FLOP)."
    found = []

    def note(conv, given, out):
        found.append((conv, given[0], 2 * out[0].numel() * conv.weight[0].numel()))

    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    module(x)
    for h in hooks:
        h.remove()
    return found


def _fast(conv, x, dtype):
    "A convolution and its input in the embedder's precision and layout."
    return [o.to(dtype, memory_format=torch.channels_last) for o in (copy.deepcopy(conv), x)]


@torch.inference_mode()
def embed_alexnet(n=256, repeats=5):
    "AlexNet conv5 features of 224 px patches in memory: ours against float32 eager and the arithmetic's limit."
    patches, ours, compiled = _patches(n), get_embedder("random"), get_embedder("random", compile=True)
    dtype = getattr(torch, ours.precision)
    layers = _convolutions(ours.module, normalise_patches(patches[:16]).contiguous())
    (second, x, work), flop = layers[1], sum(f for *_, f in layers)
    fast, y = _fast(second, x, dtype)
    runs = dict(
        ours=lambda: ours(patches),
        eager=lambda: _eager(ours.module, patches),
        compiled=lambda: compiled(patches),
        second=lambda: fast(y),
        second32=lambda: second(x),
    )
    try:
        compiled(patches[:64])
    except EmbedderError as e:
        del runs["compiled"]
        print(f"torch.compile is not measured: {e}")
    s = _in_turn(runs, repeats)
    rate, usual, precision = len(x) * work / s["second"], n / s["eager"], ours.precision
    limit, note = rate / flop, f"{torch.get_num_threads()} threads; reference is float32 eager"
    most = (
        f"{limit / usual:.1f} would be reached if its {flop / 1e9:.2f} GFLOP a patch ran at the {rate / 1e9:.0f} GFLOP/s "
        "of its second convolution and all else were free"
    )
    gain = (
        f"the second convolution is {s['second32'] / s['second']:.1f} times as fast in {precision} as in float32 here"
    )
    rows = [
        _row("embed_alexnet", n / s["ours"], usual, n, f"{precision}, {note}; {most}"),
        _row("embed_alexnet_of_limit", n / s["ours"], limit, n, f"fraction of that limit; {gain}"),
    ]
    if "compiled" in s:
        note = f"{precision} under torch.compile, {note}"
        rows.append(_row("embed_alexnet_compiled", n / s["compiled"], usual, n, note))
    exact = _eager(ours.module, patches)
    cosine, centred = (float(feature_cosines(ours(patches), exact, c).min()) for c in (False, True))
    note = f"smallest over patches, {precision} against float32; {centred:.5f} with the mean taken off"
    return rows + [_row("embed_min_cosine", cosine, 1.0, n, note) | dict(unit="cosine")]


embed_alexnet.names = ["embed_alexnet", "embed_alexnet_of_limit", "embed_alexnet_compiled", "embed_min_cosine"]


@torch.inference_mode()
def _layer(k, conv, x, flop, embedder, repeats):
    "One convolution in the embedder's precision and layout against float32 eager."
    n, dtype = len(x), getattr(torch, embedder.precision)
    bytes_in = k == 1 and embedder.takes_pixels
    if bytes_in:
        fast = PixelConv(conv, embedder.preprocessing).to(dtype, memory_format=torch.channels_last)
        pixels = torch.from_numpy(_patches(n))
        s = _in_turn(dict(ours=lambda: fast(fast.columns(pixels)), eager=lambda: conv(x)), repeats)
    else:
        fast, y = _fast(conv, x, dtype)
        s = _in_turn(dict(ours=lambda: fast(y), eager=lambda: conv(x)), repeats)
    ours, usual = (flop * n / s[who] / 1e9 for who in ("ours", "eager"))
    how = embedder.precision + ", bytes to map" * bytes_in
    note = f"{flop / 1e9:.2f} GFLOP a patch: {ours:.0f} GFLOP/s in {how}; {usual:.0f} in float32"
    return _row(f"embed_conv{k}", n / s["ours"], n / s["eager"], n, note)


def embed_layers(n=16, repeats=9):
    "Each of AlexNet's convolutions alone: what the ratio of the whole is made of."
    embedder = get_embedder("random")
    layers = _convolutions(embedder.module, normalise_patches(_patches(n)).contiguous())
    return [_layer(k, *layer, embedder, repeats) for k, layer in enumerate(layers, 1)]


embed_layers.names = [f"embed_conv{k}" for k in range(1, 6)]


def _usual(path, coords, module, spec, out):
    "OpenSlide per patch, PIL resize, float32 eager, one after the other, then one file."
    slide = openslide.OpenSlide(str(path))
    level, side = (round(spec.patch * spec.mpp / 0.25),) * 2, (spec.patch,) * 2
    features, batch = [], []
    for x, y in coords:
        patch = slide.read_region((int(x), int(y)), 0, level).convert("RGB").resize(side, Image.Resampling.BOX)
        batch.append(np.asarray(patch))
        if len(batch) == 64:
            features.append(_eager(module, batch))
            batch = []
    if batch:
        features.append(_eager(module, batch))
    with h5py.File(out, "w") as f:
        f["features"], f["coords"] = np.concatenate(features), coords


def _matmul_rate(n=1024, repeats=5):
    "FLOP/s of a large float32 matrix product on all threads: what the arithmetic allows"
    a = torch.randn(n, n)
    return 2 * n**3 / _in_turn(dict(product=lambda: a @ a), repeats)["product"]


def _from_slide(spec, ours, side, repeats):
    "Seconds to features of a slide: ours, the usual way, reading alone, the network alone; patches of the slide"
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as tmp:
        path, out = _slide(Path(tmp) / "slide.tif", side), Path(tmp) / "ours.h5"
        step = round(spec.patch * spec.mpp / 0.25)
        coords = np.array([(x, y) for y in range(0, side - step + 1, step) for x in range(0, side - step + 1, step)])
        n = len(coords)
        with WholeSlide(path) as slide:
            slide.sha256  # known before: a run hashes each slide once, when it is fetched
            patches = read_patches(slide, coords[:128], spec, threads)

            def whole():
                out.unlink(missing_ok=True)
                embed_slide(slide, coords, ours, out, spec, threads=threads)

            def reading():
                for i in range(0, n, 64):
                    read_patches(slide, coords[i : i + 64], spec, threads)

            usual = Path(tmp) / "usual.h5"
            runs = dict(ours=whole, usual=lambda: _usual(path, coords, ours.module, spec, usual), read=reading)
            seconds = _in_turn(runs | dict(net=lambda: ours(patches)), repeats)
        with h5py.File(out) as a, h5py.File(usual) as b:
            cosine = feature_cosines(a["features"][:], b["features"][:]).min()
    assert cosine > 0.995, f"features of the two ways differ: smallest cosine {cosine:.4f}"
    return n, n / seconds["ours"], n / seconds["usual"], n / seconds["read"], len(patches) / seconds["net"]


def slide_to_features(side=8064, repeats=3):
    "Slide file to feature file, and as a fraction of what the slower of reading and network reaches alone."
    embedder, threads = get_embedder("random"), os.cpu_count() or 1
    n, ours, usual, read, net = _from_slide(TileSpec(), embedder, side, repeats)
    limit, shared = min(read, net), read * net / (read + net)
    note = f"{embedder.precision}, {threads} workers; reference is OpenSlide, PIL, float32 eager in sequence"
    most = (
        f"reading alone {read:.0f}, network alone {net:.0f} patches/s; both keep all {threads} cores busy, so "
        f"together at most {shared:.0f}, {shared / limit:.2f} of the slower: {ours / shared:.2f} of that is reached"
    )
    return [_row("slide_to_features", ours, usual, n, note), _row("slide_to_features_of_limit", ours, limit, n, most)]


slide_to_features.names = ["slide_to_features", "slide_to_features_of_limit"]


@torch.inference_mode()
def _float32_rows(patch, n, side, repeats=3):
    "The measurements of `float32` for one patch size, in a process that has AVX2 only"
    embedder, patches = get_embedder("random", precision="float32"), _patches(n, patch)
    flop = sum(f for *_, f in _convolutions(embedder.module, normalise_patches(patches[:1])))
    rate, name = _matmul_rate(), "float32" if patch == 224 else f"float32_{patch}"
    s = _in_turn(dict(ours=lambda: embedder(patches), eager=lambda: _eager(embedder.module, patches)), repeats)
    apart = np.abs(embedder(patches) - _eager(embedder.module, patches)).max()
    assert apart < 1e-3, f"float32 features of the two ways differ by {apart:.2g}"
    limit, note = rate / flop, f"{patch} px, float32, AVX2 only, {torch.get_num_threads()} threads"
    bound = f"{flop / 1e9:.2f} GFLOP a patch at the {rate / 1e9:.0f} GFLOP/s of a matrix product on this machine"
    m, ours, usual, read, net = _from_slide(TileSpec(patch=patch), embedder, side, repeats)
    shared = ours * (1 / read + 1 / limit)
    parts = f"reading alone {read:.0f}, network alone {net:.0f}; {shared:.2f} of what reading and the arithmetic allow"
    eager = "reference is float32 eager, NCHW, batches of 64"
    plain = "reference is OpenSlide, PIL, float32 eager"
    return [
        _row(f"embed_alexnet_{name}", n / s["ours"], n / s["eager"], n, f"{note}; {eager}"),
        _row(f"embed_alexnet_{name}_of_limit", n / s["ours"], limit, n, f"{note}; {bound}"),
        _row(f"slide_to_features_{name}", ours, usual, m, f"{note}; {plain}; {parts}"),
    ]


def _fresh(program, **kwargs):
    "What a program prints last, run in a process of its own."
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        **kwargs,
    )
    return json.loads(run.stdout.splitlines()[-1])


def float32():
    "Features without bfloat16, as most readers' CPUs compute them: this machine restricted to AVX2."
    program = "import bench_embedding as b, json; print(json.dumps(b._float32_rows({}, {}, 4032), default=float))"
    return [row for size in ((224, 128), (96, 512)) for row in _fresh(program.format(*size), env=os.environ | AVX2)]


float32.names = [f"{name}_float32{tail}" for tail in ("", "_96") for name in ("embed_alexnet", "slide_to_features")]
float32.names += [f"embed_alexnet_float32{tail}_of_limit" for tail in ("", "_96")]


def import_features(repeats=5):
    "Importing the library in a fresh process, against the four packages it cannot do without."
    program = """import json, time
start = time.perf_counter()
import {}
print(json.dumps(time.perf_counter() - start))"""
    names, found = ("her2_mil.features", "torch, torchvision, openslide, h5py"), []
    for _ in range(repeats + 1):
        found.append([_fresh(program.format(name)) for name in names])
    ours, four = np.median(found[1:], 0)  # the first round fills the disk's cache and is not counted
    return dict(
        name="import_features",
        ours=ours,
        reference=four,
        unit="seconds",
        ratio=four / ours,
        n=repeats,
        note="her2_mil.features against torch, torchvision, OpenSlide and h5py",
    )
