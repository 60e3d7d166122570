"""Results of the ablations on disk: a line of JSON for each finished run, appended by several processes."""
import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ablation_plan import Run
from filelock import FileLock, Timeout

Line = dict[str, Any]
GUESS = {"start": 1.0, "step": 0.2, "look": 10.0}  # seconds on one core, until a finished run tells


def read_results(path: Path, quiet: bool = False) -> list[Line]:
    """The lines of a file of results, none of a missing one; what is no whole line is left out with a note.

    quiet: without the note.
    """
    lines = []
    with _held(path):
        text = path.read_bytes() if path.is_file() else b""
    for number, content in enumerate(text.split(b"\n"), 1):
        try:
            line = json.loads(content) if content.strip() else None
        except ValueError:
            if not quiet:
                print(f"note: {path.name}, line {number}: is not whole and left out; its run is made again", flush=True)
            continue
        lines += [] if line is None else [line]
    return lines


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a finished run to the file, on the disk when this returns; half a line of a killed process is dropped."""
    with _held(path):
        drop_half_line(path)
        with path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def tidy(path: Path) -> None:
    """Drop half a line at the end, before anything is begun."""
    with _held(path):
        drop_half_line(path)


def drop_half_line(path: Path) -> None:
    """Cut off what stands behind the last line's end: a process was killed while it wrote. For who holds the file."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        print(f"note: {path.name}: its last line was half written and is dropped; its run is made again", flush=True)
        os.truncate(path, whole)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_locks(path) / "file.lock"):
        yield


def _locks(path: Path) -> Path:
    folder = path.with_name(f".{path.stem}-locks")  # beside the results: who shares them shares these
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def claimed(path: Path, key: str) -> Iterator[bool]:
    """Within the block a run is this process's own, or False, if another one has it; the lock dies with its process."""
    lock = FileLock(_locks(path) / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def select(lines: Sequence[Line], wanted: Mapping[str, Run]) -> list[Line]:
    """The lines of these runs, by key; of several with one key the first."""
    found: dict[str, Line] = {}
    for line in lines:
        if line["key"] in wanted:
            found.setdefault(line["key"], line)
    return list(found.values())


def left_out(lines: Sequence[Line], wanted: Mapping[str, Run], kind: Mapping[str, str]) -> str | None:
    """One line about results that are not used, and why; None where all are."""
    others = [line for line in lines if line["key"] not in wanted]
    if not others:
        return None
    differing = [sorted(name for name in kind if line["kind"].get(name) != kind[name]) for line in others]
    apart = sum(map(bool, differing))
    names = ", ".join(sorted({name for each in differing for name in each}))
    said = [f"{apart} made with other {names}" if apart else "",
            f"{len(others) - apart} of other subjects, pictures, seeds or conditions" if apart < len(others) else ""]
    return f"note: {len(others)} results are kept apart and in no table: {'; '.join(filter(None, said))}"


def estimate(todo: Sequence[Run], lines: Sequence[Line], workers: int) -> float:
    """Hours that these runs will take, by the seconds of finished ones; without any, by a guess for one core.

    lines: of finished runs of the same kind. workers: runs at a time, as far as there are cores.
    """
    trained = [line for line in lines if line["seconds"].get("looks") and line["seconds"].get("steps")]
    parts = {name: mean([line["seconds"][name] / (line["seconds"][f"{name}s"] if name != "start" else 1)
                         for line in trained]) if trained else guess for name, guess in GUESS.items()}  # fmt: skip
    known: dict[str, list[float]] = {}
    for line in lines:
        known.setdefault(line["condition"], []).append(line["seconds"]["all"])
    seconds = [mean(known[run.name]) if run.name in known else
               parts["start"] + max(run.looks, default=0) * parts["step"] + len(run.looks) * parts["look"]
               for run in todo]  # fmt: skip
    return sum(seconds) / 3600 / max(1, min(workers, os.cpu_count() or 1))
