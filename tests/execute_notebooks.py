"""Execute the lessons, each in a fresh kernel.

    python tests/execute_notebooks.py                       run all lessons, store their outputs
    python tests/execute_notebooks.py nbs/butterflies/11_noise.ipynb    run one lesson, store its outputs
    python tests/execute_notebooks.py --check               run copies in a scratch folder, store nothing
    python tests/execute_notebooks.py --slow nbs/index.ipynb   run its cells flagged slow as well

Cells that carry `#| eval: false`, `#| slow` or `#| cuda` are passed over and keep the outputs they have: such outputs
come from a machine where the cell did run. The closing `nbdev.nbdev_export()` cell is passed over as well, because a
run must not rewrite the package it is testing.
"""
import argparse
import base64
import io
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
COLOURS = re.compile(r"\x1b\[[\d;]*m")  # of IPython's tracebacks
MISNAMED = re.compile(r"Launching training on \d+ CUDAs\.\n")  # Accelerate's launcher, of processes on a CPU
TEMPORARY = re.compile(rf"{re.escape(tempfile.gettempdir())}/tmp\w{{8}}\b")  # another name in each run
PROGRESS_BAR = re.compile(r"\d+%\|.*\[|\d+(it|step|examples|s)?\s?\[\d+:\d+")
SKIPPING_FLAGS = {"slow", "cuda"}  # --slow takes the first out
BUDGET_SECONDS = 60
HEAVY_PNG = 60_000  # characters of base64, about 45 kB
# Stored outputs must not depend on who is online, on progress bars, or on a display.
QUIET_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # tqdm asks for widgets, and stored widgets are of no use; Accelerate says which threads it chose
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore:OMP_NUM_THREADS",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def directives(source: str) -> dict[str, str]:
    """The `#| name: value` lines of a code cell."""
    found = {}
    for line in source.splitlines():
        if match := DIRECTIVE.match(line):
            found[match[1]] = match[2]
    return found


def is_skipped(cell) -> bool:
    """Whether a run passes this code cell over."""
    flags = directives(cell.source)
    if SKIPPING_FLAGS & set(flags) or flags.get("eval", "").lower() == "false":
        return True
    return "nbdev_export(" in cell.source and "def " not in cell.source


class LessonClient(NotebookClient):
    """Runs the cells that are meant to run; the others keep their outputs."""

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type == "code" and is_skipped(cell):
            return cell
        self.at = cell_index, cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def tidy(notebook) -> None:
    """Remove what differs from run to run (execution times, counts, widget state) and what makes notebooks heavy."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    output.text = without_progress_bars(output.text)
                if output.output_type == "stream":
                    output.text = TEMPORARY.sub("…", MISNAMED.sub("", output.text))
            cell.outputs = [each for each in cell.outputs if each.output_type != "stream" or each.text.strip()]
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = None
                if "image/png" in output.get("data", {}):
                    output["data"].pop("image/jpeg", None)  # IPython stores a PIL image twice
                    output["data"]["image/png"] = lighter_png(output["data"]["image/png"])


def without_progress_bars(text: str) -> str:
    """What a cell wrote to standard error besides tqdm's bars, which only make sense while they move."""
    parts = re.split(r"[\r\n]", text)
    return "\n".join(part for part in parts if part.strip() and not PROGRESS_BAR.search(part))


def lighter_png(encoded: str) -> str:
    """The figure with at most 256 colours, if it is a large one: pictures full of noise shrink to a third.

    The colours are chosen by how far apart they are and not by how often they occur: of a grid with one orange fish,
    the latter would make it a yellow one. A film stays as it is: saved anew it would be a still.
    """
    if len(encoded) < HEAVY_PNG:
        return encoded
    stored = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if getattr(stored, "is_animated", False):
        return encoded
    picture = stored.convert("RGB")
    buffer = io.BytesIO()
    lighter = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    lighter.save(buffer, format="PNG", optimize=True)
    shorter = base64.b64encode(buffer.getvalue()).decode("ascii")
    return shorter if len(shorter) < len(encoded) else encoded


def execute(path: Path, folder: Path, timeout: float) -> tuple[object, str | None]:
    """Run one lesson with `folder` as its working directory; return the notebook and what went wrong, if anything."""
    notebook = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + timeout
    sockets = tempfile.TemporaryDirectory()
    client = LessonClient(
        notebook,
        kernel_name="python3",
        # sockets that are files: two kernels that start at once can be given the same free port
        config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets.name}/kernel"}),
        resources={"metadata": {"path": str(folder)}},
        timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
        record_timing=False,
        coalesce_streams=True,
        startup_timeout=120,
    )
    client.at = 0, None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        index, cell = client.at
        source = cell.source if cell else ""
        first_line = next((line for line in source.splitlines() if not line.startswith("#|")), "")
        kind = f"more than {timeout:.0f} s" if isinstance(error, CellTimeoutError) else type(error).__name__
        place = f"{path.name}, cell {index} ({first_line.strip()[:60]!r})"
        return notebook, f"{place}: {kind}\n{COLOURS.sub('', str(error))}"
    finally:
        sockets.cleanup()
    tidy(notebook)
    return notebook, None


def lessons(arguments: list[str]) -> list[Path]:
    """The notebooks named, or every notebook of the course in its order."""
    if arguments:
        return [Path(name).resolve() for name in arguments]
    hidden = (".", "_")
    return sorted(p for p in NBS.glob("**/*.ipynb") if not any(n.startswith(hidden) for n in p.relative_to(NBS).parts))


def report(path: Path, seconds: float, problem: str | None) -> None:
    """One line for one lesson, and what went wrong below it."""
    verdict = "FAILED" if problem else "ok" if seconds <= BUDGET_SECONDS else f"ok, over {BUDGET_SECONDS} s"
    print(f"{path.stem:<28} {seconds:6.1f} s  {verdict}", flush=True)
    if problem:
        print(problem, file=sys.stderr, flush=True)


def run_all(paths: list[Path], check: bool, timeout: float, jobs: int) -> int:
    """Run the lessons, `jobs` at a time; return how many failed."""
    failures = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = NBS
        if check:  # figures and outputs that a lesson writes beside itself stay out of the checkout as well
            folder = Path(scratch) / "nbs"
            shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns(".*", "outputs"))

        def run_one(path: Path) -> bool:
            began = time.monotonic()
            notebook, problem = execute(path, folder, timeout)
            report(path, time.monotonic() - began, problem)
            if not problem and not check:
                nbformat.write(notebook, path)
            return problem is None

        with ThreadPoolExecutor(jobs) as pool:
            failures = sum(not fine for fine in pool.map(run_one, paths))
    seconds = time.monotonic() - start
    print(f"{len(paths) - failures} of {len(paths)} lessons ran without error in {seconds:.0f} s", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="default: all of nbs/")
    parser.add_argument("--check", action="store_true", help="run copies; leave the notebooks as they are")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one notebook")
    parser.add_argument("--jobs", type=int, default=1, help="lessons at a time; they share the cores")
    parser.add_argument("--slow", action="store_true", help="run the cells flagged slow as well")
    options = parser.parse_args()
    if options.slow:
        SKIPPING_FLAGS.discard("slow")
    os.environ.update(QUIET_OFFLINE)
    if options.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    return 1 if run_all(lessons(options.notebooks), options.check, options.timeout, options.jobs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
