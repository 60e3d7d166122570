"""A training run in JAX: its folder, its place, what is due, and checkpoints by Orbax that appear whole or not at all."""
import contextlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from .config import DreamBoothJaxConfig
from .devices import agreed_stop, on_first, on_host, place_batch
from .folder import TrainedPart, read_part
from .step import Rates, StepState, all_finite, rates_of, step_key
from ..engine.checkpointer import FINISHED_TEXT, Position, last_checkpoint_text
from ..engine.checkpoints import PROGRESS, Checkpoint, Digests, begin_folder, compare_progress, complete_folder
from ..engine.checkpoints import find_checkpoint, place_folder, prune_checkpoints, set_aside_later, write_json
from ..engine.commands import RunFailed, StopSignals, lasting_output, one_line
from ..engine.config import InputError, public_fields, save_config
from ..engine.data import Stream, mixed_seed
from ..engine.devices import forget_accelerator, is_out_of_memory, out_of_memory_named
from ..engine.optimization import count_steps, warmup_warning
from ..engine.output_folder import CONFIG_NAME, OutputFolder, finished_without_checkpoint, set_aside_samples
from ..engine.precision import Phase
from ..engine.run import Timing, watching_signals
from ..engine.tracking import LossLog, ProgressMeter, end_trackers, log_image, say, start_tracker


# --- order ---
def rows_of_step(step: int, pairs: int, per_step: int, steps_per_epoch: int, seed: int) -> np.ndarray:
    """Which pairs a step learns from, (per_step,): those of its epoch's order, a function of seed and step alone.

    pairs: in the data. per_step: on all devices, over all micro-steps. An epoch's last step is filled up from the
    beginning of the order, since a compiled step has one shape.
    """
    epoch, number = divmod(step, steps_per_epoch)
    order = np.random.default_rng(mixed_seed(seed, 0, epoch, Stream.ORDER)).permutation(pairs)
    return np.resize(order, steps_per_epoch * per_step)[number * per_step :][:per_step]


# --- storage ---
OPTIMIZER = "optimizer"  # the folder of the optimizer's state in a checkpoint, in Orbax's format


class StateFolder:
    """How the state of a run lies in a checkpoint: weights as diffusers' folders, the optimizer's state as Orbax's.

    sources: by the name of each part that learns, the folder that it was read from.
    """

    def __init__(self, networks: Mapping[str, nnx.Module], sources: Mapping[str, Path]) -> None:
        self.structures = {name: nnx.split(network)[0] for name, network in networks.items()}
        self.sources = dict(sources)

    def parts(self, weights: Mapping[str, Any]) -> dict[str, TrainedPart]:
        """Networks with these weights, as what `write_model` takes."""
        return {name: TrainedPart(nnx.merge(self.structures[name], state), self.sources[name])
                for name, state in weights.items()}

    def save_optimizer(self, folder: Path, state: StepState) -> None:
        """Write the optimizer's state, each process the parts that lie on its devices; all of them come here."""
        with closing(ocp.StandardCheckpointer()) as orbax:
            orbax.save(folder.absolute() / OPTIMIZER, jax.tree.leaves(state.moments))
            orbax.wait_until_finished()

    def save_weights(self, folder: Path, weights: Mapping[str, Any], averages: Mapping[str, Any] | None) -> None:
        """Write weights and averages, from the host's memory, as `unet`, `unet_ema` and so on."""
        for suffix, tree in (("", weights), ("_ema", averages)):
            for name, part in self.parts(tree or {}).items():
                part.save_pretrained(folder / f"{name}{suffix}")

    def load(self, folder: Path, like: StepState) -> StepState:
        """Read what was written, laid out as `like`. Averages that a checkpoint lacks begin as its weights."""
        with closing(ocp.StandardCheckpointer()) as orbax:
            leaves, tree = jax.tree.flatten(like.moments)
            wanted = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for each in leaves]
            moments = tree.unflatten(orbax.restore(folder.absolute() / OPTIMIZER, wanted))
        return StepState(self._weights(folder, like.weights), moments,
                          None if like.averages is None else self._weights(folder, like.averages, "_ema"))

    def _weights(self, folder: Path, like: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
        weights = {}
        for name, placed in like.items():
            path = folder / f"{name}{suffix}"
            read = nnx.split(read_part(path if path.is_dir() else folder / name, part=name))[1]
            weights[name] = jax.tree.map(placed_like, read, placed)
        return weights


def placed_like(array: Any, like: jax.Array) -> jax.Array:
    """An array of the host, in the format and in the places of another one of its shape."""
    host = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


# --- losses ---
class JaxLossLog(LossLog):
    """The log of losses, for those that lie on JAX's devices."""

    def add(self, loss: jax.Array) -> None:
        """Note a scalar loss without reading it from the device."""
        self._waiting.append(loss)

    def _fetch(self) -> list[float]:
        return [float(loss) for loss in jax.device_get(self._waiting)]


# --- the run ---
class JaxRun:
    """One training run in JAX: a `StepState`, a number of steps, and what is kept of them. See `start_jax_run`.

    storage: how the state lies in a checkpoint. moments: of all pairs, float16 (pairs, groups, h, w, 2 · channels), the
    same in every process. losses: of each optimizer step since the start, as far as read from the device.
    """

    def __init__(self, config: DreamBoothJaxConfig, state: StepState, storage: StateFolder, moments: np.ndarray,
                 fingerprint: str, mesh: Mesh, accelerator: Accelerator, command: str) -> None:
        self.config, self.state, self.storage, self.moments = config, state, storage, moments
        self.mesh, self.accelerator, self.command = mesh, accelerator, command
        self.output_dir, self.is_main = Path(config.output_dir), jax.process_index() == 0
        self.batch = config.train_batch_size * mesh.size
        self.steps = count_steps(-(-len(moments) // self.batch), config.gradient_accumulation_steps,
                                 config.num_train_epochs, config.max_train_steps)
        self.total_steps, self.steps_per_epoch = self.steps.total, self.steps.per_epoch
        self.rates: Rates = rates_of(config, self.steps.total, mesh.size)
        self.position, self.stop = Position(), StopSignals()
        self.timing = Timing(self.position, self.steps)
        self.about = {"total_steps": self.steps.total, "steps_per_epoch": self.steps.per_epoch,
                      "num_processes": mesh.size, "data": fingerprint, "device": f"jax-{jax.default_backend()}",
                      "skipped": 0, "config": public_fields(config),
                      "versions": {"python": platform.python_version(), "jax": jax.__version__}}
        self.loss_log = JaxLossLog(accelerator, config.logging_steps)
        self.losses = self.loss_log.values
        pictures = self.batch * config.gradient_accumulation_steps
        self.meter = ProgressMeter(self.steps.total, pictures, f"jax-{jax.default_backend()}", self.is_main)

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.position.global_step

    # --- the loop ---

    def batches(self) -> Iterator[tuple[jax.Array, jax.Array, np.ndarray, np.ndarray]]:
        """Yield for each step that is left what the compiled step takes besides the state: a batch, a key, two rates.

        The batch holds moments, (B, accumulation, groups, h, w, 2 · channels), in rows over all devices.
        """
        accumulation, processes = self.config.gradient_accumulation_steps, jax.process_count()
        with self.meter.running(self.global_step):
            while not self.timing.at_the_end:
                step = self.global_step
                self.position.epoch = step // self.steps.per_epoch
                rows = rows_of_step(step, len(self.moments), self.batch * accumulation, self.steps.per_epoch,
                                    self.config.seed).reshape(accumulation, self.batch)
                own = np.split(rows, processes, axis=1)[jax.process_index()].T
                yield (place_batch(self.moments[own], self.mesh), step_key(self.config.seed, step),
                       self.rates.learning_rate[step], self.rates.decay[step])
        if not self.loss_log.is_empty:
            self._log()

    def step(self, state: StepState, loss: jax.Array) -> None:
        """After a compiled step: keep its state, note its loss without reading it; log, save, stop when due."""
        self.state = state
        self.position.global_step += 1
        self.loss_log.add(loss)
        self.meter.step_done()
        last = self.timing.at_the_end
        saving = last or self.global_step % self.config.checkpointing_steps == 0
        stop = agreed_stop(self.stop.received, may_wait=saving or self.loss_log.is_full)
        saving |= stop is not None
        if saving or self.loss_log.is_full:
            self._log()
        if saving:
            self._require_finite_weights()
            self.save_checkpoint()
        if stop is not None and not last:
            self.stop.received = stop
            raise self.stop.exception()

    def _log(self) -> None:
        rate = float(self.rates.learning_rate[self.global_step - 1])
        try:
            loss = self.loss_log.read(self.global_step, learning_rate=rate, epoch=self.position.epoch)
        except RunFailed as error:
            raise RunFailed(f"{error}. {self.last_checkpoint_text()}") from None
        self.meter.show(loss, rate)

    def _require_finite_weights(self) -> None:
        if not bool(all_finite(self.state.weights)):
            raise RunFailed(f"weights are not finite after step {self.global_step}; lower --learning_rate. "
                            f"{self.last_checkpoint_text()}")

    # --- looking and saving ---

    def kept_weights(self) -> dict[str, Any]:
        """What the run leaves, by part: averages if it keeps any, else weights; where one process can reach them all.

        All processes come here.
        """
        weights = self.state.averages or self.state.weights
        return weights if jax.process_count() == 1 else on_host(weights)

    def log_image(self, name: str, image: Image.Image) -> None:
        """Send a picture to the run's tracker at the current step; call it in the first process."""
        log_image(self.accelerator, name, image, self.global_step)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`, all processes together; raises RunFailed with the way on when it cannot."""
        path = self.output_dir / f"checkpoint-{self.global_step}"
        partial = path.with_name(f".{path.name}.partial")
        try:
            on_first(lambda: begin_folder(path))
            self.storage.save_optimizer(partial, self.state)
            weights, averages = on_host(self.state.weights), on_host(self.state.averages)
            on_first(lambda: self._finish(path, partial, weights, averages))
        except BaseException as error:
            if self.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError | ValueError) and not is_out_of_memory(error):
                raise RunFailed(f"{path.name} could not be written: {one_line(error, 200)}; free some space. "
                                f"{self.last_checkpoint_text()}") from error
            raise

    def _finish(self, path: Path, partial: Path, weights: Any, averages: Any) -> None:
        with closing(Digests(partial)) as digests:
            digests.take()
            self.storage.save_weights(partial, weights, averages)
            write_json(partial / PROGRESS, self.progress())
            complete_folder(partial, digests)
        left = set_aside_later(self.output_dir, self.global_step)
        place_folder(partial, path)
        if left:
            say(f"{', '.join(left)}: of a branch that this run has left; renamed to abandoned-…")
        limit = self.config.checkpoints_total_limit
        prune_checkpoints(self.output_dir, limit if limit is None else max(1, limit))

    def progress(self) -> dict[str, Any]:
        """What a checkpoint of this moment says of itself."""
        return {"step": self.global_step, "epoch": self.position.epoch, "batch": 0, **self.about}

    def last_checkpoint_text(self) -> str:
        """Say which checkpoint is the last good one, and the command that goes on from it."""
        return last_checkpoint_text(self.output_dir, self.command)

    def speed_text(self) -> str:
        """Say how fast the run was, in a line."""
        return self.meter.text(self.global_step)


def make_tracker(config: DreamBoothJaxConfig) -> Accelerator:
    """Accelerate's trackers for a run in JAX, of which nothing else is used; only the first process has any."""
    report_to = config.report_to if jax.process_index() == 0 else "none"
    return Accelerator(
        cpu=True, mixed_precision="no", log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(config.output_dir, str(Path(config.output_dir) / config.logging_dir)))


def find_place(config: DreamBoothJaxConfig) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names, found whole; None to begin anew, which is said.

    Raises InputError for a finished run that kept none.
    """
    choice, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if choice is None:
        return None
    checkpoint, notes = find_checkpoint(output_dir, choice)
    if checkpoint is None and finished_without_checkpoint(output_dir):
        raise InputError(f"--resume_from_checkpoint {choice}: {FINISHED_TEXT.format(output_dir)}")
    for note in notes:
        say(note)
    if checkpoint is None:
        say(f"no {'sound' if notes else 'complete'} checkpoint in {output_dir}{'' if notes else ' yet'}: starting anew")
    elif not (checkpoint.path / OPTIMIZER).is_dir():
        raise InputError(f"--resume_from_checkpoint {checkpoint.path}: was written by train-dreambooth; go on with "
                         f"that command, or let generate-images --checkpoint {checkpoint.path} --save_pipeline DIR make a "
                         "model of it, and train on from there")
    return checkpoint


def resume_jax_run(run: JaxRun) -> None:
    """Go on from the checkpoint that the run's config names, if any; print what changed since it was written."""
    checkpoint = find_place(run.config)
    if checkpoint is None:
        if run.config.resume_from_checkpoint and run.is_main:
            set_aside_samples(run.output_dir, step=0, epochs=0)
        return
    devices = checkpoint.progress["num_processes"]
    if devices != run.mesh.size and not run.config.force_resume:
        raise InputError(f"--resume_from_checkpoint {checkpoint.path}: was written on {devices} devices, here are "
                         f"{run.mesh.size}, and a step would see other pictures; resume on as many, or add "
                         "--force_resume to train on from its weights as a new run")
    for change in compare_progress(checkpoint.progress, run.progress(), run.config, run.config.force_resume):
        say(change)
    run.state = run.storage.load(checkpoint.path, run.state)
    run.position.global_step = checkpoint.progress["step"]
    if run.is_main:
        set_aside_samples(run.output_dir, run.global_step)
        say(f"resuming {checkpoint.path.name}: {run.global_step} of {run.total_steps} steps are done")


def announce_jax_run(run: JaxRun) -> None:
    """Write the config into the output folder, start the tracker, and say what is about to happen."""
    if run.is_main:
        save_config(run.config, run.output_dir / CONFIG_NAME)
        start_tracker(run.accelerator, run.config, run.command, run.global_step)
    if warning := warmup_warning(run.config, run.total_steps):
        say(f"warning: {warning}")
    devices = jax.devices()
    number = f"{len(devices)} devices" if len(devices) > 1 else "1 device"
    others = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"training {run.total_steps} steps on {number} ({devices[0].device_kind}){others}, mixed precision: "
        f"{run.config.mixed_precision or 'no'}")


@contextlib.contextmanager
def start_jax_run(config: DreamBoothJaxConfig, state: StepState, storage: StateFolder, moments: np.ndarray,
                  fingerprint: str, mesh: Mesh, command: str = "train-dreambooth-jax") -> Iterator[JaxRun]:
    """Open a training run for a `with` block; the arguments are those of `JaxRun`.

    Raises InputError for an output folder or checkpoint that cannot be used, RunFailed when the run cannot go on,
    Interrupted or Terminated after a signal, with a checkpoint written.
    """
    config = config.resolve()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(lasting_output())
        output = OutputFolder(config.output_dir)
        at_the_end.callback(output.release)
        accelerator = make_tracker(config)
        at_the_end.callback(forget_accelerator, accelerator)
        at_the_end.callback(end_trackers, accelerator)
        on_first(lambda: output.claim(config.overwrite_output_dir, config.resume_from_checkpoint is not None))
        at_the_end.enter_context(output.pointing_back())
        at_the_end.enter_context(out_of_memory_named(
            config, Phase.TRAIN, lambda: last_checkpoint_text(output.path, command)))
        run = JaxRun(config, state, storage, moments, fingerprint, mesh, accelerator, command)
        resume_jax_run(run)
        announce_jax_run(run)
        with watching_signals(run):
            yield run
        if run.timing.at_the_end:
            if config.checkpoints_total_limit == 0:
                output.drop_checkpoints(run.global_step)
            output.drop_replaced()
