"""Check that what is derived from the notebooks is up to date: modules, clean notebooks, links, README.

Everything is made anew in a copy and compared with the checkout, which stays as it is.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DERIVED = {
    "nbs": "`make notebooks`, or `nbdev_clean`",
    "diffusion_lessons": "`nbdev_export`",
    "README.md": "`make readme`",
    "index_files": "`make readme`",
    "_quarto.yml": "`make links`",
}
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "outputs", "_proc", "_docs", "build", "dist", "*.egg-info", "__pycache__", ".ipynb_checkpoints",
    ".*_cache", "nbdev.yml", "sidebar.yml",
)  # fmt: skip


def files_below(root: Path, name: str) -> set[str]:
    """Paths of the files in a folder, or of one file, relative to the root."""
    place = root / name
    found = [place] if place.is_file() else place.rglob("*") if place.is_dir() else []
    left_out = {"__pycache__", ".ipynb_checkpoints", "outputs"}
    generated = {"nbdev.yml", "sidebar.yml"}
    files = (path for path in found if path.is_file() and not path.is_symlink() and path.name not in generated)
    return {path.relative_to(root).as_posix() for path in files if not left_out & set(path.parts)}


def differences(made: Path, name: str) -> list[str]:
    """Files below `name` that differ between the checkout and the copy, or are in one of them only."""
    paths = files_below(ROOT, name) | files_below(made, name)
    return sorted(
        path for path in paths
        if not ((ROOT / path).is_file() and (made / path).is_file() and filecmp.cmp(ROOT / path, made / path, False))
    )  # fmt: skip


def main() -> int:
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "checkout"
        shutil.copytree(ROOT, made, symlinks=True, ignore=IGNORED)
        # Cleaning a notebook also marks it as trusted in Jupyter's data folder; a check leaves that alone.
        environment = {**os.environ, "JUPYTER_DATA_DIR": scratch, "PYTHONPATH": ""}
        for command in (
            [sys.executable, ".ci/links.py"],
            [str(programs / "nbdev_clean")],
            [str(programs / "nbdev_export")],
            [sys.executable, ".ci/readme.py"],
        ):
            subprocess.run(command, cwd=made, env=environment, check=True)
        stale = {name: found for name in DERIVED if (found := differences(made, name))}
    for name, paths in stale.items():
        print(f"{name} is not what the notebooks say; run {DERIVED[name]}:\n  " + "\n  ".join(paths))
    if not stale:
        print("modules, notebooks, links and README are in sync")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
