"""Lay out the page on which the miniature draws in the browser: modules, graphs, weights and runtime.

    python web/build.py FOLDER [--check]

FOLDER then holds everything that the page needs, by relative addresses; any static server serves it. A page of before
is replaced, a folder with anything else is refused. What is large is packed with gzip and unpacked by the page, because
not every host packs on the way. `manifest.json` names each file with its size and fingerprint. `--check` compares the
modules with the package, in Node.js.
"""
import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusion_lessons import miniature
from diffusion_lessons.miniature.model import KNOWN_WORDS
from diffusion_lessons.pictures.meadow import COLOURS, KINDS, PLACES

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "node_modules/onnxruntime-web"
RUNTIME_MODULE = "ort.wasm.bundle.min.mjs"  # without threads a static host has to send no headers
WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae_decoder": "vae/diffusion_pytorch_model.safetensors",
}


def run(*command: str | Path, **environment: str | Path) -> None:
    """Run a command of this build; ends the build, naming it, where it fails."""
    program, *arguments = map(str, command)
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"make web needs {program}, and there is none here: install Node.js 20 or newer (nodejs.org)")
    variables = {name: str(value) for name, value in environment.items()}
    done = subprocess.run([found, *arguments], cwd=HERE, env=os.environ | variables, check=False)
    if done.returncode:
        raise SystemExit(f"make web: `{' '.join([program, *arguments])}` failed ({done.returncode})")


def sources(graphs: Path) -> dict[str, tuple[str, Path]]:
    """What the page fetches: name to its place below the page's folder and the file it is made of."""
    model = miniature.path()
    found = {"runtime": ("runtime/ort.wasm.gz", RUNTIME / "dist/ort-wasm-simd-threaded.wasm"),
             "tokenizer": ("model/tokenizer.json", model / "tokenizer/tokenizer.json"),
             "scheduler": ("model/scheduler_config.json", model / "scheduler/scheduler_config.json")}
    for name, weights in WEIGHTS.items():
        found[f"{name}.onnx"] = (f"model/{name}.onnx.gz", graphs / f"{name}.onnx")
        found[f"{name}.safetensors"] = (f"model/{name}.safetensors.gz", model / weights)
    return found


def lay(source: Path, target: Path) -> dict[str, Any]:
    """Copy or pack one file; returns its line in the manifest."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    packed = gzip.compress(content, 9, mtime=0) if target.suffix == ".gz" else content
    target.write_bytes(packed)
    return {"bytes": len(packed), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def runtime_is_there() -> bool:
    """Whether npm has installed the runtime, in the version that package.json pins."""
    if not (RUNTIME / "package.json").is_file():
        return False
    pinned = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]["onnxruntime-web"]
    return json.loads((RUNTIME / "package.json").read_text(encoding="utf-8"))["version"] == pinned


def check_replaceable(folder: Path) -> None:
    """Raise SystemExit for a folder that holds something other than a page of before."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "solver.js").is_file()):
        raise SystemExit(f"{folder} holds something else, which would be lost: name a new folder, or an empty one")


def build(folder: Path, graphs: Path) -> dict[str, Any]:
    """Write the whole page; returns its manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "page", folder)
    shutil.copytree(HERE / "licences", folder / "runtime")
    module = folder / "runtime" / RUNTIME_MODULE  # as .js: not every server knows that .mjs is JavaScript
    shutil.copy(RUNTIME / "dist" / RUNTIME_MODULE, module.with_suffix(".js"))
    shutil.copy(HERE.parent / "nbs/butterfly.svg", folder)
    files = {name: {"path": place} | lay(source, folder / place) for name, (place, source) in sources(graphs).items()}
    manifest = {"files": files, "words": sorted(KNOWN_WORDS),
                "attributes": {"colours": COLOURS, "kinds": KINDS, "places": PLACES}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made anew")
    parser.add_argument("--check", action="store_true", help="compare what the page's modules do with the package")
    options = parser.parse_args()
    folder = options.folder.resolve()
    check_replaceable(folder)
    if not runtime_is_there():
        run("npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund")
    with tempfile.TemporaryDirectory() as temporary:
        graphs = Path(temporary)
        run(sys.executable, HERE / "export.py", graphs)
        manifest = build(folder, graphs)
        if options.check:
            run(sys.executable, HERE / "cases.py", graphs / "cases.json")
            tests = sorted((HERE / "tests").glob("*.test.mjs"))  # one by one: what a folder means changed in 22
            run("node", "--test", "--test-reporter=tap", *tests, WEB=folder, GRAPHS=graphs, CASES=graphs / "cases.json")
    total = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{folder}: {total / 1e6:.1f} MB over the wire; serve it with `python -m http.server -d {options.folder}`")


if __name__ == "__main__":
    main()
