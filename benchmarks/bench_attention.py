"Heatmap of 50,000 patches: from cached features to a colour overlay at 1/32 of the slide, ours and the usual loop over patches."

import statistics
import time

import numpy as np
import torch
from matplotlib import colormaps
from scipy.stats import rankdata

from her2_mil.attention import _blend, attention_map
from her2_mil.mil import AttentionMIL

PATCH, DOWNSAMPLE = 448, 32


def _slide(n, dim=256):
    "Coordinates, features, thumbnail and size of a slide of `n` patches."
    columns = int(np.ceil(np.sqrt(1.25 * n)))
    index = np.arange(n)
    coords = np.stack([index % columns, index // columns], 1) * PATCH
    size = tuple((coords.max(0) + PATCH).tolist())
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(0))
    thumbnail = np.full((round(size[1] / DOWNSAMPLE), round(size[0] / DOWNSAMPLE), 3), 230, dtype=np.uint8)
    return coords, features, thumbnail, size


@torch.inference_mode()
def _ours(model, coords, features, thumbnail, size):
    attention = model(features[None], torch.ones(1, len(features), dtype=torch.bool))[1][0].numpy()
    amap = attention_map(coords, attention, PATCH, size, DOWNSAMPLE, show="percentile")
    return amap, _blend(thumbnail, amap, "percentile", 2, grey=False, alpha=0.6, limit=10**6)[0]


@torch.inference_mode()
def _usual(model, coords, features, thumbnail, size):
    "As in widely used code: features in batches, scores added patch by patch, then each patch coloured and blended in turn."
    scores = torch.cat([model.w(torch.tanh(model.V(f))) for f in features.split(512)]).flatten().numpy()
    scores = rankdata(scores, "average") / len(scores)
    total, count = np.zeros(thumbnail.shape[:2]), np.zeros(thumbnail.shape[:2], dtype=np.uint16)
    place, side = np.ceil(coords / DOWNSAMPLE).astype(int), int(np.ceil(PATCH / DOWNSAMPLE))
    for s, (x, y) in zip(scores, place):
        total[y : y + side, x : x + side] += s
        count[y : y + side, x : x + side] += 1
    covered = count > 0
    total[covered] /= count[covered]
    cmap, image = colormaps["viridis"], thumbnail.copy()
    for x, y in place:
        block = (cmap(total[y : y + side, x : x + side])[..., :3] * 255).astype(np.uint8)
        image[y : y + side, x : x + side] = (0.6 * block + 0.4 * image[y : y + side, x : x + side]).astype(np.uint8)
    return np.where(covered, 100 * total, np.nan), image


def heatmap_50k(n=50_000, repeats=5):
    "One row of the benchmark table: seconds from cached features to the overlay, medians of runs taken in turn."
    coords, features, thumbnail, size = _slide(n)
    model = AttentionMIL(features.shape[1]).eval()
    times, results = dict(ours=[], usual=[]), {}
    for _ in range(repeats):
        for name, run in (("ours", _ours), ("usual", _usual)):
            start = time.perf_counter()
            results[name] = run(model, coords, features, thumbnail, size)
            times[name].append(time.perf_counter() - start)
    (ours_map, ours_image), (map_, image) = results["ours"], results["usual"]
    np.testing.assert_allclose(
        ours_map, map_ - 50 / n, atol=0.01
    )  # the usual percentile counts a patch as below itself
    assert np.abs(ours_image.astype(int) - image).max() <= 4
    ours, reference = (statistics.median(times[k]) for k in ("ours", "usual"))
    return dict(
        name="heatmap_50k",
        ours=ours,
        reference=reference,
        unit="s",
        ratio=reference / ours,
        n=n,
        note="attention from cached features, map and overlay at 1/32; reference adds and colours patch by patch",
    )


if __name__ == "__main__":
    print(heatmap_50k())
