"""One training step of DreamBooth as one compiled function: chance, loss, gradients, AdamW and averages."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import DDPMScheduler
from flax import nnx
from torch import Tensor

from .encoders import Autoencoder
from .sampling import in_rows
from ..diffusion.noise import scales_at
from ..diffusion.targets import loss_weights, training_target
from ..dreambooth.config import DreamBoothConfig
from ..dreambooth.subject import middle
from ..engine.optimization import WeightAverage, make_schedule
from ..stable_diffusion.latents import pictures_at_once

# --- data ---
def encode_pictures(autoencoder: Autoencoder, pictures: Tensor) -> np.ndarray:
    """Means and log-variances of latents, float16 (N, h, w, 2 · channels), not scaled.

    pictures: uint8 (N, 3, H, W). A few at a time go through, on one device.
    """
    structure, weights = nnx.split(autoencoder)
    encode = jax.jit(lambda weights, pixels: jnp.concatenate(nnx.merge(structure, weights).encode(pixels), axis=-1))
    some, moments = min(pictures_at_once(*pictures.shape[-2:]), len(pictures)), []
    for batch in pictures.split(some):
        pixels = batch.permute(0, 2, 3, 1).numpy().astype(np.float32) / 127.5 - 1
        moments.append(np.asarray(encode(weights, in_rows(some, pixels)), np.float16)[: len(batch)])
    return np.concatenate(moments)


def encode_pairs(autoencoder: Autoencoder, groups: Sequence[Sequence[np.ndarray]], size: int, at_least: int = 1
                 ) -> np.ndarray:
    """Pairs of a picture of the subject and, if there are any, one of the class: (pairs, groups, h, w, 2 · channels).

    The middle of every picture, encoded once. at_least: how many pairs there are even if there are fewer pictures.
    """
    encoded = [encode_pictures(autoencoder, middle(group, size)) for group in groups]
    number = np.arange(max(at_least, *map(len, encoded)))
    return np.stack([each[number % len(each)] for each in encoded], axis=1)


# --- noise ---
class NoiseTable(NamedTuple):
    """What each timestep does to latents, and what the network is to answer: factors in float32, (timesteps,) each."""

    signal: Any  # noisy = signal * latents + noise * noise
    noise: Any
    target_clean: Any  # target = target_clean * latents + target_noise * noise
    target_noise: Any
    weight: Any  # of the squared error


def noise_table(scheduler: DDPMScheduler, snr_gamma: float | None = None) -> NoiseTable:
    """The table of the noise that a model is taught, by the formulas of the PyTorch side.

    scheduler: as `training_scheduler` returns it. snr_gamma: of min-SNR weighting; None weighs all timesteps alike.
    """
    bars, kind = scheduler.alphas_cumprod, scheduler.config.prediction_type
    steps = torch.arange(len(bars))
    ones, zeros = torch.ones(len(bars)), torch.zeros(len(bars))
    weights = loss_weights(steps, bars, kind, snr_gamma)
    columns = [*scales_at(bars, steps, ones), training_target(kind, ones, zeros, steps, bars),
               training_target(kind, zeros, ones, steps, bars), ones if weights is None else weights]
    return NoiseTable(*(each.float().numpy() for each in columns))


class Drawn(NamedTuple):
    """What chance decides in a micro-step, for B pairs of G pictures each: the subject's, and the class's if G is 2."""

    latents: jax.Array  # (B, G, h, w, C), scaled
    noise: jax.Array  # (B, G, h, w, C)
    timesteps: jax.Array  # (B, G), int32


def draw_chance(key: jax.Array, moments: jax.Array, scaling_factor: float, timesteps: int, offset: float = 0.0
                ) -> Drawn:
    """Draw latents from an encoder's moments, noise for them, and timesteps, the same for the same key.

    moments: means and log-variances, (B, G, h, w, 2 · C). timesteps: how many there are. offset: how much of a number
    for each channel is added to the noise.
    """
    of_latents, of_noise, of_timesteps, of_offset = jax.random.split(key, 4)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))
    latents = scaling_factor * (mean + deviation * jax.random.normal(of_latents, mean.shape))
    noise = jax.random.normal(of_noise, mean.shape)
    if offset:
        pairs, groups, *_, channels = mean.shape
        noise += offset * jax.random.normal(of_offset, (pairs, groups, 1, 1, channels))
    return Drawn(latents, noise, jax.random.randint(of_timesteps, mean.shape[:2], 0, timesteps))


# --- loss ---
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # latents, timesteps and words to a prediction


def dreambooth_loss(predict: Predict, table: NoiseTable, drawn: Drawn, words: jax.Array, prior_loss_weight: float = 1.0
                    ) -> jax.Array:
    """The subject's squared error, plus a weight times the class's, as a scalar.

    Args:
        predict: the UNet; it gets all B · G pictures as one batch.
        table, drawn: of the noise, and of this micro-step.
        words: hidden states of the prompts, (G, tokens, width).
        prior_loss_weight: of the class.

    Source: Ruiz et al. 2023, DreamBooth, equation 2.
    """
    pairs, groups = drawn.timesteps.shape
    row = NoiseTable(*(jnp.asarray(column)[drawn.timesteps][..., None, None, None] for column in table))
    noisy = row.signal * drawn.latents + row.noise * drawn.noise
    target = row.target_clean * drawn.latents + row.target_noise * drawn.noise

    def rows(array: jax.Array) -> jax.Array:
        return array.reshape(pairs * groups, *array.shape[2:])

    prediction = predict(rows(noisy), rows(drawn.timesteps), jnp.tile(words, (pairs, 1, 1)))
    errors = jnp.square(rows(target) - prediction.astype(jnp.float32)).reshape(pairs, groups, -1).mean(-1)
    subject, *others = (errors * row.weight[..., 0, 0, 0]).mean(0)
    return subject + prior_loss_weight * sum(others)


# --- optimizer ---
class Rates(NamedTuple):
    """What changes from step to step without being learned: learning rate and decay of the averages, (steps,) each."""

    learning_rate: Any
    decay: Any


def rates_of(config: DreamBoothConfig, total_steps: int, num_devices: int = 1) -> Rates:
    """Learning rate and decay at each optimizer step, by the formulas of the PyTorch side.

    num_devices: for `scale_lr`.
    """
    rate = config.learning_rate
    if config.scale_lr:
        rate *= config.train_batch_size * config.gradient_accumulation_steps * num_devices
    parameter = torch.nn.Parameter(torch.zeros(1))
    factor = make_schedule(torch.optim.SGD([parameter], lr=rate), config, total_steps).lr_lambdas[0]
    average = WeightAverage([parameter], decay=config.ema_max_decay, use_ema_warmup=True,
                            inv_gamma=config.ema_inv_gamma, power=config.ema_power)
    return Rates(np.array([rate * factor(step) for step in range(total_steps)], np.float32),
                 np.array([average.get_decay(step + 1) for step in range(total_steps)], np.float32))


def make_adamw(config: DreamBoothConfig) -> optax.GradientTransformation:
    """AdamW with clipped gradients from the `adam_*` fields and `max_grad_norm`; its changes wait for a learning rate.

    Source: Loshchilov and Hutter 2019.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
        optax.add_decayed_weights(config.adam_weight_decay))


class StepState(NamedTuple):
    """All that a step changes: weights of what learns by name, the optimizer's state, averages if they are kept."""

    weights: dict[str, nnx.State]
    moments: Any
    averages: dict[str, nnx.State] | None


def begin_state(weights: Mapping[str, nnx.State], optimizer: optax.GradientTransformation, use_ema: bool = False
                ) -> StepState:
    """The state before the first step; moments and averages lie as the weights do."""
    weights = dict(weights)
    return StepState(weights, optimizer.init(weights), jax.tree.map(jnp.copy, weights) if use_ema else None)


# --- step ---
LossOf = Callable[[Any, Any, jax.Array], jax.Array]  # weights, a micro-batch and a key to a scalar
StepProgram = Callable[..., tuple[StepState, jax.Array]]


def compiled_step(loss_of: LossOf, optimizer: optax.GradientTransformation, accumulation: int = 1, layout: Any = None
                  ) -> StepProgram:
    """A program `(state, batch, key, learning_rate, decay) -> (state, loss)`, compiled once; it uses up its state.

    Args:
        loss_of: weights, a micro-batch and a key to a scalar.
        optimizer: its changes are multiplied by minus the learning rate.
        accumulation: micro-batches of a step; gradient and loss are their means.
        layout: shardings of state and loss, as `layout_of` reads them; None: as the compiler likes.

    The program's arguments: batch, a tree of arrays (B, accumulation, ...); key, of this step; scalars.
    """
    def gradients_of(weights: Any, batch: Any, key: jax.Array) -> Any:
        return jax.value_and_grad(loss_of)(weights, batch, key)

    def mean_of_all(weights: Any, batch: Any, key: jax.Array) -> Any:
        micro_batches = jax.tree.map(lambda rows: jnp.swapaxes(rows, 0, 1), batch)
        if accumulation == 1:
            return gradients_of(weights, jax.tree.map(lambda rows: rows[0], micro_batches), key)

        def add(total: Any, numbered: Any) -> tuple[Any, None]:
            number, micro_batch = numbered
            found = gradients_of(weights, micro_batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, found), None

        nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), weights))
        total, _ = jax.lax.scan(add, nothing, (jnp.arange(accumulation), micro_batches))
        return jax.tree.map(lambda each: each / accumulation, total)

    @partial(jax.jit, donate_argnums=0, out_shardings=layout)
    def step(state: StepState, batch: Any, key: jax.Array, learning_rate: jax.Array, decay: jax.Array
             ) -> tuple[StepState, jax.Array]:
        loss, gradients = mean_of_all(state.weights, batch, key)
        changes, moments = optimizer.update(gradients, state.moments, state.weights)
        weights = jax.tree.map(lambda weight, change: weight - learning_rate * change, state.weights, changes)
        averages = state.averages
        if averages is not None:
            averages = jax.tree.map(lambda average, weight: decay * average + (1 - decay) * weight, averages, weights)
        return StepState(weights, moments, averages), loss

    return step


def step_key(seed: int, step: int) -> jax.Array:
    """The key of all that chance decides in a step: a function of two numbers, so that nothing has to be saved."""
    return jax.random.fold_in(jax.random.key(seed), step)


@jax.jit
def all_finite(weights: Any) -> jax.Array:
    """Whether every number of a tree of arrays is one."""
    return jnp.stack([jnp.isfinite(each).all() for each in jax.tree.leaves(weights)]).all()
