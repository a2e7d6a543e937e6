"Where things are, and real tissue where this machine has it."

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
