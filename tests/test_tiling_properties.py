"""Properties of grid, coordinates and bags over drawn geometries."""

import functools
import gzip
import json
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st

from conftest import tiled
from her2_mil import tiling
from her2_mil.slide import SlideError, WholeSlide, open_row
from her2_mil.tiles import overlaps, resample
from her2_mil.tiling import (
    TileSpec,
    _box_means,
    _origins,
    check_coords,
    layout_attrs,
    patch_box,
    read_coords,
    read_patches,
    read_roi,
    roi_table,
    row_grid,
    row_roi,
    sample_bag,
    survey,
    tile_slide,
    tissue_mask,
    write_coords,
)

mpps = st.floats(0.2, 0.5)


@given(
    length=st.integers(1, 200_000),
    mpp=mpps,
    patch=st.integers(16, 512),
    overlap=st.integers(0, 15),
    target=st.floats(0.5, 2),
)
@settings(max_examples=200, deadline=None)
def test_patches_lie_inside_and_do_not_drift(length, mpp, patch, overlap, target):
    size, stride = patch * target / mpp, (patch - overlap) * target / mpp
    x = _origins(length, size, stride)
    assert len(x) >= 1 and x[0] == 0
    assert np.abs(x - np.arange(len(x)) * stride).max() <= 0.5
    if len(x) > 1:
        assert x[-1] + size <= length + 0.5 + 1e-3
    assert x[-1] + stride + size > length - 1  # no further patch would have fitted


@given(h=st.integers(2, 40), w=st.integers(2, 40), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=100, deadline=None)
def test_box_means_are_exact(h, w, seed, data):
    mask = np.random.default_rng(seed).random((h, w)) > 0.5
    edge = lambda n: sorted(data.draw(st.lists(st.floats(0, n), min_size=2, max_size=2, unique=True)))
    (x0, x1), (y0, y1) = edge(w), edge(h)
    if x1 - x0 < 1e-3 or y1 - y0 < 1e-3:
        return
    cover = lambda n, a, b: np.clip(np.minimum(b, np.arange(n) + 1) - np.maximum(a, np.arange(n)), 0, None)
    expected = (mask * np.outer(cover(h, y0, y1), cover(w, x0, x1))).sum() / ((x1 - x0) * (y1 - y0))
    found = _box_means(mask, *(np.array([v]) for v in (x0, x1, y0, y1)))[0, 0]
    assert abs(found - expected) < 1e-6


@given(start=st.floats(0, 9), step=st.floats(1, 9), n=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_area_weights_sum_to_one(start, step, n):
    w = overlaps(start, step, n, int(start + step * n) + 2)
    assert np.allclose(w.sum(1), 1, atol=1e-4) and (w >= 0).all()


@given(value=st.integers(0, 255), step=st.floats(1, 5), x=st.sampled_from([0.0, 0.25, 3.0]))
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_constant(value, step, x):
    image = np.full((80, 80, 3), value, np.uint8)
    assert np.abs(resample(image, (x, x), (step, step), (12, 12)).astype(int) - value).max() <= 1


@given(
    n=st.integers(0, 2000),
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    how=st.sampled_from(["uniform", "stratified"]),
)
@settings(max_examples=100, deadline=None)
def test_bags(n, size, seed, how):
    coords = np.stack([np.arange(n) % 37, np.arange(n) // 37], 1) * 448
    bag = sample_bag(n, size, seed, coords, how)
    assert len(bag) == min(n, size) == len(set(bag.tolist())) and (np.diff(bag) > 0).all()
    assert bag.dtype == np.int64 and ((bag >= 0) & (bag < max(n, 1))).all()
    assert (bag == sample_bag(n, size, seed, coords, how)).all()


specs = st.builds(
    TileSpec, patch=st.integers(16, 512), mpp=st.floats(0.1, 4), overlap=st.integers(0, 15), min_tissue=st.floats(0, 1)
)


@given(a=specs, b=specs)
@settings(max_examples=100, deadline=None)
def test_a_spec_survives_json_and_its_hash_tells_specs_apart(a, b):
    assert TileSpec.from_json(a.to_json()) == a
    assert (a.hash == b.hash) == (a == b)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("slide") / "s.tif"
    px = np.full((1500, 2100, 3), (243, 232, 238), np.uint8)
    px[200:1300, 300:1700] = np.clip(rng.normal((170, 90, 160), 25, (1100, 1400, 3)), 0, 255)
    tifffile.imwrite(
        path,
        px,
        **tiled(0.5, 256, "jpeg"),
    )
    with WholeSlide(path) as s:
        yield s


@given(patch=st.integers(32, 200), overlap=st.integers(0, 31), least=st.floats(0.05, 1), mpp=st.floats(0.5, 1.5))
@settings(max_examples=25, deadline=None)
def test_every_patch_has_its_tissue_and_none_is_missed(slide, patch, overlap, least, mpp):
    spec = TileSpec(patch=patch, overlap=overlap, min_tissue=least, mpp=mpp)
    grid, every = (
        tile_slide(slide, spec),
        tile_slide(slide, TileSpec(patch=patch, overlap=overlap, min_tissue=0.0, mpp=mpp)),
    )
    assert (grid.tissue >= least - 1e-6).all() and len(np.unique(grid.coords, axis=0)) == len(grid)
    assert set(map(tuple, grid.coords)) == set(map(tuple, every.coords[every.tissue >= least - 1e-9]))


@given(
    at=st.lists(st.tuples(st.integers(-300, 2200), st.integers(-300, 1600)), min_size=1, max_size=6),
    mpp=st.floats(0.5, 1.5),
    threads=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_patches_equal_single_fields_in_their_order(slide, at, mpp, threads):
    spec = TileSpec(patch=64, mpp=mpp)
    assert (
        read_patches(slide, np.array(at), spec, threads) == np.stack([slide.read(x, y, 64, mpp) for x, y in at])
    ).all()


def test_trident_layout(slide, tmp_path):
    "The dataset and attributes that TRIDENT writes and reads, ours and a file as TRIDENT makes it"
    grid = tile_slide(slide)
    with h5py.File(write_coords(tmp_path / "ours.h5", grid, slide)) as f:
        a = dict(f["coords"].attrs)
        assert f["coords"].shape == (len(grid), 2) and f["coords"].dtype == np.int64
    assert {
        "patch_size",
        "patch_size_level0",
        "level0_magnification",
        "target_magnification",
        "overlap",
        "name",
        "level0_width",
        "level0_height",
    } <= set(a)
    assert (
        json.loads(a["tile_spec"])["patch"] == a["patch_size"] == 224
        and a["level0_magnification"] == a["target_magnification"] == 20
    )
    with h5py.File(tmp_path / "theirs.h5", "w") as f:
        d = f.create_dataset("coords", data=grid.coords)
        d.attrs.update(
            dict(
                patch_size=224,
                patch_size_level0=224,
                level0_magnification=20,
                target_magnification=20,
                overlap=0,
                name="s",
                savetodir="x",
                level0_width=2100,
                level0_height=1500,
            )
        )
    coords, attrs = read_coords(tmp_path / "theirs.h5")
    assert (coords == grid.coords).all() and attrs["savetodir"] == "x"
    assert read_patches(
        slide, coords[:2], TileSpec(patch=int(attrs["patch_size"]), mpp=10 / attrs["target_magnification"])
    ).shape == (2, 224, 224, 3)


@pytest.mark.parametrize(
    "image", [np.full((200, 200, 3), v, np.uint8) for v in (0, 200, 240, 255)] + [np.full((1, 1, 3), 240, np.uint8)]
)
def test_an_empty_field_gets_no_tissue(image):
    assert not tissue_mask(image, 8.0).any()


def exposed(transmittance, glass, seed, noise=1.0):
    "uint8 image of a transmittance over glass with a little noise"
    image = transmittance * np.array(glass) + np.random.default_rng(seed).normal(0, noise, transmittance.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


glasses = st.tuples(st.integers(190, 250), st.floats(0, 0.14), st.integers(0, 5)).map(
    lambda g: (
        np.array([(0, 1, 0.4), (0, 0.6, 1), (0.5, 0, 1), (1, 0.4, 0), (0.2, 1, 0), (1, 0, 0.6)][g[2]]) * -g[0] * g[1]
        + g[0]
    )
)


@given(glass=glasses, seed=st.integers(0, 99), end=st.floats(0.93, 1))
@settings(max_examples=40, deadline=None)
def test_glass_of_any_tint_is_no_tissue(glass, seed, end):
    light = np.linspace(1, end, 300)[None, :, None].repeat(200, 0)
    assert not tissue_mask(exposed(light.repeat(3, 2), glass, seed), 8.0).any()


@given(glass=glasses, seed=st.integers(0, 99), strength=st.floats(0.15, 1))
@settings(max_examples=40, deadline=None)
def test_tissue_is_found_on_glass_of_any_tint(glass, seed, strength):
    rng, truth = np.random.default_rng(seed), np.zeros((200, 300), bool)
    truth[50:150, 80:220] = True
    density = np.where(
        truth[..., None], np.array([0.25, 0.5, 0.2]) * strength * rng.uniform(0.7, 1.3, (200, 300, 1)), 0
    )
    mask = tissue_mask(exposed(10**-density, glass, seed), 8.0)
    assert mask[truth].mean() > 0.98 and (~mask)[~truth].mean() > 0.98


@given(
    glass=glasses,
    colour=st.sampled_from([(40, 70, 190), (20, 140, 80), (30, 30, 36), (128, 128, 128)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_ink_and_dirt_are_no_tissue(glass, colour, seed):
    light = np.ones((200, 300, 3))
    light[60:120, 40:260] = np.array(colour) / 255  # what the ink lets through of the lamp's light
    assert tissue_mask(exposed(light, glass, seed), 8.0).mean() < 0.01


def test_bad_images_are_refused():
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), float)):
        with pytest.raises(SlideError, match="uint8"):
            tissue_mask(bad, 8.0)


def box(x, y, w, h=None):
    "Coordinates of a rectangle"
    h = h or w
    return [[[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]]


def feature(x, y, w, h=None, **properties):
    "A rectangle as QuPath exports it"
    return dict(type="Feature", geometry=dict(type="Polygon", coordinates=box(x, y, w, h)), properties=properties)


def geojson(path, *features):
    path.write_text(json.dumps(dict(type="FeatureCollection", features=list(features))))
    return path


CLASSES = [
    dict(classification=dict(name="Tumor")),
    dict(classification=dict(name="TUMOUR")),
    dict(classification=dict(names=["Tumor"])),
    dict(classification="tumour"),
    dict(classification=dict(names=["Tumour", "Positive"], color=[1, 2, 3])),
    dict(classification=dict(name="Tumor: Negative")),
    dict(classification=dict(name=" tumor ")),
]


@pytest.mark.parametrize("properties", CLASSES, ids=str)
def test_tumour_is_found_however_its_class_is_written(tmp_path, properties):
    path = geojson(tmp_path / "a.geojson", feature(0, 0, 10, **properties))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_roi(path).area == 100
    assert roi_table(path)["use"].tolist() == ["taken"]


@pytest.mark.parametrize(
    "properties",
    [
        dict(classification=dict(name="Invasive tumour")),
        dict(classification=dict(names=["Stroma", "Tumor"])),
        dict(classification=None),
        {},
        None,
        dict(classification=dict(name="Tumoroid")),
    ],
    ids=str,
)
def test_what_is_left_out_is_counted_and_said(tmp_path, properties):
    path = geojson(
        tmp_path / "a.geojson",
        feature(0, 0, 10, classification=dict(name="Tumor")),
        feature(50, 0, 10) | dict(properties=properties),
    )
    with pytest.warns(UserWarning, match="left out.*50% of the annotated area"):
        assert read_roi(path).area == 100
    assert roi_table(path).set_index("use")["objects"].to_dict() == {"taken": 1, "left out": 1}
    name = roi_table(path).set_index("use")["class"]["left out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_roi(path, f"tumour;{name.upper()}").area == read_roi(path, None).area == 200
        assert read_roi(path, exclude=[name]).area == 100


def test_any_nesting_and_compression_is_read(tmp_path):
    tumour, gc = dict(classification=dict(name="Tumor")), lambda *g: dict(type="GeometryCollection", geometries=list(g))
    polygon = lambda x: dict(type="Polygon", coordinates=box(x, 0, 10))
    nested = dict(
        type="Feature",
        properties=tumour,
        geometry=gc(
            gc(polygon(0), dict(type="Point", coordinates=[1, 2])),
            dict(type="MultiPolygon", coordinates=[box(20, 0, 10)]),
        ),
    )
    inner = dict(
        type="FeatureCollection",
        features=[feature(40, 0, 10, **tumour), dict(type="Feature", properties=tumour, geometry=None)],
    )
    parent = feature(60, 0, 10, **tumour, childObjects=[feature(80, 0, 10, **tumour)])
    line = dict(type="Feature", properties=tumour, geometry=dict(type="LineString", coordinates=[[0, 0], [9, 9]]))
    text = json.dumps([nested, inner, parent, line]).encode()
    for name, data in (
        ("a.geojson", text),
        ("a.geojson.gz", gzip.compress(text)),
        ("bom.json", b"\xef\xbb\xbf" + text),
        ("wide.json", text.decode().encode("utf-16")),
    ):
        (tmp_path / name).write_bytes(data)
        assert read_roi(tmp_path / name).area == 500
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.geojson", text)
    assert read_roi(tmp_path / "a.zip").area == 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"null",
        b'{"type": "Feature"}',
        b'{"features": 3}',
        b"\x1f\x8bnot gzip",
        b"PK\x03\x04not zip",
        b'{"features": [{"geometry": {"type": "Blob"}}]}',
        b"[" * 100_000,
        b'{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2], [0, 0]]]}',
        b'{"type": "Polygon", "coordinates": [[[0, 0], ["a", 1], [2, 2], [0, 0]]]}',
    ],
)
def test_whatever_is_no_annotation_is_one_sentence(tmp_path, data):
    (tmp_path / "a.geojson").write_bytes(data)
    with pytest.raises(SlideError, match="a.geojson: (not a GeoJSON|no polygon)"):
        read_roi(tmp_path / "a.geojson")


@pytest.fixture
def study(slide, tmp_path):
    "A folder with a slide and an annotation of its tissue, and the manifest's row"
    (tmp_path / "s.tif").symlink_to(slide.path)
    geojson(
        tmp_path / "s.geojson",
        feature(300, 200, 700, 1100, classification=dict(name="tumor")),
        feature(1000, 200, 300, 300, classification=dict(name="Stroma")),
    )
    return tmp_path, dict(slide_id="s", uri="s.tif", roi="s.geojson", roi_classes="Tumour;stroma", roi_origin="scanned")


def counted(monkeypatch):
    "How often a slide is really tiled"
    calls, real = [], tiling.tile_slide

    @functools.wraps(real)
    def tile_slide(*args, **kw):
        calls.append(args)
        return real(*args, **kw)

    monkeypatch.setattr(tiling, "tile_slide", tile_slide)
    return calls


def test_a_rows_grid_is_made_once_and_again_when_what_decides_it_changes(study, monkeypatch):
    root, row = study
    calls, cache = counted(monkeypatch), root / "cache"

    def grid(row=row, spec=TileSpec(), **kw):
        with open_row(row, root) as s:
            return row_grid(s, row, spec, root, cache)

    first = grid()
    again = grid(dict(row, slide_id="other"))  # the id does not decide the grid
    assert (
        len(calls) == 1
        and (again.coords == first.coords).all()
        and (again.mask == first.mask).all()
        and again.mask.dtype == bool
    )
    assert (
        (again.tissue == first.tissue).all()
        and again.patch_size_level0 == first.patch_size_level0
        and again.slide_size == first.slide_size
        and again.spec == first.spec
    )
    (root / "renamed.geojson").write_bytes((root / "s.geojson").read_bytes())
    grid(dict(row, roi="renamed.geojson"))  # content, not name
    assert len(calls) == 1
    geojson(root / "s.geojson", feature(300, 200, 500, 1100, classification=dict(name="tumor")))
    with pytest.raises(SlideError, match="no polygon of class DCIS"):
        grid(dict(row, roi_classes="DCIS"))
    changed = [
        grid(),
        grid(dict(row, roi="")),
        grid(dict(row, roi_classes="tumor")),
        grid(dict(row, roi_origin="slide")),
        grid(dict(row, mpp=0.4)),
        grid(spec=TileSpec(overlap=32)),
    ]
    assert len(calls) == 1 + len(changed) and len(changed[0]) < len(first)
    assert len(list((cache / "grids").iterdir())) == len(calls)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-700]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"HDF" * 999),
        lambda p: h5py.File(p, "r+").__delitem__("coords"),
        lambda p: h5py.File(p, "r+")["coords"].__setitem__((0, 0), 7),
        lambda p: h5py.File(p, "r+").attrs.__setitem__("key", "another"),
        lambda p: h5py.File(p, "w").close(),
    ],
)
def test_a_damaged_or_foreign_grid_is_made_anew(study, monkeypatch, damage):
    root, row = study
    calls = counted(monkeypatch)
    with open_row(row, root) as s:
        first = row_grid(s, row, root=root, cache=root / "cache")
        (path,) = (root / "cache" / "grids").iterdir()
        damage(path)
        again = row_grid(s, row, root=root, cache=root / "cache")
        assert len(calls) == 2 and (again.coords == first.coords).all() and (again.mask == first.mask).all()
        row_grid(s, row, root=root, cache=root / "cache")
    assert len(calls) == 2 and list((root / "cache" / "grids").iterdir()) == [path]


def test_many_writers_of_one_grid_harm_nothing(study):
    root, row = study

    def work(_):
        with open_row(row, root) as s:
            return row_grid(s, row, root=root, cache=root / "cache").coords

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    assert all((f == found[0]).all() for f in found) and len(list((root / "cache" / "grids").iterdir())) == 1


def test_roi_origin_says_where_an_annotation_counts_from(study):
    root, row = study
    with open_row(row, root) as s:
        s.__class__ = type("Cropped", (WholeSlide,), dict(origin=(40, 30)))
        assert row_roi(s, row, root).bounds == (340, 230, 1340, 1330)
        assert row_roi(s, row | dict(roi_origin="slide"), root).bounds == (300, 200, 1300, 1300)
        with pytest.raises(SlideError, match="roi_origin is 'cropped'"):
            row_roi(s, row | dict(roi_origin="cropped"), root)
        geojson(root / "s.geojson", feature(1500, 0, 1000, classification=dict(name="tumor")))
        with pytest.warns(UserWarning, match="44% of the annotation.*roi_origin"):
            row_roi(s, row, root)
        geojson(root / "s.geojson", feature(9000, 0, 1000, classification=dict(name="tumor")))
        with pytest.raises(SlideError, match="100% of the annotation.*roi_origin"):
            row_roi(s, row, root)
        geojson(root / "s.geojson", feature(2020, 0, 30, classification=dict(name="tumor")))  # glass
        with pytest.raises(SlideError, match="this slide's, and the manifest's roi_origin"):
            row_grid(s, row, root=root)


def test_a_dry_run_shows_classes_um_per_px_and_bags(study):
    import pandas as pd

    root, row = study
    cohort = pd.DataFrame(
        [
            row | dict(roi_classes=""),
            row | dict(slide_id="b", uri="", features="bag.h5"),
            row | dict(slide_id="c", uri="", features="lost.h5"),
        ]
    )
    (root / "bag.h5").touch()
    cohort.attrs["root"] = str(root)
    with pytest.warns(UserWarning, match="left out"):
        found = survey(cohort)
    assert found["roi_taken"].fillna("").tolist() == ["tumor (1)", "", ""] and found["roi_left_out"][0] == "Stroma (1)"
    assert found["problem"].str.contains("features column").tolist() == [False, False, True]
    assert found["mpp_read"][0] == 0.5 and found["mpp_y"][0] == found["mpp"][0]


def test_an_annotation_on_glass_is_said(study):
    root, row = study
    geojson(root / "s.geojson", feature(100, 0, 1000, 380, classification=dict(name="tumor")))
    with open_row(row, root) as s:
        with pytest.warns(UserWarning, match=r"only 4?\d% of the annotation lies on tissue.*roi_origin"):
            row_grid(s, row, root=root)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            geojson(root / "s.geojson", feature(300, 200, 700, 1100, classification=dict(name="tumor")))
            row_grid(s, row, root=root)


@given(
    mx=st.floats(0.2, 0.5),
    my=st.floats(0.2, 0.5),
    w=st.integers(600, 1500),
    h=st.integers(600, 1500),
    patch=st.integers(32, 200),
)
@settings(max_examples=10, deadline=None)
def test_patches_are_square_in_um_whatever_the_pixels(tmp_path_factory, mx, my, w, h, patch):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("oblong") / "s.tif"
    px = np.clip(rng.normal((170, 90, 160), 25, (h, w, 3)), 0, 255).astype(np.uint8)
    tifffile.imwrite(
        path,
        px,
        **tiled((mx, my), 256, "jpeg"),
    )
    with WholeSlide(path) as s:
        spec = TileSpec(patch=patch, min_tissue=0.0, snap=0.0)
        grid, a = tile_slide(s, spec), layout_attrs(s, spec)
        assert patch_box(a) == grid.patch_size_level0 == (a["patch_size_level0"], a["patch_size_level0_y"])
        assert np.abs(np.array(grid.patch_size_level0) * s.mpp - patch * 0.5).max() <= 0.5 * max(s.mpp) + 1e-6
        for axis in (0, 1):
            at = np.unique(grid.coords[:, axis])
            assert len(at) < 2 or np.abs(np.diff(at) - grid.patch_size_level0[axis]).max() <= 1


@given(
    c=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20),
    extra=st.integers(0, 2),
    kind=st.sampled_from(["int32", "int64", "float64", "uint32"]),
)
@settings(max_examples=50, deadline=None)
def test_whole_pixels_pass_unchanged(c, extra, kind):
    c = np.array(c, int).reshape(-1, 2)
    found = check_coords(c.astype(kind).reshape((1,) * extra + c.shape))
    assert found.dtype == np.int64 and (found == c).all() and found.shape == c.shape


@pytest.mark.parametrize(
    "coords, attrs, why",
    [
        ([[0.0, 0.4]], {}, "not whole numbers"),
        ([[0, np.nan]], {}, "1 of 1 coords are not finite"),
        ([[0, np.inf]], {}, "not finite"),
        ([[0, -5]], {}, "count from 0"),
        ([1, 2], {}, "shape"),
        ([[1, 2, 3]], {}, "shape"),
        ([["a", "b"]], {}, "shape"),
        ([[True, False]], {}, "shape"),
        (np.zeros((2, 3, 2)), {}, "shape"),
        ([[0, 0]], dict(unit="mm"), "unit of coords is 'mm'"),
        ([[0, 0]], dict(coord_unit="um"), "um/px is not known"),
        ([[0, 0]], dict(tile_size_um=256.0), "um/px is not known"),
        ([[0, 0]], dict(stamp_version="2.0"), "um/px is not known"),
        ([[0, 0]], dict(unit=b"microns"), "um/px is not known"),
        ([[0, 0]], dict(unit="um", mpp=np.nan), "um/px is not known"),
        ([[500, 0]], dict(level0_width=500, level0_height=99), "another slide"),
        ([[2.0**40, 0]], {}, "another"),
    ],
)
def test_coordinates_that_mean_something_else_are_refused(coords, attrs, why):
    with pytest.raises(SlideError, match=f"^bag.h5: .*{why}"):
        check_coords(coords, attrs, "bag.h5")


@pytest.mark.parametrize(
    "attrs, mpp",
    [
        (dict(unit="um"), 0.25),
        (dict(coord_unit="\u00b5m"), (0.25, 0.5)),
        (dict(tile_size_um=256.0), 0.25),
        (dict(unit="um", mpp=0.25), None),
        (dict(unit="um", mpp=0.25, mpp_y=0.5), None),
    ],
)
def test_coordinates_in_um_become_pixels_and_it_is_said(attrs, mpp):
    y = 4 if mpp != (0.25, 0.5) and "mpp_y" not in attrs else 2
    with pytest.warns(UserWarning, match="coords in um taken as level-0 px"):
        found = check_coords([[256.5, 256.0], [0.0, 10.1]], attrs, mpp=mpp)
    assert found.tolist() == [[1026, 256 * y], [0, round(10.1 * y)]]


def test_features_and_coordinates_of_another_length_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["features"], f["coords"] = np.ones((12, 8)), np.arange(22).reshape(11, 2)
    with pytest.raises(SlideError, match="12 features and 11 coords"):
        read_coords(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as f:
        f["feats"], f["coords"] = np.ones((1, 11, 8)), np.arange(22).reshape(1, 11, 2)
    assert read_coords(tmp_path / "b.h5")[0].shape == (11, 2)


@pytest.mark.parametrize(
    "attrs, mpp, box",
    [
        (dict(patch_size_level0=448), None, (448, 448)),
        (dict(patch_size_level0=448, patch_size_level0_y=224), None, (448, 224)),
        (dict(patch_size=256, downsample=np.array([4.0, 4.0]), patch_level=1), None, (1024, 1024)),
        (dict(tile_size_um=256.0), (0.25, 0.5), (1024, 512)),
        (dict(tile_size_um=np.float64(100), unit="um"), 0.3, (100 / 0.3, 100 / 0.3)),
    ],
)
def test_a_patchs_size_from_any_tools_attributes(attrs, mpp, box):
    assert patch_box(attrs, mpp) == pytest.approx(box)


@pytest.mark.parametrize(
    "attrs",
    [{}, dict(patch_size=224), dict(tile_size_um=256.0), dict(patch_size_level0=0), dict(patch_size_level0=np.nan)],
)
def test_a_patch_of_unknown_size_is_refused(attrs):
    with pytest.raises(SlideError):
        patch_box(attrs)


def test_a_level_near_the_target_is_read_as_it_is_and_the_grid_follows(tmp_path):
    px = np.clip(np.random.default_rng(0).normal((170, 90, 160), 25, (900, 1100, 3)), 0, 255).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "s.tif",
        px,
        **tiled(0.499, 256, "deflate"),
    )
    with WholeSlide(tmp_path / "s.tif") as s:
        near, exact = TileSpec(snap=0.01), TileSpec(snap=0.0)
        grid, a = tile_slide(s, near), layout_attrs(s, near)
        assert a["mpp_read"] == pytest.approx(0.499, abs=1e-5) and a["target_mpp"] == 0.5
        assert grid.patch_size_level0 == (224, 224) and (np.diff(np.unique(grid.coords[:, 0])) == 224).all()
        x, y = grid.coords[5]
        assert (read_patches(s, grid.coords[5:6], near)[0] == px[y : y + 224, x : x + 224]).all()
        assert layout_attrs(s, exact)["mpp_read"] == 0.5 and tile_slide(s, exact).coords[-1, 0] != grid.coords[-1, 0]
