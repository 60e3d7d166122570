"""`make ablations`: the tables of the DreamBooth paper, with the miniature, on subjects of the meadow.

Each run is a line in a file of results as soon as it is finished, so that a killed call goes on where it was; runs are
shared by all tables that need them. At the end the tables, their figures and pictures are made from the lines. See
`benchmarks/README.md`.
"""
import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measuring

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"), HF_HUB_OFFLINE="1")
sys.path.insert(0, str(measuring.ROOT))  # the package of this checkout, installed or not

import torch
from ablation_plan import SEEDS, SUBJECTS, TABLES, TINY, Constants, Run, all_runs
from ablation_report import write_report
from ablation_results import append, claimed, estimate, left_out, read_results, select, tidy
from ablation_run import EYES, Bench

from diffusion_lessons.engine.commands import run_command
from diffusion_lessons.engine.config import InputError

PAGE = measuring.ROOT / "nbs" / "dreambooth" / "ablations.md"  # of the site, beside the lesson on the prior
PARENT = "ABLATIONS_PARENT"  # in the environment of a worker: the process that started it


def arguments() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", type=int, default=SUBJECTS, metavar="SEED",
                        help="seeds of the subjects (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED",
                        help="of the runs, for each subject (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE",
                        help=f"some of the tables {', '.join(TABLES)}; by default all")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--report", action="store_true", help="train nothing; make the report from what is there")
    parser.add_argument("--folder", type=Path, default=measuring.ROOT / "outputs" / "ablations",
                        help="class images, pictures and logs lie here (default: %(default)s)")  # fmt: skip
    parser.add_argument("--results", type=Path, help="file of the results, beside which the report is written; by "
                                                     "default benchmarks/results/ablations.jsonl, and the report "
                                                     "is a page of the site")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a few steps and pictures; the numbers mean nothing")
    parser.add_argument("--eye", choices=EYES, default=EYES[0], help="what tells individuals apart; judge: a stand-in")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; with --tiny, results go into the folder and not to the others."""
    parser = arguments()
    words = parser.parse_args(argv)
    if words.workers < 1:
        parser.error(f"--workers {words.workers}: must be 1 or more")
    words.folder = words.folder.expanduser().resolve() / ("tiny" if words.tiny else "")
    default = words.folder if words.tiny else measuring.RESULTS
    words.results = (words.results or default / "ablations.jsonl").expanduser().resolve()
    is_whole = words.results == measuring.RESULTS.resolve() / "ablations.jsonl"
    words.page = PAGE if is_whole else words.results.with_suffix(".md")
    words.constants = TINY if words.tiny else Constants()
    return words


def work(bench: Bench, wanted: dict[str, Run], results: Path) -> None:
    """Make the runs that nobody has finished or is at, one after the other."""
    parent = os.environ.get(PARENT)
    for number, (key, run) in enumerate(wanted.items(), 1):
        if parent and os.getppid() != int(parent):
            raise SystemExit(128 + signal.SIGTERM)  # who started this worker is gone
        with claimed(results, key) as is_mine:
            if not is_mine or select(read_results(results, quiet=True), {key: run}):
                continue
            line = bench.do(run)
            append(results, line)
        seconds = line["seconds"]
        parts = [f"{name} {seconds[name]:.0f} s" for name in ("start", "step", "look") if name in seconds]
        failed = f"; FAILED: {line['failed']}" if "failed" in line else ""
        print(f"[{number}/{len(wanted)}] {run}: {seconds['all']:.0f} s ({', '.join(parts)}){failed}", flush=True)


def work_together(argv: Sequence[str], workers: int) -> None:
    """Start this command so many times, with one core each, and wait for all; none outlives this process for long."""
    environment = measuring.environment_for(1) | {PARENT: str(os.getpid())}
    words = [sys.executable, str(Path(__file__).resolve()), *argv, "--workers", "1"]
    children = [subprocess.Popen(words, env=environment) for _ in range(workers)]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
    if any(codes):
        raise SystemExit(max(abs(code) for code in codes))


def announce(todo: list[Run], lines: list[dict], wanted: dict[str, Run], workers: int) -> None:
    """Say how much is to be done, and about how long it takes."""
    done = len(wanted) - len(todo)
    hours = estimate(todo, select(lines, wanted), workers)
    print(f"{len(wanted)} runs, {done} of them finished, {len(todo)} to do: about {hours:.1f} hours, {workers} at a "
          "time", flush=True)  # fmt: skip


def make_missing(words: argparse.Namespace, argv: Sequence[str], bench: Bench) -> None:
    """Make the runs of the asked tables that are not there; a worker says nothing of the whole."""
    tidy(words.results)
    is_worker, begin = PARENT in os.environ, time.monotonic()
    wanted = {bench.key(run): run for run in all_runs(words.constants, words.subjects, words.seeds, words.only)}
    lines = read_results(words.results, quiet=is_worker)
    done = {line["key"] for line in lines}
    if not is_worker:
        announce([run for key, run in wanted.items() if key not in done], lines, wanted, words.workers)
    if words.workers > 1 and not wanted.keys() <= done:
        work_together(argv, words.workers)
    else:
        work(bench, wanted, words.results)
    if not is_worker:
        print(f"it took {(time.monotonic() - begin) / 60:.0f} minutes", flush=True)


def report(words: argparse.Namespace, bench: Bench) -> None:
    """Write the report of all tables that have results; raises InputError where none has."""
    shown = {bench.key(run): run for run in all_runs(words.constants, words.subjects, words.seeds, list(TABLES))}
    lines = read_results(words.results, quiet=not words.report)
    kept, note = select(lines, shown), left_out(lines, shown, bench.kind)
    if not kept:
        raise InputError(f"{words.results}: holds no result of these weights, constants, subjects and seeds; "
                         f"{note or 'it is empty'}; leave out --report to make some")  # fmt: skip
    print(write_report(words, kept, len(shown), note), flush=True)


def ablate(words: argparse.Namespace, argv: Sequence[str]) -> None:
    """Make what is missing, then the report."""
    torch.set_num_threads(1)
    bench = Bench(words.constants, words.folder, words.eye)
    if not words.report:
        make_missing(words, argv, bench)
    if PARENT not in os.environ:
        report(words, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is 0, 1, 2, 130 or 143, as the package's commands have them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_command("ablations", lambda: ablate(words, argv), lambda: words.folder)


if __name__ == "__main__":
    raise SystemExit(main())
