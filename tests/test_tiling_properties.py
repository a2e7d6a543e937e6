"""Properties of grid, coordinates and bags over drawn geometries."""
import json

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st

from her2_mil.slide import SlideError, WholeSlide, _overlaps, _resample
from her2_mil.tiling import (TileSpec, _box_means, _origins, read_coords, read_patches, sample_bag, tile_slide, tissue_mask,
                             write_coords)

mpps = st.floats(.2, .5)


@given(length=st.integers(1, 200_000), mpp=mpps, patch=st.integers(16, 512), overlap=st.integers(0, 15), target=st.floats(.5, 2))
@settings(max_examples=200, deadline=None)
def test_patches_lie_inside_and_do_not_drift(length, mpp, patch, overlap, target):
    size, stride = patch*target/mpp, (patch - overlap)*target/mpp
    x = _origins(length, size, stride)
    assert len(x) >= 1 and x[0] == 0
    assert np.abs(x - np.arange(len(x))*stride).max() <= .5
    if len(x) > 1: assert x[-1] + size <= length + .5 + 1e-3
    assert x[-1] + stride + size > length - 1  # no further patch would have fitted


@given(h=st.integers(2, 40), w=st.integers(2, 40), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=100, deadline=None)
def test_box_means_are_exact(h, w, seed, data):
    mask = np.random.default_rng(seed).random((h, w)) > .5
    edge = lambda n: sorted(data.draw(st.lists(st.floats(0, n), min_size=2, max_size=2, unique=True)))
    (x0, x1), (y0, y1) = edge(w), edge(h)
    if x1 - x0 < 1e-3 or y1 - y0 < 1e-3: return
    cover = lambda n, a, b: np.clip(np.minimum(b, np.arange(n) + 1) - np.maximum(a, np.arange(n)), 0, None)
    expected = (mask*np.outer(cover(h, y0, y1), cover(w, x0, x1))).sum()/((x1 - x0)*(y1 - y0))
    found = _box_means(mask, *(np.array([v]) for v in (x0, x1, y0, y1)))[0, 0]
    assert abs(found - expected) < 1e-6


@given(start=st.floats(0, 9), step=st.floats(1, 9), n=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_area_weights_sum_to_one(start, step, n):
    w = _overlaps(start, step, n, int(start + step*n) + 2)
    assert np.allclose(w.sum(1), 1, atol=1e-4) and (w >= 0).all()


@given(value=st.integers(0, 255), step=st.floats(1, 5), x=st.sampled_from([0., .25, 3.]))
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_constant(value, step, x):
    image = np.full((80, 80, 3), value, np.uint8)
    assert np.abs(_resample(image, (x, x), (step, step), (12, 12)).astype(int) - value).max() <= 1


@given(n=st.integers(0, 2000), size=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), how=st.sampled_from(['uniform', 'stratified']))
@settings(max_examples=100, deadline=None)
def test_bags(n, size, seed, how):
    coords = np.stack([np.arange(n) % 37, np.arange(n)//37], 1)*448
    bag = sample_bag(n, size, seed, coords, how)
    assert len(bag) == min(n, size) == len(set(bag.tolist())) and (np.diff(bag) > 0).all()
    assert bag.dtype == np.int64 and ((bag >= 0) & (bag < max(n, 1))).all()
    assert (bag == sample_bag(n, size, seed, coords, how)).all()


specs = st.builds(TileSpec, patch=st.integers(16, 512), mpp=st.floats(.1, 4), overlap=st.integers(0, 15), min_tissue=st.floats(0, 1))


@given(a=specs, b=specs)
@settings(max_examples=100, deadline=None)
def test_a_spec_survives_json_and_its_hash_tells_specs_apart(a, b):
    assert TileSpec.from_json(a.to_json()) == a
    assert (a.hash == b.hash) == (a == b)


@pytest.fixture(scope='module')
def slide(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('slide')/'s.tif'
    px = np.full((1500, 2100, 3), (243, 232, 238), np.uint8)
    px[200:1300, 300:1700] = np.clip(rng.normal((170, 90, 160), 25, (1100, 1400, 3)), 0, 255)
    tifffile.imwrite(path, px, tile=(256, 256), photometric='rgb', compression='jpeg', metadata=None, resolution=(1e4/.5,)*2, resolutionunit='CENTIMETER')
    with WholeSlide(path) as s: yield s


@given(patch=st.integers(32, 200), overlap=st.integers(0, 31), least=st.floats(.05, 1), mpp=st.floats(.5, 1.5))
@settings(max_examples=25, deadline=None)
def test_every_patch_has_its_tissue_and_none_is_missed(slide, patch, overlap, least, mpp):
    spec = TileSpec(patch=patch, overlap=overlap, min_tissue=least, mpp=mpp)
    grid, every = tile_slide(slide, spec), tile_slide(slide, TileSpec(patch=patch, overlap=overlap, min_tissue=0., mpp=mpp))
    assert (grid.tissue >= least - 1e-6).all() and len(np.unique(grid.coords, axis=0)) == len(grid)
    assert set(map(tuple, grid.coords)) == set(map(tuple, every.coords[every.tissue >= least - 1e-9]))


@given(at=st.lists(st.tuples(st.integers(-300, 2200), st.integers(-300, 1600)), min_size=1, max_size=6), mpp=st.floats(.5, 1.5), threads=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_patches_equal_single_fields_in_their_order(slide, at, mpp, threads):
    spec = TileSpec(patch=64, mpp=mpp)
    assert (read_patches(slide, np.array(at), spec, threads) == np.stack([slide.read(x, y, 64, mpp) for x, y in at])).all()


def test_trident_layout(slide, tmp_path):
    "The dataset and attributes that TRIDENT writes and reads, ours and a file as TRIDENT makes it"
    grid = tile_slide(slide)
    with h5py.File(write_coords(tmp_path/'ours.h5', grid, slide)) as f:
        a = dict(f['coords'].attrs)
        assert f['coords'].shape == (len(grid), 2) and f['coords'].dtype == np.int64
    assert {'patch_size', 'patch_size_level0', 'level0_magnification', 'target_magnification', 'overlap', 'name', 'level0_width', 'level0_height'} <= set(a)
    assert json.loads(a['tile_spec'])['patch'] == a['patch_size'] == 224 and a['level0_magnification'] == a['target_magnification'] == 20
    with h5py.File(tmp_path/'theirs.h5', 'w') as f:
        d = f.create_dataset('coords', data=grid.coords)
        d.attrs.update(dict(patch_size=224, patch_size_level0=224, level0_magnification=20, target_magnification=20, overlap=0, name='s',
                            savetodir='x', level0_width=2100, level0_height=1500))
    coords, attrs = read_coords(tmp_path/'theirs.h5')
    assert (coords == grid.coords).all() and attrs['savetodir'] == 'x'
    assert read_patches(slide, coords[:2], TileSpec(patch=int(attrs['patch_size']), mpp=10/attrs['target_magnification'])).shape == (2, 224, 224, 3)


@pytest.mark.parametrize('image', [np.full((200, 200, 3), v, np.uint8) for v in (0, 200, 240, 255)] + [np.full((1, 1, 3), 240, np.uint8)])
def test_an_empty_field_gets_no_tissue(image):
    assert not tissue_mask(image, 8.).any()


def exposed(transmittance, glass, seed, noise=1.):
    "uint8 image of a transmittance over glass with a little noise"
    image = transmittance*np.array(glass) + np.random.default_rng(seed).normal(0, noise, transmittance.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


glasses = st.tuples(st.integers(190, 250), st.floats(0, .14), st.integers(0, 5)).map(
    lambda g: np.array([(0, 1, .4), (0, .6, 1), (.5, 0, 1), (1, .4, 0), (.2, 1, 0), (1, 0, .6)][g[2]])*-g[0]*g[1] + g[0])


@given(glass=glasses, seed=st.integers(0, 99), end=st.floats(.93, 1))
@settings(max_examples=40, deadline=None)
def test_glass_of_any_tint_is_no_tissue(glass, seed, end):
    light = np.linspace(1, end, 300)[None, :, None].repeat(200, 0)
    assert not tissue_mask(exposed(light.repeat(3, 2), glass, seed), 8.).any()


@given(glass=glasses, seed=st.integers(0, 99), strength=st.floats(.15, 1))
@settings(max_examples=40, deadline=None)
def test_tissue_is_found_on_glass_of_any_tint(glass, seed, strength):
    rng, truth = np.random.default_rng(seed), np.zeros((200, 300), bool)
    truth[50:150, 80:220] = True
    density = np.where(truth[..., None], np.array([.25, .5, .2])*strength*rng.uniform(.7, 1.3, (200, 300, 1)), 0)
    mask = tissue_mask(exposed(10**-density, glass, seed), 8.)
    assert mask[truth].mean() > .98 and (~mask)[~truth].mean() > .98


@given(glass=glasses, colour=st.sampled_from([(40, 70, 190), (20, 140, 80), (30, 30, 36), (128, 128, 128)]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_ink_and_dirt_are_no_tissue(glass, colour, seed):
    light = np.ones((200, 300, 3))
    light[60:120, 40:260] = np.array(colour)/255  # what the ink lets through of the lamp's light
    assert tissue_mask(exposed(light, glass, seed), 8.).mean() < .01


def test_bad_images_are_refused():
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), float)):
        with pytest.raises(SlideError, match='uint8'): tissue_mask(bad, 8.)
