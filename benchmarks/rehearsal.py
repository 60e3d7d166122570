"""`make rehearsal`: every road of `train-dreambooth` and `generate-images` at the size of a real Stable Diffusion.

Model folders of the exact shapes of Stable Diffusion 1.4 and 2.1, with random weights, are trained for a few steps,
killed, resumed, drawn from, and opened in plain diffusers. Each phase is a process of its own; its time and peak memory
go into a table. See `benchmarks/README.md`.
"""
import argparse
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measuring
from measuring import Finished, Results, card_code, command, environment_for, quickest_step, run_process

SUBJECT, CLASS = "a photo of a sks butterfly", "a photo of a butterfly"


@dataclass(frozen=True)
class Sizes:
    """Pixels and steps: real ones, or of toys, which step so quickly that a kill needs many steps to hit."""

    lora: int = 512
    full: int = 256
    recipe: int = 256
    drawn: int = 256
    full_steps: int = 3
    full_checkpoint: int = 2
    drawing_steps: int = 2


# Where a toy halves a latent of one number, PyTorch 2.14 on a CPU leaves the gradient in bf16 as it found the memory.
SMALL = Sizes(lora=64, full=32, recipe=64, drawn=64, full_steps=60, full_checkpoint=15)


@dataclass(frozen=True)
class Need:
    """GiB of memory and disk that a phase needs at real size."""

    memory: float
    disk: float


# A full checkpoint has 11 GiB; while a second one is written, the first still stands, and the model has 4.
NEEDS = {
    "models": Need(4, 5), "lora": Need(9, 1), "lora-2.1": Need(10, 1), "prior": Need(8, 1), "full": Need(18, 28),
    "resume": Need(18, 28), "jax": Need(21, 18), "draw": Need(8, 1), "open": Need(8, 1),
}  # fmt: skip
# A recipe for whose needs there is no room is skipped; the others go on.
RECIPES = {
    "24gb": Need(14, 7), "16gb": Need(13, 6), "12gb": Need(13, 6), "8gb": Need(22, 16), "8gb-fused": Need(9, 4),
}  # fmt: skip
# The package that each needs besides the project's own, and its folder in --overlays.
OVERLAYS = dict.fromkeys(RECIPES, ("bitsandbytes", "bnb")) | {
    "8gb": ("deepspeed", "ds"), "8gb-fused": ("torchao", "ao"),
}  # fmt: skip
# Says what the run with these flags is estimated to take on a CPU, in the largest of its phases.
ESTIMATE = """
import sys
from dataclasses import replace
from diffusion_lessons.dreambooth.config import OFFLOADING, parse_dreambooth
from diffusion_lessons.dreambooth.memory import estimate
config, options = parse_dreambooth(sys.argv[1:])
if config.mixed_precision == "fp16":  # a recipe's, and on a CPU the run takes bf16
    config = replace(config.declared, mixed_precision="bf16")
drawn = {"draw class images": config.with_prior_preservation, "look": config.validation_prompt is not None}
phases = estimate(config, config.pretrained_model_name_or_path, "cpu", deepspeed=options.recipe == OFFLOADING)
print("estimated", max(each.total + each.host for each in phases if drawn.get(str(each.phase), True)), "GiB")
"""
LEFT_OVER = ("lora", "lora-2.1", "prior", "full")  # what the phases leave in `runs`, and the last two phases read


class Fault(Exception):
    """A phase did not do what it should; the text says what."""


class Rehearsal:
    """The phases, in their order, on the models of one folder; what they leave lies in its `runs`."""

    def __init__(self, folder: Path, results: Results, sizes: Sizes, small: bool, threads: int,
                 overlays: Path | None = None) -> None:  # fmt: skip
        self.overlays = overlays
        self.folder, self.results, self.sizes, self.small, self.threads = folder, results, sizes, small, threads
        self.runs, self.rows = folder / "runs", []
        self.models = {name: folder / f"stable-diffusion-{name}" for name in ("1.4", "2.1")}
        self.resized = folder / f"stable-diffusion-1.4-for-{sizes.drawn}-px"

    def environment(self, name: str, ours: bool = True) -> dict[str, str]:
        """The environment of a phase: with the package that it alone needs, if there is a folder with it."""
        known, folder = environment_for(self.threads, ours), OVERLAYS.get(name.removeprefix("recipe-"), ("", ""))[1]
        if self.overlays and folder:
            known["PYTHONPATH"] = os.pathsep.join([known["PYTHONPATH"], str(self.overlays / folder)])
            known["PATH"] = os.pathsep.join([str(self.overlays / folder / "bin"), known["PATH"]])  # ninja
            known["TORCH_EXTENSIONS_DIR"] = str(self.overlays / folder / ".extensions")  # compiled once, by DeepSpeed
        return known

    def log(self, name: str) -> Path:
        """Where the output of a phase goes."""
        return self.runs / "logs" / f"{name.replace(' ', '-')}.log"

    def measure(self, name: str, what: str, words: Sequence[str | Path], check: Callable[[Finished], None], *,
                ours: bool = True, total: int | None = None, kill_when: Callable[[], bool] | None = None) -> None:
        """Run a process, look at what it left, and add its row to the table; check: raises Fault."""
        print(f"{name}: {what} …", flush=True)
        done = run_process(words, self.log(name), cwd=self.runs, total=total, environment=self.environment(name, ours),
                           kill_when=kill_when or (lambda: False))  # fmt: skip
        try:
            wanted = -signal.SIGKILL if kill_when else 0
            if done.code != wanted:
                raise Fault(f"exit code {done.code}: {done.last_line}")
            check(done)
            result = "killed" if kill_when else "ok"
        except Fault as fault:
            result = f"FAILED: {fault}"
        self.add(name, what, result, done, self.estimated(name, words))

    def estimated(self, name: str, words: Sequence[str | Path]) -> float | None:
        """GiB that a training was expected to take, its process aside; None for anything else."""
        if measuring.COMMANDS["train-dreambooth"] not in words:
            return None
        begin = words.index(measuring.COMMANDS["train-dreambooth"]) + 1
        said = run_process([sys.executable, "-c", ESTIMATE, *words[begin:]], self.log(f"{name} estimated"),
                           cwd=self.runs, environment=self.environment(name))  # fmt: skip
        found = re.search(r"estimated ([\d.]+) GiB", said.text)
        return float(found[1]) if found else None

    def add(self, name: str, what: str, result: str, done: Finished | None = None, expected: float | None = None
            ) -> None:  # fmt: skip
        """One row of the table, printed and written; expected: GiB."""
        row = {"phase": name, "what": what, "seconds": done and round(done.seconds, 1),
               "seconds a step": done and quickest_step(done.marks), "peak GiB": done and round(done.memory, 2),
               "estimated GiB": expected and round(expected, 2), "result": result}  # fmt: skip
        self.rows.append(row)
        self.results.section("phases", title="Phases", rows=self.rows)
        print("   " + ", ".join(f"{name}: {measuring.cell(value)}" for name, value in row.items() if value is not None
                                and name not in ("phase", "what")), flush=True)  # fmt: skip

    # --- the phases ---

    def build(self) -> None:
        """Model folders, and pictures of the subject, as far as they are missing."""
        sizes = ["--resized", str(self.sizes.drawn), "--subject", str(self.sizes.lora)]
        words = [sys.executable, Path(__file__).with_name("materials.py"), self.folder, *sizes]
        self.measure("models", "the shapes of 1.4 and 2.1, random weights, fp16; two pictures",
                     [*words, "--small"] if self.small else words,
                     lambda done: exists(self.models["2.1"] / "model_index.json"))  # fmt: skip

    def train(self, output: str, model: Path, *flags: str, **fields: object) -> list[str]:
        """The words of a training; all have batch 1 and a constant learning rate in common."""
        return command("train-dreambooth", *flags, pretrained_model_name_or_path=model, output_dir=output,
                       instance_data_dir=self.folder / "subject", instance_prompt=SUBJECT, train_batch_size=1, seed=0,
                       report_to="none", lr_warmup_steps=0, fidelity_model="none", **fields)  # fmt: skip

    def adapter(self, output: str) -> Callable[[Finished], None]:
        """The check that a training left an adapter."""
        return lambda done: exists(self.runs / output / "pytorch_lora_weights.safetensors")

    def lora(self) -> None:
        """Two steps of LoRA on Stable Diffusion 1.4."""
        size = self.sizes.lora
        words = self.train("lora", self.models["1.4"], "--lora", resolution=size, max_train_steps=2)
        self.measure("lora", f"LoRA, 1.4, {size} px, batch 1, 2 steps", words, self.adapter("lora"), total=2)

    def lora_of_2(self) -> None:
        """A step of LoRA on Stable Diffusion 2.1."""
        size = self.sizes.lora
        words = self.train("lora-2.1", self.models["2.1"], "--lora", resolution=size, max_train_steps=1)
        self.measure("lora-2.1", f"LoRA, 2.1, {size} px, batch 1, 1 step", words, self.adapter("lora-2.1"), total=1)

    def prior(self) -> None:
        """Two class images, drawn by the model at its own size in 25 solver steps, and a step that preserves them.

        They are the most arithmetic of all phases; bfloat16 halves it on a CPU that has it.
        """
        size = self.sizes.drawn
        words = self.train("prior", self.resized, "--lora", "--with_prior_preservation", class_data_dir="class",
                           class_prompt=CLASS, num_class_images=2, sample_batch_size=1, resolution=size,
                           prior_generation_precision="bf16", max_train_steps=1)  # fmt: skip

        def check(done: Finished) -> None:
            self.adapter("prior")(done)
            if len(list((self.runs / "class").glob("*.png"))) != 2:
                raise Fault("there are not two class images")

        what = f"two class images of 1.4 at {size} px, bf16, and LoRA with the prior, 1 step"
        self.measure("prior", what, words, check, total=1)

    def full_words(self, *flags: str) -> list[str]:
        """The words of full fine-tuning with the text encoder."""
        sizes = self.sizes
        return self.train("full", self.models["1.4"], "--train_text_encoder", *flags, resolution=sizes.full,
                          max_train_steps=sizes.full_steps, checkpointing_steps=sizes.full_checkpoint,
                          checkpoints_total_limit=1)  # fmt: skip

    def full(self) -> None:
        """Full fine-tuning with the text encoder, ended by SIGKILL once its first checkpoint stands."""
        sizes, output = self.sizes, self.runs / "full"
        what = f"UNet and text encoder, 1.4, {sizes.full} px, SIGKILL once checkpoint-{sizes.full_checkpoint} stands"
        self.measure("full", what, self.full_words(), lambda done: exists(self.checkpoint()), total=sizes.full_steps,
                     kill_when=lambda: any(output.glob("checkpoint-*")))

    def resume(self) -> None:
        """The same, from its checkpoint to its end."""
        first = self.checkpoint()

        def check(done: Finished) -> None:
            if f"resuming {first.name}" not in done.text:
                raise Fault(f"it did not go on from {first.name}")
            exists(self.runs / "full" / "model_index.json")

        self.measure("resume", f"the rest of it, from {first.name} to the model",
                     self.full_words("--resume_from_checkpoint", "latest"), check, total=self.sizes.full_steps)

    def recipe(self, name: str) -> None:
        """Two steps of full fine-tuning on 1.4 by a recipe, where there is its package, and room for it."""
        phase, size = f"recipe-{name}", self.sizes.recipe
        what, missing = f"--recipe {name}, 1.4, {size} px, 2 steps", self.missing(name)
        if missing:
            self.add(phase, what, f"skipped: {missing}")
            return
        words = self.train(phase, self.models["1.4"], "--recipe", name, resolution=size, max_train_steps=2)
        if name == "8gb":
            words = self.under_deepspeed(words)
        self.measure(phase, what, words, lambda done: exists(self.runs / phase / "model_index.json"), total=2)
        shutil.rmtree(self.runs / phase, ignore_errors=True)

    def jax(self) -> None:
        """Two steps of full fine-tuning on 1.4 in JAX, and a checkpoint; the first step's time is that of compiling."""
        size = self.sizes.full
        what = f"UNet in JAX, 1.4, {size} px, batch 1, 2 steps"
        if importlib.util.find_spec("jax") is None:
            self.add("jax", what, "skipped: there is no JAX; pip install 'diffusion_lessons[jax]'")
            return
        words = command("train-dreambooth-jax", "--gradient_checkpointing",
                        pretrained_model_name_or_path=self.models["1.4"], output_dir="jax",
                        instance_data_dir=self.folder / "subject", instance_prompt=SUBJECT, train_batch_size=1,
                        report_to="none", fidelity_model="none", resolution=size, max_train_steps=2)  # fmt: skip
        self.measure("jax", what, words, lambda done: exists(self.runs / "jax" / "model_index.json"), total=2)
        shutil.rmtree(self.runs / "jax", ignore_errors=True)

    def missing(self, name: str) -> str | None:
        """What a recipe cannot have here, or None."""
        package, folder = OVERLAYS[name]
        there = self.overlays is not None and (self.overlays / folder / package).is_dir()
        if not there and importlib.util.find_spec(package) is None:
            return f"there is no {package}; --overlays names a folder with {folder}/{package}"
        return None if self.small else lacking(self.folder, RECIPES[name])

    def under_deepspeed(self, words: Sequence[str | Path]) -> list[str | Path]:
        """The words that start a training by `accelerate launch`, with the file that the training itself writes."""
        file = self.runs / "deepspeed.yaml"
        file.unlink(missing_ok=True)
        run_process([*words, "--write_deepspeed_config", file], self.log("recipe-8gb file"), cwd=self.runs,
                    environment=self.environment("recipe-8gb"))  # fmt: skip
        begin = words.index("-m")
        return [*words[:begin], "-m", "accelerate.commands.launch", "--config_file", file, *words[begin:]]

    def checkpoint(self) -> Path:
        """The newest checkpoint of the full run."""
        found = sorted((self.runs / "full").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return found[-1] if found else self.runs / "full" / "checkpoint-N"

    def draw(self) -> None:
        """Pictures from the finished model, from a checkpoint and from an adapter."""
        sources = {"model": ("full/model_index.json", {"model_path": "full"}),
                   "checkpoint": (self.checkpoint(), {"checkpoint": self.checkpoint()}),
                   "adapter": ("lora/README.md", {"lora_weights": "lora"})}  # fmt: skip
        for name, (needed, fields) in sources.items():
            what = f"a picture from the {name}, {self.sizes.drawn} px, {self.sizes.drawing_steps} solver steps"
            if not (self.runs / needed).exists():
                self.add(f"draw {name}", what, f"skipped: there is no {needed}")
                continue
            words = command("generate-images", prompt=SUBJECT, num_images=1, size=self.sizes.drawn, seed=0,
                            num_inference_steps=self.sizes.drawing_steps, output_dir=f"drawn/{name}", **fields)
            self.measure(f"draw {name}", what, words,
                         lambda done, name=name: exists(self.runs / "drawn" / name / "0000.png"))  # fmt: skip

    def open(self) -> None:
        """Every result in plain diffusers, by the code on its model card, in a process that knows nothing of ours."""
        bases = {"lora": self.models["1.4"], "lora-2.1": self.models["2.1"], "prior": self.resized, "full": ""}
        for name in LEFT_OVER:
            what, picture = f"{name} in plain diffusers, as its card says", self.runs / "opened" / f"{name}.png"
            if not (self.runs / name / "README.md").is_file():
                self.add(f"open {name}", what, "skipped: there is no such result")
                continue
            try:
                code = card_code(self.runs / name, bases[name], self.sizes.drawing_steps, self.sizes.drawn, picture)
            except ValueError as error:
                self.add(f"open {name}", what, f"FAILED: {error}")
                continue
            picture.parent.mkdir(exist_ok=True)
            self.measure(f"open {name}", what, [sys.executable, "-c", code],
                         lambda done, picture=picture: exists(picture), ours=False)  # fmt: skip


PHASES: dict[str, Callable[[Rehearsal], None]] = {
    "lora": Rehearsal.lora, "lora-2.1": Rehearsal.lora_of_2, "prior": Rehearsal.prior, "full": Rehearsal.full,
    "resume": Rehearsal.resume, **{f"recipe-{name}": partial(Rehearsal.recipe, name=name) for name in RECIPES},
    "jax": Rehearsal.jax, "draw": Rehearsal.draw, "open": Rehearsal.open,
}  # fmt: skip


def exists(path: Path) -> None:
    """Raise Fault where a file or folder is missing."""
    if not path.exists():
        raise Fault(f"it left no {path.name}")


def check_room(folder: Path, phases: Sequence[str]) -> str | None:
    """What of memory or disk is missing for these phases, in a sentence, or None."""
    needs = [NEEDS[phase] for phase in ("models", *phases) if phase in NEEDS]
    built = (folder / "stable-diffusion-2.1" / "model_index.json").is_file()
    disk = max(need.disk for need in needs) + (0 if built else NEEDS["models"].disk)
    said = lacking(folder, Need(max(need.memory for need in needs), disk))
    return said and f"{said}; free some, or choose fewer phases with --phases lora,draw"


def lacking(folder: Path, need: Need) -> str | None:
    """What of memory or disk there is too little of, in a sentence, or None."""
    for kind, there, wanted in (("memory", measuring.memory_gib(), need.memory),
                                ("disk", measuring.disk_gib(folder), need.disk)):  # fmt: skip
        if there < wanted:
            return f"{kind}: {wanted:.0f} GiB are needed and {there:.1f} are free"
    return None


def default_folder() -> Path:
    """Where model folders are kept: the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-lessons" / "rehearsal"


def parse() -> argparse.Namespace:
    """The command line; names of phases that do not exist are refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phases", help=f"some of {','.join(PHASES)}, with commas; by default all")
    parser.add_argument("--folder", type=Path, default=default_folder(),
                        help="models are kept here (4.5 GB), runs until the end (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the runs in the folder; later phases find them")
    parser.add_argument("--small", action="store_true", help="the same with toys, in one or two minutes")
    parser.add_argument("--threads", type=int, help="of each process; by default as many as there are cores")
    parser.add_argument("--overlays", type=Path, help="folder with bnb/bitsandbytes, ao/torchao and ds/deepspeed, "
                                                      "for recipes; by default what is installed")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder of the table; by default benchmarks/results, and that of "
                                                     "--folder with --small")  # fmt: skip
    words = parser.parse_args()
    words.phases = list(PHASES) if words.phases is None else words.phases.split(",")
    unknown = [name for name in words.phases if name not in PHASES]
    if unknown:
        parser.error(f"--phases {unknown[0]}: there is no such phase; choose from {', '.join(PHASES)}")
    words.overlays = words.overlays and words.overlays.expanduser().resolve()
    words.folder = words.folder.expanduser().resolve() / ("small" if words.small else "")
    missing = None if words.small else check_room(words.folder, words.phases)
    if missing:
        parser.error(missing)
    return words


def main() -> int:
    """Run the phases, print the table; 1 when one of them failed."""
    measuring.leave_on_sigterm()
    words, begin = parse(), time.monotonic()
    threads = words.threads or len(os.sched_getaffinity(0))
    results = Results(words.results or (words.folder / "results" if words.small else measuring.RESULTS), "rehearsal",
                      measuring.about_machine(card=False) | {"threads": str(threads)},
                      "Rehearsal with toys" if words.small else "Rehearsal at real size")  # fmt: skip
    rehearsal = Rehearsal(words.folder, results, SMALL if words.small else Sizes(), words.small, threads,
                          words.overlays)  # fmt: skip
    rehearsal.runs.mkdir(parents=True, exist_ok=True)
    try:
        rehearsal.build()
        for name in words.phases:
            PHASES[name](rehearsal)
    finally:
        if not words.keep:
            shutil.rmtree(rehearsal.runs)
    results.section("phases", seconds=time.monotonic() - begin)
    print(f"\n{measuring.table(rehearsal.rows)}\n{results.page}\nThe models stay in {words.folder}.")
    return int(any("FAILED" in row["result"] for row in rehearsal.rows))


if __name__ == "__main__":
    raise SystemExit(main())
