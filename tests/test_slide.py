"""Slides as files: formats written for the test, damage, downloads, and where their pixels lie."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from hypothesis import given, settings, strategies as st

from conftest import tiled
from her2_mil.metadata import level_step
from her2_mil.slide import (
    SlideError,
    WholeSlide,
    _NativeTiles,
    _resample,
    fetch_slide,
    open_row,
    register_opener,
    slide_files,
    slide_sha256,
)
from her2_mil.tiling import TileSpec, _survey_one, layout_attrs, read_patches, read_roi, row_grid, tile_slide
from her2_mil.tissue import tissue_mask


def test_missing_tiles_and_edge_tiles_read_as_openslide_does(tmp_path):
    "A sparse TIFF whose size is no multiple of its tiles"
    rng = np.random.default_rng(0)

    def tiles():
        for i in range(12):
            yield None if i in (1, 5, 6) else rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)

    with tifffile.TiffWriter(tmp_path / "sparse.tif") as t:
        t.write(
            tiles(),
            shape=(300, 450, 3),
            dtype="uint8",
            **tiled(0.5, 128, "jpeg"),
        )
    with WholeSlide(tmp_path / "sparse.tif") as s:
        at = np.array([(0, 0), (100, 60), (350, 200), (-20, 250)])
        assert s._native(0) is not None
        for side, mpp in ((150, 0.5), (60, 1.0)):
            assert (s.fields(at, side, mpp) == np.stack([s.read(*c.tolist(), side, mpp) for c in at])).all()


@given(
    tile=st.sampled_from([(16, 16), (48, 32), (112, 112)]),
    k=st.integers(1, 4),
    side=st.integers(1, 120),
    size=st.tuples(st.integers(120, 500), st.integers(120, 500)),
    n=st.integers(0, 12),
    threads=st.integers(1, 3),
    run=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_fields_are_what_read_gives_one_by_one(tmp_path_factory, tile, k, side, size, n, threads, run, seed):
    """Fields of whole blocks and others, overlapping, apart, over the border and outside: whatever the tiles,
    the ratio and how many are averaged in one go"""
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("fields") / "s.tif"
    px = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    tifffile.imwrite(
        path,
        px,
        tile=tile,
        photometric="rgb",
        compression="jpeg",
        metadata=None,
        resolution=(1e4 / 0.25,) * 2,
        resolutionunit="CENTIMETER",
    )
    at = rng.integers(-side * k, max(size), (n, 2))
    at[::2] -= at[::2] % k  # every other field is whole blocks
    with WholeSlide(path) as s:
        s._native(0).run = run
        found = s.fields(at, side, 0.25 * k, threads)
        assert found.shape == (n, side, side, 3)
        for f, c in zip(found, at.tolist()):
            assert np.array_equal(f, s.read(*c, side, 0.25 * k))


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    "The https path, against a local server: right hash of either kind, wrong hash, missing file"
    import http.server, threading
    from functools import partial
    from her2_mil import core, fetch as fetching

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.svs").write_bytes(b"slide")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        fetching, "download", lambda url, *args, **kw: core.download(url.replace("https:", "http:"), *args, **kw)
    )
    url, good, md5 = (
        f"https://127.0.0.1:{server.server_port}/a.svs",
        hashlib.sha256(b"slide").hexdigest(),
        hashlib.md5(b"slide").hexdigest(),
    )
    fetch = partial(fetch_slide, cache=tmp_path / "cache")
    for wrong in (dict(sha256="0" * 64), dict(md5="0" * 32)):
        with pytest.raises(SlideError, match="another hash"):
            fetch(url, **wrong)
    assert not list((tmp_path / "cache" / "slides").iterdir())
    path = fetch(url, sha256=good)
    assert path.read_bytes() == b"slide" and fetch(url, md5=md5).read_bytes() == b"slide"
    with pytest.raises(SlideError, match="md5 is"):
        fetch(url, sha256=good, md5="0" * 32)
    with pytest.raises(SlideError, match="download failed"):
        fetch(url + "x", sha256=good)
    server.shutdown()
    assert fetch(url, sha256=good, md5=md5) == path  # kept: no server needed


def test_openslide_reads_what_the_fast_path_does_not(tmp_path):
    "A lossless TIFF falls back with one warning and gives the same fields"
    px = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "z.tif",
        px,
        **tiled(0.5, 128, "zlib"),
    )
    with WholeSlide(tmp_path / "z.tif") as s:
        with pytest.warns(UserWarning, match="read by OpenSlide"):
            a = read_patches(s, np.array([(10, 20)]), TileSpec(patch=64))
        assert (a[0] == px[20:84, 10:74]).all()


def pyramid(path, px, mpp, downsamples=(1,), tile=(128, 128), resolution=None, **how):
    "A tiled JPEG TIFF of level 0 and what is averaged from it; the pixels of the levels as the file has them"
    with tifffile.TiffWriter(path) as t:
        for d in downsamples:
            size = px.shape[1] // d, px.shape[0] // d
            t.write(
                cv2.resize(px, size, interpolation=cv2.INTER_AREA),
                tile=tile,
                photometric="rgb",
                compression="jpeg",
                metadata=None,
                subfiletype=int(d > 1),
                resolution=resolution or (1e4 / mpp,) * 2,
                resolutionunit="CENTIMETER",
                **(how if d == 1 else {}),
            )
    with tifffile.TiffFile(path) as t:
        return [p.asarray() for p in t.pages]


@pytest.mark.parametrize("threads, kept, level", [(1, 0, 0), (3, 0, 0), (1, 0.6, 1), (3, 0.9, 1)])
def test_a_damaged_tile_is_named_and_stops_all_threads(tmp_path, threads, kept, level, monkeypatch):
    "One tile is overwritten from some byte on: its place is named on level 0, and nobody reads to the end"
    px = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    pyramid(tmp_path / "torn.tif", px, 0.5, (1, 2), tile=(64, 64))
    read = []
    monkeypatch.setattr(
        _NativeTiles, "decode", lambda *args, old=_NativeTiles.decode: (read.append(1), time.sleep(0.004), old(*args))
    )  # so that no thread is through before another begins
    with WholeSlide(tmp_path / "torn.tif") as s:
        tiles, side, mpp = s._native(level), 64 * 2**level, 0.5 * 2**level
        tiles.run, bad = 2, 3 * tiles.across + 5
        with open(tmp_path / "torn.tif", "r+b") as f:
            n = int(tiles.counts[bad])
            f.seek(int(tiles.offsets[bad]) + int(n * kept))
            f.write(bytes(n - int(n * kept)))
        for shift, ratio in ((0, 2), (20, 1.9)):  # runs of whole tiles; fields one by one
            read.clear()
            at = np.mgrid[5:13, 3:11].reshape(2, -1).T * side + shift  # what this thread begins with
            with pytest.raises(
                SlideError, match=rf"cannot decode the tile at \({5 * side}, {3 * side}\), level {level}"
            ):
                s.fields(at, 32, mpp * ratio, threads, snap=-1)
            assert len(read) < len(at)


def test_levels_whose_size_is_rounded_lie_where_level_0_does(tmp_path):
    """OpenSlide averages the ratios of width and height to one downsample and divides by it: what it is asked
    for is multiplied by the same"""
    px = cv2.resize(
        np.random.default_rng(0).integers(0, 255, (32, 624, 3), dtype=np.uint8),
        (20_000, 1003),
        interpolation=cv2.INTER_CUBIC,
    )
    page = pyramid(tmp_path / "wide.tif", px, 0.25, (1, 4))[1]
    with WholeSlide(tmp_path / "wide.tif") as s:
        assert s._osr.level_downsamples[1] > 4.001 and s.level_downsamples[1] == 4
        for x in (400, 4000, 12000, 19000):
            for found in (s.read(x, 400, 100, 1.2, level=1), s.fields([(x, 400)], 100, 1.2)[0]):
                error = [
                    np.abs(found.astype(int) - _resample(page, (x / 4 + shift, 100), (1.2, 1.2), (100, 100))).mean()
                    for shift in (0, -1, 1)
                ]
                assert error[0] < min(error[1:]) / 3


def test_fields_of_levels_and_of_unequal_um_per_px(tmp_path):
    "Three levels, x finer than y: whole blocks in one direction only are none"
    px = np.random.default_rng(1).integers(0, 255, (1792, 1344, 3), dtype=np.uint8)
    for ratio in (1.0, 1.08, 2.0):
        pyramid(tmp_path / "p.tif", px, 0.25, (1, 4, 16), tile=(112, 96), resolution=(4e4, 4e4 / ratio))
        with WholeSlide(tmp_path / "p.tif") as s:
            assert s.mpp == pytest.approx((0.25, 0.25 * ratio)) and len(s.level_sizes) == 3
            for mpp in (0.5, 1.0, 1.3, 2.0, 4.5):
                at = np.array(
                    [(0, 0), (64, 128), (65, 131), (900, 900), (-40, 60), (1300, 1700), (1345, 5), (-9999, 3)]
                )
                assert (s.fields(at, 40, mpp, 2) == np.stack([s.read(*c.tolist(), 40, mpp) for c in at])).all()


def test_a_missing_tile_of_an_aperio_level_is_made_from_a_finer_one(tmp_path):
    "As OpenSlide does it; on level 0 there is none finer"
    px = np.full((1024, 1024, 3), 128, np.uint8)
    pyramid(
        tmp_path / "a.svs",
        px,
        0.25,
        (1, 4),
        description="Aperio Image Library v11\n1024x1024 (128x128) JPEG/RGB|AppMag = 40|MPP = 0.25",
    )
    with tifffile.TiffFile(tmp_path / "a.svs", mode="r+b") as t:
        counts = t.pages[1].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    with WholeSlide(tmp_path / "a.svs") as s:
        assert s.properties["openslide.vendor"] == "aperio" and s._native(0) is not None
        with pytest.warns(UserWarning, match="missing tiles"):
            assert np.abs(s.fields([(0, 0)], 64, 1.2)[0].astype(int) - 128).max() < 9


@pytest.mark.parametrize("tile", [64, 512])
def test_tiles_are_kept_for_the_fields_that_follow(tmp_path, tile, monkeypatch):
    "Fields at an odd ratio, and a thumbnail: a tile is decoded little more than once, small or large"
    pyramid(tmp_path / "s.tif", np.zeros((2048, 2048, 3), np.uint8), 0.25, tile=(tile, tile))
    read = []
    monkeypatch.setattr(
        _NativeTiles,
        "decode",
        lambda self, tx, ty, into, old=_NativeTiles.decode: (read.append((tx, ty)), old(self, tx, ty, into)),
    )
    with WholeSlide(tmp_path / "s.tif") as s:
        for once in (
            lambda: s.fields(np.mgrid[1:1900:100, 1:1900:100].reshape(2, -1).T, 50, 0.55),
            lambda: s.thumbnail(7.3),
        ):
            read.clear()
            once()
            assert len(set(read)) >= 0.8 * (2048 // tile) ** 2 and len(read) <= 1.6 * len(set(read))


def test_bytes_behind_a_tile_and_coords_of_another_shape(tmp_path):
    "A count that is one too long is read as OpenSlide reads it; three numbers are no corner"
    pyramid(tmp_path / "s.tif", np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8), 0.5)
    with tifffile.TiffFile(tmp_path / "s.tif", mode="r+b") as t:
        counts = t.pages[0].tags["TileByteCounts"]
        counts.overwrite([n + 1 for n in counts.value[:-1]] + [counts.value[-1]])
    with WholeSlide(tmp_path / "s.tif") as s:
        assert (s.fields([(9, 9)], 99, 0.5)[0] == s.read(9, 9, 99, 0.5)).all()
        for odd in ([(1, 2, 3), (4, 5, 6)], [1, 2]):
            with pytest.raises(SlideError, match="pass \\(N, 2\\)"):
                s.fields(odd, 9, 0.5)


def dicom_level(path, px, mpp, series, level):
    "One level of a whole slide as a DICOM file of JPEG tiles, row by row, as scanners write it"
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

    h, w = px.shape[:2]
    tiles = [px[y : y + 128, x : x + 128] for y in range(0, h, 128) for x in range(0, w, 128)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        VLWholeSlideMicroscopyImageStorage,
        generate_uid(),
        JPEGBaseline8Bit,
    )
    d, measures, group = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128), Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000] * 2
    group.PixelMeasuresSequence = [measures]
    for name, value in dict(
        SOPClassUID=meta.MediaStorageSOPClassUID,
        SOPInstanceUID=meta.MediaStorageSOPInstanceUID,
        SeriesInstanceUID=series,
        ImageType=["DERIVED" if level else "ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"],
        Modality="SM",
        TotalPixelMatrixColumns=w,
        TotalPixelMatrixRows=h,
        Rows=128,
        Columns=128,
        NumberOfFrames=len(tiles),
        SamplesPerPixel=3,
        PhotometricInterpretation="YBR_FULL_422",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        DimensionOrganizationType="TILED_FULL",
        SharedFunctionalGroupsSequence=[group],
    ).items():
        setattr(d, name, value)
    d.PixelData = encapsulate(
        [
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(t), level=95, colorspace="rgb", outcolorspace="ycbcr", subsampling="422"
            )
            for t in tiles
        ]
    )
    d["PixelData"].is_undefined_length = True
    d.save_as(path, enforce_file_format=True)


def test_a_folder_of_dicom_files_is_one_slide(tmp_path):
    "Two levels, opened by their folder or by either file: same pixels, same hash, fields by OpenSlide"
    from pydicom.uid import generate_uid

    coarse = np.random.default_rng(0).integers(60, 250, (16, 24, 3), dtype=np.uint8)
    px, series = cv2.resize(coarse, (768, 512), interpolation=cv2.INTER_CUBIC), generate_uid()
    for level in (0, 1):
        dicom_level(
            tmp_path / f"{level}.dcm",
            cv2.resize(px, None, fx=0.5**level, fy=0.5**level, interpolation=cv2.INTER_AREA),
            0.25 * 2**level,
            series,
            level,
        )
    with WholeSlide(tmp_path) as s, WholeSlide(tmp_path / "1.dcm") as other:
        assert (
            s.properties["openslide.vendor"] == "dicom"
            and s.level_sizes == ((768, 512), (384, 256))
            and s.mpp == (0.25, 0.25)
        )
        assert s.sha256 == other.sha256
        with pytest.warns(UserWarning, match="read by OpenSlide"):
            fields = s.fields([(0, 0), (100, 60)], 200, 0.25)
        for f, (x, y) in zip(fields, [(0, 0), (100, 60)]):
            assert np.abs(f.astype(int) - px[y : y + 200, x : x + 200]).mean() < 3
        assert (other.read(0, 0, 100, 0.5) == s.read(0, 0, 100, 0.5)).all()


FILL, NOT_TAKEN = (
    (250, 246, 238),
    {(0, 0), (1, 0), (2, 0), (1, 2)},
)  # colour of what was not imaged; row and column of photos


def mirax_slide(path, px, missing=NOT_TAKEN, fill=FILL, levels=4):
    """A small MIRAX slide, for real ones have gigabytes: photos that overlap and stand off their grid, each
    cut into four JPEGs, some never taken; 0.25 um/px"""
    rows, cols = ((n - 32) // 480 for n in px.shape[:2])  # photos of 512 px that overlap by 32
    at = lambda i: 480 * i - 3 * (i % 2)  # where a photo begins, in px of level 0
    photos = [(i, j) for i in range(rows) for j in range(cols)]
    taken, most = np.zeros((2 * rows, 2 * cols), bool), 2 ** (levels - 1)
    mosaic = np.full(
        (*(-(-n // most) * most * 256 for n in taken.shape), 3), fill, np.uint8
    )  # levels are made of photos side by side, overlaps and all
    for i, j in set(photos) - set(missing):
        taken[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], mosaic[512 * i : 512 * i + 512, 512 * j : 512 * j + 512] = (
            True,
            px[at(i) : at(i) + 512, at(j) : at(j) + 512],
        )
    data, records = bytearray(), []
    for k in [2**n for n in range(levels)]:
        small, record = cv2.resize(mosaic, None, fx=1 / k, fy=1 / k, interpolation=cv2.INTER_AREA), []
        for y, x in [
            (y, x) for y in range(0, 2 * rows, k) for x in range(0, 2 * cols, k) if taken[y : y + k, x : x + k].any()
        ]:
            jpeg = imagecodecs.jpeg8_encode(
                np.ascontiguousarray(small[y // k * 256 :, x // k * 256 :][:256, :256]), level=95
            )
            record += [
                y * 2 * cols + x,
                len(data),
                len(jpeg),
                0,
            ]  # number of its first image in level 0, place, length, data file
            data += jpeg
        records.append(record)
    positions = b"".join(struct.pack("<bii", 1, at(j), at(i)) for i, j in photos)
    records.append([0, 0, len(data), len(positions), 0])
    head = b"01.02" + b"a-slide"
    index = [len(head) + 8, len(head) + 8 + 4 * levels] + [0] * len(
        records
    )  # where the records of levels and of other things are listed
    for n, record in enumerate(records):
        index[2 + n] = len(head) + 4 * len(index)
        index += [
            0,
            len(head) + 4 * len(index) + 8,
            max(1, len(record) // 4),
            0,
            *record,
        ]  # an empty page and where the next is; that one's length, none to follow, its items
    zoom = lambda n: dict(
        OVERLAP_X=32 / 2**n,
        OVERLAP_Y=32 / 2**n,
        MICROMETER_PER_PIXEL_X=0.25 * 2**n,
        MICROMETER_PER_PIXEL_Y=0.25 * 2**n,
        IMAGE_FORMAT="JPEG",
        DIGITIZER_WIDTH=256,
        DIGITIZER_HEIGHT=256,
        IMAGE_FILL_COLOR_BGR=fill[2] * 65536 + fill[1] * 256 + fill[0],
        IMAGE_CONCAT_FACTOR=int(n > 0),
    )
    ini = dict(
        GENERAL=dict(
            SLIDE_ID="a-slide",
            IMAGENUMBER_X=2 * cols,
            IMAGENUMBER_Y=2 * rows,
            OBJECTIVE_MAGNIFICATION=20,
            CameraImageDivisionsPerSide=2,
        ),
        HIERARCHICAL=dict(
            INDEXFILE="Index.dat",
            HIER_COUNT=1,
            HIER_0_NAME="Slide zoom level",
            HIER_0_COUNT=levels,
            NONHIER_COUNT=1,
            NONHIER_0_COUNT=1,
            NONHIER_0_NAME="VIMSLIDE_POSITION_BUFFER",
            **{f"HIER_0_VAL_{n}_SECTION": f"ZOOM_{n}" for n in range(levels)},
        ),
        DATAFILE=dict(FILE_COUNT=1, FILE_0="Data0000.dat"),
        **{f"ZOOM_{n}": zoom(n) for n in range(levels)},
    )
    text = "".join(f"[{section}]\n" + "".join(f"{k} = {v}\n" for k, v in d.items()) for section, d in ini.items())
    path.with_suffix("").mkdir()
    path.touch()
    (path.with_suffix("") / "Slidedat.ini").write_text(text, encoding="utf-8-sig")
    (path.with_suffix("") / "Index.dat").write_bytes(head + struct.pack(f"<{len(index)}i", *index))
    (path.with_suffix("") / "Data0000.dat").write_bytes(data + positions)
    return path


@pytest.fixture(scope="module")
def mirax(tmp_path_factory):
    """Tissue on glass; neither the left column of photos nor one across the tissue's left border was taken:
    path, pixels, and where they were imaged"""
    px, rng = np.full((1472, 2432, 3), (243, 232, 238), np.uint8), np.random.default_rng(0)
    tissue = (rng.normal(0, 25, (70, 70, 1)) + (170, 90, 160)).clip(0, 255).astype(np.uint8)
    px[200:1300, 1200:2300] = cv2.resize(tissue, (1100, 1100), interpolation=cv2.INTER_CUBIC)
    imaged = np.ones(px.shape[:2], bool)
    imaged[:, :477] = imaged[512:960, 989:1437] = False  # neighbours overlap the photo in the middle
    return mirax_slide(tmp_path_factory.mktemp("mirax") / "case.mrxs", px), px, imaged


def at_level(array, k):
    "What a level k times as coarse shows of a level-0 array: its area averages"
    return cv2.resize(array.astype(np.float32), None, fx=1 / k, fy=1 / k, interpolation=cv2.INTER_AREA)


def test_mirax_pixels_are_where_they_were_written(mirax):
    """Size, um/px and levels; every level, and 0.5 um/px from level 0; level 0 begins with the scanner's
    field, not with the first photo"""
    path, px, imaged = mirax
    with WholeSlide(path) as s:
        assert (
            s.properties["openslide.vendor"] == "mirax"
            and s.mpp == (0.25, 0.25)
            and s.level_downsamples == (1, 2, 4, 8)
        )
        assert s.level_sizes == ((2432, 1472), (1216, 736), (608, 368), (304, 184))
        assert [s.properties[f"openslide.bounds-{k}"] for k in ("x", "y", "width", "height")] == [
            "477",
            "0",
            "1955",
            "1472",
        ]
        for level, k in [(0, 1), (0, 2), (1, 2), (2, 4), (3, 8)]:
            found, written = (
                s.read(480, 160, (1952 // k, 1312 // k), 0.25 * k, level=level),
                at_level(px[160:, 480:], k),
            )
            assert np.abs(found - written)[at_level(imaged[160:, 480:], k) == 1].mean() < 1.5
            tissue = np.s_[144 // k : 1040 // k, 1024 // k : 1720 // k]  # across the borders of photos
            fit = lambda *d, a=found, b=written, t=tissue: np.abs(a - np.roll(b, d, (0, 1)))[t].mean()
            assert fit(0, 0) < min(fit(1, 0), fit(-1, 0), fit(0, 1), fit(0, -1)) / 2
        assert (s.read(100, 60, 600, 0.5, snap=-1) == s.read(100, 60, 600, 0.5, level=0)).all()
        assert (
            s.read(100, 60, 600, 0.5) == s._region(1, (50, 30, 650, 630))
        ).all()  # a level at the target is read as it is


def test_what_mirax_did_not_image_is_its_background(mirax):
    """OpenSlide gives transparent black there, half transparent at the borders of coarse levels; neither may
    darken a pixel"""
    path, px, imaged = mirax
    with WholeSlide(path) as s:
        assert s.properties["openslide.background-color"] == "FAF6EE"
        for level, k in enumerate((1, 2, 4, 8)):
            w, h = s.level_sizes[level]
            raw, found = (
                np.asarray(s._osr.read_region((0, 0), level, (w, h))),
                s.read(0, 0, (w, h), 0.25 * k, level=level),
            )
            empty = cv2.erode((at_level(imaged, k) == 0).astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1) > 0
            assert empty.sum() > 100 and not raw[empty].any() and (found[empty] == FILL).all()
            assert found[: 160 // k].min() > 225  # glass and what was not imaged
            if level:
                assert (
                    (raw[: 160 // k, :, 3] > 0) & (raw[: 160 // k, :, 3] < 255)
                ).any()  # so half transparent pixels were among them


def test_fields_of_mirax_are_read_by_openslide(mirax):
    "The fast path reads TIFF alone: one warning, and the fields that `read` gives, in their order"
    at = np.array([(1700, 400), (0, 0), (900, 400), (2300, 1300), (-50, 700)])
    with WholeSlide(mirax[0]) as s:
        with pytest.warns(UserWarning, match="read by OpenSlide.*format mirax"):
            fields = s.fields(at, 224, 0.5, threads=2)
        assert (fields == np.stack([s.read(*c.tolist(), 224, 0.5) for c in at])).all()


def test_a_byte_of_a_mirax_folder_changes_its_hash(mirax, tmp_path):
    "A slide is its file and its folder: the same copy has the same hash, one bit in the data another"
    copy, data = shutil.copy(mirax[0], tmp_path), tmp_path / "case" / "Data0000.dat"
    shutil.copytree(mirax[0].with_suffix(""), tmp_path / "case")
    assert slide_sha256(copy) == slide_sha256(mirax[0])
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert slide_sha256(copy) != slide_sha256(mirax[0])


@pytest.mark.parametrize("fill", [FILL, (255, 255, 255)])
def test_mirax_tissue_is_tiled_and_what_was_not_imaged_is_not(mirax, tmp_path, fill):
    "The mask is the tissue that was imaged, whatever the colour of the rest, and a patch's share of it is true"
    truth = mirax[2] & (mirax[1][..., 1] < 200)
    with WholeSlide(mirax_slide(tmp_path / "case.mrxs", mirax[1], fill=fill)) as s:
        mask, share = tissue_mask(s.thumbnail(8.0), 8.0), at_level(truth, 32)
        assert mask[share == 1].mean() > 0.98 and mask[share == 0].mean() < 0.02
        grid = tile_slide(s)
        inside = np.array([truth[y : y + 448, x : x + 448].mean() for x, y in grid.coords])
        assert len(grid) >= 6 and (inside > 0.42).all()
        assert (
            np.abs(inside - grid.tissue).max() < 0.1
        )  # an outline may lie one pixel of 8 um off, a patch is 112 um wide


def test_a_mirax_file_without_its_folder_is_refused(tmp_path, mirax):
    """Scanners write a small JPEG as the .mrxs file: neither it nor a TIFF of that name must pass for the
    slide, even where the manifest has um/px"""
    Image.fromarray(np.full((90, 120, 3), 240, np.uint8)).save(tmp_path / "case.mrxs", "jpeg")
    pyramid(tmp_path / "other.mrxs", np.zeros((300, 300, 3), np.uint8), 0.25)
    shutil.copytree(mirax[0].with_suffix(""), tmp_path / "LOUD")
    (tmp_path / "LOUD.MRXS").touch()
    for name in ("case.mrxs", "other.mrxs", "LOUD.MRXS"):
        with pytest.raises(SlideError, match="beside it a folder"):
            WholeSlide(tmp_path / name, mpp=0.25)


def test_a_qupath_annotation_of_a_mirax_slide_lies_on_its_tissue(mirax, tmp_path):
    """QuPath counts pixels from the scanned part, we from the scanner's field: for the grid, the dry run and
    the features"""
    x, y = [1440, 2300], [200, 1300]
    ring = [[a - 477, b] for a, b in [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])]]
    (tmp_path / "roi.geojson").write_text(
        json.dumps(
            dict(
                type="Feature",
                properties=dict(classification=dict(name="Tumor")),
                geometry=dict(type="Polygon", coordinates=[ring]),
            )
        )
    )
    row = dict(slide_id="case", uri="case.mrxs", roi="roi.geojson", sha256=None, mpp=None)
    shutil.copy(mirax[0], tmp_path), shutil.copytree(mirax[0].with_suffix(""), tmp_path / "case")
    with WholeSlide(mirax[0]) as s:
        assert s.origin == (477, 0)
        roi = read_roi(tmp_path / "roi.geojson", origin=s.origin)
        assert roi.bounds == (x[0], y[0], x[1], y[1])
        grid = tile_slide(s, roi=roi)
        assert len(grid) and (row_grid(s, row, TileSpec(), tmp_path).coords == grid.coords).all()
    with pytest.warns(UserWarning, match="read by OpenSlide"):
        assert _survey_one(row, tmp_path, TileSpec(), None)[0]["patches"] == len(grid)


@pytest.mark.parametrize(
    "bounds, origin",
    [
        (("5", "-7", "10", "20"), (5, -7)),
        (("5", "7", "10", None), (0, 0)),
        (("", "7", "10", "20"), (0, 0)),
        (("1.5", "7", "10", "20"), (0, 0)),
    ],
)
def test_bounds_are_taken_as_qupath_takes_them(mirax, bounds, origin):
    "All four whole numbers, or none of them"
    with WholeSlide(mirax[0]) as s:
        s.properties = {
            f"openslide.bounds-{k}": v for k, v in zip(("x", "y", "width", "height"), bounds) if v is not None
        }
        assert s.origin == origin


@pytest.mark.parametrize(
    "mpp, target",
    [
        (0.25, 0.5),
        (0.2199, 0.5),
        (0.2527, 0.5),
        (0.2999, 0.5),
        (0.32, 0.5),
        (0.499, 0.5),
        (0.25, 0.35),
        (0.25, 0.6),
        (0.25, 1.0),
    ],
)
def test_trident_reads_our_fields(mirax, mpp, target):
    """It takes a patch's side on level 0 from the ratio of the two magnifications; whole numbers, so to a few
    percent; whatever the objective"""
    with WholeSlide(mirax[0], mpp=mpp) as s:
        a = layout_attrs(s, TileSpec(mpp=target))
    assert s.properties["openslide.objective-power"] == "20"
    assert a["patch_size"] * a["level0_magnification"] / a["target_magnification"] == pytest.approx(
        a["patch_size_level0"], rel=0.04
    )


# ---- levels ----


@pytest.mark.parametrize(
    "full, size, tile, before, said, step",
    [
        ((86016, 89600), (5632, 5632), (512, 512), (1, 2, 4, 8), 0, 16),  # CAMELYON16's test_001
        ((10240, 9216), (2560, 2560), (512, 512), (1, 2), 0, 4),
        ((10240, 9216), (1024, 1024), (512, 512), (1, 2, 4, 8), 0, 16),
        ((9216, 9216), (1536, 1536), (512, 512), (1, 2, 4), 0, 8),  # a square: both axes agree, and are wrong
        ((1000, 1000), (512, 512), (64, 64), (1,), 0, 2),
        ((1000, 800), (512, 448), (64, 64), (1,), 0, 2),
        ((10240, 9216), (2560, 2560), (256, 256), (1, 2), 0, 4),  # padded to blocks of two tiles
        ((4000, 3000), (1536, 1024), (512, 512), (1,), 3, 3),  # the file says it in another place
        ((4096, 4096), (512, 512), (512, 512), (1, 2, 4), 0, 8),  # one tile, and right as it is
        ((4096, 4096), (512, 512), (512, 512), (1, 2, 4, 8), 0, 16),  # one tile once more: padded
        ((4443, 3567), (2221, 1783), (256, 256), (1,), 0, 2),
        ((4096, 4096), (1365, 1365), (256, 256), (1,), 0, 3),
        ((1000, 1000), (400, 400), (256, 256), (1,), 0, 2.5),
        ((20000, 1003), (5000, 250), (128, 128), (1,), 0, 4),
        ((6912, 6912), (256, 256), (256, 256), (1, 3, 9), 0, 27),
        ((46000, 32914), (2875, 2057), (240, 240), (1, 4), 0, 16),
        ((46000, 32914), (1437, 1028), (240, 240), (1, 4, 16), 0, 32),
        ((1000, 1000), (500, 250), (64, 64), (1,), 0, None),  # another ratio along y
        ((1000, 1000), (448, 448), (64, 64), (1,), 0, None),  # cut to whole tiles
        ((5000, 4000), (2500, 2200), None, (1,), 0, None),
        ((1536, 1536), (512, 512), (256, 256), (1,), 0, None),  # 3, or 4 and padded
    ],
)
def test_the_step_of_a_level_is_the_true_one_or_none(full, size, tile, before, said, step):
    "Rounded sizes, padded ones, and what cannot be told"
    assert level_step(full, size, tile, before, said) == (None if step is None else pytest.approx(step, rel=2e-3))


def smooth(h, w, seed=3):
    "Pinks that change over some 80 px: JPEG and averaging leave them as they are"
    shade = cv2.resize(
        np.random.default_rng(seed).uniform(0, 1, (max(2, h // 80), max(2, w // 80), 1)),
        (w, h),
        interpolation=cv2.INTER_CUBIC,
    )[..., None].clip(0, 1)
    return np.rint(np.array([240, 220, 235]) - shade * [60, 150, 90]).astype(np.uint8)


def padded(path, px, to, downsamples, photometric="rgb", compression="jpeg"):
    "A pyramid whose coarse levels are filled up with black to multiples of `to` px; no level says its um/px"
    with tifffile.TiffWriter(path) as t:
        for d in downsamples:
            a = cv2.resize(px, None, fx=1 / d, fy=1 / d, interpolation=cv2.INTER_AREA)
            h, w = (-(-n // to) * to for n in a.shape[:2])
            level = np.pad(a, ((0, h - len(a)), (0, w - a.shape[1]), (0, 0)))
            t.write(
                level if d > 1 else a,
                tile=(to, to),
                photometric=photometric,
                compression=compression,
                metadata=None,
                subfiletype=int(d > 1),
                resolution=(4e4,) * 2,
                resolutionunit="CENTIMETER",
            )


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_padded_levels_lie_where_level_0_does(tmp_path, compression):
    "On our path and on OpenSlide's: thumbnail, fields and reading from any level are those of level 0"
    px = smooth(1440, 2000)
    padded(tmp_path / "p.tif", px, 128, (1, 2, 4, 8), compression=compression)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slide = WholeSlide(tmp_path / "p.tif")
    with slide as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert s._osr.level_downsamples[3] != pytest.approx(8, rel=0.01) and s.level_downsamples == (1, 2, 4, 8)
        assert s.level_sizes == ((2000, 1440), (1000, 720), (500, 360), (250, 180))
        assert np.abs(s.thumbnail(4.0).astype(int) - at_level(px, 16)).mean() < 2.5
        for mpp, level in ((1.0, 2), (2.0, 3), (2.2, 3)):
            for x, y in ((1200, 900), (100, 60), (1700, 1200)):
                size = [int((n - v) * 0.25 / mpp) for n, v in zip(s.size, (x, y))]
                truth = _resample(px, (x, y), (mpp / 0.25,) * 2, size)
                for found in (
                    s.read(x, y, size, mpp),
                    s.read(x, y, size, mpp, level=level),
                    s.fields([(x, y)], min(size), mpp)[0],
                ):
                    n, m = found.shape[:2]
                    assert np.abs(found.astype(int) - truth[:n, :m]).mean() < 3
        assert (s.read(2040, 0, 8, 2.0) == 255).all() and (
            s.fields([(2040, 0)], 8, 2.0) == 255
        ).all()  # what pads a level is no part of the slide


def test_a_level_that_fits_nothing_is_left_out_and_said(tmp_path):
    "Squeezed along x alone; coarse views come from level 0, and a worker does not warn again"
    px = smooth(1440, 2000)
    with tifffile.TiffWriter(tmp_path / "s.tif") as t:
        for i, size in enumerate([(2000, 1440), (500, 720)]):
            t.write(
                cv2.resize(px, size, interpolation=cv2.INTER_AREA),
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                metadata=None,
                subfiletype=int(i > 0),
                resolution=(4e4,) * 2,
                resolutionunit="CENTIMETER",
            )
    with pytest.warns(UserWarning, match=r"s.tif: 1 of 2 levels \(500 x 720 px\) fit no step"):
        s = WholeSlide(tmp_path / "s.tif")
    assert s.level_downsamples == (1,) and np.abs(s.thumbnail(4.0).astype(int) - at_level(px, 16)).mean() < 2.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(s)).level_sizes == s.level_sizes
    s.close()


# ---- colours ----


def jpeg_tiff(path, px, encode, photometric, tile=128):
    "A tiled TIFF of given JPEG streams under a given tag"
    tiles = [
        encode(np.ascontiguousarray(px[y : y + tile, x : x + tile]), i)
        for i, (y, x) in enumerate(product(range(0, len(px), tile), range(0, px.shape[1], tile)))
    ]
    with tifffile.TiffWriter(path) as t:
        t.write(
            iter(tiles),
            shape=px.shape,
            dtype="uint8",
            tile=(tile, tile),
            photometric="rgb",
            compression=7,
            metadata=None,
            resolution=(2e4,) * 2,
            resolutionunit="CENTIMETER",
        )
    with tifffile.TiffFile(path, mode="r+b") as t:
        for page in t.pages:
            page.tags[262].overwrite(photometric)
    return path


def ycbcr(tile, i=0):  # with a JFIF marker, as any encoder writes it
    out = io.BytesIO()
    Image.fromarray(tile).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def bare(data):
    return data[:2] + data[2 + 2 + int.from_bytes(data[4:6], "big") :]  # the same without its first marker


def rgb(tile, i=0):
    return imagecodecs.jpeg8_encode(tile, level=95, colorspace="rgb", outcolorspace="rgb")  # with Adobe's marker


def adobe_ycbcr(tile, i=0):
    return bare(ycbcr(tile))[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x01" + bare(ycbcr(tile))[2:]


def both(tile, i=0):
    return ycbcr(tile)[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + ycbcr(tile)[2:]


def subsampled(tile, i=0):
    return bare(imagecodecs.jpeg8_encode(tile, level=95, colorspace="rgb", outcolorspace="ycbcr", subsampling="420"))


@pytest.mark.parametrize("encode", [ycbcr, rgb, adobe_ycbcr, subsampled])
@pytest.mark.parametrize("photometric", [2, 6])
def test_colours_are_those_that_the_jpeg_streams_name(tmp_path, encode, photometric):
    "Tag and marker agree, or do not: on our path, OpenSlide's and in thumbnails, the pixels written"
    px = smooth(384, 512)
    with WholeSlide(jpeg_tiff(tmp_path / "c.tif", px, encode, photometric)) as s:
        for found in (s.read(100, 60, 200, 0.5), s.fields([(100, 60)], 200, 0.5)[0]):
            assert np.abs(found.astype(int) - px[60:260, 100:300]).mean() < 3
        assert np.abs(s.thumbnail(4.0).astype(int) - at_level(px, 8)).mean() < 3
        assert (
            s.fields([(3, 5), (-20, 300)], 150, 0.9)
            == np.stack([s.read(x, y, 150, 0.9) for x, y in ((3, 5), (-20, 300))])
        ).all()


def test_streams_without_a_marker_are_what_the_tag_says(tmp_path):
    "As Aperio writes RGB, and everybody YCbCr in a TIFF"
    px = np.full((256, 256, 3), (200, 120, 170), np.uint8)
    for encode, photometric in (
        (lambda t, i: bare(ycbcr(t)), 6),
        (
            lambda t, i: imagecodecs.jpeg8_encode(
                t, level=95, colorspace="ycbcr", outcolorspace="ycbcr", subsampling="444"
            ),
            2,
        ),
    ):
        data = encode(px[:128, :128], 0)
        if photometric == 2:
            encode = lambda t, i, data=bare(data): data  # bytes that were not converted, nor say so
        with WholeSlide(jpeg_tiff(tmp_path / "b.tif", px, encode, photometric)) as s:
            assert (
                np.abs(s.read(0, 0, 100, 0.5).astype(int) - px[0, 0]).max() < 5
                and np.abs(s.fields([(0, 0)], 100, 0.5).astype(int) - px[0, 0]).max() < 5
            )


@pytest.mark.parametrize("encode", [both, lambda t, i: (rgb, ycbcr)[i % 2](t)])
def test_streams_that_contradict_themselves_are_refused(tmp_path, encode):
    "Two markers that say different things; tiles of one kind beside tiles of the other"
    px = np.full((384, 512, 3), (200, 120, 170), np.uint8)
    for photometric in (2, 6):
        with pytest.raises(SlideError, match="c.tif: its JPEG streams are .*tag"):
            WholeSlide(jpeg_tiff(tmp_path / "c.tif", px, encode, photometric))


def test_a_plain_tiff_whose_tag_and_stream_disagree_is_refused(tmp_path):
    "Strips are read by Pillow, which believes the tag"
    px = np.full((64, 64, 3), (200, 120, 170), np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as t:
        t.write(
            iter([ycbcr(px)]),
            shape=px.shape,
            dtype="uint8",
            rowsperstrip=64,
            photometric="rgb",
            compression=7,
            metadata=None,
            resolution=(2e4,) * 2,
            resolutionunit="CENTIMETER",
        )
    with tifffile.TiffFile(tmp_path / "s.tif", mode="r+b") as t:
        t.pages[0].tags[262].overwrite(2)
    with pytest.raises(SlideError, match="its JPEG streams are ycbcr"):
        WholeSlide(tmp_path / "s.tif")


def colourless(folder):
    "Files that hold no RGB of 8 bits, by name"
    px = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    grey, tile, per_cm = (
        px[..., 0],
        dict(tile=(128, 128), metadata=None),
        dict(resolution=(2e4,) * 2, resolutionunit="CENTIMETER"),
    )
    planes = dict(
        tile=(128, 128),
        photometric="minisblack",
        metadata=dict(axes="CYX", PhysicalSizeX=0.5, PhysicalSizeY=0.5),
        ome=True,
    )
    tifffile.imwrite(folder / "pages.ome.tif", np.ascontiguousarray(px.transpose(2, 0, 1)), **planes)
    tifffile.imwrite(
        folder / "fluorescence.ome.tif", np.ascontiguousarray(px.transpose(2, 0, 1)).astype(np.uint16), **planes
    )
    tifffile.imwrite(
        folder / "planes.tif",
        np.ascontiguousarray(px.transpose(2, 0, 1)),
        photometric="minisblack",
        planarconfig="separate",
        **tile,
        **per_cm,
    )
    tifffile.imwrite(folder / "grey.tif", grey, photometric="minisblack", **tile, **per_cm)
    tifffile.imwrite(folder / "white.tif", grey, photometric="miniswhite", **tile, **per_cm)
    tifffile.imwrite(folder / "grey16.tif", grey.astype(np.uint16), photometric="minisblack", **tile, **per_cm)
    tifffile.imwrite(folder / "strip.tif", grey, photometric="minisblack", metadata=None, **per_cm)
    tifffile.imwrite(folder / "two.tif", px[..., :2], photometric="minisblack", planarconfig="contig", **tile, **per_cm)
    tifffile.imwrite(folder / "jpeg.tif", grey, photometric="minisblack", compression="jpeg", **tile, **per_cm)
    tifffile.imwrite(folder / "deep.tif", px.astype(np.uint16) * 257, photometric="rgb", **tile, **per_cm)
    (
        Image.fromarray(grey).save(folder / "grey.png"),
        Image.fromarray(grey.astype(np.uint16)).save(folder / "deep.png"),
        Image.fromarray(grey).save(folder / "grey.jpg"),
    )
    return sorted(folder.iterdir())


def test_slides_without_colour_are_told_to_become_rgb(tmp_path):
    "One channel a page, in whatever form; with um/px given, too"
    for path in colourless(tmp_path):
        for mpp in (None, 0.5):
            with pytest.raises(SlideError, match=rf"^{path.name}: .*convert it to RGB"):
                WholeSlide(path, mpp=mpp)


# ---- what is opened ----


def focal_planes(path, order):
    "An SVS of planes told by their grey: (plane, downsample) in the order of the file"
    with tifffile.TiffWriter(path) as t:
        for z, d in order:
            n = 512 // d
            text = f"Aperio Image Library v12\r\n{n}x{n} [0,0 {n}x{n}] (128x128) JPEG/RGB Q=70"
            text += f"|AppMag = 40|MPP = 0.25|OffsetZ = {z}"
            t.write(
                np.full((n, n, 3), 60 * (z + 1), np.uint8),
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                metadata=None,
                description=text,
            )
    return path


def test_one_focal_plane_is_read_at_every_um_per_px(tmp_path):
    "Pages of one size come several times: the first of full size, and no coarse level of another"
    for i, order in enumerate(
        [[(z, d) for d in (1, 4) for z in range(3)], [(0, 1), (1, 1), (2, 1), (2, 4), (1, 4), (0, 4)]]
    ):
        with pytest.warns(UserWarning, match="3 pictures of full size, such as focal planes"):
            s = WholeSlide(focal_planes(tmp_path / f"{i}.svs", order))
        with s:
            assert {
                int(round(v))
                for mpp in (0.25, 0.5, 1.0, 2.0)
                for v in (
                    s.read(0, 0, 8, mpp).mean(),
                    s.fields([(0, 0)], 8, mpp).mean(),
                    s.thumbnail(mpp)[:4, :4].mean(),
                )
            } == {60}


def test_what_openslide_refuses_gets_a_sentence_that_says_why(tmp_path):
    "Focal planes one after the other, a picture in strips with a pyramid: never one picture of them as if it were all"
    px = np.full((300, 400, 3), 128, np.uint8)
    focal_planes(tmp_path / "z.svs", [(z, d) for z in range(3) for d in (1, 4)])
    for mpp in (None, 0.25):
        with pytest.raises(
            SlideError,
            match="z.svs: it holds 3 pictures of 512 x 512 px, such as focal planes.*OpenSlide does not open",
        ):
            WholeSlide(tmp_path / "z.svs", mpp=mpp)
    how = dict(photometric="rgb", metadata=None, resolution=(2e4,) * 2, resolutionunit="CENTIMETER")
    with tifffile.TiffWriter(tmp_path / "strips.tif") as t:
        for d in (1, 2):
            t.write(px[::d, ::d], subfiletype=int(d > 1), **how)
    with tifffile.TiffWriter(tmp_path / "nested.tif") as t:
        t.write(px, subifds=1, **how)
        t.write(px[::2, ::2], subfiletype=1, **how)
    for name in ("strips.tif", "nested.tif"):
        with pytest.raises(SlideError, match=f"{name}: it holds 2 pictures, the largest of 400 x 300 px"):
            WholeSlide(tmp_path / name, mpp=0.25)


def test_what_is_opened_is_the_largest_picture(tmp_path):
    "A tiled overview before the scan, which OpenSlide takes for the slide"
    how = dict(
        tile=(128, 128),
        photometric="rgb",
        compression="jpeg",
        metadata=None,
        resolution=(2e4,) * 2,
        resolutionunit="CENTIMETER",
    )
    with tifffile.TiffWriter(tmp_path / "o.tif") as t:
        for n in (256, 1024):
            t.write(np.full((n, n, 3), 128, np.uint8), **how)
    with pytest.raises(
        SlideError, match="o.tif: OpenSlide opens a picture of 256 x 256 px, and the file holds one of 1024 x 1024 px"
    ):
        WholeSlide(tmp_path / "o.tif")


def test_only_plain_pictures_are_read_as_plain_pictures(tmp_path):
    "A PNG, a JPEG, a TIFF of one picture; not what calls itself a slide, nor what holds several"
    px = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    for name in ("a.png", "a.PNG", "a.tiff", "palette.png", "cmyk.jpg"):
        image = Image.fromarray(px).convert({"palette.png": "P", "cmyk.jpg": "CMYK"}.get(name, "RGB"))
        image.save(tmp_path / name)
        with WholeSlide(tmp_path / name, mpp=0.5) as s:
            assert np.abs(s.read(0, 0, s.size, 0.5).astype(int) - np.asarray(image.convert("RGB"))).mean() < 25
    for name in ("a.svs", "a.vsi", "a.ndpi", "a.czi", "a", "a.dcm"):
        Image.fromarray(px).save(tmp_path / name, "jpeg")
        with pytest.raises(SlideError, match=f"{name}: no slide and no plain"):
            WholeSlide(tmp_path / name, mpp=0.5)
    Image.fromarray(px).save(tmp_path / "many.tif", save_all=True, append_images=[Image.fromarray(px[::2, ::2])])
    Image.fromarray(px).save(tmp_path / "many.png", save_all=True, append_images=[Image.fromarray(px)])
    for name in ("many.tif", "many.png"):
        with pytest.raises(SlideError, match=f"{name}: (it )?holds 2 pictures"):
            WholeSlide(tmp_path / name, mpp=0.5)


# ---- um/px ----

OME = (
    '<OME><Image ID="Image:1"><Pixels SizeX="80" SizeY="60" PhysicalSizeX="9" PhysicalSizeY="9"/></Image>'
    '<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" SizeX="256" SizeY="256" {}/></Image></OME>'
)
VIPS = (
    '<image><properties><property><name>openslide.mpp-x</name><value type="VipsRefString">0.25</value></property>'
    '<property><name>openslide.mpp-y</name><value type="VipsRefString">0.5</value></property></properties></image>'
)


@pytest.mark.parametrize(
    "mpp, how",
    [
        (0.5, dict(resolution=(20000, 20000), resolutionunit="CENTIMETER")),
        (0.5, dict(resolution=(50800, 50800), resolutionunit="INCH")),
        (0.5, dict(resolution=(2000, 2000), resolutionunit="MILLIMETER")),
        (0.5, dict(resolution=((2, 1), (2, 1)), resolutionunit="MICROMETER")),
        ((0.5, 0.25), dict(resolution=(20000, 40000), resolutionunit="CENTIMETER")),
        (0.25, dict(description=OME.format('PhysicalSizeX="0.25" PhysicalSizeY="0.25"'))),
        (
            0.25,
            dict(
                description=OME.format(
                    'PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"'
                )
            ),
        ),
        (
            (0.25, 0.5),
            dict(
                description=OME.format(
                    'PhysicalSizeX="0.25" PhysicalSizeXUnit="&#181;m" PhysicalSizeY="0.5" PhysicalSizeYUnit="\u00b5m"'
                )
            ),
        ),
        (0.25, dict(description=OME.format('PhysicalSizeX="0.25"'), resolution=(72, 72), resolutionunit="INCH")),
        (0.5, dict(resolution=(2.0, 2.0), resolutionunit="NONE", description="ImageJ=1.53t\nunit=micron\n")),
        (
            0.5,
            dict(resolution=(2.0, 2.0), resolutionunit="NONE", description="ImageJ=1.53t\nunit=\\u00B5m\nloop=false\n"),
        ),
        (0.5, dict(resolution=(2000.0, 2000.0), resolutionunit="INCH", description="ImageJ=1.53t\nunit=mm\n")),
        (0.25, dict(description="from a scan at MPP = 0.2500")),
        (0.25, dict(description="|AppMag = 40|MPP = 0,25|")),
        ((0.25, 0.5), dict(description=VIPS)),
    ],
)
@pytest.mark.parametrize("tile", [None, (128, 128)])
def test_um_per_px_is_taken_from_wherever_the_file_has_it(tmp_path, mpp, how, tile):
    """Tags in any unit, OME-XML, ImageJ, descriptions: of a tiled TIFF and of a plain one; x and y apart; a
    default of 72 dpi does not hide it"""
    how = {k: v.encode("utf-8", "replace") if k == "description" else v for k, v in how.items()}
    tifffile.imwrite(
        tmp_path / "u.tif", np.full((256, 256, 3), 200, np.uint8), tile=tile, photometric="rgb", metadata=None, **how
    )
    with WholeSlide(tmp_path / "u.tif") as s:
        assert s.mpp == pytest.approx(mpp if isinstance(mpp, tuple) else (mpp, mpp))


@pytest.mark.parametrize(
    "said, how",
    [
        (
            "TIFF resolution 20000 x 20000 px/.unit not named.: no known unit",
            dict(resolution=(20000, 20000), resolutionunit="NONE"),
        ),
        (
            "TIFF resolution 72 x 72 px/inch means 352.778 x 352.778 um/px, outside 0.05-20",
            dict(resolution=(72, 72), resolutionunit="INCH"),
        ),
        ("96 px/inch means 264.583", dict(resolution=(96, 96), resolutionunit="INCH")),
        ("TIFF resolution 1 x 1 px/cm means 10000", dict(resolution=(1, 1), resolutionunit="CENTIMETER")),
        (
            "PhysicalSizeX 0.25 reference frame.*: no known unit",
            dict(description=OME.format('PhysicalSizeX="0.25" PhysicalSizeXUnit="reference frame"')),
        ),
        (
            "ImageJ resolution 2 x 2 px/pixel: no known unit",
            dict(resolution=(2.0, 2.0), resolutionunit="NONE", description="ImageJ=1.53t\nunit=pixel\n"),
        ),
        (" in the file; pass mpp", dict()),
    ],
)
def test_um_per_px_that_is_not_taken_is_said(tmp_path, said, how):
    "What stands where, and why it is not believed"
    tifffile.imwrite(
        tmp_path / "u.tif",
        np.full((256, 256, 3), 200, np.uint8),
        tile=(128, 128),
        photometric="rgb",
        metadata=None,
        **how,
    )
    with pytest.raises(SlideError, match=f"u.tif: no um/px.*{said}"):
        WholeSlide(tmp_path / "u.tif")
    with WholeSlide(tmp_path / "u.tif", mpp=0.3) as s:
        assert s.mpp == (0.3, 0.3)


@pytest.mark.parametrize("name", ["p.png", "p.jpg"])
def test_density_of_plain_pictures(tmp_path, name):
    "Taken where a microscope can have it, else said"
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    image.save(tmp_path / name, dpi=(50800, 50800))
    with WholeSlide(tmp_path / name) as s:
        assert s.mpp == pytest.approx((0.5, 0.5), rel=1e-3)
    for dpi in (72, 96, 300):
        image.save(tmp_path / name, dpi=(dpi, dpi))
        with pytest.raises(SlideError, match=f"{dpi} x {dpi} px/inch means {25400 / dpi:.4g}"[:-1]):
            WholeSlide(tmp_path / name)


def test_a_given_um_per_px_that_contradicts_the_file_is_said(tmp_path):
    "Place and both values, for either axis; 5 % is let pass; and two places of one file"
    tifffile.imwrite(
        tmp_path / "u.tif",
        np.full((256, 256, 3), 200, np.uint8),
        tile=(128, 128),
        photometric="rgb",
        metadata=None,
        resolution=(20000, 40000),
        resolutionunit="CENTIMETER",
    )
    for stated, clash in (
        (0.5, True),
        ((0.5, 0.25), False),
        ((0.51, 0.2451), False),
        ((0.53, 0.25), True),
        ("0.25", True),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            WholeSlide(tmp_path / "u.tif", mpp=stated).close()
        assert [
            str(w.message).startswith("u.tif: the given")
            and "0.5 x 0.25 um/px (TIFF resolution 20000 x 40000 px/cm)" in str(w.message)
            for w in seen
        ] == [True] * clash
        assert all(w.filename == __file__ for w in seen)
    row = dict(slide_id="a", uri="u.tif", mpp=0.25)
    with pytest.warns(UserWarning, match="the given 0.25 um/px contradicts.*manifest"):
        open_row(row, tmp_path).close()
    tifffile.imwrite(
        tmp_path / "u.tif",
        np.full((256, 256, 3), 200, np.uint8),
        tile=(128, 128),
        photometric="rgb",
        metadata=None,
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        description=OME.format('PhysicalSizeX="0.25" PhysicalSizeY="0.25"'),
    )
    with pytest.warns(
        UserWarning, match=r"0.25 um/px \(OME-XML.*contradicts what the file says, 0.5 um/px \(TIFF resolution"
    ):
        s = WholeSlide(tmp_path / "u.tif")
    assert s.mpp == (0.25, 0.25)
    s.close()


# ---- files of a slide ----


@pytest.mark.parametrize(
    "names", [("0.DCM", "1.dcm", "2.Dcm"), ("IM0", "IM1", "IM2"), ("1.2.840.1", "1.2.840.2", "1.2.840.3")]
)
def test_a_dicom_series_is_its_files_whatever_their_names(tmp_path, names):
    "Folder or any file: same slide, same hash, which covers the series and nothing else"
    from pydicom.uid import generate_uid

    px, series, folder = (
        np.random.default_rng(0).integers(60, 250, (256, 384, 3), dtype=np.uint8),
        generate_uid(),
        tmp_path / "study",
    )
    folder.mkdir()
    for level, name in enumerate(names):
        dicom_level(folder / name, px[:: 2**level, :: 2**level], 0.25 * 2**level, series, level)
    (
        (folder / "notes.txt").write_text("no part of it"),
        (folder / ".hidden").write_bytes(b"x"),
        (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM"),
    )
    with WholeSlide(folder) as s:
        assert len(s.level_sizes) == 3 and s.name == "study" and s.mpp == (0.25, 0.25)
        assert slide_files(folder) == sorted(folder / n for n in names)
        for name in names:
            with WholeSlide(folder / name) as other:
                assert (
                    other.sha256 == s.sha256
                    and other.level_sizes == s.level_sizes
                    and slide_files(folder / name) == slide_files(folder)
                )
    old = slide_sha256(folder)
    dicom_level(folder / names[2], px[1::4, 1::4], 1.0, series, 2)
    assert slide_sha256(folder / names[0]) == slide_sha256(folder) != old


def test_a_folder_of_two_dicom_slides_is_refused_and_each_file_opens_its_own(tmp_path):
    "Only the series of the file that is named"
    from pydicom.uid import generate_uid

    sizes = [(256, 384), (128, 256)]
    for i, (h, w) in enumerate(sizes):
        dicom_level(tmp_path / f"{i}.dcm", np.full((h, w, 3), 100, np.uint8), 0.25, generate_uid(), 0)
    for f in (WholeSlide, slide_sha256, slide_files):
        with pytest.raises(SlideError, match="holds 2 DICOM slides.*name one file.*such as [01].dcm"):
            f(tmp_path)
    for i, (h, w) in enumerate(sizes):
        with WholeSlide(tmp_path / f"{i}.dcm") as s:
            assert s.size == (w, h) and slide_files(s.path) == [s.path]
    (tmp_path / "1.dcm").unlink()
    assert slide_sha256(tmp_path) == slide_sha256(tmp_path / "0.dcm")  # a series of one file, by either name
    (tmp_path / "empty").mkdir(), (tmp_path / "other").mkdir(), (tmp_path / "other" / "a.txt").touch()
    for name in ("empty", "other"):
        with pytest.raises(SlideError, match="folder without a DICOM slide|empty folder"):
            WholeSlide(tmp_path / name)


@pytest.mark.parametrize(
    "said, change",
    [
        (
            "the JPEG streams of 0.dcm are ycbcr, and its tag says RGB, which OpenSlide believes",
            dict(PhotometricInterpretation="RGB"),
        ),
        (
            "this file has one channel a page .MONOCHROME2.*convert it to RGB",
            dict(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2"),
        ),
        ("it holds 3 focal planes, which OpenSlide does not open", dict(TotalPixelMatrixFocalPlanes=3)),
    ],
)
def test_dicom_without_colours_or_with_wrong_ones_is_refused(tmp_path, said, change):
    "By folder and by file; a label of the series may be as it likes"
    import pydicom

    series = pydicom.uid.generate_uid()
    for name in ("0.dcm", "label.dcm"):
        dicom_level(tmp_path / name, smooth(256, 384), 0.25, series, 0)
        d = pydicom.dcmread(tmp_path / name)
        for k, v in (
            change
            if name == "0.dcm"
            else dict(ImageType=["ORIGINAL", "PRIMARY", "LABEL", "NONE"], PhotometricInterpretation="RGB")
        ).items():
            setattr(d, k, v)
        d.save_as(tmp_path / name)
    for path in (tmp_path, tmp_path / "0.dcm", tmp_path / "label.dcm"):
        with pytest.raises(SlideError, match=f"^{path.name}: {said}"):
            WholeSlide(path)


# ---- snap ----


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_a_level_at_the_target_is_read_as_it_is(tmp_path, compression):
    "Pixel for pixel, on both paths, within the fraction asked for; else averaged; and the um/px that came out is said"
    px = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as t:
        for d in (1, 2):
            t.write(
                px[::d, ::d],
                tile=(128, 128),
                photometric="rgb",
                compression=compression,
                metadata=None,
                subfiletype=int(d > 1),
                resolution=(1e4 / 0.2495,) * 2,
                resolutionunit="CENTIMETER",
            )
    with tifffile.TiffFile(tmp_path / "s.tif") as t:
        own = [p.asarray() for p in t.pages]
    with WholeSlide(tmp_path / "s.tif", mpp=(0.2495, 0.2494)) as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at = np.array([(0, 0), (64, 128), (65, 131), (902, 3)])
        assert (
            s.mpp_read(0.499) == pytest.approx((0.499, 0.4988))
            and s.mpp_read(0.5) == (0.5, 0.5)
            and s.mpp_read(0.5, 0.003) == pytest.approx((0.499, 0.4988))
            and s.mpp_read(0.5, 0.0021) == (0.5, 0.5)
        )
        assert s.mpp_read(0.2496) == pytest.approx((0.2495, 0.2494)) and s.mpp_read(0.499, -1) == (0.499, 0.499)
        for target, snap in ((0.499, 0.001), (0.5, 0.003)):
            many = s.fields(at, 60, target, 2, snap)
            for field, (x, y) in zip(many, at.tolist()):
                left, top = (int(np.floor(v / 2 + 0.5)) for v in (x, y))
                assert (field == own[1][top : top + 60, left : left + 60]).all() and (
                    s.read(x, y, 60, target, snap=snap) == field
                ).all()
            assert s.plan(target, snap).as_is and s.plan(target, snap).level == 1
        averaged = s.fields(at, 60, 0.5, 2)
        assert (
            not s.plan(0.5).as_is
            and (averaged == np.stack([s.read(*c, 60, 0.5) for c in at.tolist()])).all()
            and not (averaged == many).all()
        )
        assert (s.fields([(7, 9)], 60, 0.2496)[0] == own[0][9:69, 7:67]).all()
        assert "as it is" in str(s.plan(0.499)) and (
            "read by tiles" if compression == "jpeg" else "read by OpenSlide (compression ADOBE_DEFLATE)"
        ) in str(s.plan(0.5))


# ---- from a row to a slide ----


def test_hashes_of_either_kind_are_checked_before_use(tmp_path, mirax):
    "sha256, md5, both; and md5 of a slide of several files is no hash of it"
    pyramid(tmp_path / "a.tif", np.zeros((256, 256, 3), np.uint8), 0.5)
    data = (tmp_path / "a.tif").read_bytes()
    good = dict(sha256=hashlib.sha256(data).hexdigest(), md5=hashlib.md5(data).hexdigest())
    for keys in (["sha256"], ["md5"], ["sha256", "md5"]):
        assert fetch_slide("a.tif", tmp_path, **{k: good[k].upper() for k in keys}) == tmp_path / "a.tif"
        with open_row(
            dict(uri="a.tif", mpp=float("nan"), sha256=None, md5=None) | {k: good[k] for k in keys}, tmp_path
        ) as s:
            assert s.mpp == (0.5, 0.5)
        for k in keys:
            with pytest.raises(SlideError, match=f"a.tif: {k} is {good[k]}, expected 000"):
                open_row(dict(uri="a.tif") | good | {k: "0" * len(good[k])}, tmp_path)
    with pytest.raises(SlideError, match="md5 covers one file, and this slide has 4"):
        fetch_slide(mirax[0].name, mirax[0].parent, md5="0" * 32)


def test_a_missing_file_is_said_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    "Relative paths count from the manifest's folder"
    monkeypatch.chdir(tmp_path)
    for root in (".", tmp_path, "../" + tmp_path.name):
        with pytest.raises(SlideError, match=f"gone.svs: no such file in {tmp_path}; check the manifest's uri"):
            fetch_slide("gone.svs", root)
    for row in (dict(slide_id="s1", uri=""), dict(slide_id="s1", uri=None), dict(slide_id="s1", uri=float("nan"))):
        with pytest.raises(SlideError, match="s1: no slide to open"):
            open_row(row, tmp_path)


def test_a_cache_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SlideError, match="cache folder cannot be made.*HER2_MIL_CACHE"):
        fetch_slide("phantom:score=1;seed=1", cache=tmp_path / "file")


def test_a_scheme_of_ones_own_is_known_to_processes_started_later(tmp_path, monkeypatch):
    "By call or by environment variable; what cannot be imported, and what the opener says, are sentences"
    (tmp_path / "my_lab.py").write_text(
        "from her2_mil.core import Her2Error\ndef fetch(uri, folder):\n"
        "    if 'bad' in uri: raise Her2Error('the archive does not know it')\n    return uri.split(':', 1)[1]\n"
    )
    pyramid(tmp_path / "a.tif", np.zeros((256, 256, 3), np.uint8), 0.5)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HER2_MIL_OPENERS", "other=nowhere.at:all")
    register_opener("lab", "my_lab:fetch")
    with open_row(dict(uri=f"lab:{tmp_path}/a.tif"), cache=tmp_path / "cache") as s:
        assert s.size == (256, 256)
    with pytest.raises(SlideError, match="lab:bad: the archive does not know it"):
        fetch_slide("lab:bad", cache=tmp_path / "cache")
    with pytest.raises(SlideError, match="other:x: its opener nowhere.at:all cannot be imported"):
        fetch_slide("other:x", cache=tmp_path / "cache")
    script = (
        "from her2_mil.slide import open_row\n"
        f"print(open_row(dict(uri='lab:{tmp_path}/a.tif'), cache={str(tmp_path / 'cache')!r}).size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | dict(PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(256, 256)", done.stderr


def test_slide_does_not_import_the_phantom():
    "Nor does reading a slide"
    script = "import sys, her2_mil.slide; print([m for m in sys.modules if m.startswith('her2_mil.phantom')])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr
