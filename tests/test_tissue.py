"The tissue mask: no tumour is taken for ink, no film for tissue; on real sections where they are here."

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from her2_mil.slide import SlideError, WholeSlide
from her2_mil.tissue import TissueSpec, background_colour, tissue_mask

GLASS = {"white": (243, 243, 243), "pink": (235, 219, 234), "violet": (220, 207, 223), "dim": (200, 199, 202)}
OBJECT = (slice(80, 220), slice(100, 300))


def background(colour, seed=0):
    "300 x 400 px of background with a little noise"
    return np.random.default_rng(seed).normal(colour, 1.0, (300, 400, 3))


def picture(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def tissue(density, seed=0):
    "Transmittance of rough tissue, (140, 200, 3)"
    return 10 ** -(np.array(density) * np.random.default_rng(seed).uniform(0.5, 1.5, (140, 200, 1)))


@pytest.mark.parametrize("colour", GLASS.values(), ids=GLASS)
@pytest.mark.parametrize(
    "density",
    [(0.6, 0.52, 0.27), (0.75, 0.65, 0.35), (0.45, 0.37, 0.2), (0.1, 0.5, 0.15), (0.06, 0.09, 0.03)],
    ids=["blue-violet tumour", "dense blue tumour", "blue stroma", "eosin", "pale stroma"],
)
def test_tissue_is_found_whatever_its_hue(colour, density):
    image = background(colour)
    image[OBJECT] *= tissue(density)
    mask = tissue_mask(picture(image), 8.0)
    assert mask[OBJECT].mean() > 0.98 and (~mask).sum() > 0.98 * (mask.size - 140 * 200)


@pytest.mark.parametrize("colour", GLASS.values(), ids=GLASS)
@pytest.mark.parametrize(
    "ink",
    [(40, 70, 190), (20, 140, 80), (30, 30, 36), (245, 215, 40), (240, 130, 30)],
    ids="blue green black yellow orange".split(),
)
def test_ink_goes_and_the_tumour_beside_it_stays(colour, ink):
    image = background(colour)
    image[OBJECT] *= tissue((0.6, 0.52, 0.27))
    image[250:290, 20:380] = np.random.default_rng(1).normal(ink, 3.0, (40, 360, 3))
    mask = tissue_mask(picture(image), 8.0)
    assert mask[OBJECT].mean() > 0.98 and mask[230:].mean() < 0.01


@pytest.mark.parametrize("ink", [(200, 30, 40), (110, 40, 150), (25, 30, 90)], ids="red violet navy".split())
def test_ink_of_a_colour_that_stains_make_stays(ink):
    image = background(GLASS["white"])
    image[OBJECT] = np.random.default_rng(1).normal(ink, 3.0, (140, 200, 3))
    assert tissue_mask(picture(image), 8.0)[OBJECT].all()


@pytest.mark.parametrize("colour", GLASS.values(), ids=GLASS)
def test_background_alone_is_empty(colour):
    image, (y, x) = background(colour), np.indices((300, 400))
    film = 10 ** (-np.array([0.01, 0.12, 0.04]) * np.exp(-((y - 150) ** 2 + (x - 200) ** 2) / 9000)[..., None])
    light = np.linspace(1, 0.9, 400)[None, :, None]
    white = image.copy()
    white[:100, :150] = 255  # what a scanner fills in
    for case in (image, image * film, image * light, white, np.pad(image, [(50, 50), (70, 70), (0, 0)])):
        assert not tissue_mask(picture(case), 8.0).any()


def test_a_frame_does_not_hide_what_it_frames():
    image = background(GLASS["white"])
    image[OBJECT] *= tissue((0.2, 0.5, 0.2))
    framed = np.pad(image, [(90, 90), (300, 300), (0, 0)])
    mask = tissue_mask(picture(framed), 8.0)
    assert mask[90:-90, 300:-300][OBJECT].mean() > 0.98
    mask[90:-90, 300:-300] = False
    assert not mask.any()


@pytest.mark.parametrize("density", [(0.6, 0.52, 0.27), (0.1, 0.5, 0.15), (0.35, 0.45, 0.2)])
def test_a_field_without_background_is_all_tissue(density):
    image = 245 * tissue(density)
    assert tissue_mask(picture(image), 8.0).all() and background_colour(picture(image))[0].tolist() == [255.0] * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (40, 1), (257, 300)])
@pytest.mark.parametrize("mpp", [0.25, 4.0, 8.0, 50.0])
def test_any_size_and_resolution(size, mpp):
    assert not tissue_mask(np.full((*size, 3), 240, np.uint8), mpp).any()
    assert tissue_mask(np.full((*size, 3), (150, 60, 120), np.uint8), mpp).shape == size


def test_strips_leave_no_seam():
    "Rows of strips are computed with their context: a slide of several strips equals its transpose's transpose"
    image = np.random.default_rng(0).normal(GLASS["pink"], 1.0, (900, 400, 3))
    image[240:280, 50:350] *= tissue((0.6, 0.5, 0.3))[:40].repeat(2, 1)[:, :300]
    image[500:640, 100:300] *= tissue((0.06, 0.09, 0.03))
    image = picture(image)
    assert (tissue_mask(image, 8.0) == tissue_mask(image.transpose(1, 0, 2), 8.0).T).mean() > 0.9999


def test_plain_hsv_is_two_thresholds():
    spec = TissueSpec(method="hsv")
    image = np.zeros((1, 4, 3), np.uint8)
    image[0] = [(240, 240, 240), (240, 220, 235), (20, 0, 20), (240, 229, 240)]
    assert tissue_mask(image, 8.0, spec).tolist() == [[False, True, False, False]]
    assert tissue_mask(image, 8.0, TissueSpec(method="hsv", hsv_saturation=0.04)).tolist() == [
        [False, True, False, True]
    ]
    with pytest.raises(SlideError, match="give 'density' or 'hsv'"):
        tissue_mask(image, 8.0, TissueSpec(method="HSV"))


@pytest.mark.parametrize("name", ["B4", "C3", "C5"])
def test_spots_lie_on_tissue_and_places_away_from_them_do_not(real, name):
    spots = pd.read_csv(real / f"her2st/ST-spotfiles/{name}_selection.tsv", sep="\t")
    design = np.c_[spots[["x", "y"]], np.ones(len(spots))]
    affine = np.linalg.lstsq(design, spots[["pixel_x", "pixel_y"]], rcond=None)[0]
    mpp = 200 / np.sqrt(abs(np.linalg.det(affine[:2])))
    image = cv2.imread(str(next((real / "her2st/ST-imgs").rglob(f"{name}/*.jpg"))))[..., ::-1]
    assert 0.68 < mpp < 0.69
    mask = tissue_mask(image, mpp)
    array = np.stack(np.meshgrid(np.arange(1, 34), np.arange(1, 36)), -1).reshape(-1, 2)
    far = np.hypot(*(array[:, None] - design[None, :, :2]).transpose(2, 0, 1)).min(1) >= 2.5
    empty = np.c_[array[far], np.ones(far.sum())] @ affine
    empty = empty[((empty >= 0) & (empty < image.shape[1::-1])).all(1)]
    at = lambda places: mask[tuple(places.astype(int).T[::-1])].mean()
    assert at(spots[["pixel_x", "pixel_y"]].to_numpy()) >= 0.98 and at(empty) <= 0.02 and len(empty) > 500


def test_no_strongly_stained_area_is_lost_on_whole_sections(real):
    files = sorted((real / "tcga_thumbnails").glob("*.jpg"))
    if not files:
        pytest.skip("no pictures of whole sections here")
    for path in files:
        image = np.asarray(Image.open(path).convert("RGB"))
        red, green, _ = cv2.split(cv2.blur(image, (3, 3)).astype(np.int16))
        stained = (green < 170) & (red >= green + 10)
        assert (stained & ~tissue_mask(image, 15.0)).sum() < 0.01 * stained.sum(), path.name


@pytest.mark.parametrize("name", [1008, 1015, 1019])
def test_a_breast_region_is_tissue_throughout(real, name):
    with WholeSlide(real / f"bcss/wsi/bcss_{name}.tif") as slide:
        assert tissue_mask(slide.thumbnail(8.0), 8.0).mean() > 0.99
