"""A tiny study with an installed wheel, away from the repository: what somebody has who only typed `pip install`.

python tools/smoke.py FOLDER    writes a manifest of phantoms there, runs the study, scores a slide
"""

import sys
from pathlib import Path

import pandas as pd

import her2_mil
from her2_mil.config import StudyConfig
from her2_mil.score import score_slide
from her2_mil.slide import fetch_slide
from her2_mil.study import run_study


def manifest(folder: Path, patients: int = 4) -> Path:
    "Small phantom slides, as many of each score"
    rows = [
        dict(
            slide_id=f"s{score}{i}",
            patient_id=f"p{score}{i}",
            her2_score=("0", "1+", "2+", "3+")[score],
            uri=f"phantom:score={score};seed={10 * i + score};size=600x600",
        )
        for score in range(4)
        for i in range(patients)
    ]
    path = folder / "data_manifest.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def main(folder: Path) -> int:
    here = Path(her2_mil.__file__).resolve()
    assert "site-packages" in here.parts or "wheel" in str(here), f"not the installed wheel: {here}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest(folder)
    cfg = StudyConfig(
        name="smoke",
        embedders=("random",),
        primary="random",
        patch=96,
        patches_per_slide=20,
        bag_size=10,
        n_folds=2,
        seeds=1,
        inner_folds=0,
        permutations=2,
        mil_epochs=2,
    )
    run = run_study(cfg, folder)
    auc = run.metrics[run.metrics["primary"]]["auc"].iloc[0]
    scored = score_slide(fetch_slide(run.cohort["uri"].iloc[0], cache=run.cache), run.model)
    print(
        f"her2_mil {her2_mil.__version__}: {len(run.cohort)} slides, AUC {auc:.2f}, one slide scored {scored['probabilities']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
