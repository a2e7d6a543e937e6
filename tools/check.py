"Fail if `nbdev_export`, `nbdev_clean` or `tools/readme.py` would change a file; changes nothing itself."

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["nbs", "her2_mil", "tools", "settings.ini", "setup.py", "README.md", "references.bib", "_quarto.yml"]
IGNORE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "nbdev.yml", "*.pyc")


def digests(root: Path) -> dict[str, str]:
    "SHA-256 of every notebook, module and README below `root`, by relative path."
    files = [*root.glob("nbs/**/*.ipynb"), *root.glob("her2_mil/**/*.py"), root / "README.md"]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def copy_tree(source: Path, to: Path) -> None:
    "Copy what the tools read, links as links, so that the working tree is left alone."
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, to / part, symlinks=True, ignore=IGNORE)
        else:
            shutil.copy2(source / part, to / part)


def stale(root: Path) -> list[str]:
    "Files below `root` that export, clean or readme would change."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with tempfile.TemporaryDirectory(prefix="her2_mil_check_") as folder:
        copy = Path(folder)
        copy_tree(root, copy)
        before = digests(copy)
        for command in (["nbdev_export"], ["nbdev_clean"], [sys.executable, "tools/readme.py"]):
            subprocess.run(command, cwd=copy, env=env, check=True)
        after = digests(copy)
    return sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))


def main() -> int:
    changed = stale(ROOT)
    for name in changed:
        print(f"{name}: not up to date; run nbdev_export, nbdev_clean and tools/readme.py, and commit the result")
    if not changed:
        print("export, clean and README are up to date")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
