"""The loop of DreamBooth: against a step written out by hand, its options, and what is drawn while it learns."""

import contextlib
import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from dreambooth_runs import CLASS, SMALL, SUBJECT
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from diffusion_lessons.dreambooth import loop
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.loop import dreambooth_loop, look_at_prompts, validation_grid
from diffusion_lessons.dreambooth.subject import Prompts, SubjectData
from diffusion_lessons.engine.data import mixed_seed
from diffusion_lessons.engine.optimization import make_optimizer
from diffusion_lessons.engine.run import start_run
from diffusion_lessons.miniature.latent_diffusion import make_latent_scheduler, make_pipeline
from diffusion_lessons.pictures.figures import make_grid
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import load_pipeline, shipped

WIDTH = 128  # of what the miniature's text encoder says


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline(shipped("miniature"))
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False)
    return pipeline


def tiny_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH,
            norm_num_groups=8, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip


def moments(number: int, seed: int) -> torch.Tensor:
    """Means spread like an autoencoder's, small variances."""
    mean = torch.randn(number, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.cat([mean, torch.full_like(mean, -4.0)], dim=1).half()


def data_of(pipeline, groups: int = 1, number: int = 4) -> SubjectData:
    dataset = TensorDataset(*(moments(number, seed) for seed in range(groups)))
    return SubjectData(dataset, Prompts(pipeline, [SUBJECT, CLASS][:groups]), pipeline.vae, torch.zeros(0))


def a_config(output_dir: Path | str = "out", **fields) -> DreamBoothConfig:
    small = SMALL | {"instance_data_dir": "meadow", "output_dir": str(output_dir), "train_batch_size": 2,
                     "mixed_precision": "no", "checkpointing_steps": 1000}  # fmt: skip
    return DreamBoothConfig(**(small | fields))


class StandIn:
    """A run of the given batches, without Accelerate: it notes each loss and keeps the gradients of the last one."""

    def __init__(self, model, batches, seed: int = 5) -> None:
        self.model, self._batches, self.prepared, self.losses = model, batches, {"unet": model}, []
        self.generator = torch.Generator().manual_seed(seed)
        self.accumulate, self.global_step = contextlib.nullcontext, 0

    def epochs(self):
        return range(1)

    def batches(self):
        return iter(self._batches)

    def backward(self, loss: torch.Tensor) -> None:
        self.model.zero_grad()
        loss.backward()
        self.losses.append(loss.item())

    def step(self) -> None:
        self.global_step += 1


def reference(pipeline, model, batch, prompts, seed: int = 5, offset: float = 0.0, gamma: float | None = None):
    """The loss of one batch with nothing but equations: drawn latents, noise, weights, squared errors."""
    dice = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.cat(batch).float().chunk(2, dim=1)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=dice)
    z = z * pipeline.vae.config.scaling_factor
    t = torch.randint(1000, (len(z),), generator=dice)
    noise = torch.randn(z.shape, generator=dice)
    if offset:
        noise = noise + offset * torch.randn(len(z), 4, 1, 1, generator=dice)
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[t]
    scale = alpha_bar.reshape(-1, 1, 1, 1)
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    words = pipeline.text_encoder(ids)[0].repeat_interleave(len(z) // len(prompts), 0)
    answer = model(scale.sqrt() * z + (1 - scale).sqrt() * noise, t, words).sample
    errors = (answer - noise).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = alpha_bar / (1 - alpha_bar)
        errors = errors * torch.minimum(snr, torch.tensor(gamma)) / snr
    return errors.mean()


def gradients(model) -> list[torch.Tensor]:
    return [each.grad.clone() for each in model.parameters()]


# --- the step ---


@pytest.mark.parametrize(
    "fields, reference_fields",
    [({}, {}), ({"offset_noise": True}, {"offset": 0.1}), ({"snr_gamma": 0.01}, {"gamma": 0.01}),
     ({"offset_noise": True, "snr_gamma": 0.02}, {"offset": 0.1, "gamma": 0.02})],
    ids=["plain", "offset noise", "min-SNR", "both"],
)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_is_the_one_written_by_hand(pipeline, groups, fields, reference_fields):
    data = data_of(pipeline, groups)
    batch = next(iter(DataLoader(data.dataset, 2)))
    run = StandIn(tiny_unet(), [batch])
    dreambooth_loop(run, a_config(**fields), data, make_latent_scheduler())
    model = tiny_unet()
    expected = reference(pipeline, model, batch, [SUBJECT, CLASS][:groups], **reference_fields)
    expected.backward()
    assert run.losses == [pytest.approx(expected.item(), rel=1e-5)]
    for ours, theirs in zip(gradients(run.model), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_options_change_the_loss(pipeline):
    data, losses = data_of(pipeline), []
    batch = next(iter(DataLoader(data.dataset, 2)))
    for fields in ({}, {"offset_noise": True}, {"snr_gamma": 0.01}):
        run = StandIn(tiny_unet(), [batch])
        dreambooth_loop(run, a_config(**fields), data, make_latent_scheduler())
        losses += run.losses
    assert len(set(losses)) == 3


def test_each_half_of_a_batch_hears_its_own_prompt(pipeline):
    """With the words of the two prompts exchanged, the same pictures give another loss."""
    data, losses = data_of(pipeline, groups=2), []
    batch = next(iter(DataLoader(data.dataset, 2)))
    for prompts in ([SUBJECT, CLASS], [CLASS, SUBJECT]):
        run = StandIn(tiny_unet(), [batch])
        told = data._replace(prompts=Prompts(pipeline, prompts))
        dreambooth_loop(run, a_config(), told, make_latent_scheduler())
        losses += run.losses
    assert losses[0] != losses[1]


def test_noise_and_latents_are_drawn_anew_in_each_step(pipeline):
    data = data_of(pipeline)
    batch = next(iter(DataLoader(data.dataset, 2)))
    run = StandIn(tiny_unet(), [batch, batch])
    dreambooth_loop(run, a_config(), data, make_latent_scheduler())
    assert len(run.losses) == 2 and run.losses[0] != run.losses[1]


def test_what_a_model_predicts_is_the_schedulers_business(pipeline):
    """For a model that predicts v (Stable Diffusion 2.1) the target is the velocity."""
    scheduler = make_latent_scheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    data, seen = data_of(pipeline), []

    def loss(prediction, target, weights):
        seen.append(target)
        return prediction.mean()

    for each in (scheduler, make_latent_scheduler()):
        dreambooth_loop(StandIn(tiny_unet(), [[data.dataset.tensors[0][:2]]]), a_config(), data, each, loss=loss)
    assert not torch.equal(*seen) and seen[0].shape == seen[1].shape


def test_the_loss_can_be_another_one(pipeline):
    data, given = data_of(pipeline, groups=2), []

    def loss(prediction, target, weights):
        given.append((prediction.shape, target.shape, None if weights is None else weights.shape))
        return 3 * prediction.square().mean()

    batch = next(iter(DataLoader(data.dataset, 2)))
    for gamma in (None, 5.0):
        run = StandIn(tiny_unet(), [batch])
        dreambooth_loop(run, a_config(snr_gamma=gamma), data, make_latent_scheduler(), loss=loss)
        assert len(run.losses) == 1
    assert given == [((4, 4, 8, 8), (4, 4, 8, 8), None), ((4, 4, 8, 8), (4, 4, 8, 8), (4,))]


def test_look_is_called_before_the_first_step_and_after_each(pipeline):
    data, steps = data_of(pipeline), []
    run = StandIn(tiny_unet(), list(DataLoader(data.dataset, 1)))
    dreambooth_loop(run, a_config(), data, make_latent_scheduler(), look=lambda each: steps.append(each.global_step))
    assert steps == [0, 1, 2, 3, 4]


# --- as a run ---


def test_a_real_run_makes_the_reference_steps(pipeline, tmp_path):
    """Accelerate, clipping, AdamW and the seed: two steps of a run against two steps by hand."""
    data, model, seen = data_of(pipeline, number=2), tiny_unet(), []
    config = a_config(tmp_path / "run", max_train_steps=2, learning_rate=1e-3, max_grad_norm=0.1)
    watched = data._replace(dataset=data.dataset)
    loader = DataLoader(watched.dataset, 2, shuffle=True)
    by_hand = copy.deepcopy(model)

    class Noting(SubjectData):
        def latents(self, batch, generator):
            seen.append([each.clone() for each in batch])
            return super().latents(batch, generator)

    with start_run(config, {"unet": model}, make_optimizer(model.parameters(), config), loader) as run:
        dreambooth_loop(run, config, Noting(*watched), make_latent_scheduler())
    assert len(run.losses) == len(seen) == 2

    optimizer = make_optimizer(by_hand.parameters(), config)
    dice, losses = mixed_seed(config.seed, 0), []
    state = torch.Generator().manual_seed(dice)
    for batch in seen:
        stand_in = StandIn(by_hand, [batch])
        stand_in.generator = state
        dreambooth_loop(stand_in, config, data, make_latent_scheduler())
        losses += stand_in.losses
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), config.max_grad_norm)
        optimizer.step()
    assert run.losses == pytest.approx(losses, rel=1e-5)
    first = reference(pipeline, tiny_unet(), seen[0], [SUBJECT], seed=dice)
    assert run.losses[0] == pytest.approx(first.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_looking_does_not_change_what_is_learned(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw", lambda *args, **settings: draw(*args, **settings, num_inference_steps=1))
    results, data = [], data_of(pipeline)
    for name, prompt in (("quiet", None), ("looking", [SUBJECT])):
        model = tiny_unet()
        parts = {part: getattr(pipeline, part) for part in ("vae", "text_encoder", "tokenizer")}
        shown = make_pipeline(**parts, unet=model, noise_scheduler=make_latent_scheduler())
        config = a_config(tmp_path / name, validation_prompt=prompt, validation_steps=2, num_validation_images=1)
        loader = DataLoader(data.dataset, 2, shuffle=True)
        with start_run(config, {"unet": model}, make_optimizer(model.parameters(), config), loader) as run:
            look = partial(look_at_prompts, config=config, pipeline=shown)
            dreambooth_loop(run, config, data, make_latent_scheduler(), look=look)
        results.append((run.losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(weight, results[1][1][name]) for name, weight in results[0][1].items())
    names = [path.name for path in sorted((tmp_path / "looking" / "samples").iterdir())]
    assert names == ["step-000002.png", "step-000004.png"] and not (tmp_path / "quiet" / "samples").exists()


# --- looking ---


@pytest.fixture
def drawn(monkeypatch):
    """What is asked of `draw`, which answers with grey pictures of the asked size."""
    calls = []

    def answer(pipeline, prompts, *, seed=0, guidance_scale=5.0, size=None, **places):
        calls.append({"prompts": list(prompts), "seed": seed, "guidance_scale": guidance_scale, "size": size})
        return torch.stack([torch.full((3, size, size), 10 * len(calls) + i, dtype=torch.uint8)
                            for i in range(len(prompts))])  # fmt: skip

    monkeypatch.setattr(loop, "draw", answer)
    return calls


def test_a_row_for_each_prompt_from_the_same_noise(drawn):
    grid = validation_grid(None, ["one", "two"], 3, seed=11, size=8)
    assert drawn == [{"prompts": [name] * 3, "seed": 11, "guidance_scale": 7.5, "size": 8} for name in ("one", "two")]
    assert grid.size == (24, 16)
    assert [grid.getpixel((8 * col + 4, 8 * row + 4))[0] for row in (0, 1) for col in (0, 1, 2)] == [
        10, 11, 12, 20, 21, 22]  # fmt: skip


def test_a_grid_shows_what_draw_draws(pipeline, monkeypatch):
    quick = {"num_inference_steps": 2}
    monkeypatch.setattr(loop, "draw", lambda *args, **settings: draw(*args, **settings, **quick))
    grid = validation_grid(pipeline, [SUBJECT, CLASS], 2, seed=3, size=32)
    rows = [draw(pipeline, [each] * 2, seed=3, guidance_scale=7.5, size=32, **quick) for each in (SUBJECT, CLASS)]
    assert grid.tobytes() == make_grid([*rows[0], *rows[1]], 2, 2).tobytes()
    assert not torch.equal(rows[0][0], rows[0][1]), "another seed in each column"


class Due:
    """A run at some step of its way, as `look_at_prompts` asks it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps_per_epoch, self.asked, self.logged, self.averaged = folder, 3, [], [], 0
        self.device, self.accelerator = torch.device("cpu"), SimpleNamespace(mixed_precision="no")

    def sample_due(self, every: int, at_the_end: bool = False) -> Path | None:
        self.asked.append((every, at_the_end))
        return self.folder / "step-000006.png"

    @contextlib.contextmanager
    def looking(self, autocast: bool):
        assert not autocast, "the plan says in which precision one looks"
        self.averaged += 1
        yield

    def log_image(self, name: str, image: Image.Image) -> None:
        self.logged.append((name, image.size))


def test_validation_pictures_become_a_file_and_go_to_the_tracker(drawn, pipeline, tmp_path):
    run = Due(tmp_path)
    look_at_prompts(run, a_config(validation_prompt=[SUBJECT, CLASS], num_validation_images=3, seed=4).resolve(),
                     pipeline)
    with Image.open(tmp_path / "step-000006.png") as grid:
        assert grid.size == (96, 64)
    assert run.logged == [("validation", (96, 64))] and run.averaged == 1
    assert [(call["seed"], call["size"], len(call["prompts"])) for call in drawn] == [(4, 32, 3)] * 2


@pytest.mark.parametrize(
    "fields, every",
    [({}, 100), ({"validation_steps": 7}, 7), ({"validation_epochs": 2}, 6), ({"lora": True}, 150)],
)  # fmt: skip
def test_validation_is_due_by_steps_or_by_epochs(pipeline, drawn, tmp_path, fields, every):
    run = Due(tmp_path)
    look_at_prompts(run, a_config(validation_prompt=SUBJECT, **fields).resolve(), pipeline)
    assert run.asked == [(every, True)]


def test_without_a_prompt_nothing_is_drawn(drawn, tmp_path):
    run = Due(tmp_path)
    look_at_prompts(run, a_config(), None)
    assert not drawn and not run.asked and not list(tmp_path.iterdir())
