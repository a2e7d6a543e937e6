"""The real cohort of profiles/tcga.yaml: found, or fetched where that was asked for, as a manifest of bags.

python tools/tcga.py    writes cache/tcga_brca/manifest.csv; FETCH=1 in the environment fetches what is not there (24 MB)
"""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from her2_mil.cohort import write_manifest
from her2_mil.core import Her2Error
from her2_mil.tcga import CLINICAL, FEATURES, fetch_tcga, tcga_cohort

ROOT = Path(__file__).resolve().parents[1]


def places(root: Path = ROOT) -> list:
    "Where the data may be: the folder that the environment names, else beside the repository's own data"
    named = os.environ.get("HER2_MIL_REAL_DATA")
    return [*([Path(named) / "tcga_brca"] if named else []), root / "data" / "tcga_brca"]


def data(root: Path = ROOT) -> Path:
    "The folder that holds the clinical table and the features, fetched where FETCH=1 says so"
    found = next((p for p in places(root) if (p / CLINICAL).is_file() and (p / FEATURES).is_dir()), None)
    if found:
        return found
    home = root / "data" / "tcga_brca"
    if os.environ.get("FETCH") == "1":
        return fetch_tcga(home, root / "nbs" / "data" / "tcga_features.csv", progress=tqdm)
    raise Her2Error(
        f"TCGA-BRCA is not at hand (looked in {', '.join(map(str, places(root)))}); on a machine with internet run "
        "'make reproduce PROFILE=tcga FETCH=1', which fetches 24 MB: public features of mahmoodlab/HIPT (Apache 2.0 with "
        "Commons Clause, non-commercial academic use) and the clinical table of the NCI GDC (open access); or set "
        "HER2_MIL_REAL_DATA to the folder that holds tcga_brca"
    )


def main(root: Path = ROOT) -> Path:
    "Write the manifest; bags are linked, not copied"
    source, home = data(root), root / "cache" / "tcga_brca"
    home.mkdir(parents=True, exist_ok=True)
    link = home / FEATURES
    if link.is_symlink():
        link.unlink()
    link.symlink_to((source / FEATURES).resolve(), target_is_directory=True)
    cohort = tcga_cohort(source / CLINICAL, source / FEATURES)
    for row in cohort.attrs["flow"].itertuples():
        print(f"{row.step}: {row.slides} slides of {row.patients} patients")
    cohort["features"] = [f"{FEATURES}/{name}" for name in cohort["features"]]
    return write_manifest(cohort, home / "manifest.csv")


if __name__ == "__main__":
    try:
        print(main().relative_to(ROOT))
    except Her2Error as e:
        sys.exit(str(e))
