"Where things are, and real tissue where this machine has it."

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


# files whose every test renders a slide, trains a network or drives a browser
SLOW = {"test_run", "test_score", "test_viewer", "test_pretraining", "test_embedding", "test_slide", "test_real"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs more than a second or two; `make quick` leaves it out")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def tiled(mpp, side=256, compression="jpeg") -> dict:
    "What tifffile is told of a tiled RGB slide of this um/px (one number, or x and y)"
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    return dict(
        tile=(side, side),
        photometric="rgb",
        compression=compression,
        metadata=None,
        resolution=(1e4 / x, 1e4 / y),
        resolutionunit="CENTIMETER",
    )


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def real() -> Path:
    "Folder of real slides, patches and weights; skips where it is absent."
    folder = Path(os.environ.get("HER2_MIL_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "wsi").is_dir():
        pytest.skip(
            f"no real tissue in {folder}: set HER2_MIL_REAL_DATA to a folder that holds wsi/, bcss/ and weights/"
        )
    return folder
