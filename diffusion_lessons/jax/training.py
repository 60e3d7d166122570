"""The command `train-dreambooth-jax`: load, draw, encode, train in compiled steps, and write what plain diffusers opens."""
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import DDPMScheduler
from flax import nnx
from jax.sharding import Mesh
from torch import Tensor
from transformers import CLIPTokenizer

from .config import DREAMBOOTH_JAX_PRESETS, DreamBoothJaxConfig, check_launch
from .devices import agreed_stop, bytes_held, copies_on, device_mesh, join_processes, layout_of, on_first
from .devices import place_batch, place_parameters
from .sampling import Drawer, own_size
from .folder import Copied, StableDiffusion, find_vae, read_folder, read_part, refuse_old_flax
from .run import JaxRun, StateFolder, start_jax_run
from .step import StepProgram, StepState, begin_state, compiled_step, draw_chance, dreambooth_loss, encode_pairs
from .step import make_adamw, noise_table, step_key
from ..dreambooth.class_images import check_class_folder, choose_class_images, generation_recipe, held_folder
from ..dreambooth.class_images import missing_numbers, recipe_key, save_drawn, subject_notes, tidy_class_folder
from ..dreambooth.fidelity import FidelityTable, forget_rows, load_encoders, make_table, verdict
from ..dreambooth.loop import OFFSET_NOISE
from ..dreambooth.preparation import check_before_work, model_notes
from ..dreambooth.subject import data_fingerprint, instance_source, middle, note_crops, read_pictures, say_notes
from ..dreambooth.training import card_text
from ..engine.checkpointer import is_over
from ..engine.command_line import LaunchOptions
from ..engine.checkpoints import begin_folder, flush_folder, place_folder
from ..engine.commands import training_command
from ..engine.devices import out_of_memory_named
from ..engine.optimization import count_steps
from ..engine.output_folder import newest_samples, samples_path
from ..engine.precision import Phase
from ..engine.publishing import push_to_hub, save_parts, write_model_card
from ..engine.tracking import say
from ..pictures.figures import make_grid
from ..pictures.sets import Source
from ..stable_diffusion.drawing import scheduler_trained_with
from ..stable_diffusion.folder import COPY_AGAIN, files_fingerprint, find_model, network_fingerprints, read_json
from ..stable_diffusion.folder import weight_files, write_model
from ..stable_diffusion.prompts import find_tokenizer, load_tokenizer, set_context, tokenize

FORMATS = {"no": jnp.float32, "fp32": jnp.float32, "bf16": jnp.bfloat16}
SOLVERS = {"DPMSolverMultistepScheduler": "dpmsolver++", "DDIMScheduler": "ddim"}


# --- model ---
def read_networks(config: DreamBoothJaxConfig, precision: str | None, remat: bool = False) -> StableDiffusion:
    """The model that a run begins with, weights in 32 bits, computing in a precision; with another VAE if one is named.

    Raises InputError for what is no Stable Diffusion, or is not served in JAX.
    """
    dtype = FORMATS[precision or "no"]
    model = read_folder(config.pretrained_model_name_or_path, dtype=dtype, remat=remat, revision=config.revision,
                        variant=config.variant)
    if config.pretrained_vae_name_or_path:
        model.autoencoder = read_part(find_vae(config.pretrained_vae_name_or_path), dtype=dtype, part="vae")
    return model


def read_tokenizer(config: DreamBoothJaxConfig, model: StableDiffusion) -> CLIPTokenizer:
    """The tokenizer of a run, with the context that its config asks for."""
    tokenizer = (find_tokenizer(config.tokenizer_name, config.revision) if config.tokenizer_name
                 else load_tokenizer(model.source / "tokenizer", COPY_AGAIN))
    set_context(SimpleNamespace(text_encoder=model.text_encoder, tokenizer=tokenizer), config.tokenizer_max_length)
    return tokenizer


def model_fingerprints(config: DreamBoothJaxConfig) -> dict[str, str]:
    """For each network that a run reads a hash of its weights as they are stored."""
    folder = find_model(config.pretrained_model_name_or_path, config.revision, config.variant)
    found = network_fingerprints(folder, config.variant)
    if config.pretrained_vae_name_or_path:
        found["vae"] = files_fingerprint(weight_files(find_vae(config.pretrained_vae_name_or_path)))
    return found


# --- class images ---
def find_class_images(config: DreamBoothJaxConfig, fingerprints: Mapping[str, str]) -> Source:
    """The class images of a run: what is in the folder, topped up with what the model draws in JAX.

    A folder that the PyTorch side has filled is found full: prompt, weights and solver are the same recipe. Several
    processes share the work. Raises InputError for a folder that holds anything else, or cannot be written.
    """
    folder, recipe = Path(config.class_data_dir), generation_recipe(config, fingerprints)
    key, wanted = recipe_key(recipe), config.num_class_images

    def prepare_step(held: contextlib.ExitStack) -> None:
        check_class_folder(folder)
        if missing_numbers(folder, key, wanted):
            held.enter_context(held_folder(folder))
        tidy_class_folder(folder, recipe, wanted)

    with contextlib.ExitStack() as held:
        on_first(lambda: prepare_step(held))
        share = missing_numbers(folder, key, wanted)[jax.process_index() :: jax.process_count()]
        if share:
            model = read_networks(config, config.prior_generation_precision or config.mixed_precision)
            drawer = Drawer(model, read_tokenizer(config, model))
            draw_some = partial(_draw_class, drawer, recipe)
            save_drawn(folder, key, share, draw_some, config.sample_batch_size * drawer.mesh.size,
                       quiet=jax.process_index() > 0)
        agreed_stop(None, may_wait=True)  # all wait until the last has drawn its share
    chosen = choose_class_images(folder, key, wanted)
    return Source([str(path) for path in chosen], key, lambda: chosen.__getitem__)


def _draw_class(drawer: Drawer, recipe: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
    settings = {name: recipe[name] for name in ("num_inference_steps", "guidance_scale")}
    return drawer([recipe["prompt"]] * len(seeds), seeds=seeds, batch_size=len(seeds), **settings)


# --- what learns ---
class JaxIngredients(NamedTuple):
    """What a run is made of, when all is loaded, drawn and encoded."""

    model: StableDiffusion
    tokenizer: CLIPTokenizer
    moments: np.ndarray  # of all pairs
    words: np.ndarray  # token numbers of the prompts where the text encoder learns, else its hidden states
    fingerprint: str
    noise_scheduler: DDPMScheduler
    table: FidelityTable | None


def gather_for_jax(config: DreamBoothJaxConfig, on_trial: bool = False) -> JaxIngredients:
    """Load the model, draw missing class images, encode pictures and prompts.

    on_trial: nothing is drawn; the subject's pictures stand for those of the class, which are as large.
    """
    folder = find_model(config.pretrained_model_name_or_path, config.revision, config.variant)
    fingerprints = model_fingerprints(config)
    width = read_json(folder / "text_encoder" / "config.json", COPY_AGAIN).get("hidden_size")
    measures = jax.process_index() == 0 and not on_trial
    clip, eye = load_encoders(config, width) if measures else (None, None)
    sources = [instance_source(config.instance_data_dir, config.resolution)]
    if config.with_prior_preservation and on_trial:
        sources *= 2
    elif config.with_prior_preservation:
        with out_of_memory_named(config, Phase.CLASS_IMAGES):
            others = find_class_images(config, fingerprints)
        sources.append(others._replace(notes=[*others.notes, *subject_notes(sources[0], others)]))
    model = read_networks(config, config.mixed_precision, config.gradient_checkpointing)
    tokenizer = read_tokenizer(config, model)
    groups = [read_pictures(source, config.resolution, config.image_interpolation_mode, config.on_bad_image)
              for source in sources]
    say_notes(config, sources, tokenizer)
    if not config.center_crop:
        note_crops(groups)
    for note in model_notes(config, own_size(model), folder):
        say(f"note: {note}")
    a_step = config.train_batch_size * jax.device_count()  # pairs that all devices see together
    moments = encode_pairs(model.autoencoder, groups, config.resolution, a_step)
    ids = tokenize(tokenizer, [config.instance_prompt, config.class_prompt][: len(groups)]).numpy()
    words = ids if config.train_text_encoder else np.asarray(model.text_encoder(ids), np.float32)
    scheduler = scheduler_trained_with(read_json(folder / "scheduler" / "scheduler_config.json", COPY_AGAIN))
    return JaxIngredients(model, tokenizer, moments, words, data_fingerprint(config, groups, fingerprints), scheduler,
                       make_table(config, clip, middle(groups[0], config.resolution), eye))


def learning_parts(config: DreamBoothJaxConfig, model: StableDiffusion) -> dict[str, nnx.Module]:
    """The networks that learn, by name."""
    return {"unet": model.unet} | ({"text_encoder": model.text_encoder} if config.train_text_encoder else {})


def make_loss(config: DreamBoothJaxConfig, model: StableDiffusion, noise_scheduler: DDPMScheduler, words: np.ndarray
              ) -> Any:
    """The loss of a micro-batch as a pure function of weights, moments (B, groups, h, w, 2 · channels) and a key."""
    structures = {name: nnx.split(network)[0] for name, network in learning_parts(config, model).items()}
    table, scaling = noise_table(noise_scheduler, config.snr_gamma), model.autoencoder.config.scaling_factor
    offset = OFFSET_NOISE * config.offset_noise

    def loss_of(weights: Mapping[str, Any], moments: jax.Array, key: jax.Array) -> jax.Array:
        drawn = draw_chance(key, moments, scaling, len(table.signal), offset)
        networks = {name: nnx.merge(structures[name], each) for name, each in weights.items()}
        states = networks["text_encoder"](words) if config.train_text_encoder else jnp.asarray(words)
        return dreambooth_loss(networks["unet"], table, drawn, states, config.prior_loss_weight)

    return loss_of


def place_network(network: nnx.Module, mesh: Mesh, shard: bool) -> nnx.State:
    """The weights of a network on the mesh; the network keeps only their shapes, so that none are there twice."""
    weights = nnx.split(network)[1]
    placed = place_parameters(weights, mesh, shard)
    nnx.update(network, jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), weights))
    return placed


def prepare_step(config: DreamBoothJaxConfig, found: JaxIngredients, mesh: Mesh
                 ) -> tuple[StepState, StateFolder, StepProgram]:
    """The state before the first step on all devices, how it is stored, and the compiled step."""
    networks, optimizer = learning_parts(config, found.model), make_adamw(config)
    storage = StateFolder(networks, {name: found.model.source / name for name in networks})
    loss_of = make_loss(config, found.model, found.noise_scheduler, found.words)
    weights = {name: place_network(network, mesh, config.shard_parameters) for name, network in networks.items()}
    state = begin_state(weights, optimizer, config.use_ema)
    layout = (layout_of(state, mesh), copies_on(mesh))
    return jax.device_put(state, layout[0]), storage, compiled_step(
        loss_of, optimizer, config.gradient_accumulation_steps, layout)


# --- looking ---
class JaxWatch:
    """After each step what is due: validation pictures, and a row of the fidelity table."""

    def __init__(self, config: DreamBoothJaxConfig, model: StableDiffusion, tokenizer: CLIPTokenizer,
                 table: FidelityTable | None) -> None:
        self.config, self.table, self.is_new = config, table, True
        learning = list(learning_parts(config, model))
        self.drawer = Drawer(model, tokenizer, SOLVERS[config.validation_scheduler], learning)

    def __call__(self, run: JaxRun) -> None:
        config, step = self.config, run.global_step
        if self.is_new and run.is_main:  # rows of a branch that the run has left
            forget_rows(run.output_dir / "fidelity.json", step or -1)
            if self.table is not None:
                self.table.forget_after(step or -1)
        self.is_new = False
        every = config.validation_steps or config.validation_epochs * run.steps_per_epoch
        draws = bool(config.validation_prompt) and run.timing.after_step(every, at_the_end=True)
        measures = config.wants_table and (step % config.checkpointing_steps == 0 or run.timing.at_the_end)
        if not draws and not measures:
            return
        weights = run.kept_weights()
        if run.is_main:
            self._look(run, weights, draws, measures)

    def _look(self, run: JaxRun, weights: Mapping[str, Any], draws: bool, measures: bool) -> None:
        config, path = self.config, samples_path(run.output_dir, run.global_step)
        drawing = partial(self.drawer, weights=weights, size=config.resolution,
                          batch_size=config.sample_batch_size * self.drawer.mesh.size)
        with out_of_memory_named(config, Phase.LOOK, run.last_checkpoint_text), run.meter.aside():
            if draws and not path.exists():
                rows = [drawing([prompt] * config.num_validation_images, seed=config.seed, guidance_scale=7.5)
                        for prompt in config.validation_prompt]
                grid = make_grid([picture for row in rows for picture in row], len(rows), len(rows[0]))
                path.parent.mkdir(exist_ok=True)
                grid.save(path)
                run.log_image("validation", grid)
            if measures and self.table is not None and not self.table.has(run.global_step):
                row = self.table.measure_drawn(drawing, run.global_step)
                self.table.add(row)
                numbers = {f"fidelity/{name}": value for name, value in row.items() if name != "step"}
                run.accelerator.log(numbers, step=run.global_step)


# --- writing ---
def write_pipeline(config: DreamBoothJaxConfig, found: JaxIngredients, storage: StateFolder, weights: Mapping[str, Any],
                   folder: Path) -> None:
    """Write a whole model that plain diffusers opens: what was trained, all else as it was in the model's folder."""
    changed: dict[str, Any] = storage.parts(weights)
    if config.tokenizer_name or config.tokenizer_max_length:
        changed["tokenizer"] = found.tokenizer
    if config.pretrained_vae_name_or_path:
        changed["vae"] = Copied(find_vae(config.pretrained_vae_name_or_path))
    write_model(folder, found.model.source, changed, config.variant)


def save_due(run: JaxRun, config: DreamBoothJaxConfig, found: JaxIngredients) -> None:
    """When `save_steps` says so, write a whole model into `pipeline-STEP`, beside the checkpoints."""
    if not config.save_steps or run.global_step % config.save_steps:
        return
    weights = run.kept_weights()
    if run.is_main:
        path = run.output_dir / f"pipeline-{run.global_step}"
        partial_folder = begin_folder(path)
        write_pipeline(config, found, run.storage, weights, partial_folder)
        flush_folder(partial_folder)
        place_folder(partial_folder, path)


def finish_jax_run(run: JaxRun, config: DreamBoothJaxConfig, found: JaxIngredients) -> None:
    """At the end of a run: the verdict, the model, its card, the upload if one was asked for."""
    weights = run.kept_weights()
    if not run.is_main:
        return
    say(run.speed_text())
    if found.table is not None:
        say(verdict(found.table, config, run.global_step))
    save_parts(config.output_dir, partial(write_pipeline, config, found, run.storage, weights))
    name, base = run.output_dir.resolve().name, config.pretrained_model_name_or_path
    text = card_text(config, name, run.global_step, found.model.text_encoder.config.hidden_size)
    write_model_card(config.output_dir, config, title=name, grid=newest_samples(run.output_dir),
                     base_model=None if base == "miniature" else base, **text)
    if config.push_to_hub:
        say(f"uploaded to {push_to_hub(config)}")
    say(f"the model is in {config.output_dir}")


# --- the command ---
def train_in_jax(config: DreamBoothJaxConfig) -> list[float]:
    """Load, draw what is missing, and train: what one process of `train-dreambooth-jax` does; returns the losses."""
    config = config.resolve()
    with out_of_memory_named(config, Phase.ENCODE):
        found = gather_for_jax(config)
    mesh = device_mesh()
    with out_of_memory_named(config, Phase.TRAIN):
        state, storage, program = prepare_step(config, found, mesh)
        look = JaxWatch(config, found.model, found.tokenizer, found.table)
    with start_jax_run(config, state, storage, found.moments, found.fingerprint, mesh) as run:
        del state
        look(run)
        for batch in run.batches():
            run.step(*program(run.state, *batch))
            look(run)
            save_due(run, config, found)
        finish_jax_run(run, config, found)
    return run.losses


class Trial(NamedTuple):
    """What a few real steps of a run took, and what is known of it besides."""

    compiling: float  # seconds
    seconds: float  # of a step
    kept: int  # bytes on each device between two steps
    within: int  # bytes more within a step, as compiled
    pairs: int  # of pictures


def try_steps(config: DreamBoothJaxConfig, mesh: Mesh, repeats: int = 3) -> Trial:
    """Compile the step of a run and take it a few times on the real devices; nothing is drawn, nothing is written."""
    found = gather_for_jax(config, on_trial=True)
    state, _, program = prepare_step(config, found, mesh)
    own = config.train_batch_size * mesh.size // jax.process_count()
    rows = np.resize(np.arange(len(found.moments)), (own, config.gradient_accumulation_steps))
    inputs = place_batch(found.moments[rows], mesh), step_key(0, 0), np.float32(0), np.float32(0)
    begin = time.perf_counter()
    compiled = program.lower(state, *inputs).compile()
    compiling = time.perf_counter() - begin
    kept, within = max(bytes_held(state).values()), compiled.memory_analysis().temp_size_in_bytes
    for number in range(repeats + 1):  # the first one is not counted
        state, loss = compiled(state, *inputs)
        loss.block_until_ready()
        begin = time.perf_counter() if number == 0 else begin
    return Trial(compiling, (time.perf_counter() - begin) / repeats, kept, within, len(found.moments))


def dry_run_in_jax(config: DreamBoothJaxConfig) -> str:
    """Say how many steps, how much memory and about how much time the run would need; writes nothing."""
    config, mesh = replace(config.declared, report_to="none", fidelity_model="none").resolve(), device_mesh()
    trial = try_steps(config, mesh)
    pictures = len(instance_source(config.instance_data_dir, config.resolution).names)
    prior, missing = config.with_prior_preservation, 0
    if prior:
        key = recipe_key(generation_recipe(config, model_fingerprints(config)))
        missing = len(missing_numbers(Path(config.class_data_dir), key, config.num_class_images))
    batches = -(-max(trial.pairs, config.num_class_images if prior else 0) // (config.train_batch_size * mesh.size))
    per_epoch, total, epochs = count_steps(batches, config.gradient_accumulation_steps, config.num_train_epochs,
                                           config.max_train_steps)
    return (f"dry run: {pictures} pictures of the subject, {missing} class images to generate, {per_epoch} steps an "
            f"epoch, {total} steps in {epochs} epochs\n"
            f"memory of each device: {trial.kept / 2**30:.3f} GiB for weights, moments and average, "
            f"{trial.within / 2**30:.3f} GiB more within a step, as compiled; other networks aside\n"
            f"time: {trial.compiling:.0f} s to compile the step, then about {total * trial.seconds / 60:.1f} minutes "
            f"({trial.seconds:.3f} s a step, measured), class images and validation aside")


def run_dreambooth_jax(config: DreamBoothJaxConfig, options: LaunchOptions) -> None:
    """Check, and train; or only say what would happen."""
    check_launch(options)
    if join_processes():
        os.environ["RANK"] = str(jax.process_index())  # by which the engine knows who speaks
    refuse_old_flax(config.pretrained_model_name_or_path, "pretrained_model_name_or_path")
    check_before_work(config)
    if config.pretrained_vae_name_or_path:
        find_vae(config.pretrained_vae_name_or_path)
    if is_over(config):
        return
    if options.dry_run:
        print(dry_run_in_jax(config))
        return
    train_in_jax(config)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `train-dreambooth-jax`; returns its exit code."""
    return training_command("train-dreambooth-jax", DreamBoothJaxConfig, DREAMBOOTH_JAX_PRESETS, run_dreambooth_jax,
                            argv)


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
