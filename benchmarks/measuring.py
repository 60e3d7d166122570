"""What the benchmarks share: a process run to its end with time and peak memory, the machine, and results on disk.

Only the standard library: the kernel counts the size of a process into the peak of those that it starts, so what
measures must not weigh; and the environment is set before torch is imported.
"""
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {  # the package's commands as modules: they run from a checkout, installed or not
    "train-butterflies": "diffusion_lessons.butterflies",
    "train-dreambooth": "diffusion_lessons.dreambooth.training",
    "generate-images": "diffusion_lessons.dreambooth.inference",
    "train-dreambooth-jax": "diffusion_lessons.jax.training",
}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "jax", "flax")
GIB = 2**30


# ── one process ──────────────────────────────────────────────────────────────────────────

BAR = re.compile(rb"\| *(\d+)/(\d+) \[[^\]]*?(?:step|it)")  # a progress bar of ours, or of the reference scripts


class Listener(threading.Thread):
    """Reads what a process says into a file, and notes when its progress bar of `total` steps moved."""

    def __init__(self, pipe: IO[bytes], log: Path, total: int | None) -> None:
        super().__init__(daemon=True)
        self.pipe, self.log, self.total = pipe, log, total
        self.marks: list[tuple[float, int]] = []  # seconds on the monotonic clock, and steps done by then

    def run(self) -> None:
        """Until the process closes its end."""
        with self.log.open("ab") as file:
            while chunk := os.read(self.pipe.fileno(), 65536):
                file.write(chunk)
                file.flush()
                for done, total in BAR.findall(chunk) if self.total else ():
                    if int(total) == self.total and (not self.marks or int(done) > self.marks[-1][1]):
                        self.marks.append((time.monotonic(), int(done)))


@dataclass(frozen=True)
class Finished:
    """What became of a process: its exit code (negative: ended by that signal), and what it took."""

    code: int
    seconds: float
    memory: float  # GiB, the largest resident size that the kernel saw
    marks: list[tuple[float, int]]  # of the progress bar
    text: str  # what it said, output and errors together

    @property
    def last_line(self) -> str:
        """The last line that is no progress bar: an error, or the result."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.text) if line.strip()]
        return next((line for line in reversed(lines) if "it/s" not in line and "step/s" not in line), "")


def run_process(words: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None,
                cwd: Path | None = None, limit: float | None = None, total: int | None = None,
                kill_when: Callable[[], bool] = lambda: False) -> Finished:  # fmt: skip
    """Run a process to its end. It is ended by SIGKILL after `limit` seconds, or as soon as `kill_when()` is true.

    log: what it says goes there. total: steps of the progress bar whose pace is noted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment, cwd=cwd)  # fmt: skip
    listener, usage = Listener(process.stdout, log, total), None
    listener.start()
    try:
        while usage is None:
            if kill_when() or (limit is not None and time.monotonic() - begin > limit):
                os.kill(process.pid, signal.SIGKILL)  # `process.kill` would ask for the exit code, and lose the usage
            usage = wait(process)
    finally:
        if usage is None:  # this process itself was stopped
            process.kill()
            process.wait()
    seconds = time.monotonic() - begin
    listener.join(timeout=5)
    process.stdout.close()
    text = log.read_text(encoding="utf-8", errors="replace")
    return Finished(process.returncode, seconds, usage.ru_maxrss * 1024 / GIB, listener.marks, text)


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def wait(process: subprocess.Popen, seconds: float = 0.02) -> Any:
    """What the kernel knows of a process that has ended, its children included; None after a moment, if it has not."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        time.sleep(seconds)
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def quickest_step(marks: Sequence[tuple[float, int]]) -> float | None:
    """Seconds of the quickest step of a progress bar: without the start, and without a checkpoint in between."""
    paces = [(later[0] - mark[0]) / (later[1] - mark[1]) for mark, later in itertools.pairwise(marks)]
    return min(paces, default=None)


def mean_step(marks: Sequence[tuple[float, int]], skipped: int = 3) -> float | None:
    """Seconds of a step of a progress bar, the mean over all but the first ones."""
    kept = [mark for mark in marks if mark[1] >= skipped]
    return (kept[-1][0] - kept[0][0]) / (kept[-1][1] - kept[0][1]) if len(kept) > 1 else None


def command(name: str, *flags: str, **fields: Any) -> list[str]:
    """One of the package's commands in this Python. A field becomes a flag with its value; True: a bare flag."""
    named = [[f"--{key}"] if value is True else [f"--{key}", str(value)]
             for key, value in fields.items() if value is not None]  # fmt: skip
    return [sys.executable, "-m", COMMANDS[name], *flags, *(word for words in named for word in words)]


def environment_for(threads: int | None = None, ours: bool = True) -> dict[str, str]:
    """The environment of a measured process: offline, at once heard, and with this checkout's package, or without."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    changed = {"PYTHONPATH": os.pathsep.join([*([str(ROOT)] if ours else []), *paths]), "PYTHONUNBUFFERED": "1",
               "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    if threads is not None:
        changed |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return os.environ | changed


# ── plain diffusers ──────────────────────────────────────────────────────────────────────


# Before it draws. A CPU loads 16 bits and computes with them a hundred times slower; parts of unlike formats stay so.
WIDEN = """
import sys, torch
if {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float16}:
    pipeline.to(torch.float32)
"""


def card_code(folder: Path, base: Path, steps: int, size: int, picture: Path) -> str:
    """The Python code on the model card of a run, with few steps and a small picture, which it saves.

    base: what the card of an adapter leaves to its reader, the model that it belongs to.
    Raises ValueError for a card without such code.
    """
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if found is None or "\nimage = pipeline(" not in found[1] or ").images[0]" not in found[1]:
        raise ValueError(f"{folder / 'README.md'}: shows no code that draws a picture")
    quick = f", num_inference_steps={steps}, height={size}, width={size}).images[0]"
    code = found[1].replace("DIR_OF_THE_BASE_MODEL", str(base)).replace(").images[0]", quick)
    code = code.replace("\nimage = pipeline(", f"\n{WIDEN}\nimage = pipeline(")
    return (f"{code}\nimage.save({str(picture)!r})\n"
            "assert not any(name.startswith('diffusion_lessons') for name in sys.modules)\n")  # fmt: skip


# ── the machine ──────────────────────────────────────────────────────────────────────────


def first_line(*words: str) -> str | None:
    """The first line that a program prints, or None where there is no such program, or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 and done.stdout.strip() else None


def graphics_card() -> str | None:
    """Name, memory and driver of the first GPU, or None."""
    return first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def about_machine(card: bool = True) -> dict[str, str]:
    """What results depend on: date, card, CPU, memory, versions, the state of the checkout. card: whether it counts."""
    commit = first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "card": graphics_card() if card else None,
             "cpu": f"{processor()}, {cores} cores", "memory": f"{memory_gib('MemTotal'):.0f} GiB",
             "python": platform.python_version(), **{name: installed(name) for name in LIBRARIES},
             "checkout": commit}  # fmt: skip
    return {name: value for name, value in facts.items() if value}


def memory_gib(kind: str = "MemAvailable") -> float:
    """GiB of memory of the machine, as Linux counts them; infinite where nobody says."""
    info = Path("/proc/meminfo")
    found = re.search(rf"{kind}:\s*(\d+) kB", info.read_text(encoding="utf-8")) if info.is_file() else None
    return int(found[1]) * 1024 / GIB if found else float("inf")


def disk_gib(folder: Path) -> float:
    """GiB that are free where a folder lies, or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


# ── results ──────────────────────────────────────────────────────────────────────────────


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as a Markdown table."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Results:
    """A JSON file and its Markdown page, written anew with everything that is added: a killed run keeps what it had.

    Named by kind, date and machine, `gpu-2026-11-26-nvidia-h100.json`. The file is the only memory, so that several
    processes may add to it one after the other.
    """

    def __init__(self, folder: Path, kind: str, about: Mapping[str, str], title: str) -> None:
        machine = about.get("card", about["cpu"]).split(",")[0].lower()
        name = f"{kind}-{about['date'][:10]}-{re.sub('[^a-z0-9]+', '-', machine).strip('-')}"
        self.path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._write({"title": title, "about": dict(about), "sections": {}})

    @property
    def content(self) -> dict[str, Any]:
        """Everything so far."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def page(self) -> Path:
        """The same for people to read."""
        return self.path.with_suffix(".md")

    def picture(self, name: str) -> Path:
        """Where a picture of these results goes."""
        return self.path.with_name(f"{self.path.stem}-{name}.png")

    def section(self, name: str, **content: Any) -> None:
        """Add to a section, or begin it: `title`, `state`, `seconds`, `rows` and `pictures` (names of files)."""
        everything = self.content
        everything["sections"][name] = everything["sections"].get(name, {}) | content
        self._write(everything)

    def _write(self, content: dict[str, Any]) -> None:
        for path, text in ((self.path, json.dumps(content, indent=1) + "\n"), (self.page, as_markdown(content))):
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of some results."""
    parts = [f"# {content['title']}\n", table([{"": name, " ": value} for name, value in content["about"].items()])]
    for name, section in content["sections"].items():
        parts.append(f"## {section.get('title', name)}\n")
        said = [section.get("state"), f"{section['seconds']:.0f} s" if "seconds" in section else None]
        if any(said):
            parts.append(", ".join(each for each in said if each) + "\n")
        parts.append(table(section.get("rows", ())))
        parts += [f"![{Path(picture).stem}]({picture})\n" for picture in section.get("pictures", ())]
    return "\n".join(part for part in parts if part)
