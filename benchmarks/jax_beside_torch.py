"""Both DreamBooth trainers beside each other on the miniature: what they reach, and how fast they are.

    python benchmarks/jax_beside_torch.py reached [--seeds 0 1 2] [--steps 300]
    python benchmarks/jax_beside_torch.py speed

`reached`: the guide's three Flax commands (plain, with the prior, with the text encoder) by both commands, from the
same class images, over several seeds: fidelity, PRES and DIV at the end, measured by the runs' own tables. A run that
is there already is not made again. `speed`: seconds of a step in turns, in one process, and what limits it.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measuring

SUBJECT, CLASS = "a photo of a sks butterfly", "a photo of a butterfly"
COMMANDS = {"torch": "train-dreambooth", "jax": "train-dreambooth-jax"}
KINDS = {
    "plain": {"with_prior_preservation": "False"},
    "prior": {"with_prior_preservation": "True"},
    "text encoder": {"with_prior_preservation": "True", "train_text_encoder": "True"},
}
COLUMNS = {"subject": "fidelity", "class": "PRES", "diversity": "DIV"}


def run(folder: Path, trainer: str, kind: str, seed: int, steps: int) -> dict[str, float]:
    """Train, unless it was done, and return the last row of the run's table."""
    output = folder / f"{trainer}-{kind.replace(' ', '-')}-{seed}"
    if not (output / "model_index.json").is_file():
        words = measuring.command(
            COMMANDS[trainer], preset="quick", seed=seed, max_train_steps=steps, checkpointing_steps=steps,
            checkpoints_total_limit=0, validation_steps=steps, num_validation_images=8, sample_batch_size=16,
            class_data_dir=folder / "class", output_dir=output, **KINDS[kind])  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, env=measuring.environment_for() | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")})  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().split("\n")[-1])
    return json.loads((output / "fidelity.json").read_text(encoding="utf-8"))[-1]


def reached(words: argparse.Namespace, results: measuring.Results) -> None:
    """The table of what both reach, with the paired difference and its standard error."""
    rows = []
    for kind in words.kinds:
        found = {trainer: [run(words.folder, trainer, kind, seed, words.steps) for seed in words.seeds]
                 for trainer in COMMANDS}  # fmt: skip
        for column, name in COLUMNS.items():
            values = {trainer: [row[column] for row in each] for trainer, each in found.items()}
            gaps = [ours - theirs for ours, theirs in zip(values["jax"], values["torch"], strict=True)]
            row = {"trained": kind, "measure": name}
            for trainer, each in values.items():
                row[trainer] = f"{statistics.mean(each):.3f} ± {spread(each):.3f}"
            row |= {"difference": round(statistics.mean(gaps), 3), "standard error": round(
                spread(gaps) / math.sqrt(len(gaps)), 3), "values": values}  # fmt: skip
            rows.append(row)
            title = f"What both reach: {words.steps} steps, seeds {words.seeds[0]} to {words.seeds[-1]}"
            results.section(f"reached-{len(words.seeds)}", title=title, rows=rows)
            print(row, flush=True)


def spread(values: list[float]) -> float:
    """The standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


# Both loops in one process: a step of each in turns, so that whatever else the machine does strikes both.
SPEED = r"""
import json, sys, time
import jax, numpy as np, torch
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.loop import micro_step
from diffusion_lessons.dreambooth.preparation import choose_loss, load_for_training
from diffusion_lessons.dreambooth.memory import choose_models, precision_plan
from diffusion_lessons.dreambooth.subject import instance_source, load_subject
from diffusion_lessons.engine.devices import make_accelerator
from diffusion_lessons.engine.optimization import TrainState, make_optimizer, trained_parameters
from diffusion_lessons.jax.config import DreamBoothJaxConfig
from diffusion_lessons.jax.devices import device_mesh, place_batch
from diffusion_lessons.jax.step import step_key
from diffusion_lessons.jax.training import gather_for_jax, prepare_step

model, size, batch, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
fields = dict(pretrained_model_name_or_path=model, instance_data_dir="meadow", resolution=size, train_batch_size=batch,
              instance_prompt="a photo of a sks butterfly", report_to="none", fidelity_model="none", seed=0,
              mixed_precision="no", output_dir="unused")
config = DreamBoothConfig(**fields).resolve()
accelerator = make_accelerator(config)
plan = precision_plan(config, accelerator.device)
pipeline, noise_scheduler = load_for_training(config, plan)
data = load_subject(config, pipeline, [instance_source("meadow", size)])
models = choose_models(config, pipeline, plan)
optimizer = make_optimizer([each for network in models.values() for each in trained_parameters(network)], config)
state = TrainState(accelerator, config, models, optimizer, 10_000)
generator, loss = torch.Generator().manual_seed(0), choose_loss(config)
rows = next(iter(torch.utils.data.DataLoader(data.dataset, batch)))

def torch_step():
    with state.accumulate():
        value = micro_step(state.prepared, rows, data, noise_scheduler, config, generator, loss)
        state.backward(value)
        state.step()
    return value.item()

jax_config = DreamBoothJaxConfig(**fields).resolve()
found, mesh = gather_for_jax(jax_config, on_trial=True), device_mesh()
own, _, program = prepare_step(jax_config, found, mesh)
inputs = place_batch(found.moments[:batch][:, None], mesh), step_key(0, 0), np.float32(1e-6), np.float32(0)
begin = time.perf_counter()
compiled = program.lower(own, *inputs).compile()
compiling = time.perf_counter() - begin

def jax_step():
    global own
    own, value = compiled(own, *inputs)
    return float(value)

times = {"torch": [], "jax": []}
for number in range(repeats + 2):
    for name, step in (("torch", torch_step), ("jax", jax_step)):
        begin = time.perf_counter()
        step()
        times[name].append(time.perf_counter() - begin)
cost = compiled.cost_analysis()
cost = cost[0] if isinstance(cost, list) else cost
about = {"compiling": compiling, "flops": cost.get("flops")}
print(json.dumps(about | {name: each[2:] for name, each in times.items()}))
"""


def speed(words: argparse.Namespace, results: measuring.Results) -> None:
    """Seconds of a step of each, in turns in one process."""
    rows = []
    for size, batch in ((64, 1), (64, 4)):
        for threads in (1, 2):
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
            done = subprocess.run(
                ["taskset", "-c", cores, sys.executable, "-c", SPEED, "miniature", str(size), str(batch), "10"],
                capture_output=True, text=True, cwd=words.folder, env=measuring.environment_for(threads))  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr.strip().split("\n")[-1])
            found = json.loads(done.stdout.strip().split("\n")[-1])
            medians = {name: statistics.median(found[name]) for name in COMMANDS}
            row = {"model": "miniature", "px": size, "batch": batch, "cores": threads,
                   **{f"{name}, s a step": round(value, 4) for name, value in medians.items()},
                   "jax / torch": round(medians["jax"] / medians["torch"], 2),
                   "s to compile": round(found["compiling"], 1),
                   "jax, GFLOP/s": round(found["flops"] / medians["jax"] / 1e9, 1)}  # fmt: skip
            rows.append(row)
            results.section("speed", title="Seconds of a step, in turns in one process", rows=rows)
            print(row, flush=True)


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["reached", "speed"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/jax-beside-torch"), help="of the runs")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS)
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    words.folder = words.folder.resolve()
    results = measuring.Results(words.results, "jax", measuring.about_machine(card=False), "JAX beside PyTorch")
    for what in words.what:
        {"reached": reached, "speed": speed}[what](words, results)
    print(results.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
