"""make bench: one line a measurement, and runs/bench/bench.csv.

Each `bench_*.py` here has public functions that measure ours and the usual way in turn, in one run, and return rows
`name, ours, reference, unit, ratio, n, note`. A function that gives several names lists them in its attribute `names`;
else its own name is the name. `python benchmarks/run.py NAME` runs what gives NAME.
"""

import importlib
import inspect
import os
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
COLUMNS = ["name", "ours", "reference", "unit", "ratio", "n", "note"]


def benchmarks() -> dict:
    "Name of each measurement -> the function that makes it."
    sys.path.insert(0, str(HERE))
    found = {}
    for file in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(file.stem)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == module.__name__:
                found |= {n: function for n in getattr(function, "names", [name])}
    return found


def main(only: str = "") -> int:
    found = benchmarks()
    if only and only not in found:
        print(f"there is no measurement {only!r}; there are {', '.join(found)}")
        return 2
    rows, out = [], HERE.parent / "runs" / "bench" / "bench.csv"
    for function in dict.fromkeys([found[only]] if only else found.values()):
        made = function()
        for row in [made] if isinstance(made, dict) else made:
            rows.append(row)
            print(
                f"{row['name']:<28} {row['ours']:>10.4g} {row['reference']:>10.4g} {row['unit']:<12} ratio {row['ratio']:>7.3g}  n={row['n']}  {row['note']}",
                flush=True,
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    if only and out.exists():
        old = pd.read_csv(out)
        table = pd.concat([old[~old["name"].isin(table["name"])], table])
    part = out.with_suffix(".part")
    table.to_csv(part, index=False)
    os.replace(part, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
