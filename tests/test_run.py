"""A training run on a straight line of four numbers: every step by hand, every save, stop and resume, every upload."""

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from runs import Tiny
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.checkpointer import ModelFolders
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.commands import Interrupted, RunFailed, Terminated, hide_token, training_command
from diffusion_lessons.engine.config import InputError, RunConfig, load_config
from diffusion_lessons.engine.optimization import make_optimizer
from diffusion_lessons.engine.output_folder import OutputFolder, lock_output_dir
from diffusion_lessons.engine.publishing import check_login, push_to_hub, save_parts, save_pipeline, write_model_card
from diffusion_lessons.engine.run import compose_run, start_run


@pytest.fixture(autouse=True, scope="module")
def quick_end_of_runs():
    """A run ends with a collection of garbage; it need not look through all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


def table(rows: int) -> TensorDataset:
    """So many rows: the row's number, three inputs, a target."""
    dice = torch.Generator().manual_seed(7)
    return TensorDataset(torch.arange(rows), torch.randn(rows, 3, generator=dice), torch.randn(rows, generator=dice))


def a_config(folder: Path, **fields) -> RunConfig:
    """Two rows a micro-step at a constant rate, no checkpoint but the last one, no tracker."""
    small = dict(output_dir=str(folder), train_batch_size=2, learning_rate=0.1, lr_scheduler="constant",
                 lr_warmup_steps=0, mixed_precision="no", report_to="none", checkpointing_steps=1000)  # fmt: skip
    return RunConfig(**(small | fields))


def opened(config, models=None, data=None, optimizer=None, shuffle=False, lr_scheduler=None, **settings):
    """`start_run` with one straight line, twelve rows and plain gradient descent, where nothing else is given."""
    models = models or {"line": Tiny()}
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=config.learning_rate)
    loader = DataLoader(data or table(12), batch_size=config.train_batch_size, shuffle=shuffle)
    return start_run(config, models, optimizer, loader, lr_scheduler, **settings)


def squared_errors(run, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return sum((model(inputs) - targets).square().mean() for model in run.prepared.values())


def micro_steps(run) -> Iterator[list[int]]:
    """Train; yield the numbers of the rows after each micro-step."""
    for _ in run.epochs():
        for rows, inputs, targets in run.batches():
            with run.accumulate():
                run.backward(squared_errors(run, inputs, targets))
                run.step()
            yield rows.tolist()


def train(config: RunConfig, models=None, **settings):
    """A run from its start to its end, closed."""
    with opened(config, models, **settings) as run:
        for _ in micro_steps(run):
            pass
    return run


def flat(parameters) -> torch.Tensor:
    """A copy of all numbers in one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


def saved(folder: Path) -> torch.Tensor:
    """The numbers of a line that lies in a folder."""
    numbers = load_file(folder / "diffusion_pytorch_model.safetensors")
    return torch.cat([numbers["weight"], numbers["bias"]])


def steps_saved(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, each of which has to be whole, with every file in its manifest."""
    found = list_checkpoints(folder)
    for checkpoint in found:
        assert checkpoint.fault(thorough=True) is None
        files = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
        assert {*json.loads((checkpoint.path / "manifest.json").read_text()), "manifest.json"} == files
    return [checkpoint.step for checkpoint in found]


# --- the step, by hand ---


def by_hand(config: RunConfig, groups: list[list[torch.Tensor]], total: int) -> Iterator[SimpleNamespace]:
    """AdamW at a falling rate on the line of `Tiny()`, and the average of its weights, written out in 64 bits.

    groups: the batches, as `table` gives them, of each optimizer step.
    """
    weights = torch.tensor([0, 1, 2, -1], dtype=torch.float64)
    average, first, second = weights.clone(), torch.zeros(4), torch.zeros(4)
    for step, group in enumerate(groups, start=1):
        loss, gradient = 0.0, torch.zeros(4, dtype=torch.float64)
        for _, inputs, targets in group:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
            errors = inputs @ weights - targets
            loss += errors.square().mean().item() / len(group)
            gradient += 2 * (errors[:, None] * inputs).mean(dim=0) / len(group)
        gradient = gradient * min(1, config.max_grad_norm / gradient.norm().item())
        rate = config.learning_rate * (1 - (step - 1) / total)
        first = config.adam_beta1 * first + (1 - config.adam_beta1) * gradient
        second = config.adam_beta2 * second + (1 - config.adam_beta2) * gradient.square()
        scale = (second / (1 - config.adam_beta2**step)).sqrt() + config.adam_epsilon
        weights = weights * (1 - rate * config.adam_weight_decay)
        weights = weights - rate * first / (1 - config.adam_beta1**step) / scale
        decay = min(config.ema_max_decay, 1 - (1 + (step - 1) / config.ema_inv_gamma) ** -config.ema_power)
        average = decay * average + (1 - decay) * weights
        yield SimpleNamespace(loss=loss, gradient=gradient, weights=weights, average=average, decay=decay,
                              next_rate=config.learning_rate * (1 - step / total))  # fmt: skip


def groups_of(data: TensorDataset, batch: int, accumulation: int) -> list[list]:
    batches = list(DataLoader(data, batch_size=batch))
    return [batches[begin : begin + accumulation] for begin in range(0, len(batches), accumulation)]


BY_HAND = dict(
    lr_scheduler="linear", adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=0.1,
    gradient_accumulation_steps=2, use_ema=True, ema_inv_gamma=2.0, ema_power=0.5, ema_max_decay=0.3,
)  # fmt: skip


@pytest.mark.parametrize("max_grad_norm, clipped", [(0.5, True), (1000.0, False)])
def test_each_step_is_the_one_that_was_written_out_by_hand(tmp_path, max_grad_norm, clipped):
    config, data, model = a_config(tmp_path, max_grad_norm=max_grad_norm, **BY_HAND), table(20), Tiny()
    optimizer, gradients = make_optimizer(model.parameters(), config), []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(flat(each.grad for each in model.parameters())))
    steps = by_hand(config, groups_of(data, 2, 2), total=5)
    with opened(config, {"line": model}, data, optimizer) as run:
        assert (run.steps_per_epoch, run.total_steps) == (5, 5)
        for number, _ in enumerate(micro_steps(run), start=1):
            assert run.global_step == number // 2
            if number % 2:
                continue
            step = next(steps)
            assert gradients[-1].numpy() == pytest.approx(step.gradient.numpy(), rel=1e-4, abs=1e-6)
            assert (gradients[-1].norm().item() == pytest.approx(0.5, rel=1e-4)) is clipped
            assert flat(model.parameters()).numpy() == pytest.approx(step.weights.numpy(), rel=1e-4, abs=1e-6)
            average = flat(run.emas["line"].shadow_params)
            assert average.numpy() == pytest.approx(step.average.numpy(), rel=1e-4, abs=1e-6)
            assert run.schedule.get_last_lr() == pytest.approx([step.next_rate], abs=1e-9)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(step.next_rate, abs=1e-9)
    assert len(gradients) == run.global_step == 5 and next(steps, None) is None
    assert step.decay == 0.3, "the last average was made with the largest decay"


def test_the_gradients_of_all_models_are_clipped_together(tmp_path):
    models, norms = {"one": Tiny(), "two": Tiny(3.0)}, []
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: norms.append(flat(each.grad for each in parameters).norm().item()))
    train(a_config(tmp_path, max_grad_norm=0.25, max_train_steps=2), models, optimizer=optimizer)
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)


def test_a_scaled_rate_is_that_of_one_row_times_the_rows_of_a_step(tmp_path):
    with opened(a_config(tmp_path, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2)) as run:
        assert run.schedule.get_last_lr() == pytest.approx([0.1 * 3 * 2])
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 3 * 2)


@pytest.mark.parametrize(
    "rows, accumulation, epochs, limit, micro, steps",
    [(12, 1, 2, None, 12, 12), (10, 2, 2, None, 10, 6), (10, 2, 1, 4, 7, 4), (12, 3, 5, 1, 3, 1)],
)
def test_a_run_takes_so_many_micro_steps_and_no_more(tmp_path, rows, accumulation, epochs, limit, micro, steps):
    config = a_config(tmp_path, gradient_accumulation_steps=accumulation, max_train_steps=limit)
    with opened(config, data=table(rows), num_epochs=epochs) as run:
        assert len(list(micro_steps(run))) == micro
    assert run.global_step == run.total_steps == steps and steps_saved(tmp_path) == [steps]


# --- what is logged ---


def logged(folder: Path, name: str) -> dict[int, float]:
    """What the run's TensorBoard has under a name, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "train"))
    events.Reload()
    values = {event.step: event.value for event in events.Scalars(name)}
    assert len(values) == len(events.Scalars(name)), "a step that was logged twice"
    return values


@pytest.mark.parametrize("every, rates_at", [(1, [1, 2]), (2, [2]), (10, [2])])
def test_the_loss_of_a_step_is_the_mean_over_its_micro_steps(tmp_path, every, rates_at):
    config = a_config(tmp_path, **(BY_HAND | {"gradient_accumulation_steps": 3}), report_to="tensorboard",
                      logging_steps=every)  # fmt: skip
    model, steps = Tiny(), list(by_hand(config, groups_of(table(12), 2, 3), total=2))
    run = train(config, {"line": model}, optimizer=make_optimizer(model.parameters(), config))
    losses = [step.loss for step in steps]
    assert run.losses == pytest.approx(losses, rel=1e-5) and losses[0] - losses[1] > 0.05
    assert logged(tmp_path, "train/loss") == pytest.approx({1: losses[0], 2: losses[1]}, rel=1e-5)
    rates = {1: steps[0].next_rate, 2: steps[1].next_rate}
    expected = {step: rates[step] for step in rates_at}
    assert logged(tmp_path, "train/learning_rate") == pytest.approx(expected, abs=1e-8)
    assert logged(tmp_path, "train/epoch") == dict.fromkeys(rates_at, 0)


def test_all_losses_of_an_epoch_are_read_when_it_ends(tmp_path):
    with opened(a_config(tmp_path, logging_steps=4), num_epochs=2) as run:
        seen = []
        for _ in run.epochs():
            for _, inputs, targets in run.batches():
                with run.accumulate():
                    run.backward(squared_errors(run, inputs, targets))
                    run.step()
                seen.append(len(run.losses))
            assert len(run.losses) == run.global_step == len(seen)
    assert seen == [0, 0, 0, 4, 4, 4, 6, 6, 6, 10, 10, 12], "every four, and before a checkpoint"


def test_the_log_of_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path):
    fields = dict(report_to="tensorboard", logging_steps=1, checkpointing_steps=3, max_train_steps=6)
    with opened(a_config(tmp_path, **fields)) as first:
        next(rows for rows in micro_steps(first) if first.global_step == 5)
    resumed = train(a_config(tmp_path, **fields, learning_rate=0.01, resume_from_checkpoint="latest"))
    losses = first.losses[:3] + resumed.losses
    assert len(losses) == 6 and logged(tmp_path, "train/loss") == pytest.approx(dict(enumerate(losses, start=1)))


# --- several models ---


def half_frozen() -> dict[str, Tiny]:
    """Two lines, of which the second trains its bias only."""
    models = {"one": Tiny(0.5), "two": Tiny(-2.0)}
    models["two"].weight.requires_grad_(False)
    return models


def test_models_are_trained_averaged_and_saved_under_their_names(tmp_path):
    models, before = half_frozen(), half_frozen()
    run = train(a_config(tmp_path, use_ema=True, max_train_steps=4, checkpointing_steps=2), models)
    assert list(run.models) == list(run.prepared) == list(run.emas) == ["one", "two"]
    assert run.models["one"] is models["one"] and run.models["two"] is models["two"]
    assert (models["one"].weight != before["one"].weight).all() and models["one"].bias != before["one"].bias
    assert torch.equal(models["two"].weight, before["two"].weight), "what is frozen stays, to the bit"
    assert models["two"].bias != before["two"].bias
    assert [len(ema.shadow_params) for ema in run.emas.values()] == [2, 1], "only what is trained is averaged"
    assert (run.emas["one"].shadow_params[0] != before["one"].weight).all()
    assert run.emas["two"].shadow_params[0] != before["two"].bias
    for name, model in models.items():
        assert torch.equal(saved(tmp_path / "checkpoint-4" / name), flat(model.parameters()))
        assert not torch.equal(saved(tmp_path / "checkpoint-2" / name), flat(model.parameters()))
    averages = flat(run.emas["one"].shadow_params)
    assert torch.equal(saved(tmp_path / "checkpoint-4" / "one_ema"), averages)
    frozen_and_averaged = torch.cat([before["two"].weight, run.emas["two"].shadow_params[0]])
    assert torch.equal(saved(tmp_path / "checkpoint-4" / "two_ema"), frozen_and_averaged)
    assert not torch.equal(averages, flat(models["one"].parameters()))


def test_without_averages_none_are_saved(tmp_path):
    run = train(a_config(tmp_path, max_train_steps=1))
    assert run.emas == {} and not list(tmp_path.glob("checkpoint-1/*_ema"))


def test_models_and_averages_are_restored_by_name(tmp_path):
    fields = dict(use_ema=True, max_train_steps=3)
    first = train(a_config(tmp_path, **fields), half_frozen())
    others = {"one": Tiny(20.0), "two": Tiny(30.0)}
    others["two"].weight.requires_grad_(False)
    with opened(a_config(tmp_path, **fields, resume_from_checkpoint="latest"), others) as run:
        for name in ("one", "two"):
            assert torch.equal(flat(others[name].parameters()), flat(first.models[name].parameters()))
            assert torch.equal(flat(run.emas[name].shadow_params), flat(first.emas[name].shadow_params))
        assert run.emas["one"].optimization_step == 3
        assert others["one"].weight.requires_grad and not others["two"].weight.requires_grad


def test_averaged_weights_are_there_within_the_block_and_gone_after_it(tmp_path):
    models = half_frozen()
    with opened(a_config(tmp_path, use_ema=True, max_train_steps=4), models) as run:
        for _ in micro_steps(run):
            pass
        trained = {name: flat(model.parameters()) for name, model in models.items()}
        averages = [*run.emas["one"].shadow_params, models["two"].weight, *run.emas["two"].shadow_params]
        averages = flat(averages)
        for error in (None, ZeroDivisionError, KeyboardInterrupt):
            with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt), run.averaged_weights():
                within = torch.cat([flat(model.parameters()) for model in models.values()])
                if error is not None:
                    raise error
            assert torch.equal(within, averages) and not torch.equal(within, torch.cat([*trained.values()]))
            assert all(torch.equal(flat(models[name].parameters()), trained[name]) for name in models)
    with opened(a_config(tmp_path), models) as run, run.averaged_weights():
        assert torch.equal(flat(models["one"].parameters()), trained["one"]), "none are kept, so nothing is swapped"


# --- when something is due ---


def due_epochs(run, every: int | None) -> list[int]:
    found = []
    for epoch in run.epochs():
        assert epoch == run.epoch
        for _, inputs, targets in run.batches():
            with run.accumulate():
                run.backward(squared_errors(run, inputs, targets))
                run.step()
        if run.is_due(every):
            found.append(epoch)
    return found


@pytest.mark.parametrize(
    "every, fields, epochs",
    [
        (1, {}, [0, 1, 2, 3, 4, 5, 6]),
        (3, {}, [2, 5, 6]),
        (100, {}, [6]),
        (None, {}, [2, 4, 6]),
        (None, {"max_train_steps": 5}, [0, 1]),
        (2, {"max_train_steps": 10}, [1, 2]),
    ],
)
def test_what_is_due_after_so_many_epochs(tmp_path, every, fields, epochs):
    """Four steps an epoch and seven epochs: thirds end in the third, the fifth and the last."""
    with opened(a_config(tmp_path, **fields), data=table(8), num_epochs=7) as run:
        assert due_epochs(run, every) == epochs


@pytest.mark.parametrize("every, left", [(3, [5, 6]), (None, [4, 6])])
def test_what_is_due_after_a_resume_is_what_was_left(tmp_path, every, left):
    fields = dict(checkpointing_steps=14)
    with opened(a_config(tmp_path, **fields), data=table(8), num_epochs=7) as run:
        next(rows for rows in micro_steps(run) if run.global_step == 15)
    config = a_config(tmp_path, **fields, resume_from_checkpoint="latest")
    with opened(config, data=table(8), num_epochs=7) as run:
        assert (run.global_step, run.epoch) == (14, 3)
        assert due_epochs(run, every) == left


def sampled(run, every: int, at_the_end: bool = False) -> list[tuple[int, str]]:
    """Train and draw whenever it is due: after which micro-step, and where to."""
    found = []
    assert run.sample_due(every, at_the_end) is None, "nothing has been trained yet"
    for number, _ in enumerate(micro_steps(run), start=1):
        path = run.sample_due(every, at_the_end)
        if path is not None:
            assert run.sample_due(every, at_the_end) == path, "until it is drawn"
            path.write_bytes(b"a picture")
            found.append((number, path.relative_to(run.output_dir).as_posix()))
        assert run.sample_due(every, at_the_end) is None, "not twice"
    return found


def test_samples_are_due_once_every_so_many_optimizer_steps(tmp_path):
    fields = dict(gradient_accumulation_steps=2, max_train_steps=5)
    twice = [(4, "samples/step-000002.png"), (8, "samples/step-000004.png")]
    with opened(a_config(tmp_path / "a", **fields), data=table(8)) as run:
        assert sampled(run, every=2) == twice
    with opened(a_config(tmp_path / "b", **fields), data=table(8)) as run:
        assert sampled(run, every=2, at_the_end=True) == [*twice, (10, "samples/step-000005.png")]
    with opened(a_config(tmp_path / "c", **fields), data=table(8)) as run:
        assert sampled(run, every=5, at_the_end=True) == [(10, "samples/step-000005.png")]
    with opened(a_config(tmp_path / "d", **fields), data=table(8)) as run:
        due = [number for number, _ in enumerate(micro_steps(run), start=1) if run.sample_due(every=2)]
    assert due == [4, 8], "what was not drawn in its step is not due in the middle of the next"


def test_samples_that_a_stop_left_undrawn_are_due_at_the_resume_and_no_others(tmp_path):
    fields = dict(checkpointing_steps=2, max_train_steps=6)
    with opened(a_config(tmp_path, **fields)) as run:
        for _ in micro_steps(run):
            path = run.sample_due(every=2)
            if path is not None and run.global_step != 4:
                path.write_bytes(b"a picture")
            if run.global_step == 5:
                break
    left = tmp_path / "samples" / "step-000005.png"
    left.write_bytes(b"of a branch that is left")
    with opened(a_config(tmp_path, **fields, resume_from_checkpoint="latest")) as run:
        assert run.sample_due(every=2) == tmp_path / "samples" / "step-000004.png"
        assert not left.exists() and (tmp_path / "samples" / "abandoned-step-000005.png").exists()
    with opened(a_config(tmp_path, **fields, resume_from_checkpoint="checkpoint-2")) as run:
        assert run.sample_due(every=2) is None, "that picture is there"


# --- saves that fail ---


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_when(patch: pytest.MonkeyPatch, owner, name: str, condition) -> None:
    """Let a function fail as on a full disk, but only for the arguments that the condition picks."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: (full_disk if condition(args) else real)(*args, **kwargs))


def fail_while_sealing(patch: pytest.MonkeyPatch) -> None:
    for name in ("rename", "replace"):
        failing_when(patch, os, name, lambda args: Path(args[1]).name == "checkpoint-4")


FAILURES = {
    "the folder is made": lambda patch: failing_when(patch, os, "mkdir", lambda args: "checkpoint-4" in str(args[0])),
    "a model is written": lambda patch: patch.setattr(Tiny, "save_pretrained", full_disk),
    "an average is written": lambda patch: failing_when(
        patch, Tiny, "save_pretrained", lambda args: str(args[1]).endswith("_ema")),
    "the optimizer is written": lambda patch: patch.setattr(torch, "save", full_disk),
    "the generator is written": lambda patch: failing_when(
        patch, safetensors.torch, "serialize_file", lambda args: "generator" in str(args[1])),
    "it is flushed to the disk": lambda patch: patch.setattr(os, "fsync", full_disk),
    "it gets its name": fail_while_sealing,
}  # fmt: skip


@pytest.mark.parametrize("moment", FAILURES)
def test_a_save_that_fails_leaves_the_only_checkpoint_whole(tmp_path, moment):
    fields = dict(checkpointing_steps=2, checkpoints_total_limit=1, use_ema=True, max_train_steps=6)
    with pytest.MonkeyPatch.context() as patch, opened(a_config(tmp_path, **fields)) as run:
        steps = micro_steps(run)
        next(steps), next(steps)
        kept, average = flat(run.models["line"].parameters()), flat(run.emas["line"].shadow_params)
        FAILURES[moment](patch)
        with pytest.raises(RunFailed, match="checkpoint-4 could not be written: .*Last good checkpoint: checkpoint-2"):
            list(steps)
    assert steps_saved(tmp_path) == [2]
    assert not list(tmp_path.glob(".checkpoint-*")), "what was half written is gone, to free its space"
    with opened(a_config(tmp_path, **fields, resume_from_checkpoint="latest"), {"line": Tiny(50.0)}) as run:
        assert run.global_step == 2 and torch.equal(flat(run.models["line"].parameters()), kept)
        assert torch.equal(flat(run.emas["line"].shadow_params), average)
        for _ in micro_steps(run):
            pass
    assert steps_saved(tmp_path) == [6], "with space again it goes on, and the old ones go"


def test_an_old_checkpoint_goes_only_when_the_new_one_has_its_name(tmp_path, monkeypatch):
    seen, real = [], shutil.rmtree

    def noted(path, *args, **kwargs):
        if "checkpoint-2" in Path(path).name and Path(path).is_dir():
            seen.append(steps_saved(tmp_path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", noted)
    train(a_config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=4))
    assert seen and all(4 in steps for steps in seen) and steps_saved(tmp_path) == [4]


def test_checkpoints_of_a_branch_that_was_left_count_no_more(tmp_path):
    fields = dict(checkpointing_steps=2)
    train(a_config(tmp_path, checkpointing_steps=2, max_train_steps=6))
    with opened(a_config(tmp_path, **fields, max_train_steps=6, resume_from_checkpoint="checkpoint-2")) as run:
        next(micro_steps(run))
        assert steps_saved(tmp_path) == [2, 4, 6], "nothing is moved before the new branch has a checkpoint"
        run.save_checkpoint()
    assert steps_saved(tmp_path) == [2, 3]
    assert sorted(path.name for path in tmp_path.glob("abandoned-*")) == [
        "abandoned-checkpoint-4", "abandoned-checkpoint-6"]  # fmt: skip


# --- numbers that are none ---


@pytest.mark.parametrize(
    "bad, name, parameter",
    [(float("inf"), "one", "bias"), (-float("inf"), "two", "weight"), (float("nan"), "two", "bias")],
)
@pytest.mark.parametrize("at, good", [(4, 2), (5, 4)])
def test_a_spoiled_weight_is_found_wherever_it_is_and_not_saved(tmp_path, bad, name, parameter, at, good):
    """at: the step that spoils it, one that saves, or the last of the run. good: the last checkpoint before it."""
    models = {"one": Tiny(), "two": Tiny(1.0)}
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    optimizer, done = torch.optim.SGD(parameters, lr=0.01), []

    def spoil(*_):
        done.append(1)
        if len(done) == at:
            models[name].get_parameter(parameter).data[-1] = bad

    optimizer.register_step_post_hook(spoil)
    config = a_config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    expected = f"weights are not finite after step {at};.*Last good checkpoint: checkpoint-{good}; go on with"
    with pytest.raises(RunFailed, match=expected):
        train(config, models, optimizer=optimizer)
    assert steps_saved(tmp_path) == [good]


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_not_finite_names_its_step_and_is_not_saved(tmp_path, every):
    config = a_config(tmp_path, checkpointing_steps=2, logging_steps=every, max_train_steps=6)
    expected = "loss is not finite at step 3;.*Last good checkpoint: checkpoint-2;"
    with pytest.raises(RunFailed, match=expected), opened(config) as run:
        for _ in run.epochs():
            for _, inputs, targets in run.batches():
                spoiled = float("nan") if run.global_step == 2 else 1.0
                with run.accumulate():
                    run.backward(squared_errors(run, inputs, targets) * spoiled)
                    run.step()
    assert steps_saved(tmp_path) == [2]


def test_a_failure_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    expected = "--train_batch_size 1 --gradient_accumulation_steps 2.*There is no checkpoint yet"
    with pytest.raises(RunFailed, match=expected), opened(a_config(tmp_path)):
        raise torch.OutOfMemoryError("out of memory")


def test_the_way_on_after_too_little_memory_is_that_of_all_processes(tmp_path, monkeypatch):
    def exhausted(*_) -> None:
        raise torch.OutOfMemoryError("out of memory")

    train(a_config(tmp_path, max_train_steps=2))
    monkeypatch.setattr("diffusion_lessons.engine.run.compose_run", exhausted)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(RunFailed, match="checkpoint-2; .* --resume_from_checkpoint latest --num_processes 2$"):
        train(a_config(tmp_path, max_train_steps=4, resume_from_checkpoint="latest"))


def test_speed_counts_the_rows_of_all_micro_steps(tmp_path):
    with opened(a_config(tmp_path, gradient_accumulation_steps=3)) as run:
        assert run.meter.pictures_per_step == 2 * 3


# --- going on where it stopped ---


def recorded(run, stop_after: int | None = None) -> list[tuple]:
    """Train, noting for each micro-step its rows, a number from the run's dice and a global one, rate and epoch."""
    notes = []
    for epoch in run.epochs():
        for rows, inputs, targets in run.batches():
            draws = torch.rand((), generator=run.generator).item(), torch.rand(()).item()
            notes.append((rows.tolist(), *draws, run.schedule.get_last_lr()[0], epoch))
            with run.accumulate():
                run.backward(squared_errors(run, inputs, targets) * (1 + draws[0]))
                run.step()
            if len(notes) == stop_after:
                return notes
    return notes


def falling(folder: Path, **fields) -> RunConfig:
    """Seven micro-steps an epoch in groups of two, so four steps, of which the last is a group of one."""
    common = dict(lr_scheduler="linear", gradient_accumulation_steps=2, use_ema=True)
    return a_config(folder, **(common | fields))


def recorded_run(config: RunConfig, stop_after: int | None = None, start: float = 0.0, **settings):
    model = Tiny(start)
    shuffled = dict(data=table(13), optimizer=make_optimizer(model.parameters(), config), shuffle=True, num_epochs=3)
    with opened(config, {"line": model}, **(shuffled | settings)) as run:
        return recorded(run, stop_after), run


@pytest.mark.parametrize(
    "every, stop_after, micro, step",
    [
        pytest.param(3, 10, 6, 3, id="within the first epoch, one batch before its end"),
        pytest.param(3, 14, 11, 6, id="within the second epoch, halfway through it"),
        pytest.param(5, 10, 9, 5, id="halfway through a group"),
        pytest.param(4, 9, 7, 4, id="at the end of an epoch"),
        pytest.param(12, 21, 21, 12, id="at the end of the run"),
    ],
)
def test_what_is_left_after_a_stop_is_exactly_what_would_have_followed(tmp_path, every, stop_after, micro, step):
    """micro, step: how far the last checkpoint before the stop is."""
    whole, expected = recorded_run(falling(tmp_path / "whole", checkpointing_steps=every))
    assert sorted(sum((rows for rows, *_ in whole[:7]), [])) == list(range(13)), "every row once in an epoch"
    before, _ = recorded_run(falling(tmp_path / "parts", checkpointing_steps=every), stop_after)
    again = falling(tmp_path / "parts", checkpointing_steps=every, resume_from_checkpoint="latest")
    after, run = recorded_run(again, start=9.0)
    assert before == whole[:stop_after] and after == whole[micro:]
    assert (run.global_step, run.total_steps, run.steps_per_epoch) == (12, 12, 4)
    assert torch.equal(flat(run.models["line"].parameters()), flat(expected.models["line"].parameters()))
    assert torch.equal(flat(run.emas["line"].shadow_params), flat(expected.emas["line"].shadow_params))
    assert len(expected.losses) == 12 and run.losses == expected.losses[step:]


def test_epochs_and_seeds_shuffle_differently_and_a_seed_always_alike(tmp_path):
    first, again, other = (recorded_run(falling(tmp_path / name, seed=seed))[0]
                           for name, seed in (("a", 3), ("b", 3), ("c", 40)))  # fmt: skip
    assert first == again
    orders = [[rows for rows, *_ in notes] for notes in (first[:7], first[7:14], first[14:], other[:7])]
    assert len({str(order) for order in orders}) == 4 and orders[0] != sorted(orders[0])
    assert len({draw for _, draw, *_ in first + other}) == 2 * 21, "no draw comes twice"


class Jittered(Dataset):
    """Rows with a transform that draws from the global generator."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return torch.tensor(index), torch.rand(3), torch.rand(())


def test_random_transforms_go_on_where_they_stopped(tmp_path):
    def inputs(config, stop_after=None) -> list[list[float]]:
        with opened(config, data=Jittered(), shuffle=True, num_epochs=2) as run:
            seen = []
            for _ in run.epochs():
                for _, inputs, targets in run.batches():
                    seen.append(inputs.flatten().tolist())
                    with run.accumulate():
                        run.backward(squared_errors(run, inputs, targets))
                        run.step()
                    if len(seen) == stop_after:
                        return seen
            return seen

    fields = dict(checkpointing_steps=4)
    whole = inputs(a_config(tmp_path / "whole", **fields))
    assert len({number for batch in whole for number in batch}) == 6 * 6, "each epoch has its own"
    assert inputs(a_config(tmp_path / "parts", **fields), stop_after=5) == whole[:5]
    assert inputs(a_config(tmp_path / "parts", **fields, resume_from_checkpoint="latest")) == whole[4:]


def test_a_changed_rate_length_and_decay_hold_from_the_resume_on(tmp_path, capsys):
    recorded_run(falling(tmp_path, checkpointing_steps=4), stop_after=8)
    config = falling(tmp_path, learning_rate=0.4, max_train_steps=16, adam_weight_decay=0.5, adam_beta1=0.7,
                     resume_from_checkpoint="latest")  # fmt: skip
    notes, run = recorded_run(config)
    rates = [0.4 * (1 - (4 + step) / 16) for step in range(12)]
    assert [note[-2] for note in notes[:6]] == pytest.approx([rates[step] for step in (0, 0, 1, 1, 2, 2)])
    assert run.global_step == 16 and run.schedule.get_last_lr() == pytest.approx([0.0], abs=1e-9)
    options = run.optimizer.param_groups[0]
    assert options["weight_decay"] == 0.5 and options["betas"] == (0.7, 0.999)
    said = capsys.readouterr().out
    assert "learning_rate changed on resume: 0.1 -> 0.4" in said and "4 of 16 steps are done" in said


def test_a_schedule_that_was_handed_over_goes_on_where_it_stopped(tmp_path):
    def rates(stop_after=None, **fields) -> list[float]:
        config, model = falling(tmp_path, checkpointing_steps=3, **fields), Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        with opened(config, {"line": model}, table(13), optimizer, lr_scheduler=schedule, num_epochs=2) as run:
            return [note[-2] for note in recorded(run, stop_after)]

    expected = [0.1] * 4 + [0.05] * 3 + [0.025] * 4 + [0.0125] * 3
    assert rates(stop_after=8) == pytest.approx(expected[:8])
    assert rates(resume_from_checkpoint="latest") == pytest.approx(expected[6:])


def test_a_schedule_for_the_undivided_data_is_long_enough_for_two_processes(tmp_path, monkeypatch, capsys):
    class Composed(Exception):
        """That is as far as it has to go."""

    def composed(*_) -> None:
        raise Composed

    monkeypatch.setattr("diffusion_lessons.engine.run.TrainState", composed)
    optimizer = torch.optim.SGD(Tiny().parameters(), lr=0.1)
    process = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    for length, warned in ((6, False), (24, True)):  # six batches, stepped once by each of two processes
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, length=length: max(0, 1 - step / length))
        with pytest.raises(Composed):
            compose_run(a_config(tmp_path), {}, optimizer, DataLoader(table(12), 2), schedule, 1, "train",
                        ModelFolders(), process, OutputFolder(tmp_path))  # fmt: skip
        assert ("warning: lr_scheduler" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("change", [{"seed": 5}, {"train_batch_size": 3}, {"gradient_accumulation_steps": 3}])
def test_another_seed_or_another_grouping_is_refused_unless_forced(tmp_path, change):
    recorded_run(falling(tmp_path, checkpointing_steps=5), stop_after=9)
    (name, value), = change.items()
    fields = dict(resume_from_checkpoint="latest", max_train_steps=7) | change
    with pytest.raises(InputError, match=rf"--{name} {value}: was \d in the checkpoint;.*--force_resume"):
        recorded_run(falling(tmp_path, **fields))
    assert steps_saved(tmp_path) == [5] and not is_locked(tmp_path)
    notes, run = recorded_run(falling(tmp_path, **fields, force_resume=True))
    assert run.global_step == 7 and notes[0][-1] == 1, "it goes on in the second epoch"


def test_other_data_are_refused_unless_forced(tmp_path):
    def data(name: str | None) -> TensorDataset:
        rows = table(13)
        rows.fingerprint = name
        return rows

    recorded_run(falling(tmp_path, checkpointing_steps=5), stop_after=9, data=data("these"))
    fields = dict(resume_from_checkpoint="latest", max_train_steps=6)
    with pytest.raises(InputError, match="training pictures.*are not those of the checkpoint;.*--force_resume"):
        recorded_run(falling(tmp_path, **fields), data=data("others"))
    assert steps_saved(tmp_path) == [5]
    for settings in ({"data": data("these")}, {"data": data(None)}):
        with opened(falling(tmp_path, **fields), shuffle=True, num_epochs=3, **settings) as run:
            assert run.global_step == 5
    assert recorded_run(falling(tmp_path, **fields, force_resume=True), data=data("others"))[1].global_step == 6


def test_a_forced_resume_with_other_groups_begins_its_epoch_anew(tmp_path):
    recorded_run(falling(tmp_path, checkpointing_steps=5), stop_after=9)
    config = falling(tmp_path, gradient_accumulation_steps=1, resume_from_checkpoint="latest", force_resume=True)
    notes, run = recorded_run(config)
    assert run.steps_per_epoch == 7 and run.total_steps == 21
    assert [note[-1] for note in notes] == [0] * 7 + [1] * 7 + [2] * 2, "steps 6 to 21"


# --- signals ---


@pytest.fixture
def caught():
    """Handlers of the test's own: the numbers of the signals that reached them while no run was looking."""
    numbers: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        numbers.append(number)

    before = [signal.signal(number, note) for number in watched]
    yield SimpleNamespace(numbers=numbers, in_place=lambda: all(signal.getsignal(each) is note for each in watched))
    for number, handler in zip(watched, before, strict=True):
        signal.signal(number, handler)


def signalled(run, at: int, *numbers: int) -> None:
    """Train, with signals to this process within a micro-step, before its update."""
    for _ in run.epochs():
        for count, (_, inputs, targets) in enumerate(run.batches(), start=1):
            with run.accumulate():
                run.backward(squared_errors(run, inputs, targets))
                for number in numbers if count == at else ():
                    os.kill(os.getpid(), number)
                run.step()


@pytest.mark.parametrize(
    "at, numbers, error",
    [
        (3, [signal.SIGINT], Interrupted),
        (4, [signal.SIGINT], Interrupted),
        (4, [signal.SIGTERM], Terminated),
        (3, [signal.SIGINT, signal.SIGINT], Interrupted),
        (3, [signal.SIGTERM, signal.SIGINT], Terminated),
        (4, [signal.SIGINT, signal.SIGTERM], Interrupted),
    ],
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, capsys, caught, at, numbers, error):
    """at: the first or the second micro-step of the second group."""
    config = a_config(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises((Interrupted, Terminated)) as ended, opened(config, command="python -m lines") as run:
        signalled(run, at, *numbers)
    assert ended.type is error
    assert run.global_step == 2 and steps_saved(tmp_path) == [2]
    assert len(run.losses) == 2, "what waited to be read was read"
    said = capsys.readouterr().out
    assert "stopped after step 2. Last good checkpoint: checkpoint-2; go on with: python -m lines --config " in said
    assert f"{tmp_path / 'training_config.json'} --resume_from_checkpoint latest" in said
    assert caught.in_place() and caught.numbers == []
    with opened(a_config(tmp_path, gradient_accumulation_steps=2, resume_from_checkpoint="latest")) as run:
        assert list(micro_steps(run)) == [[8, 9], [10, 11]]


def test_processes_ask_each_other_for_signals_where_they_wait_anyway(tmp_path, monkeypatch):
    asked = []

    def noted(accelerator, received, may_wait):
        asked.append(may_wait)

    monkeypatch.setattr("diffusion_lessons.engine.run.agreed_signal", noted)
    train(a_config(tmp_path, logging_steps=2, checkpointing_steps=3))
    assert asked == [False, True, True, False, True, True], "where losses are read and where a checkpoint is written"


def test_a_signal_within_the_last_step_changes_nothing(tmp_path, caught):
    with opened(a_config(tmp_path, max_train_steps=3)) as run:
        signalled(run, 3, signal.SIGTERM)
    assert steps_saved(tmp_path) == [3] and caught.in_place() and caught.numbers == []


def test_handlers_are_put_back_after_a_failure_and_are_in_place_only_within_the_run(tmp_path, caught):
    with pytest.raises(ZeroDivisionError), opened(a_config(tmp_path)):
        assert not caught.in_place()
        raise ZeroDivisionError
    assert caught.in_place()
    os.kill(os.getpid(), signal.SIGINT)
    assert caught.numbers == [signal.SIGINT]


# --- the output folder ---


def is_locked(folder: Path) -> bool:
    try:
        lock_output_dir(folder).release()
    except InputError:
        return True
    return False


def test_the_data_are_held_where_the_run_is_while_it_is_open(tmp_path, monkeypatch):
    held = []

    @contextlib.contextmanager
    def noted(device, dataloader):
        held.append((device.type, len(dataloader.dataset)))
        yield
        held.clear()

    monkeypatch.setattr("diffusion_lessons.engine.run.held_on", noted)
    with opened(a_config(tmp_path)):
        assert held == [("cpu", 12)]
    assert held == []


def test_the_folder_is_locked_while_the_run_is_open(tmp_path):
    with opened(a_config(tmp_path)):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with pytest.raises(ZeroDivisionError), opened(a_config(tmp_path)):
        assert is_locked(tmp_path)
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


def test_a_folder_that_another_run_holds_is_left_alone(tmp_path):
    train(a_config(tmp_path, max_train_steps=2))
    lock = lock_output_dir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}: another run is writing there"):
        train(a_config(tmp_path, max_train_steps=2))
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()


def test_the_folder_is_free_again_after_a_start_that_failed(tmp_path, monkeypatch):
    train(a_config(tmp_path, max_train_steps=2))
    with pytest.raises(InputError, match="no such folder; .* holds checkpoint-2"):
        train(a_config(tmp_path, resume_from_checkpoint="checkpoint-1"))
    assert not is_locked(tmp_path)
    monkeypatch.setattr("diffusion_lessons.engine.run.start_tracker", full_disk)
    with pytest.raises(OSError):
        train(a_config(tmp_path, max_train_steps=2))
    assert not is_locked(tmp_path)


def test_an_unfinished_run_is_moved_aside_and_kept(tmp_path, capsys):
    folder = tmp_path / "run"
    with opened(a_config(folder, checkpointing_steps=2)) as run:
        next(rows for rows in micro_steps(run) if run.global_step == 3)
    published = {"model_index.json": '{"line": ["diffusers", "Tiny"]}', "line/weights": "old", "samples/1.png": "old"}
    write_tree(folder, published | {"notes.txt": "mine"})
    train(a_config(folder, max_train_steps=1))
    assert all((tmp_path / "run.previous" / name).is_file() and not (folder / name).exists() for name in published)
    assert steps_saved(tmp_path / "run.previous") == [2] and steps_saved(folder) == [1]
    assert f"the unfinished run in {folder} was moved to {tmp_path / 'run.previous'}" in capsys.readouterr().out
    assert (tmp_path / "run.previous" / "training_config.json").is_file()
    assert (folder / "notes.txt").read_text() == "mine", "what no run wrote stays"


def test_a_finished_run_is_replaced_only_when_the_new_one_has_finished(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = train(a_config(folder, max_train_steps=2))
    weights = flat(first.models["line"].parameters())

    def begins(*_, **__):
        assert torch.equal(saved(tmp_path / "run.previous" / "checkpoint-2" / "line"), weights)
        raise ConnectionError("the start failed")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr("diffusion_lessons.engine.run.start_tracker", begins)
        train(a_config(folder, max_train_steps=3))
    assert torch.equal(saved(tmp_path / "run.previous" / "checkpoint-2" / "line"), weights)
    train(a_config(folder, max_train_steps=3))
    assert steps_saved(folder) == [3] and [path.name for path in tmp_path.iterdir()] == ["run"]
    with opened(a_config(folder, max_train_steps=4)) as run:
        assert steps_saved(tmp_path / "run.previous") == [3] and steps_saved(folder) == []
        next(micro_steps(run))
    assert steps_saved(tmp_path / "run.previous") == [3], "left in the middle: not finished"
    train(a_config(folder, max_train_steps=4))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_leave_to_overwrite_and_a_foreign_folder_are_refused(tmp_path):
    train(a_config(tmp_path / "run", max_train_steps=2))
    with pytest.raises(InputError, match="--resume_from_checkpoint latest .* or --overwrite_output_dir"):
        train(a_config(tmp_path / "run", overwrite_output_dir=False))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for choice in (None, "latest"):
        with pytest.raises(InputError, match=r"holds something else \(chapter.tex"):
            train(a_config(tmp_path / "thesis", resume_from_checkpoint=choice))
    assert steps_saved(tmp_path / "run") == [2]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_what_a_killed_save_left_is_swept_up_at_the_next_start(tmp_path):
    train(a_config(tmp_path, max_train_steps=2))
    (tmp_path / ".checkpoint-3.partial" / "line").mkdir(parents=True)
    (tmp_path / "training_config.json.partial").write_text("{")
    (tmp_path / ".hidden").write_text("mine")
    with opened(a_config(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")):
        assert not (tmp_path / ".checkpoint-3.partial").exists() and (tmp_path / ".hidden").exists()
        assert steps_saved(tmp_path) == [2]


def test_the_config_lies_beside_the_run_without_secrets_and_without_what_was_meant_for_this_start(tmp_path):
    train(a_config(tmp_path, max_train_steps=2))
    fields = dict(resume_from_checkpoint="latest", force_resume=True, hub_token="hf_secret")
    train(a_config(tmp_path, **fields, max_train_steps=3))
    config = load_config(tmp_path / "training_config.json", RunConfig)
    assert config == a_config(tmp_path, max_train_steps=3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


class Noting(Tiny):
    """A line that notes in which precision it multiplies."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.precision = (inputs @ self.weight).dtype
        return super().forward(inputs)


def test_each_run_has_its_own_precision_and_afterwards_the_model_has_none(tmp_path):
    model, inputs = Noting(), torch.randn(2, 3)
    for precision in ("no", "bf16", "no", "bf16"):
        with opened(a_config(tmp_path, mixed_precision=precision), {"line": model}) as run:
            assert run.prepared["line"](inputs).dtype == torch.float32
            assert model.precision == (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert run.accelerator.mixed_precision == precision
        assert model(inputs).dtype == model.precision == torch.float32


# --- the card ---


def card_of(config: RunConfig, **settings) -> tuple[dict, str]:
    """The metadata and the whole text of a card."""
    told = dict(title="Lines", summary="Straight ones.", usage="line = load('.')", tags=["straight"])
    path = write_model_card(config.output_dir, config, **(told | settings))
    assert path == Path(config.output_dir) / "README.md"
    return ModelCard.load(path).data.to_dict(), path.read_text()


def test_a_card_has_metadata_picture_usage_and_the_changed_settings(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), learning_rate=0.25)
    data, text = card_of(config, grid=tmp_path / "samples" / "0001.png", base_model="somebody/curves", license="mit")
    assert data == {"license": "mit", "library_name": "diffusers", "base_model": "somebody/curves",
                    "tags": ["diffusion-lessons", "straight"]}  # fmt: skip
    assert "\n# Lines\n\nStraight ones.\n" in text and "```python\nline = load('.')\n```" in text
    assert "![samples](samples/0001.png)" in text
    settings = json.loads(text.split("```json\n")[1].split("```")[0])
    assert settings == {"output_dir": tmp_path.name, "learning_rate": 0.25}


def test_a_card_says_neither_paths_nor_the_token(tmp_path):
    (tmp_path / "base").mkdir()
    config = RunConfig(output_dir=str(tmp_path / "base"), resume_from_checkpoint=str(tmp_path / "x" / "checkpoint-2"),
                       hub_token="hf_secret", hub_model_id="somebody/lines")  # fmt: skip
    data, text = card_of(config, base_model=str(tmp_path / "base"))
    assert str(tmp_path) not in text and "hf_secret" not in text and "hub_token" not in text
    assert '"resume_from_checkpoint": "checkpoint-2"' in text and '"hub_model_id": "somebody/lines"' in text
    assert "base_model" not in data and data["license"] == "apache-2.0" and "![" not in text


# --- the published folder ---


def tree(folder: Path) -> dict[str, str]:
    """The text of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OLD = {"unet/weights": "old", "unet/more": "old", "model_index.json": "old", "checkpoint-2/weights": "old"}
NEW = {"unet/weights": "new", "scheduler/config": "new", "model_index.json": "new"}


def test_parts_are_replaced_whole_and_the_rest_of_the_folder_stays(tmp_path):
    write_tree(tmp_path, OLD | {".pipeline.partial/unet/killed": "half"})
    save_parts(tmp_path, lambda folder: write_tree(folder, NEW))
    assert tree(tmp_path) == NEW | {"checkpoint-2/weights": "old"}
    assert not (tmp_path / ".pipeline.partial").exists()


def test_parts_that_could_not_be_written_replace_nothing(tmp_path):
    def half(folder: Path) -> None:
        write_tree(folder, {"unet/weights": "half"})
        full_disk()

    write_tree(tmp_path, OLD)
    with pytest.raises(OSError):
        save_parts(tmp_path, half)
    assert {name: text for name, text in tree(tmp_path).items() if not name.startswith(".")} == OLD


def test_no_part_is_ever_half_there_and_the_index_comes_last(tmp_path, monkeypatch):
    write_tree(tmp_path, OLD)
    states, real = [], os.replace

    def noted(source, target):
        states.append(tree(tmp_path))
        real(source, target)
        states.append(tree(tmp_path))

    monkeypatch.setattr(os, "replace", noted)
    save_parts(tmp_path, lambda folder: write_tree(folder, NEW | {"vae/weights": "new"}))
    for state in states:
        unet = {name: text for name, text in state.items() if name.startswith("unet/")}
        assert set(unet.values()) in ({"old"}, {"new"}, set()), "old or new, or for a moment none"
        complete = unet == {"unet/weights": "new"} and "vae/weights" in state and "scheduler/config" in state
        assert state["model_index.json"] == "old" or complete
    assert states[-1]["model_index.json"] == "new"


def test_a_pipeline_is_saved_into_the_folder_of_its_run(tmp_path):
    write_tree(tmp_path, {"checkpoint-2/weights": "old", "unet/left over": "old", "README.md": "old"})
    pipeline = DDPMPipeline(make_unet("tiny-16", 16, seed=3), make_noise_scheduler())
    save_pipeline(pipeline, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "checkpoint-2", "model_index.json", "scheduler", "unet"]
    assert not (tmp_path / "unet" / "left over").exists()
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert torch.equal(flat(again.unet.parameters()), flat(pipeline.unet.parameters()))


# --- the upload ---


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub: it notes the calls, and the token that they were made with."""
    calls = SimpleNamespace(created=[], uploaded=[])

    def create_repo(api, repo_id, **settings):
        calls.created.append({"repo_id": repo_id, "token": api.token, **settings})
        return RepoUrl(f"https://huggingface.co/somebody/{repo_id.split('/')[-1]}")

    def upload_folder(api, **settings):
        calls.uploaded.append({"token": api.token, **settings})

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    return calls


def test_an_upload_takes_the_token_the_name_and_the_privacy_of_the_config(tmp_path, hub):
    config = RunConfig(output_dir=str(tmp_path), hub_model_id="somebody/lines", hub_token="hf_a", hub_private_repo=True)
    assert push_to_hub(config) == "https://huggingface.co/somebody/lines"
    assert hub.created == [{"repo_id": "somebody/lines", "token": "hf_a", "private": True, "exist_ok": True}]
    (upload,) = hub.uploaded
    assert upload["repo_id"] == "somebody/lines" and upload["token"] == "hf_a"
    assert Path(upload["folder_path"]).name == tmp_path.name, "a folder put together for the upload"
    assert push_to_hub(RunConfig(output_dir=str(tmp_path / "curves"))) == "https://huggingface.co/somebody/curves"
    assert hub.created[1] == {"repo_id": "curves", "token": None, "private": None, "exist_ok": True}
    assert hub.uploaded[1]["repo_id"] == "somebody/curves", "the name that the Hub gave it"


def test_checkpoints_logs_and_what_is_hidden_stay_at_home(tmp_path, hub):
    config = RunConfig(output_dir=str(tmp_path), logging_dir="journal", hub_token="hf_a")
    push_to_hub(config)
    published = ["README.md", "model_index.json", "training_config.json", "unet/config.json",
                 "unet/diffusion_pytorch_model.safetensors", "samples/0001.png"]  # fmt: skip
    private = ["checkpoint-2/optimizer.bin", "checkpoint-2/line/config.json", "abandoned-checkpoint-4/optimizer.bin",
               "logs/train/events", "journal/train/events", "journal/error.log", "error.log", ".lock",
               ".checkpoint-6.partial/line/config.json", ".pipeline.partial/unet/config.json"]  # fmt: skip
    patterns = hub.uploaded[0]["ignore_patterns"]
    assert list(filter_repo_objects(published + private, ignore_patterns=patterns)) == published


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_says_how_to_do_it_later(tmp_path, hub, monkeypatch, method):
    def refuse(*_, **__):
        raise ConnectionError("the Hub\nis away")

    monkeypatch.setattr(HfApi, method, refuse)
    config = RunConfig(output_dir=str(tmp_path), hub_model_id="somebody/lines", hub_token="hf_secret")
    with pytest.raises(RunFailed, match="the upload failed: the Hub is away") as failure:
        push_to_hub(config)
    assert f"`hf upload somebody/lines {tmp_path} --exclude 'checkpoint-*/**'" in str(failure.value)
    assert "hf_secret" not in str(failure.value)


def test_an_upload_without_a_login_says_how_to_log_in(tmp_path, hub, monkeypatch):
    def refuse(*_, **__):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=f"--push_to_hub: not logged in; run `hf auth login`.*{tmp_path}"):
        push_to_hub(RunConfig(output_dir=str(tmp_path)))


def test_a_wanted_upload_is_checked_before_anything_is_trained(tmp_path, hub, monkeypatch):
    check_login(RunConfig(output_dir=str(tmp_path / "a name with spaces")))  # no upload is wanted
    fields = dict(output_dir=str(tmp_path / "lines"), push_to_hub=True)
    with pytest.raises(InputError, match="--push_to_hub: not logged in"):
        check_login(RunConfig(**fields))
    check_login(RunConfig(**fields, hub_token="hf_a"))
    monkeypatch.setenv("HF_TOKEN", "hf_b")
    check_login(RunConfig(**fields))
    for wrong in ("a//b", "a name with spaces", "a/b/c"):
        with pytest.raises(InputError, match=f"--hub_model_id {wrong}: is no name for a repository"):
            check_login(RunConfig(**fields, hub_model_id=wrong))
    with pytest.raises(InputError, match="--hub_model_id a name with spaces"):
        check_login(RunConfig(output_dir=str(tmp_path / "a name with spaces"), push_to_hub=True))


# --- the token among the words ---

TOKENS = [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token", "hf_secret"],
          ["--hub-token=hf_secret"]]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS, ids=" ".join)
def test_a_token_is_hidden_wherever_it_stands(token):
    others = ["--output_dir", "hub_token", "--hub_model_id=somebody/lines", "--push_to_hub"]
    for position in (0, 2, 3, 4):
        words = hide_token([*others[:position], *token, *others[position:]])
        assert "hf_secret" not in " ".join(words) and "***" in " ".join(words)
        assert len(words) == len(others) + len(token)
        assert words[:position] == others[:position] and words[position + len(token) :] == others[position:]
    assert hide_token(others) == others and hide_token([]) == []


@pytest.mark.parametrize("token", TOKENS, ids=" ".join)
def test_a_command_works_with_its_token_and_its_words_no_longer_have_it(tmp_path, monkeypatch, token):
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(tmp_path), *token, "--learning_rate", "0.5"])
    seen = []

    def work(config, options) -> None:
        seen.append((config.hub_token, config.learning_rate, options.num_processes, list(sys.argv)))

    assert training_command("train", RunConfig, {}, work) == 0
    ((hub_token, rate, processes, argv),) = seen
    assert (hub_token, rate, processes) == ("hf_secret", 0.5, 1)
    assert "hf_secret" not in " ".join(argv) and argv[0] == "train" and argv[-1] == "0.5"
    assert "hf_secret" not in " ".join(sys.argv)


def test_a_command_that_fails_writes_its_log_into_the_log_folder_if_there_is_one(tmp_path, capsys):
    def work(config, _) -> None:
        raise ZeroDivisionError("by zero")

    words = ["--output_dir", str(tmp_path), "--logging_dir", "journal"]
    assert training_command("train", RunConfig, {}, work, [*words, "--seed", "x"]) == 2
    assert training_command("train", RunConfig, {}, work, words) == 1
    assert not list(tmp_path.iterdir()) and "full log: " in capsys.readouterr().err
    (tmp_path / "journal").mkdir()
    assert training_command("train", RunConfig, {}, work, words) == 1
    log = tmp_path / "journal" / "error.log"
    assert f"train: the run failed: ZeroDivisionError: by zero (full log: {log})" in capsys.readouterr().err
    assert "Traceback" in log.read_text()
