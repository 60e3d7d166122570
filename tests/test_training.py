"""The pieces of a run: steps, schedules, seeds, looks, losses."""

import json
import random

import numpy as np
import pytest
import torch
from runs import TINY

from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.engine.checkpointer import Position
from diffusion_lessons.engine.checkpoints import atomic_folder, latest_checkpoint, prune_checkpoints
from diffusion_lessons.engine.commands import RunFailed
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.data import SeededDataset, mixed_seed
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.optimization import Steps, count_steps, make_optimizer, make_schedule, schedule_warning
from diffusion_lessons.engine.precision import choose_precision
from diffusion_lessons.engine.publishing import changed_fields, push_to_hub, write_model_card
from diffusion_lessons.engine.run import Timing
from diffusion_lessons.engine.tracking import LossLog, check_tracker, run_name


@pytest.mark.parametrize(
    "batches, accumulation, epochs, given, expected",
    [
        (63, 1, 50, None, (63, 3150, 50)),
        (63, 4, 50, None, (16, 800, 50)),
        (63, 4, 50, 100, (16, 100, 7)),
        (1, 8, 2, None, (1, 2, 2)),
    ],
)
def test_steps_are_counted_in_optimizer_steps(batches, accumulation, epochs, given, expected):
    assert count_steps(batches, accumulation, epochs, given) == expected


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "cosine_with_restarts"])
def test_falling_schedules_end_low_with_the_run(name):
    config = TrainingConfig(lr_scheduler=name, lr_warmup_steps=10)
    optimizer = make_optimizer([parameter()], config)
    schedule = make_schedule(optimizer, config, 200)
    for _ in range(200):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] < 0.01 * config.learning_rate
    assert schedule_warning(schedule, 200) is None


def test_min_lr_rate_is_where_the_cosine_ends():
    config = TrainingConfig(min_lr_rate=0.05, lr_warmup_steps=0)
    schedule = make_schedule(make_optimizer([parameter()], config), config, 100)
    assert schedule.lr_lambdas[0](100) == pytest.approx(0.05)


@pytest.mark.parametrize("length, steps, warned", [(100, 100, False), (400, 100, True), (40, 100, True)])
def test_a_schedule_of_the_wrong_length_is_noticed(length, steps, warned):
    config = TrainingConfig(lr_warmup_steps=5, lr_scheduler="linear")
    schedule = make_schedule(make_optimizer([parameter()], config), config, length)
    assert (schedule_warning(schedule, steps) is not None) == warned


def test_a_constant_rate_is_never_warned_about():
    config = TrainingConfig(lr_scheduler="constant")
    assert schedule_warning(make_schedule(make_optimizer([parameter()], config), config, 7), 1000) is None


def test_mixed_seeds_differ_where_sums_would_not():
    seeds = {mixed_seed(seed, rank) for seed in range(40) for rank in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_seeded_data_set_leaves_the_global_generators_alone():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.rand(()).item(), np.random.rand(), random.random()

    def start() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    def draw() -> tuple[float, ...]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    start()
    expected = draw()
    start()
    seeded = SeededDataset(Noisy(), seed=1)
    first = [seeded[0], seeded[1]]
    assert draw() == expected
    assert first[0] != first[1] and seeded[0] == first[0]


def looks(steps_per_epoch: int, total: int, every: int | None) -> list[int]:
    """The epochs after which a run of this shape is due to look."""
    position, found = Position(), []
    timing = Timing(position, Steps(steps_per_epoch, total, -(-total // steps_per_epoch)))
    while not timing.at_the_end:
        position.global_step = min(total, (position.epoch + 1) * steps_per_epoch)
        if timing.after_epoch(every):
            found.append(position.epoch)
        position.epoch += 1
    return found


def test_when_a_run_looks_at_its_samples():
    assert looks(10, 45, every=2) == [1, 3, 4], "every second epoch, and at the end"
    assert looks(250, 2800, every=None) == [3, 7, 11], "three times"
    assert looks(5, 2800, every=None) == [186, 373, 559], "also where epochs are short"
    assert looks(10, 7, every=None) == [0]


def test_the_loss_log_asks_the_device_once_a_group(monkeypatch):
    accelerator = make_accelerator(TrainingConfig(report_to="none"))
    log, asked = LossLog(accelerator, every=4), []
    reduce = accelerator.reduce
    monkeypatch.setattr(accelerator, "reduce", lambda *args, **kwargs: (asked.append(1), reduce(*args, **kwargs))[1])
    for step in range(1, 13):
        log.add(torch.tensor(float(step)))
        if log.is_full:
            log.read(step)
    assert log.values == [float(step) for step in range(1, 13)] and len(asked) == 3
    for loss in (1.0, float("inf"), 2.0):
        log.add(torch.tensor(loss))
    with pytest.raises(RunFailed, match="step 14"):
        log.read(15)
    forget_accelerator(accelerator)


def test_a_run_keeps_its_name(tmp_path):
    assert run_name(tmp_path / "a" / "logs") == run_name(tmp_path / "a" / "logs") != run_name(tmp_path / "b" / "logs")
    names = [run_name(tmp_path / disk / "moths" / "logs") for disk in ("one", "two")]
    assert names[0] != names[1], "folders of one name are two runs"
    assert all(name.startswith("moths-") for name in names)


def test_only_a_tracker_that_was_named_has_to_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracker("none")
    check_tracker("all")  # Accelerate takes what there is
    with pytest.raises(InputError, match=r"--report_to wandb: is not installed; pip install '.*\[wandb\]'"):
        check_tracker("wandb")


def test_precision_is_what_was_asked_for_then_accelerates_then_the_devices(monkeypatch):
    assert choose_precision(None, "cuda") == "fp16" and choose_precision(None, "cpu") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision(None, "cuda") == "bf16" and choose_precision("no", "cuda") == "no"
    with pytest.raises(InputError, match="--mixed_precision fp16"):
        choose_precision("fp16", "cpu")


def checkpoint(folder, step: int) -> None:
    with atomic_folder(folder / f"checkpoint-{step}") as partial:
        (partial / "progress.json").write_text(json.dumps({"step": step}))


def test_pruning_keeps_the_newest_by_number_not_by_name(tmp_path):
    for step in (900, 1000, 80):
        checkpoint(tmp_path, step)
    assert prune_checkpoints(tmp_path, limit=2) == ["checkpoint-80"]
    assert latest_checkpoint(tmp_path)[0].step == 1000
    assert prune_checkpoints(tmp_path, limit=None) == []


def test_a_card_says_what_was_changed_and_no_secret(tmp_path):
    config = TrainingConfig(**(TINY | {"hub_token": "hf_secret", "output_dir": str(tmp_path)}))
    assert "hub_token" not in changed_fields(config) and changed_fields(config)["image_size"] == 16
    card = write_model_card(tmp_path, config, title="T", summary="S", usage="U", tags=["t"])
    assert "hf_secret" not in card.read_text() and '"image_size": 16' in card.read_text()


def test_an_upload_offline_fails_with_the_way_to_do_it_later(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises((InputError, RunFailed), match="hf upload"):
        push_to_hub(TrainingConfig(output_dir=str(tmp_path), hub_model_id="somebody/flies"))
