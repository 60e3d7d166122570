"""Build the package, install the wheel into a fresh environment outside the checkout, train and draw with it.

Installing torch a second time would cost a minute and gigabytes. The fresh environment therefore borrows the
dependencies: a `.pth` file appends the site-packages of the environment that runs this. The project itself cannot be
borrowed that way. It is installed there as editable, through a `.pth` file of its own, and Python reads no `.pth` files
in folders that it has from a `.pth` file. The check below makes sure.
"""
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHERE = """
import importlib.metadata, pathlib, sys
from packaging.requirements import Requirement
import diffusion_lessons
home = pathlib.Path(sys.prefix).resolve()
assert home in pathlib.Path(diffusion_lessons.__file__).resolve().parents, diffusion_lessons.__file__
wheel = importlib.metadata.distribution("diffusion_lessons")
assert home in pathlib.Path(wheel.locate_file("")).resolve().parents, wheel.locate_file("")
for text in wheel.requires:
    needed = Requirement(text)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        found = importlib.metadata.version(needed.name)
        assert needed.specifier.contains(found, prereleases=True), f"{text} is not met by {found}"
print("from the wheel:", diffusion_lessons.__file__)
"""
DRAW = """
from diffusion_lessons import miniature
pipeline = miniature.load()
picture = pipeline("a photo of a red butterfly on snow", num_inference_steps=5).images[0]
assert picture.size == (64, 64) and len(picture.getcolors(64 * 64)) > 100, "an empty picture"
print("drawn by", miniature.path())
"""
WHEEL_LIMIT = 25_000_000  # bytes; the miniature is most of it


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> None:
    """Run a command with no sight of the checkout; stop here when it fails. A quiet one is heard only then."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    print("+", *(str(word) if len(str(word)) < 100 else "…" for word in command), flush=True)
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if quiet else {}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, **heard)
    if done.returncode:
        raise SystemExit(f"{done.stdout or ''}\nthe wheel does not work: {command[0]} exited with {done.returncode}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="diffusion-lessons-wheel-") as scratch:
        folder = Path(scratch).resolve()
        # Wheel from source distribution from checkout: what either leaves out is missing below.
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder, quiet=True)
        wheel = next((folder / "dist").glob("*.whl"))
        size = wheel.stat().st_size
        assert size <= WHEEL_LIMIT, f"the wheel has {size:,} bytes, more than {WHEEL_LIMIT:,}"
        names = {name.split("/")[0].split("-")[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert names == {"diffusion_lessons"}, f"the wheel brings {sorted(names)}"
        print(f"{wheel.name}: {size / 1e6:.1f} MB")
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        programs = folder / "venv" / "bin"
        run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
        fresh = Path(sysconfig.get_path("purelib", vars={"base": folder / "venv", "platbase": folder / "venv"}))
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (fresh / "borrowed-dependencies.pth").write_text("\n".join(sorted(borrowed)) + "\n", encoding="utf-8")
        run(programs / "python", "-c", WHERE, cwd=folder)
        run(programs / "python", "-c", DRAW, cwd=folder)
        run(programs / "train-butterflies", "--help", cwd=folder, quiet=True)
        run(
            programs / "train-butterflies", "--preset", "quick", "--max_train_steps", "5", "--output_dir", "trained",
            cwd=folder,
        )  # fmt: skip
        for name in ("model_index.json", "training_config.json", "README.md"):
            assert (folder / "trained" / name).is_file(), f"the run left no {name}"
        run(
            programs / "train-dreambooth", "--preset", "quick", "--lora", "--with_prior_preservation", "False",
            "--fidelity_model", "none", "--validation_steps", "100", "--max_train_steps", "2",
            "--output_dir", "adapter", cwd=folder,
        )  # fmt: skip
        run(
            programs / "generate-images", "--lora_weights", "adapter", "--prompt", "a photo of a sks butterfly",
            "--num_images", "1", "--num_inference_steps", "3", "--output_dir", "drawn", cwd=folder,
        )  # fmt: skip
        assert (folder / "drawn" / "0000.png").is_file(), "generate-images drew nothing"


if __name__ == "__main__":
    main()
