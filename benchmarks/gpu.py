"""`make gpu`: all that is worth knowing from a GPU, in one command of at most eight minutes on an H100.

In order of worth, each piece in a process of its own, bounded in time, and written as soon as something of it is there:

a  the miniature's DreamBooth in fp16 and bf16, with text encoder, prior, LoRA, SIGKILL and resume: is it correct?
b  Stable Diffusion 1.4's shape at 512 px: seconds a step and peak memory, beside the estimate
f  the same for each recipe, in a process under a hard cap of its 24, 16, 12 or 8 GB, and LoRA under 4
c  the same through the reference scripts, if --scripts names their folder
d  tutorial-128 on drawn specimens: images a second, peak memory, a grid after three minutes
e  class images a second: Stable Diffusion 1.4's shape, 512 px, fp16
g  the JAX trainer at that shape: seconds a step and to compile, where JAX finds the GPU

See `benchmarks/README.md`.
"""
import argparse
import contextlib
import gc
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
from measuring import GIB, Results, environment_for, mean_step, run_process

SUBJECT, CLASS = "a photo of a sks butterfly", "a photo of a butterfly"
# A child of `fork` has everything imported already, and starts in no time. Nothing touches the GPU before it forks.
FORK = multiprocessing.get_context("fork")
OVERLAY = "DIFFUSION_LESSONS_OVERLAY"  # in the environment: where the wheels were installed


@dataclass(frozen=True)
class Sizes:
    """How large everything is: real, or toys for `--rehearse`."""

    precisions: tuple[str, ...] = ("fp16", "bf16")  # of the miniature's runs
    pixels: int = 64
    steps: int = 90
    checkpoint: int = 30
    killed: int = 4  # how many of those runs are killed and resumed as well
    resolution: int = 512  # of Stable Diffusion's shape
    repeats: int = 5
    reference_steps: int = 23
    network: str = "tutorial-128"
    side: int = 128
    specimens: int = 1000
    training_seconds: float = 180
    batches: tuple[int, ...] = (1, 4, 8)  # class images drawn at a time
    solver_steps: int = 25
    half: str = "fp16"  # of everything that is measured at Stable Diffusion's shape
    small: bool = False


TOY = Sizes(precisions=("no",), pixels=32, steps=6, checkpoint=2, killed=1, resolution=64, repeats=1, reference_steps=7,
            network="tiny-16", side=16, specimens=32, training_seconds=1, batches=(1, 2), solver_steps=2, half="bf16",
            small=True)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What every piece gets: where it may write, how large it is, until when it may run."""

    folder: Path
    results: Results
    sizes: Sizes
    scripts: Path | None
    deadline: float  # on the monotonic clock

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def rows(self, piece: str, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        """Add a row to a piece's table, print it, and write it at once."""
        rows.append(row)
        self.results.section(piece, rows=rows)
        print("   " + ", ".join(f"{name}: {measuring.cell(value)}" for name, value in row.items()), flush=True)

    @property
    def model(self) -> Path:
        """The folder of Stable Diffusion 1.4's shape, built when it is first asked for."""
        from materials import build, model_folder

        path = model_folder(self.folder, "1.4")
        build("1.4", path, self.sizes.small)
        return path

    @property
    def subject(self) -> Path:
        """Five drawn pictures of the subject."""
        from materials import draw_subject

        folder = self.folder / "subject"
        if not folder.is_dir():
            draw_subject(folder, 5, self.sizes.resolution)
        return folder


# ── a: is it correct? ────────────────────────────────────────────────────────────────────


def miniature_fields(bench: Bench, precision: str, lora: bool) -> dict[str, Any]:
    """A run on the miniature, with text encoder and prior, full or with adapters."""
    sizes = bench.sizes
    return dict(pretrained_model_name_or_path="miniature", instance_data_dir=str(bench.subject), seed=0,
                instance_prompt=SUBJECT, class_prompt=CLASS, class_data_dir=str(bench.folder / "class"),
                with_prior_preservation=True, num_class_images=4, sample_batch_size=4, train_text_encoder=True,
                resolution=sizes.pixels, train_batch_size=2, max_train_steps=sizes.steps, lora=lora,
                checkpointing_steps=sizes.checkpoint, learning_rate=1e-3 if lora else 3e-4, lr_warmup_steps=2,
                report_to="none", fidelity_model="none", mixed_precision=precision)  # fmt: skip


def kill_after_checkpoint(fields: dict[str, Any], limit: float) -> str:
    """Train in a child process, end it by SIGKILL as soon as a checkpoint stands; returns how far it had come."""
    from diffusion_lessons.dreambooth.config import DreamBoothConfig
    from diffusion_lessons.dreambooth.training import train

    folder, end = Path(fields["output_dir"]), time.monotonic() + limit
    child = FORK.Process(target=train, args=(DreamBoothConfig(**fields),))
    child.start()
    while child.is_alive() and time.monotonic() < end and not any(folder.glob("checkpoint-*")):
        time.sleep(0.005)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    found = sorted(path.name for path in folder.glob("checkpoint-*"))
    return f"killed after {found[-1]}" if child.exitcode == -signal.SIGKILL and found else "NOT KILLED in time"


def largest_difference(one: Path, two: Path) -> float:
    """The largest difference between the weights of two finished runs; infinite unless they have the same names."""
    from safetensors.torch import load_file

    def weights(folder: Path) -> dict[str, Any]:
        files = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors"))]
        return {f"{path}:{name}": weight for path in files if not path.parts[0].startswith("checkpoint-")
                for name, weight in load_file(folder / path).items()}  # fmt: skip

    first, second = weights(one), weights(two)
    if first.keys() != second.keys() or not first:
        return math.inf
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def train_whole(fields: dict[str, Any]) -> dict[str, Any]:
    """Train without a break; returns what the losses say."""
    from diffusion_lessons.dreambooth.config import DreamBoothConfig
    from diffusion_lessons.dreambooth.training import train

    begin = time.monotonic()
    losses = train(DreamBoothConfig(**fields))
    quarter = max(1, len(losses) // 4)
    first, last = (sum(some) / len(some) for some in (losses[:quarter], losses[-quarter:]))
    return {"seconds": time.monotonic() - begin, "steps": len(losses), "first quarter's loss": first,
            "last quarter's loss": last, "finite": all(map(math.isfinite, losses)), "falls": last < first}  # fmt: skip


# What a user writes who has never heard of this package.
PLAIN = """
pipeline = StableDiffusionPipeline.from_pretrained({model!r}, torch_dtype=torch.float16)
if {adapter!r}:
    pipeline.load_lora_weights({adapter!r})
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
generator = torch.Generator().manual_seed(0)
pipeline({prompt!r}, num_inference_steps={steps}, generator=generator).images[0].save({picture!r})
"""


def open_results(bench: Bench, folders: Sequence[Path]) -> str:
    """Draw with each result in one process of plain diffusers, in fp16; returns `ok`, or what went wrong."""
    from diffusion_lessons.stable_diffusion.folder import shipped

    code, pictures = "import torch\nfrom diffusers import StableDiffusionPipeline\n", []
    for folder in folders:
        adapter = not (folder / "model_index.json").is_file()
        pictures.append(bench.results.picture(f"a-{folder.name}"))
        code += PLAIN.format(model=str(shipped("miniature") if adapter else folder), prompt=SUBJECT,
                             adapter=str(folder) if adapter else "", steps=bench.sizes.solver_steps,
                             picture=str(pictures[-1]))  # fmt: skip
    done = run_process([sys.executable, "-c", code], bench.folder / "open.log", limit=max(1, bench.left),
                       environment=environment_for(ours=False), cwd=bench.folder)  # fmt: skip
    bench.results.section("a", pictures=[picture.name for picture in pictures if picture.is_file()])
    return "open in plain diffusers in fp16" if done.code == 0 else f"do NOT open in plain diffusers: {done.last_line}"


def check_row(row: dict[str, Any], steps: int) -> list[str]:
    """What is wrong with a run, in words."""
    wrong = [] if row["finite"] else ["its losses are not finite"]
    if "killed" in row and not row["killed"].startswith("killed"):
        wrong.append("it was over before it was killed")
    if "killed" in row and row["steps after it"] >= steps:
        wrong.append("it began anew instead of going on")
    return [f"{row['run']}: {each}" for each in wrong]


def correct(bench: Bench) -> None:
    """Piece a. What is killed is killed first: that happens in forked children, before CUDA has started here."""
    kinds = {f"{'lora' if lora else 'full'}-{precision}": miniature_fields(bench, precision, lora)
             for precision, lora in itertools.product(bench.sizes.precisions, (False, True))}  # fmt: skip
    rows, wrong, said = [], [], {}
    for name, fields in list(kinds.items())[: bench.sizes.killed]:
        said[name] = kill_after_checkpoint(fields | {"output_dir": str(bench.folder / f"{name}-killed")}, 45)
    for name, fields in kinds.items():
        whole, killed = bench.folder / name, bench.folder / f"{name}-killed"
        row = {"run": name, **train_whole(fields | {"output_dir": str(whole)})}
        if name in said:
            rest = train_whole(fields | {"output_dir": str(killed), "resume_from_checkpoint": "latest"})
            row |= {"killed": said[name], "steps after it": rest["steps"],
                    "largest difference": largest_difference(whole, killed)}  # fmt: skip
        bench.rows("a", rows, row)
        wrong += check_row(row, bench.sizes.steps)
    opened = open_results(bench, [bench.folder / name for name in kinds])
    failed = wrong or "NOT" in opened
    bench.results.section("a", state="; ".join([*(["FAILED"] if failed else []), *wrong, f"all {opened}"]))


# ── b: Stable Diffusion's shape ──────────────────────────────────────────────────────────

MODES: dict[str, dict[str, Any]] = {
    "full": {}, "text encoder": {"train_text_encoder": True}, "LoRA": {"lora": True},
}  # fmt: skip


def free_gpu() -> None:
    """Give back what an earlier measurement held, and forget its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def estimated(config: Any) -> float | None:
    """GiB that the package expects a run to need on a GPU while it trains; None where it makes no such estimate."""
    try:
        memory = importlib.import_module("diffusion_lessons.dreambooth.memory")
    except ModuleNotFoundError:
        return None
    phases = memory.estimate(config, config.pretrained_model_name_or_path)
    return next(phase.total for phase in phases if phase.phase == "train")


def shape_config(bench: Bench, recompute: bool, **fields: Any) -> Any:
    """A run at Stable Diffusion's shape, batch 1; recompute: with gradient checkpointing."""
    from diffusion_lessons.dreambooth.config import DreamBoothConfig

    return DreamBoothConfig(pretrained_model_name_or_path=str(bench.model), instance_data_dir=str(bench.subject),
                            instance_prompt=SUBJECT, resolution=bench.sizes.resolution, train_batch_size=1, seed=0,
                            mixed_precision=bench.sizes.half, gradient_checkpointing=recompute, report_to="none",
                            output_dir=str(bench.folder / "unused"), fidelity_model="none", **fields)  # fmt: skip


def shape(bench: Bench) -> None:
    """Piece b: real micro-steps, with and without gradient checkpointing; then, as far as time is left, estimates."""
    import torch

    from diffusion_lessons.dreambooth.preparation import measure_run

    rows: list[dict[str, Any]] = []
    runs = list(itertools.product(MODES, (False, True)))
    for mode, recompute in runs:
        row = {"trained": mode, "gradient checkpointing": recompute, "seconds a step": None, "peak GiB": None,
               "estimate GiB": None}  # fmt: skip
        free_gpu()
        try:
            measured = measure_run(shape_config(bench, recompute, **MODES[mode]), bench.sizes.repeats)
            row |= {"seconds a step": measured.seconds, "peak GiB": measured.memory}
        except torch.OutOfMemoryError:
            row["seconds a step"] = "out of memory"
        bench.rows("b", rows, row)
    for row, (mode, recompute) in zip(rows, runs, strict=True):
        if bench.left < 20:  # an estimate takes seconds of a processor, and the next piece is worth more
            break
        row["estimate GiB"] = estimated(shape_config(bench, recompute, **MODES[mode]))
        bench.results.section("b", rows=rows)


# ── f: the recipes ───────────────────────────────────────────────────────────────────────


def recipe_words(bench: Bench, name: str, job: dict[str, Any]) -> list[str | Path]:
    """How a recipe is started: as a script, or by `accelerate launch` where it trains under DeepSpeed."""
    from diffusion_lessons.dreambooth.config import OFFLOADING
    from diffusion_lessons.engine.deepspeed import deepspeed_config_text

    words = [Path(__file__).with_name("capped.py"), json.dumps(job)]
    if name != OFFLOADING:
        return [sys.executable, *words]
    file = bench.folder / "deepspeed.yaml"
    file.write_text(deepspeed_config_text(bench.sizes.half), encoding="utf-8")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *words]


def missing_package(name: str, fields: dict[str, Any]) -> str | None:
    """What a recipe needs and this Python does not have, with the install command; None where it has all."""
    from diffusion_lessons.dreambooth.config import OFFLOADING
    from diffusion_lessons.engine.deepspeed import INSTALL
    from diffusion_lessons.engine.optimizers import EIGHT_BIT

    package, install = ("deepspeed", INSTALL) if name == OFFLOADING else (None, "")
    if fields.get("use_8bit_adam"):
        package = "torchao" if fields.get("full_bf16") else "bitsandbytes"
        install = f"pip install 'diffusion_lessons[{EIGHT_BIT[package]}]'"
    there = package is None or importlib.util.find_spec(package) is not None
    return None if there else f"{package} is not installed; {install}"


def recipe_row(bench: Bench, name: str, gigabytes: float, fields: dict[str, Any]) -> dict[str, Any]:
    """What `capped.py` measured of a recipe, or why it did not."""
    row, missing = {"recipe": name, "cap GB": gigabytes}, missing_package(name, fields)
    if missing is not None:
        return row | {"result": missing}
    own = dict(pretrained_model_name_or_path=str(bench.model), instance_data_dir=str(bench.subject), seed=0,
               instance_prompt=SUBJECT, resolution=bench.sizes.resolution, report_to="none", fidelity_model="none",
               output_dir=str(bench.folder / "unused"))  # fmt: skip
    half = {"mixed_precision": bench.sizes.half} if fields.get("mixed_precision") == "fp16" else {}  # a CPU has no fp16
    job = {"name": name, "gigabytes": gigabytes, "repeats": bench.sizes.repeats, "fields": own | fields | half}
    done = run_process(recipe_words(bench, name, job), bench.folder / "recipe.log", environment=environment_for(),
                       cwd=bench.folder, limit=max(1, bench.left))  # fmt: skip
    found = re.search(r"^measured (\{.*\})$", done.text, re.MULTILINE)
    failed = {"result": f"exit code {done.code}: {done.last_line[:150]}"}
    return row | (json.loads(found[1]) if found else failed)


def recipes(bench: Bench) -> None:
    """Piece f: each recipe in a process of its own, which cannot have more of the card than the recipe is named for."""
    from diffusion_lessons.dreambooth.config import OFFLOADING, RECIPES

    rows: list[dict[str, Any]] = []
    lora = {"lora": True, "train_batch_size": 1, "gradient_checkpointing": True}
    runs = {"LoRA": lora} | dict(reversed(RECIPES.items()))  # the smallest card first
    runs[OFFLOADING] = runs.pop(OFFLOADING)  # but last what may have to be compiled, for a minute or more
    for name, fields in runs.items():
        gigabytes = 4 if name == "LoRA" else float(name.split("gb")[0])
        bench.rows("f", rows, recipe_row(bench, name, gigabytes, fields))


# ── c: the reference scripts ─────────────────────────────────────────────────────────────

# Runs a script as `python SCRIPT` would, and says at the end what the allocator's peak was: the number of piece b.
WRAPPED = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30} GiB")
"""


def reference_words(bench: Bench, mode: str, recompute: bool) -> list[str | Path]:
    """A short training by a reference script, with the settings of piece b."""
    from materials import in_32_bits

    script = bench.scripts / ("train_dreambooth_lora.py" if mode == "LoRA" else "train_dreambooth.py")
    fields = dict(pretrained_model_name_or_path=in_32_bits(bench.model), instance_data_dir=bench.subject,
                  instance_prompt=SUBJECT, resolution=bench.sizes.resolution, train_batch_size=1, seed=0,
                  max_train_steps=bench.sizes.reference_steps, mixed_precision=bench.sizes.half,
                  checkpointing_steps=100_000, output_dir=bench.folder / "reference")  # fmt: skip
    words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    flags = [*(["--gradient_checkpointing"] if recompute else []),
             *(["--train_text_encoder"] if mode == "text encoder" else [])]  # fmt: skip
    return [sys.executable, "-c", WRAPPED, script, *words, *flags]


def reference(bench: Bench) -> None:
    """Piece c: the pace of their progress bar, start and end left out, and PyTorch's peak over their whole run."""
    rows: list[dict[str, Any]] = []
    for recompute, mode in itertools.product((False, True), ("LoRA", "full", "text encoder")):
        done = run_process(reference_words(bench, mode, recompute), bench.folder / "reference.log",
                           total=bench.sizes.reference_steps, environment=environment_for(), cwd=bench.folder,
                           limit=max(1, bench.left))  # fmt: skip
        peak = re.search(r"peak memory ([\d.]+) GiB", done.text)
        row = {"trained": mode, "gradient checkpointing": recompute, "seconds a step": mean_step(done.marks),
               "peak GiB": float(peak[1]) if peak else None, "whole run, seconds": done.seconds,
               "result": "ok" if done.code == 0 else f"exit code {done.code}: {done.last_line[:150]}"}  # fmt: skip
        bench.rows("c", rows, row)
        shutil.rmtree(bench.folder / "reference", ignore_errors=True)


# ── d: butterflies ───────────────────────────────────────────────────────────────────────


def spoken(words: Sequence[str]) -> str:
    """What `train-butterflies` with these words prints. Raises RuntimeError when it fails."""
    from diffusion_lessons.butterflies.command import main

    with contextlib.redirect_stdout(io.StringIO()) as heard, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words)
    if code:
        raise RuntimeError(errors.getvalue().strip().split("\n")[-1])
    return heard.getvalue()


def butterflies(bench: Bench) -> None:
    """Piece d: as many steps as fit into three minutes, so that the schedule ends where the grid is drawn."""
    sizes, output, begin = bench.sizes, bench.folder / "butterflies", time.monotonic()
    words = ["--dataset_name", "meadow", "--model_config_name_or_path", sizes.network, "--image_size", str(sizes.side),
             "--num_train_images", str(sizes.specimens), "--report_to", "none", "--output_dir", str(output),
             "--save_image_epochs", "100000", "--save_model_epochs", "100000", "--lr_warmup_steps", "100",
             "--checkpointing_steps", "100000"]  # fmt: skip
    pace = float(re.search(r"([\d.]+) s a micro-step", spoken([*words, "--dry_run"]))[1])
    seconds = min(sizes.training_seconds, bench.left - (time.monotonic() - begin) - 20)
    steps = min(max(2, int(seconds / max(pace, 1e-3))), 4 if sizes.small else 1_000_000)
    free_gpu()
    heard = spoken([*words, "--max_train_steps", str(steps)])
    rate = re.search(r"(\d+) steps in (\d+) s, ([\d.]+) images/s", heard)
    peak = re.search(r"peak memory ([\d.]+) GiB", heard)
    grid = max((output / "samples").glob("*.png"))
    shutil.copyfile(grid, bench.results.picture("d-grid"))
    bench.results.section("d", pictures=[bench.results.picture("d-grid").name])
    bench.rows("d", [], {"network": sizes.network, "batch": 16, "steps": steps, "seconds": float(rate[2]),
                         "images a second": float(rate[3]), "peak GiB": float(peak[1]) if peak else None})


# ── e: class images ──────────────────────────────────────────────────────────────────────


def class_images(bench: Bench) -> None:
    """Piece e: drawn as a run draws its class images, from weights in 16 bits; the first batch is not counted."""
    import torch

    from diffusion_lessons.stable_diffusion.drawing import draw
    from diffusion_lessons.stable_diffusion.folder import load_pipeline

    sizes, rows = bench.sizes, []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[sizes.half]
    pipeline = load_pipeline(bench.model)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        torch.nn.Module.to(network, device, dtype)  # that of diffusers warns of every change of format
    for batch in sizes.batches:
        settings = dict(num_inference_steps=sizes.solver_steps, guidance_scale=7.5, size=sizes.resolution,
                        batch_size=batch)  # fmt: skip
        draw(pipeline, [CLASS] * batch, **settings | {"num_inference_steps": 2})
        free_gpu()
        begin = time.monotonic()
        draw(pipeline, [CLASS] * batch, **settings)
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        bench.rows("e", rows, {"at a time": batch, "images a second": batch / (time.monotonic() - begin),
                               "solver steps": sizes.solver_steps, "peak GiB": peak})  # fmt: skip


# ── g: JAX ───────────────────────────────────────────────────────────────────────────────

DRY_RUN = re.compile(r"([\d.]+) GiB for weights.*?([\d.]+) GiB more.*?(\d+) s to compile.*?\(([\d.]+) s a step",
                     re.DOTALL)


def in_jax(bench: Bench) -> None:
    """Piece g: the dry run of the command, with and without gradient checkpointing, each in a process of its own."""
    asked = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True,
                           text=True)  # fmt: skip
    backend = asked.stdout.strip()
    if not backend or (backend == "cpu" and not bench.sizes.small):
        reason = "it finds no GPU here: pip install 'jax[cuda13]'" if backend else "it is not installed"
        bench.results.section("g", state=f"skipped: JAX: {reason}")
        return
    rows: list[dict[str, Any]] = []
    for recompute in (False,) if bench.sizes.small else (False, True):
        words = measuring.command(
            "train-dreambooth-jax", "--dry_run", *(["--gradient_checkpointing"] if recompute else []),
            pretrained_model_name_or_path=bench.model, instance_data_dir=bench.subject, instance_prompt=SUBJECT,
            resolution=bench.sizes.resolution, train_batch_size=1, mixed_precision="bf16", max_train_steps=100,
            report_to="none", output_dir=bench.folder / "unused")  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, env=measuring.environment_for())
        found = DRY_RUN.search(done.stdout)
        if found is None:
            raise RuntimeError(done.stderr.strip().split("\n")[-1])
        kept, within, compiling, seconds = map(float, found.groups())
        bench.rows("g", rows, {"backend": backend, "gradient checkpointing": recompute, "seconds a step": seconds,
                               "seconds to compile": compiling, "kept GiB": kept, "within a step GiB": within})


# ── all of it ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Piece:
    """One of the seven."""

    title: str
    work: Callable[[Bench], None]
    most: float  # seconds
    reserve: float = 0  # seconds that it leaves to what comes after it


PIECES = {
    "a": Piece("a: the miniature's DreamBooth, killed and resumed", correct, 150),
    "b": Piece("b: Stable Diffusion 1.4's shape, batch 1", shape, 130),
    "f": Piece("f: the recipes, each under its cap", recipes, 180),
    "c": Piece("c: the reference scripts, the same shape", reference, 110),
    "d": Piece("d: tutorial-128 on drawn specimens", butterflies, 230, reserve=40),
    "e": Piece("e: class images, Stable Diffusion 1.4's shape", class_images, 60),
    "g": Piece("g: the JAX trainer, the same shape, bf16", in_jax, 120),
}


def run_piece(name: str, piece: Piece, bench: Bench) -> str:
    """Run a piece in a child process until it ends, fails, or has no time left; returns how it went."""
    def work() -> None:
        try:
            piece.work(bench)
        except Exception as error:  # whatever it is: the next piece comes all the same
            text = " ".join(str(error).split())
            bench.results.section(name, state=f"FAILED: {type(error).__name__}: {text[:300]}")
            raise

    begin = time.monotonic()
    bench.results.section(name, title=piece.title)
    child = FORK.Process(target=work)
    child.start()
    try:
        child.join(max(1, bench.left))
    finally:
        over = child.is_alive()
        child.kill()
        child.join()
    state = bench.results.content["sections"][name].get("state")
    if over:
        state = "FAILED: its time was over; what it had by then is here"
    elif child.exitcode and not (state or "").startswith("FAILED"):
        state = f"FAILED: exit code {child.exitcode}"
    bench.results.section(name, state=state or "ok", seconds=time.monotonic() - begin)
    return state or "ok"


def run_pieces(words: argparse.Namespace, results: Results, folder: Path, sizes: Sizes, end: float) -> bool:
    """The chosen pieces, one after the other until `end` on the monotonic clock; tells whether all went well."""
    well = True
    for name in words.chosen:
        piece, now = PIECES[name], time.monotonic()
        if name == "c" and words.scripts is None:
            results.section(name, title=piece.title, state="skipped: --scripts names no folder")
            continue
        deadline = min(now + piece.most, end - piece.reserve)
        if deadline - now < 10 and not sizes.small:
            results.section(name, title=piece.title, state="skipped: no time was left")
            continue
        print(f"{piece.title}, at most {deadline - now:.0f} s", flush=True)
        state = run_piece(name, piece, Bench(folder, results, sizes, words.scripts, deadline))
        print(f"   {state}", flush=True)
        well &= "FAILED" not in state
    return well


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """The folder for models and runs: the given one, which stays, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="diffusion-lessons-gpu-") as folder:
        yield Path(folder)


def with_wheels(wheels: Path) -> None:
    """Install a folder of wheels beside this Python, not into it, and start anew with them; does not return."""
    target = tempfile.mkdtemp(prefix="diffusion-lessons-wheels-")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target,
                    *sorted(wheels.glob("*.whl"))], check=True)  # fmt: skip
    paths = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONPATH": paths, OVERLAY: target})


def parse() -> argparse.Namespace:
    """The command line; names of pieces that do not exist are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="".join(PIECES), help="letters of the pieces to run, such as ab")
    parser.add_argument("--skip", default="", help="letters of the pieces to leave out")
    parser.add_argument("--scripts", type=Path, help="folder with train_dreambooth.py and train_dreambooth_lora.py")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the model and the runs here; by default a temporary folder")
    parser.add_argument("--results", type=Path, help="by default benchmarks/results; of a rehearsal a temporary folder")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into a temporary folder first")
    parser.add_argument("--rehearse", action="store_true", help="all pieces on the CPU, with toys")
    words = parser.parse_args()
    unknown = set(words.only + words.skip) - set(PIECES)
    if unknown:
        parser.error(f"there is no piece {min(unknown)!r}; choose from {''.join(PIECES)}")
    words.chosen = [name for name in PIECES if name in words.only and name not in words.skip]
    words.scripts = words.scripts and words.scripts.resolve()
    if words.results is None:
        rehearsed = Path(tempfile.gettempdir()) / "diffusion-lessons-gpu-rehearsed"
        words.results = rehearsed if words.rehearse else measuring.RESULTS
    return words


def prepare(rehearse: bool) -> None:
    """Set the environment, then import what all pieces need, before any of them is forked. Exits without a GPU."""
    # The last one: a library that asks for a GPU while it is imported must not start CUDA, which no fork would survive.
    os.environ |= environment_for() | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(measuring.ROOT))
    for module in ("dreambooth.training", "butterflies.command"):
        importlib.import_module(f"diffusion_lessons.{module}")
    child = FORK.Process(target=lambda: os._exit(not importlib.import_module("torch").cuda.is_available()))
    child.start()
    child.join()
    if child.exitcode and not rehearse:
        raise SystemExit("make gpu: PyTorch finds no GPU here; rehearse on the CPU with --rehearse")


def main() -> int:
    """Run the pieces; 1 when one of them failed."""
    measuring.leave_on_sigterm()
    words = parse()
    end = time.monotonic() + 60 * words.minutes
    if words.wheels and OVERLAY not in os.environ:
        with_wheels(words.wheels)
    about = measuring.about_machine(card=not words.rehearse)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    prepare(words.rehearse)
    title = "What a GPU does: rehearsed with toys on a CPU" if words.rehearse else "What a GPU does"
    results = Results(words.results, "gpu-rehearsed" if words.rehearse else "gpu", about, title)
    with working_folder(words.folder) as folder:
        well = run_pieces(words, results, folder, TOY if words.rehearse else Sizes(), end)
    print(f"{results.page}\n{results.path}")
    return int(not well)


if __name__ == "__main__":
    raise SystemExit(main())
