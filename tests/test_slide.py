"""Slides as files: formats written for the test, damage, downloads, and where their pixels lie."""
import json
import shutil
import struct

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from hypothesis import given, settings, strategies as st

from her2_mil.embedding import _grid_coords
from her2_mil.slide import SlideError, WholeSlide, _NativeTiles, _resample, slide_sha256
from her2_mil.tiling import TileSpec, _layout, _survey_one, read_patches, read_roi, tile_slide, tissue_mask


def test_missing_tiles_and_edge_tiles_read_as_openslide_does(tmp_path):
    "A sparse TIFF whose size is no multiple of its tiles"
    rng = np.random.default_rng(0)
    def tiles():
        for i in range(12): yield None if i in (1, 5, 6) else rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path/'sparse.tif') as t:
        t.write(tiles(), shape=(300, 450, 3), dtype='uint8', tile=(128, 128), photometric='rgb', compression='jpeg', metadata=None,
                resolution=(1e4/.5,)*2, resolutionunit='CENTIMETER')
    with WholeSlide(tmp_path/'sparse.tif') as s:
        at = np.array([(0, 0), (100, 60), (350, 200), (-20, 250)])
        assert s._native(0) is not None
        for side, mpp in ((150, .5), (60, 1.)): assert (s.fields(at, side, mpp) == np.stack([s.read(*c.tolist(), side, mpp) for c in at])).all()


@given(tile=st.sampled_from([(16, 16), (48, 32), (112, 112)]), k=st.integers(1, 4), side=st.integers(1, 120), size=st.tuples(st.integers(120, 500), st.integers(120, 500)),
       n=st.integers(0, 12), threads=st.integers(1, 3), run=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_fields_are_what_read_gives_one_by_one(tmp_path_factory, tile, k, side, size, n, threads, run, seed):
    "Fields of whole blocks and others, overlapping, apart, over the border and outside: whatever the tiles, the ratio and how many are averaged in one go"
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp('fields')/'s.tif'
    px = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    tifffile.imwrite(path, px, tile=tile, photometric='rgb', compression='jpeg', metadata=None, resolution=(1e4/.25,)*2, resolutionunit='CENTIMETER')
    at = rng.integers(-side*k, max(size), (n, 2))
    at[::2] -= at[::2] % k  # every other field is whole blocks
    with WholeSlide(path) as s:
        s._native(0).run = run
        found = s.fields(at, side, .25*k, threads)
        assert found.shape == (n, side, side, 3)
        for f, c in zip(found, at.tolist()): assert np.array_equal(f, s.read(*c, side, .25*k))


def test_download_is_checked_and_kept(tmp_path):
    "The https path, against a local server: right hash, wrong hash, missing file"
    import hashlib, http.server, threading
    from functools import partial
    from her2_mil.slide import _download
    (tmp_path/'www').mkdir(); (tmp_path/'cache').mkdir()
    (tmp_path/'www'/'a.svs').write_bytes(b'slide')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'www')))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, good = f'http://127.0.0.1:{server.server_port}/a.svs', hashlib.sha256(b'slide').hexdigest()
    with pytest.raises(SlideError, match='another sha256'): _download(url, '0'*64, tmp_path/'cache')
    assert not list((tmp_path/'cache').iterdir())
    path = _download(url, good, tmp_path/'cache')
    assert path.read_bytes() == b'slide'
    with pytest.raises(SlideError, match='download failed'): _download(url + 'x', good, tmp_path/'cache')
    server.shutdown()
    assert _download(url, good, tmp_path/'cache') == path  # kept: no server needed


def test_openslide_reads_what_the_fast_path_does_not(tmp_path):
    "A lossless TIFF falls back with one warning and gives the same fields"
    px = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path/'z.tif', px, tile=(128, 128), photometric='rgb', compression='zlib', metadata=None, resolution=(1e4/.5,)*2, resolutionunit='CENTIMETER')
    with WholeSlide(tmp_path/'z.tif') as s:
        with pytest.warns(UserWarning, match='read by OpenSlide'): a = read_patches(s, np.array([(10, 20)]), TileSpec(patch=64))
        assert (a[0] == px[20:84, 10:74]).all()


def pyramid(path, px, mpp, downsamples=(1,), tile=(128, 128), resolution=None, **how):
    "A tiled JPEG TIFF of level 0 and what is averaged from it; the pixels of the levels as the file has them"
    with tifffile.TiffWriter(path) as t:
        for d in downsamples:
            size = px.shape[1]//d, px.shape[0]//d
            t.write(cv2.resize(px, size, interpolation=cv2.INTER_AREA), tile=tile, photometric='rgb', compression='jpeg', metadata=None, subfiletype=int(d > 1),
                    resolution=resolution or (1e4/mpp,)*2, resolutionunit='CENTIMETER', **(how if d == 1 else {}))
    with tifffile.TiffFile(path) as t: return [p.asarray() for p in t.pages]


@pytest.mark.parametrize('threads, kept, level', [(1, 0, 0), (3, 0, 0), (1, .6, 1), (3, .9, 1)])
def test_a_damaged_tile_is_named_and_stops_all_threads(tmp_path, threads, kept, level, monkeypatch):
    "One tile is overwritten from some byte on: its place is named on level 0, and nobody reads to the end"
    px = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    pyramid(tmp_path/'torn.tif', px, .5, (1, 2), tile=(64, 64))
    read = []
    monkeypatch.setattr(_NativeTiles, 'decode', lambda *args, old=_NativeTiles.decode: (read.append(1), old(*args)))
    with WholeSlide(tmp_path/'torn.tif') as s:
        tiles, side, mpp = s._native(level), 64*2**level, .5*2**level
        tiles.run, bad = 2, 3*tiles.across + 5
        with open(tmp_path/'torn.tif', 'r+b') as f:
            n = int(tiles.counts[bad])
            f.seek(int(tiles.offsets[bad]) + int(n*kept))
            f.write(bytes(n - int(n*kept)))
        for shift, ratio in ((0, 2), (20, 1.9)):  # runs of whole tiles; fields one by one
            read.clear()
            at = np.mgrid[5:13, 3:11].reshape(2, -1).T*side + shift  # what this thread begins with
            with pytest.raises(SlideError, match=fr'cannot decode the tile at \({5*side}, {3*side}\), level {level}'): s.fields(at, 32, mpp*ratio, threads)
            assert len(read) < len(at)


def test_levels_whose_size_is_rounded_lie_where_level_0_does(tmp_path):
    "OpenSlide averages the ratios of width and height to one downsample and divides by it: what it is asked for is multiplied by the same"
    px = cv2.resize(np.random.default_rng(0).integers(0, 255, (32, 624, 3), dtype=np.uint8), (20_000, 1003), interpolation=cv2.INTER_CUBIC)
    page = pyramid(tmp_path/'wide.tif', px, .25, (1, 4))[1]
    with WholeSlide(tmp_path/'wide.tif') as s:
        assert s._osr.level_downsamples[1] > 4.001 and s.level_downsamples[1] == 4
        for x in (400, 4000, 12000, 19000):
            for found in (s.read(x, 400, 100, 1.2, level=1), s.fields([(x, 400)], 100, 1.2)[0]):
                error = [np.abs(found.astype(int) - _resample(page, (x/4 + shift, 100), (1.2, 1.2), (100, 100))).mean() for shift in (0, -1, 1)]
                assert error[0] < min(error[1:])/3


def test_fields_of_levels_and_of_unequal_um_per_px(tmp_path):
    "Three levels, x finer than y: whole blocks in one direction only are none"
    px = np.random.default_rng(1).integers(0, 255, (1792, 1344, 3), dtype=np.uint8)
    for ratio in (1., 1.08, 2.):
        pyramid(tmp_path/'p.tif', px, .25, (1, 4, 16), tile=(112, 96), resolution=(4e4, 4e4/ratio))
        with WholeSlide(tmp_path/'p.tif') as s:
            assert s.mpp == pytest.approx((.25, .25*ratio)) and len(s.level_sizes) == 3
            for mpp in (.5, 1., 1.3, 2., 4.5):
                at = np.array([(0, 0), (64, 128), (65, 131), (900, 900), (-40, 60), (1300, 1700), (1345, 5), (-9999, 3)])
                assert (s.fields(at, 40, mpp, 2) == np.stack([s.read(*c.tolist(), 40, mpp) for c in at])).all()


def test_a_missing_tile_of_an_aperio_level_is_made_from_a_finer_one(tmp_path):
    "As OpenSlide does it; on level 0 there is none finer"
    px = np.full((1024, 1024, 3), 128, np.uint8)
    pyramid(tmp_path/'a.svs', px, .25, (1, 4), description='Aperio Image Library v11\n1024x1024 (128x128) JPEG/RGB|AppMag = 40|MPP = 0.25')
    with tifffile.TiffFile(tmp_path/'a.svs', mode='r+b') as t:
        counts = t.pages[1].tags['TileByteCounts']
        counts.overwrite([0, *counts.value[1:]])
    with WholeSlide(tmp_path/'a.svs') as s:
        assert s.properties['openslide.vendor'] == 'aperio' and s._native(0) is not None
        with pytest.warns(UserWarning, match='missing tiles'): assert np.abs(s.fields([(0, 0)], 64, 1.2)[0].astype(int) - 128).max() < 9


@pytest.mark.parametrize('tile', [64, 512])
def test_tiles_are_kept_for_the_fields_that_follow(tmp_path, tile, monkeypatch):
    "Fields at an odd ratio, and a thumbnail: a tile is decoded little more than once, small or large"
    pyramid(tmp_path/'s.tif', np.zeros((2048, 2048, 3), np.uint8), .25, tile=(tile, tile))
    read = []
    monkeypatch.setattr(_NativeTiles, 'decode', lambda self, tx, ty, into, old=_NativeTiles.decode: (read.append((tx, ty)), old(self, tx, ty, into)))
    with WholeSlide(tmp_path/'s.tif') as s:
        for once in (lambda: s.fields(np.mgrid[1:1900:100, 1:1900:100].reshape(2, -1).T, 50, .55), lambda: s.thumbnail(7.3)):
            read.clear()
            once()
            assert len(set(read)) >= .8*(2048//tile)**2 and len(read) <= 1.6*len(set(read))


def test_bytes_behind_a_tile_and_coords_of_another_shape(tmp_path):
    "A count that is one too long is read as OpenSlide reads it; three numbers are no corner"
    pyramid(tmp_path/'s.tif', np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8), .5)
    with tifffile.TiffFile(tmp_path/'s.tif', mode='r+b') as t:
        counts = t.pages[0].tags['TileByteCounts']
        counts.overwrite([n + 1 for n in counts.value[:-1]] + [counts.value[-1]])
    with WholeSlide(tmp_path/'s.tif') as s:
        assert (s.fields([(9, 9)], 99, .5)[0] == s.read(9, 9, 99, .5)).all()
        for odd in ([(1, 2, 3), (4, 5, 6)], [1, 2]):
            with pytest.raises(SlideError, match='pass \\(N, 2\\)'): s.fields(odd, 9, .5)


def dicom_level(path, px, mpp, series, level):
    "One level of a whole slide as a DICOM file of JPEG tiles, row by row, as scanners write it"
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid
    h, w = px.shape[:2]
    tiles = [px[y:y+128, x:x+128] for y in range(0, h, 128) for x in range(0, w, 128)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = VLWholeSlideMicroscopyImageStorage, generate_uid(), JPEGBaseline8Bit
    d, measures, group = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128), Dataset(), Dataset()
    measures.PixelSpacing = [mpp/1000]*2
    group.PixelMeasuresSequence = [measures]
    for name, value in dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, SeriesInstanceUID=series,
                            ImageType=['DERIVED' if level else 'ORIGINAL', 'PRIMARY', 'VOLUME', 'RESAMPLED' if level else 'NONE'], Modality='SM',
                            TotalPixelMatrixColumns=w, TotalPixelMatrixRows=h, Rows=128, Columns=128, NumberOfFrames=len(tiles), SamplesPerPixel=3,
                            PhotometricInterpretation='YBR_FULL_422', PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0,
                            TotalPixelMatrixFocalPlanes=1, NumberOfOpticalPaths=1, DimensionOrganizationType='TILED_FULL',
                            SharedFunctionalGroupsSequence=[group]).items(): setattr(d, name, value)
    d.PixelData = encapsulate([imagecodecs.jpeg8_encode(np.ascontiguousarray(t), level=95, colorspace='rgb', outcolorspace='ycbcr', subsampling='422') for t in tiles])
    d['PixelData'].is_undefined_length = True
    d.save_as(path, enforce_file_format=True)


def test_a_folder_of_dicom_files_is_one_slide(tmp_path):
    "Two levels, opened by their folder or by either file: same pixels, same hash, fields by OpenSlide"
    from pydicom.uid import generate_uid
    coarse = np.random.default_rng(0).integers(60, 250, (16, 24, 3), dtype=np.uint8)
    px, series = cv2.resize(coarse, (768, 512), interpolation=cv2.INTER_CUBIC), generate_uid()
    for level in (0, 1): dicom_level(tmp_path/f'{level}.dcm', cv2.resize(px, None, fx=.5**level, fy=.5**level, interpolation=cv2.INTER_AREA), .25*2**level, series, level)
    with WholeSlide(tmp_path) as s, WholeSlide(tmp_path/'1.dcm') as other:
        assert s.properties['openslide.vendor'] == 'dicom' and s.level_sizes == ((768, 512), (384, 256)) and s.mpp == (.25, .25)
        assert s.sha256 == other.sha256
        with pytest.warns(UserWarning, match='read by OpenSlide'): fields = s.fields([(0, 0), (100, 60)], 200, .25)
        for f, (x, y) in zip(fields, [(0, 0), (100, 60)]): assert np.abs(f.astype(int) - px[y:y+200, x:x+200]).mean() < 3
        assert (other.read(0, 0, 100, .5) == s.read(0, 0, 100, .5)).all()


FILL, NOT_TAKEN = (250, 246, 238), {(0, 0), (1, 0), (2, 0), (1, 2)}  # colour of what was not imaged; row and column of photos


def mirax_slide(path, px, missing=NOT_TAKEN, fill=FILL, levels=4):
    "A small MIRAX slide, for real ones have gigabytes: photos that overlap and stand off their grid, each cut into four JPEGs, some never taken; 0.25 um/px"
    rows, cols = ((n - 32)//480 for n in px.shape[:2])  # photos of 512 px that overlap by 32
    at = lambda i: 480*i - 3*(i % 2)  # where a photo begins, in px of level 0
    photos = [(i, j) for i in range(rows) for j in range(cols)]
    taken, most = np.zeros((2*rows, 2*cols), bool), 2**(levels - 1)
    mosaic = np.full((*(-(-n//most)*most*256 for n in taken.shape), 3), fill, np.uint8)  # levels are made of photos side by side, overlaps and all
    for i, j in set(photos) - set(missing):
        taken[2*i:2*i+2, 2*j:2*j+2], mosaic[512*i:512*i+512, 512*j:512*j+512] = True, px[at(i):at(i)+512, at(j):at(j)+512]
    data, records = bytearray(), []
    for k in [2**n for n in range(levels)]:
        small, record = cv2.resize(mosaic, None, fx=1/k, fy=1/k, interpolation=cv2.INTER_AREA), []
        for y, x in [(y, x) for y in range(0, 2*rows, k) for x in range(0, 2*cols, k) if taken[y:y+k, x:x+k].any()]:
            jpeg = imagecodecs.jpeg8_encode(np.ascontiguousarray(small[y//k*256:, x//k*256:][:256, :256]), level=95)
            record += [y*2*cols + x, len(data), len(jpeg), 0]  # number of its first image in level 0, place, length, data file
            data += jpeg
        records.append(record)
    positions = b''.join(struct.pack('<bii', 1, at(j), at(i)) for i, j in photos)
    records.append([0, 0, len(data), len(positions), 0])
    head = b'01.02' + b'a-slide'
    index = [len(head) + 8, len(head) + 8 + 4*levels] + [0]*len(records)  # where the records of levels and of other things are listed
    for n, record in enumerate(records):
        index[2+n] = len(head) + 4*len(index)
        index += [0, len(head) + 4*len(index) + 8, max(1, len(record)//4), 0, *record]  # an empty page and where the next is; that one's length, none to follow, its items
    zoom = lambda n: dict(OVERLAP_X=32/2**n, OVERLAP_Y=32/2**n, MICROMETER_PER_PIXEL_X=.25*2**n, MICROMETER_PER_PIXEL_Y=.25*2**n, IMAGE_FORMAT='JPEG',
                          DIGITIZER_WIDTH=256, DIGITIZER_HEIGHT=256, IMAGE_FILL_COLOR_BGR=fill[2]*65536 + fill[1]*256 + fill[0], IMAGE_CONCAT_FACTOR=int(n > 0))
    ini = dict(GENERAL=dict(SLIDE_ID='a-slide', IMAGENUMBER_X=2*cols, IMAGENUMBER_Y=2*rows, OBJECTIVE_MAGNIFICATION=20, CameraImageDivisionsPerSide=2),
               HIERARCHICAL=dict(INDEXFILE='Index.dat', HIER_COUNT=1, HIER_0_NAME='Slide zoom level', HIER_0_COUNT=levels, NONHIER_COUNT=1, NONHIER_0_COUNT=1,
                                 NONHIER_0_NAME='VIMSLIDE_POSITION_BUFFER', **{f'HIER_0_VAL_{n}_SECTION': f'ZOOM_{n}' for n in range(levels)}),
               DATAFILE=dict(FILE_COUNT=1, FILE_0='Data0000.dat'), **{f'ZOOM_{n}': zoom(n) for n in range(levels)})
    text = ''.join(f'[{section}]\n' + ''.join(f'{k} = {v}\n' for k, v in d.items()) for section, d in ini.items())
    path.with_suffix('').mkdir()
    path.touch()
    (path.with_suffix('')/'Slidedat.ini').write_text(text, encoding='utf-8-sig')
    (path.with_suffix('')/'Index.dat').write_bytes(head + struct.pack(f'<{len(index)}i', *index))
    (path.with_suffix('')/'Data0000.dat').write_bytes(data + positions)
    return path


@pytest.fixture(scope='module')
def mirax(tmp_path_factory):
    "Tissue on glass; neither the left column of photos nor one across the tissue's left border was taken: path, pixels, and where they were imaged"
    px, rng = np.full((1472, 2432, 3), (243, 232, 238), np.uint8), np.random.default_rng(0)
    tissue = (rng.normal(0, 25, (70, 70, 1)) + (170, 90, 160)).clip(0, 255).astype(np.uint8)
    px[200:1300, 1200:2300] = cv2.resize(tissue, (1100, 1100), interpolation=cv2.INTER_CUBIC)
    imaged = np.ones(px.shape[:2], bool)
    imaged[:, :477] = imaged[512:960, 989:1437] = False  # neighbours overlap the photo in the middle
    return mirax_slide(tmp_path_factory.mktemp('mirax')/'case.mrxs', px), px, imaged


def at_level(array, k):
    "What a level k times as coarse shows of a level-0 array: its area averages"
    return cv2.resize(array.astype(np.float32), None, fx=1/k, fy=1/k, interpolation=cv2.INTER_AREA)


def test_mirax_pixels_are_where_they_were_written(mirax):
    "Size, um/px and levels; every level, and 0.5 um/px from level 0; level 0 begins with the scanner's field, not with the first photo"
    path, px, imaged = mirax
    with WholeSlide(path) as s:
        assert s.properties['openslide.vendor'] == 'mirax' and s.mpp == (.25, .25) and s.level_downsamples == (1, 2, 4, 8)
        assert s.level_sizes == ((2432, 1472), (1216, 736), (608, 368), (304, 184))
        assert [s.properties[f'openslide.bounds-{k}'] for k in ('x', 'y', 'width', 'height')] == ['477', '0', '1955', '1472']
        for level, k in [(0, 1), (0, 2), (1, 2), (2, 4), (3, 8)]:
            found, written = s.read(480, 160, (1952//k, 1312//k), .25*k, level=level), at_level(px[160:, 480:], k)
            assert np.abs(found - written)[at_level(imaged[160:, 480:], k) == 1].mean() < 1.5
            fit = lambda *d: np.abs(found - np.roll(written, d, (0, 1)))[144//k:1040//k, 1024//k:1720//k].mean()  # tissue, across the borders of photos
            assert fit(0, 0) < min(fit(1, 0), fit(-1, 0), fit(0, 1), fit(0, -1))/2
        assert (s.read(100, 60, 600, .5) == s.read(100, 60, 600, .5, level=0)).all()


def test_what_mirax_did_not_image_is_its_background(mirax):
    "OpenSlide gives transparent black there, half transparent at the borders of coarse levels; neither may darken a pixel"
    path, px, imaged = mirax
    with WholeSlide(path) as s:
        assert s.properties['openslide.background-color'] == 'FAF6EE'
        for level, k in enumerate((1, 2, 4, 8)):
            w, h = s.level_sizes[level]
            raw, found = np.asarray(s._osr.read_region((0, 0), level, (w, h))), s.read(0, 0, (w, h), .25*k, level=level)
            empty = cv2.erode((at_level(imaged, k) == 0).astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1) > 0
            assert empty.sum() > 100 and not raw[empty].any() and (found[empty] == FILL).all()
            assert found[:160//k].min() > 225  # glass and what was not imaged
            if level: assert ((raw[:160//k, :, 3] > 0) & (raw[:160//k, :, 3] < 255)).any()  # so half transparent pixels were among them


def test_fields_of_mirax_are_read_by_openslide(mirax):
    "The fast path reads TIFF alone: one warning, and the fields that `read` gives, in their order"
    at = np.array([(1700, 400), (0, 0), (900, 400), (2300, 1300), (-50, 700)])
    with WholeSlide(mirax[0]) as s:
        with pytest.warns(UserWarning, match='read by OpenSlide.*format mirax'): fields = s.fields(at, 224, .5, threads=2)
        assert (fields == np.stack([s.read(*c.tolist(), 224, .5) for c in at])).all()


def test_a_byte_of_a_mirax_folder_changes_its_hash(mirax, tmp_path):
    "A slide is its file and its folder: the same copy has the same hash, one bit in the data another"
    copy, data = shutil.copy(mirax[0], tmp_path), tmp_path/'case'/'Data0000.dat'
    shutil.copytree(mirax[0].with_suffix(''), tmp_path/'case')
    assert slide_sha256(copy) == slide_sha256(mirax[0])
    content = bytearray(data.read_bytes())
    content[len(content)//2] ^= 1
    data.write_bytes(content)
    assert slide_sha256(copy) != slide_sha256(mirax[0])


@pytest.mark.parametrize('fill', [FILL, (255, 255, 255)])
def test_mirax_tissue_is_tiled_and_what_was_not_imaged_is_not(mirax, tmp_path, fill):
    "The mask is the tissue that was imaged, whatever the colour of the rest, and a patch's share of it is true"
    truth = mirax[2] & (mirax[1][..., 1] < 200)
    with WholeSlide(mirax_slide(tmp_path/'case.mrxs', mirax[1], fill=fill)) as s:
        mask, share = tissue_mask(s.thumbnail(8.), 8.), at_level(truth, 32)
        assert mask[share == 1].mean() > .98 and mask[share == 0].mean() < .02
        grid = tile_slide(s)
        inside = np.array([truth[y:y+448, x:x+448].mean() for x, y in grid.coords])
        assert len(grid) >= 6 and (inside > .45).all() and np.abs(inside - grid.tissue).max() < .06


def test_a_mirax_file_without_its_folder_is_refused(tmp_path, mirax):
    "Scanners write a small JPEG as the .mrxs file: neither it nor a TIFF of that name must pass for the slide, even where the manifest has um/px"
    Image.fromarray(np.full((90, 120, 3), 240, np.uint8)).save(tmp_path/'case.mrxs', 'jpeg')
    pyramid(tmp_path/'other.mrxs', np.zeros((300, 300, 3), np.uint8), .25)
    shutil.copytree(mirax[0].with_suffix(''), tmp_path/'LOUD')
    (tmp_path/'LOUD.MRXS').touch()
    for name in ('case.mrxs', 'other.mrxs', 'LOUD.MRXS'):
        with pytest.raises(SlideError, match='beside it a folder'): WholeSlide(tmp_path/name, mpp=.25)


def test_a_qupath_annotation_of_a_mirax_slide_lies_on_its_tissue(mirax, tmp_path):
    "QuPath counts pixels from the scanned part, we from the scanner's field: for the grid, the dry run and the features"
    x, y = [1440, 2300], [200, 1300]
    ring = [[a - 477, b] for a, b in [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])]]
    (tmp_path/'roi.geojson').write_text(json.dumps(dict(type='Feature', properties=dict(classification=dict(name='Tumor')), geometry=dict(type='Polygon', coordinates=[ring]))))
    row = dict(slide_id='case', uri='case.mrxs', roi='roi.geojson', sha256=None, mpp=None)
    shutil.copy(mirax[0], tmp_path), shutil.copytree(mirax[0].with_suffix(''), tmp_path/'case')
    with WholeSlide(mirax[0]) as s:
        assert s.origin == (477, 0)
        roi = read_roi(tmp_path/'roi.geojson', origin=s.origin)
        assert roi.bounds == (x[0], y[0], x[1], y[1])
        grid = tile_slide(s, roi=roi)
        assert len(grid) and (_grid_coords(s, row, TileSpec(), 0, tmp_path, 0) == grid.coords).all()
    with pytest.warns(UserWarning, match='read by OpenSlide'): assert _survey_one(row, tmp_path, TileSpec(), None)[0]['patches'] == len(grid)


@pytest.mark.parametrize('bounds, origin', [(('5', '-7', '10', '20'), (5, -7)), (('5', '7', '10', None), (0, 0)), (('', '7', '10', '20'), (0, 0)), (('1.5', '7', '10', '20'), (0, 0))])
def test_bounds_are_taken_as_qupath_takes_them(mirax, bounds, origin):
    "All four whole numbers, or none of them"
    with WholeSlide(mirax[0]) as s:
        s.properties = {f'openslide.bounds-{k}': v for k, v in zip(('x', 'y', 'width', 'height'), bounds) if v is not None}
        assert s.origin == origin


@pytest.mark.parametrize('mpp, target', [(.25, .5), (.2199, .5), (.2527, .5), (.2999, .5), (.32, .5), (.499, .5), (.25, .35), (.25, .6), (.25, 1.)])
def test_trident_reads_our_fields(mirax, mpp, target):
    "It takes a patch's side on level 0 from the ratio of the two magnifications; whole numbers, so to a few percent; whatever the objective"
    with WholeSlide(mirax[0], mpp=mpp) as s: a = _layout(s, TileSpec(mpp=target))
    assert s.properties['openslide.objective-power'] == '20'
    assert a['patch_size']*a['level0_magnification']/a['target_magnification'] == pytest.approx(a['patch_size_level0'], rel=.04)
