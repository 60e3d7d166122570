"""The parts that a run is composed of, each alone: folder, state, checkpointer, timing, meter, precision, data."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch.utils.data import DataLoader, TensorDataset

from diffusion_lessons.engine.checkpointer import Checkpointer, ModelFolders, Position, last_checkpoint_text
from diffusion_lessons.engine.checkpoints import Checkpoint, compare_progress, list_checkpoints
from diffusion_lessons.engine.commands import RunFailed
from diffusion_lessons.engine.config import InputError, RunConfig, public_fields
from diffusion_lessons.engine.data import (
    HeldData,
    count_batches,
    fingerprint_of,
    held_on,
    mixed_seed,
    order_seed,
    repeatable,
)
from diffusion_lessons.engine.devices import (
    agreed_signal,
    forget_accelerator,
    make_accelerator,
    on_main,
    out_of_memory_text,
    seed_all,
)
from diffusion_lessons.engine.optimization import (
    Steps,
    TrainState,
    count_steps,
    make_optimizer,
    seconds_per_micro_step,
    training_memory,
)
from diffusion_lessons.engine.output_folder import (
    CONFIG_NAME,
    OutputFolder,
    newest_samples,
    samples_path,
    set_aside_samples,
)
from diffusion_lessons.engine.precision import Phase, PrecisionPlan, drawing_precision, generation_precision
from diffusion_lessons.engine.run import Timing, start_run
from diffusion_lessons.engine.tracking import ProgressMeter
from diffusion_lessons.pictures.batches import ImageSet


class Line(ModelMixin, ConfigMixin):
    """A model of three numbers that diffusers can save."""

    @register_to_config
    def __init__(self, size: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(size, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def a_config(tmp_path, **fields) -> RunConfig:
    chosen = {"output_dir": str(tmp_path), "report_to": "none", "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    return RunConfig(**chosen | fields).resolve()


@pytest.fixture
def open_state(tmp_path):
    """Makes train states of one or two lines; their Accelerator is forgotten afterwards."""
    made = []

    def build(names=("line",), total_steps=10, **fields) -> TrainState:
        config = a_config(tmp_path, **fields)
        made.append(make_accelerator(config))
        torch.manual_seed(0)
        models = {name: Line() for name in names}
        parameters = [each for model in models.values() for each in model.parameters()]
        return TrainState(made[-1], config, models, make_optimizer(parameters, config), total_steps)

    yield build
    for accelerator in made:
        forget_accelerator(accelerator)


def micro_step(state: TrainState, value: float = 1.0) -> torch.Tensor | None:
    with state.accumulate():
        state.backward(sum(model(torch.full((4, 2), value)).square().mean() for model in state.prepared.values()))
        return state.step()


# --- the folder ---


def test_a_folder_is_claimed_once_and_free_again_after_release(tmp_path):
    first, second = OutputFolder(tmp_path / "run"), OutputFolder(tmp_path / "run")
    first.claim(overwrite=True, resuming=False)
    with pytest.raises(InputError, match="another run is writing there"):
        second.claim(overwrite=True, resuming=False)
    first.release()
    second.claim(overwrite=True, resuming=False)
    second.release()


def test_a_finished_run_is_dropped_only_when_it_is_said(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text("{}")
    (folder / "mine.txt").write_text("no run wrote this")
    output = OutputFolder(folder)
    output.claim(overwrite=True, resuming=False)
    assert (tmp_path / "run.previous" / CONFIG_NAME).is_file() and (folder / "mine.txt").is_file()
    output.drop_replaced()
    assert not (tmp_path / "run.previous").exists()
    output.release()
    assert samples_path(folder, 7) == folder / "samples" / "step-000007.png"


def test_all_that_a_run_leaves_goes_aside_with_it_and_nothing_else(tmp_path):
    folders = {"samples", "logs", "unet", "checkpoint-3", "abandoned-checkpoint-5"}
    files = {CONFIG_NAME, "README.md", "model_index.json", "fidelity.json", "pytorch_lora_weights.safetensors",
             "pytorch_lora_weights_kohya.safetensors"}  # fmt: skip
    for name in folders | {"my pictures"}:
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in files | {"mine.txt"}:
        (tmp_path / "run" / name).write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    output = OutputFolder(tmp_path / "run")
    output.claim(overwrite=True, resuming=False)
    assert {path.name for path in (tmp_path / "run.previous").iterdir()} - {".copy.json"} == folders | files
    left = {path.name for path in (tmp_path / "run").iterdir()} - {".lock", ".replaces.json"}
    assert left == {"my pictures", "mine.txt"}
    output.release()


def test_releasing_what_was_never_claimed_does_nothing(tmp_path):
    OutputFolder(tmp_path).release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names, newest", [
    (["9999.png", "10000.png"], "10000.png"),
    (["step-000100.png", "step-1000000.png"], "step-1000000.png"),
    (["step-000100.png", "abandoned-step-000900.png", "mine.png"], "step-000100.png"),
    (["abandoned-step-000900.png", "step-mine.png"], None),
])  # fmt: skip
def test_the_newest_samples_are_the_last_by_number_of_this_branch(names, newest, tmp_path):
    (tmp_path / "samples").mkdir()
    for name in names:
        (tmp_path / "samples" / name).touch()
    found = newest_samples(tmp_path)
    assert (found and found.name) == newest


def test_pictures_with_other_names_are_left_where_they_are(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("step-000009.png", "step-mine.png", "step-.png"):
        (tmp_path / "samples" / name).touch()
    set_aside_samples(tmp_path, 5)
    assert sorted(os.listdir(tmp_path / "samples")) == ["abandoned-step-000009.png", "step-.png", "step-mine.png"]


# --- the train state ---


def test_a_step_is_taken_after_the_last_micro_step_of_a_group_and_gives_its_mean_loss(open_state):
    state = open_state(gradient_accumulation_steps=2, learning_rate=0.1)
    before = state.models["line"].layer.weight.clone()
    assert micro_step(state, 1.0) is None
    assert torch.equal(state.models["line"].layer.weight, before), "only noted so far"
    line = state.models["line"]
    expected = sum(line(torch.full((4, 2), value)).square().mean() for value in (1.0, 3.0)) / 2
    loss = micro_step(state, 3.0)
    torch.testing.assert_close(loss, expected.detach())
    assert not torch.equal(state.models["line"].layer.weight, before)


def test_averages_are_lent_and_given_back_also_when_the_block_raises(open_state):
    state = open_state(names=("one", "two"), use_ema=True, ema_max_decay=0.5, learning_rate=0.1)
    for _ in range(4):
        micro_step(state)
    own = {name: model.layer.weight.clone() for name, model in state.models.items()}
    with pytest.raises(ZeroDivisionError), state.averaged():
        for name, model in state.models.items():
            assert torch.equal(model.layer.weight, state.emas[name].shadow_params[0]), name
            assert not torch.equal(model.layer.weight, own[name])
        raise ZeroDivisionError
    assert all(torch.equal(model.layer.weight, own[name]) for name, model in state.models.items())


def test_rewinding_sets_rate_options_and_the_averages_clock(open_state):
    state = open_state(lr_scheduler="linear", learning_rate=0.1, use_ema=True, total_steps=10)
    state.optimizer.param_groups[0]["betas"] = (0.1, 0.2)  # as a checkpoint of another config would leave it
    state.rewind(5)
    assert state.schedule.get_last_lr() == [pytest.approx(0.05)]
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert state.optimizer.param_groups[0]["betas"] == (0.9, 0.999), "the config of this run counts"
    assert state.emas["line"].optimization_step == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_number_anywhere_is_found(open_state, bad):
    state = open_state(names=("one", "two"))
    assert state.is_finite()
    with torch.no_grad():
        state.models["two"].layer.bias[-1] = bad
    assert not state.is_finite()


def test_models_can_be_prepared_again_after_close(open_state):
    state = open_state(mixed_precision="bf16")
    model = state.models["line"]
    assert model(torch.ones(1, 2)).dtype == torch.float32 and model._is_accelerate_prepared
    state.close()
    assert not hasattr(model, "_is_accelerate_prepared")


def test_micro_steps_are_measured_on_the_state_that_a_run_would_have(open_state, monkeypatch):
    state, calls = open_state(use_ema=True), []
    monkeypatch.setattr("time.perf_counter", lambda: 2.5 * sum(calls))

    def loss_of() -> torch.Tensor:
        calls.append(1 if calls else 100)  # the first step pays for start-up
        return state.prepared["line"](torch.ones(4, 2)).square().mean()

    assert seconds_per_micro_step(state, loss_of, repeats=3) == 2.5 and len(calls) == 4
    assert state.emas["line"].optimization_step == 4, "the averages are part of a step"
    parameters = 4 * 3  # bytes of two weights and a bias
    memory = training_memory(state.models.values(), torch.device("cpu"), use_ema=True) * 2**30
    assert memory == pytest.approx(parameters * (1 + 3 + 1) + 2 * 4), "a counter of steps for weight and bias"


# --- the checkpointer ---


def about(state: TrainState, **changed) -> dict:
    return {"total_steps": 10, "steps_per_epoch": 5, "num_processes": 1, "data": "abc", "device": "cpu",
            "config": {}} | changed  # fmt: skip


def test_what_a_checkpointer_saves_another_one_restores(open_state, tmp_path):
    state, generator = open_state(use_ema=True, learning_rate=0.1), torch.Generator().manual_seed(3)
    saver = Checkpointer(tmp_path, state, generator, ModelFolders(), about(state))
    micro_step(state)
    torch.rand(5, generator=generator)
    saver.save(Position(1, 0, 1))
    weights = state.models["line"].layer.weight.clone()
    moment = state.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    average, expected = state.emas["line"].shadow_params[0].clone(), torch.rand(3, generator=generator)
    micro_step(state)
    checkpoint = saver.find("latest")
    assert checkpoint == Checkpoint(tmp_path / "checkpoint-1", 1) and checkpoint.fault(thorough=True) is None
    assert saver.restore(checkpoint, a_config(tmp_path)) == Position(1, 0, 1)
    assert torch.equal(state.models["line"].layer.weight, weights)
    assert torch.equal(state.emas["line"].shadow_params[0], average)
    assert torch.equal(state.optimizer.state_dict()["state"][0]["exp_avg"], moment)
    assert torch.equal(torch.rand(3, generator=generator), expected)


def test_other_epochs_than_the_checkpoints_begin_at_the_start_of_one(open_state, tmp_path):
    state = open_state()
    Checkpointer(tmp_path, state, torch.Generator(), ModelFolders(), about(state)).save(Position(7, 1, 2))
    state.accelerator._save_model_state_pre_hook.clear()
    state.accelerator._load_model_state_pre_hook.clear()
    forced = Checkpointer(tmp_path, state, torch.Generator(), ModelFolders(), about(state, steps_per_epoch=3))
    assert forced.restore(forced.find("latest"), a_config(tmp_path, force_resume=True)) == Position(7, 2, 0)


def test_a_fresh_scaler_stays_where_the_checkpoint_was_written_without_one(open_state, tmp_path):
    state = open_state()
    saver = Checkpointer(tmp_path, state, torch.Generator(), ModelFolders(), about(state))
    saver.save(Position(1, 0, 1))
    scaler = state.accelerator.scaler = torch.amp.GradScaler("cpu")  # fp16 is chosen on the resume
    saver.restore(saver.find("latest"), a_config(tmp_path))
    assert state.accelerator.scaler is scaler


def test_latest_without_a_checkpoint_is_none(open_state, tmp_path, capsys):
    state = open_state()
    assert Checkpointer(tmp_path, state, torch.Generator(), ModelFolders(), about(state)).find("latest") is None
    assert "starting anew" in capsys.readouterr().out
    assert last_checkpoint_text(tmp_path, "train-butterflies") == "There is no checkpoint yet"


def test_the_limit_keeps_the_newest(open_state, tmp_path):
    state = open_state()
    saver = Checkpointer(tmp_path, state, torch.Generator(), ModelFolders(), about(state))
    for step in (1, 2, 3):
        saver.save(Position(step, 0, step), limit=2)
    assert [each.step for each in list_checkpoints(tmp_path)] == [2, 3]
    text = last_checkpoint_text(tmp_path, "python -m somewhere", num_processes=2)
    assert "checkpoint-3" in text and text.endswith(
        f"python -m somewhere --config {tmp_path / CONFIG_NAME} --resume_from_checkpoint latest --num_processes 2")


def test_what_is_said_to_one_start_is_no_change_of_the_run(tmp_path):
    then = a_config(tmp_path / "here")
    now = a_config(tmp_path / "there", overwrite_output_dir=False, resume_from_checkpoint="latest", force_resume=True,
                   learning_rate=0.5)  # fmt: skip
    progress = [{"num_processes": 1, "data": None, "config": public_fields(each)} for each in (then, now)]
    assert compare_progress(*progress, now) == ["learning_rate changed on resume: 0.0001 -> 0.5"]


# --- timing and speed ---


def test_something_is_due_after_steps_but_not_before_the_first(tmp_path):
    position, steps = Position(), Steps(per_epoch=5, total=12, epochs=3)
    timing = Timing(position, steps)
    due = []
    for position.global_step in range(13):
        due.append((timing.after_step(5), timing.after_step(5, at_the_end=True)))
    assert [step for step, (plain, _) in enumerate(due) if plain] == [5, 10]
    assert [step for step, (_, last) in enumerate(due) if last] == [5, 10, 12]
    assert timing.at_the_end and steps == count_steps(5, 1, 3, max_train_steps=12)


def test_the_meter_counts_only_what_this_process_did():
    meter = ProgressMeter(total_steps=10, pictures_per_step=8, device_type="cpu", shown=False)
    with meter.running(4):
        for _ in range(3):
            meter.step_done()
        meter.show(0.5, 1e-4)
    assert meter.text(7).startswith("3 steps in 0 s, ") and meter.text(7).endswith("images/s on cpu")


def test_the_bar_of_a_resumed_run_goes_on_where_it_stood(capsys):
    meter = ProgressMeter(total_steps=10, pictures_per_step=8, device_type="cpu")
    with meter.running(4):
        for _ in range(3):
            meter.step_done()
    assert "7/10" in capsys.readouterr().err


def test_a_signal_of_one_process_is_that_of_all(tmp_path):
    accelerator = make_accelerator(a_config(tmp_path))
    assert agreed_signal(accelerator, None, may_wait=True) is None
    assert agreed_signal(accelerator, 15, may_wait=False) == 15
    forget_accelerator(accelerator)


class OneOfTwo:
    """What a process of two sees of its Accelerator; the other one has received `others`."""

    num_processes, is_main_process = 2, True

    def __init__(self, device: str = "cpu", others: int = 0, process_index: int = 0) -> None:
        self.device, self.others, self.process_index = torch.device(device), others, process_index
        self.dataloader_config, self.asked = SimpleNamespace(data_seed=None), 0

    def gather(self, signals: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.tensor([*signals.tolist(), self.others])


def test_a_signal_that_the_other_process_got_counts_and_a_gpu_is_asked_only_where_it_waits_anyway():
    assert agreed_signal(OneOfTwo(others=15), None, may_wait=False) == 15
    assert agreed_signal(OneOfTwo(), 2, may_wait=False) == 2 and agreed_signal(OneOfTwo(), None, may_wait=True) is None
    busy = OneOfTwo("meta", others=15)
    assert agreed_signal(busy, 2, may_wait=False) is None and busy.asked == 0


def test_what_the_main_process_finds_wrong_is_an_input_error_or_a_failed_run(tmp_path):
    def fail(error: Exception) -> None:
        raise error

    accelerator = make_accelerator(a_config(tmp_path))
    assert on_main(accelerator, lambda: 7) == 7
    with pytest.raises(InputError, match="--a b: c"):
        on_main(accelerator, lambda: fail(InputError("--a b: c")))
    with pytest.raises(RunFailed, match="no space left"):
        on_main(accelerator, lambda: fail(OSError("no space left")))
    forget_accelerator(accelerator)


def test_trackers_are_ended_once_when_the_accelerator_is_forgotten(tmp_path, monkeypatch):
    accelerator, ended = make_accelerator(a_config(tmp_path)), []
    monkeypatch.setattr(accelerator, "end_training", lambda: ended.append(1))
    forget_accelerator(accelerator)
    forget_accelerator(accelerator)
    assert ended == [1]


def test_less_memory_is_half_the_batch_and_more_micro_steps(tmp_path):
    said = out_of_memory_text(a_config(tmp_path, train_batch_size=4, gradient_accumulation_steps=3))
    assert "--train_batch_size 4; try --train_batch_size 2 --gradient_accumulation_steps 6, " in said
    assert "--mixed_precision bf16" in out_of_memory_text(a_config(tmp_path, train_batch_size=1)), "no half of one"


# --- precision ---


NETWORKS = ("unet", "vae", "text_encoder")


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
AT_WORK = {Phase.CLASS_IMAGES: {"unet"}, Phase.ENCODE: {"vae", "text_encoder"}, Phase.TRAIN: {"unet"},
           Phase.LOOK: {"unet"}}  # fmt: skip


@pytest.mark.parametrize("phase, dtype", [(Phase.CLASS_IMAGES, torch.float16), (Phase.ENCODE, torch.bfloat16),
                                          (Phase.LOOK, torch.bfloat16)])  # fmt: skip
def test_on_an_accelerator_what_is_only_read_has_weights_in_half_and_computes_in_them(phase, dtype):
    plan = PrecisionPlan(GPU, "bf16", "fp16", frozenset({"unet"}))
    for name in NETWORKS:
        keeps = phase == Phase.ENCODE and name == "unet"  # it is trained next, and must not be rounded before
        expected = torch.float32 if keeps else dtype
        assert plan.placement(phase, name) == (GPU, expected, None), name


@pytest.mark.parametrize("phase", Phase)
def test_in_full_precision_nothing_is_halved_anywhere(phase):
    for device in (GPU, CPU):
        plan = PrecisionPlan(device, "no", "fp32", frozenset({"unet"}))
        assert {plan.placement(phase, name) for name in NETWORKS} == {(device, torch.float32, None)}


@pytest.mark.parametrize("phase, compute", [
    (Phase.CLASS_IMAGES, torch.float16), (Phase.ENCODE, None), (Phase.TRAIN, torch.bfloat16),
    (Phase.LOOK, torch.bfloat16), (Phase.WRITE, None),
])  # fmt: skip
def test_on_a_cpu_weights_stay_in_32_bits(phase, compute):
    plan = PrecisionPlan(CPU, "bf16", "fp16", frozenset({"unet"}))
    assert {plan.placement(phase, name) for name in NETWORKS} == {(CPU, torch.float32, compute)}


@pytest.mark.parametrize("trained, expected", [
    ({"unet"}, ["32", "16", "16"]), ({"unet", "text_encoder"}, ["32", "16", "32"]), (set(), ["16", "16", "16"]),
])  # fmt: skip
def test_what_learns_stays_in_32_bits_and_the_rest_is_halved_on_an_accelerator(trained, expected):
    plan = PrecisionPlan(GPU, "bf16", trained=frozenset(trained))
    found = [plan.placement(Phase.TRAIN, name) for name in NETWORKS]
    assert [str(8 * each.weights.itemsize) for each in found] == expected
    assert {each.autocast for each in found} == {torch.bfloat16}


@pytest.mark.parametrize("phase", Phase)
def test_networks_that_have_nothing_to_do_wait_on_the_cpu(phase):
    plan = PrecisionPlan(GPU, "fp16", "fp16", frozenset({"unet"}), AT_WORK)
    there = {name for name in NETWORKS if plan.placement(phase, name).device == GPU}
    assert there == AT_WORK.get(phase, set())


def test_what_leaves_the_device_leaves_before_anything_comes():
    """Else both would have to fit for a moment. `meta` stands for the device; what lies there has no memory."""
    plan = PrecisionPlan(torch.device("meta"), "fp16", at_work={Phase.TRAIN: {"a", "c"}})
    moved = []

    class Noting(torch.nn.Linear):
        def _apply(self, *args, **kwargs):
            moved.append(self)
            return super()._apply(*args, **kwargs)

    networks = {name: Noting(2, 2) for name in "abc"}
    plan.place(Phase.TRAIN, networks)
    assert moved == [networks["b"], networks["a"], networks["c"]]
    assert [each.weight.device.type for each in networks.values()] == ["meta", "cpu", "meta"]


def test_a_plan_is_carried_out():
    plan = PrecisionPlan(torch.device("meta"), "fp16", trained=frozenset({"unet"}))
    networks = {"unet": torch.nn.Linear(2, 2), "vae": torch.nn.Linear(2, 2)}
    plan.place(Phase.TRAIN, networks)
    assert networks["unet"].weight.dtype == torch.float32 and networks["vae"].weight.dtype == torch.float16
    assert networks["vae"].weight.device.type == "meta"


def test_autocast_is_the_plans():
    plan = PrecisionPlan(torch.device("cpu"), "bf16")
    layer, inputs = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with plan.autocast(Phase.TRAIN):
        assert layer(inputs).dtype == torch.bfloat16
    with plan.autocast(Phase.ENCODE):
        assert layer(inputs).dtype == torch.float32


def test_drawing_and_class_images_have_defaults_by_device():
    assert drawing_precision(None) == (torch.device("cpu"), torch.float32)
    assert drawing_precision("bf16") == (torch.device("cpu"), torch.bfloat16)
    by_device = {each: generation_precision(None, each) for each in ("cuda", "xpu", "cpu", "mps")}
    assert by_device == {"cuda": "fp16", "xpu": "fp16", "cpu": "fp32", "mps": "fp32"}
    assert generation_precision("bf16", "cpu") == "bf16"


# --- data ---


def test_sets_of_pictures_are_held_data_and_others_are_not():
    pictures = ImageSet(np.zeros((3, 3, 2, 2), np.uint8))
    assert isinstance(pictures, HeldData) and fingerprint_of(pictures) == pictures.fingerprint
    others = TensorDataset(torch.zeros(3))
    assert not isinstance(others, HeldData) and fingerprint_of(others) is None
    loader = DataLoader(pictures, 2)
    assert repeatable(loader, 0) is loader, "held data have no random transforms"


@pytest.mark.parametrize("batching", [
    {"batch_size": 4, "drop_last": True, "shuffle": True}, {"batch_size": 4}, {"batch_size": None},
    {"batch_sampler": [[0, 3], [1]]},
])  # fmt: skip
def test_a_loader_with_repeatable_transforms_is_otherwise_the_users(batching):
    loader = DataLoader(list(range(10)), **batching, collate_fn=tuple if "batch_sampler" in batching else None,
                        num_workers=2, worker_init_fn=print)  # fmt: skip
    made = repeatable(loader, seed=3)
    assert made.dataset.dataset is loader.dataset and made.dataset.seed == 3
    for name in ("batch_size", "drop_last", "sampler", "collate_fn", "num_workers", "worker_init_fn", "pin_memory"):
        if name != "sampler" or "batch_sampler" not in batching:
            assert getattr(made, name) == getattr(loader, name), name
    assert ("batch_sampler" not in batching) or made.batch_sampler is loader.batch_sampler
    assert len(made) == len(loader)


class Noted:
    """Held data that notes where it is sent."""

    fingerprint = "x"

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.places = nbytes, []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index

    def to(self, device) -> None:
        self.places.append(str(device))


@pytest.mark.parametrize("nbytes, workers, device, expected", [
    (10, 0, "meta", ["meta", "cpu"]), (2**31, 0, "meta", []), (10, 1, "meta", []), (10, 0, "cpu", []),
])  # fmt: skip
def test_small_held_data_lie_on_the_device_while_the_run_lasts(nbytes, workers, device, expected):
    data = Noted(nbytes)
    with held_on(torch.device(device), DataLoader(data, 2, num_workers=workers)):
        assert data.places == expected[:1]
    assert data.places == expected


def test_held_data_come_back_from_the_device_also_after_an_error():
    data = Noted(10)
    with pytest.raises(ZeroDivisionError), held_on(torch.device("meta"), DataLoader(data, 2)):
        raise ZeroDivisionError
    assert data.places == ["meta", "cpu"]


@pytest.mark.parametrize("length, batch, dropping, processes", [
    (10, 3, False, 1), (10, 3, False, 2), (10, 3, False, 3), (10, 3, True, 1), (10, 3, True, 2), (12, 3, False, 4),
])  # fmt: skip
def test_batches_are_counted_as_accelerate_will_share_them_out(length, batch, dropping, processes):
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(TensorDataset(torch.arange(length)), batch, drop_last=dropping)
    shared = prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)
    assert count_batches(loader, processes) == len(shared)


def test_the_global_generators_follow_the_seed_and_so_does_the_order_of_the_data(tmp_path):
    accelerator = make_accelerator(a_config(tmp_path, seed=1))
    seed_all(5, accelerator)
    first = torch.rand(3)
    assert accelerator.dataloader_config.data_seed == order_seed(5)
    seed_all(5, accelerator)
    assert torch.equal(torch.rand(3), first)
    forget_accelerator(accelerator)


def test_the_global_generators_of_two_processes_differ_and_the_order_of_their_data_does_not():
    drawn, orders = [], []
    for rank in (0, 1):
        process = OneOfTwo(process_index=rank)
        seed_all(5, process)
        drawn.append(torch.rand(1).item())
        orders.append(process.dataloader_config.data_seed)
    assert drawn[0] != drawn[1] and orders == [order_seed(5)] * 2


def test_dropout_does_not_repeat_the_noise_of_a_run(tmp_path):
    accelerator = make_accelerator(a_config(tmp_path, seed=5))
    seed_all(5, accelerator)
    dropped, noise = torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(mixed_seed(5, 0)))
    assert not torch.equal(dropped, noise)
    forget_accelerator(accelerator)


def order_of(tmp_path, seed: int, epoch: int) -> list[int]:
    accelerator = make_accelerator(a_config(tmp_path, seed=seed))
    loader = accelerator.prepare(DataLoader(torch.arange(32), batch_size=4, shuffle=True))
    loader.set_epoch(epoch)
    order = [number for batch in loader for number in batch.tolist()]
    forget_accelerator(accelerator)
    return order


def test_the_next_epoch_has_not_the_order_of_the_next_seed(tmp_path):
    assert order_of(tmp_path, 3, 1) != order_of(tmp_path, 4, 0)
    assert order_of(tmp_path, 3, 1) == order_of(tmp_path, 3, 1) != order_of(tmp_path, 3, 0)


def test_a_run_takes_its_hooks_back(tmp_path):
    accelerator = make_accelerator(a_config(tmp_path))
    for name in ("first", "second"):
        line, config = Line(), a_config(tmp_path / name, max_train_steps=1, train_batch_size=2)
        optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
        with start_run(config, {"line": line}, optimizer, DataLoader(TensorDataset(torch.ones(4, 2)), 2),
                       accelerator=accelerator) as run:  # fmt: skip
            assert len(accelerator._save_model_state_pre_hook) == len(accelerator._load_model_state_pre_hook) == 1
            run.save_checkpoint()
    assert not accelerator._save_model_state_pre_hook and not accelerator._load_model_state_pre_hook
    forget_accelerator(accelerator)


PATIENT = """
import json, sys
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import PartialState
from diffusion_lessons.engine.commands import launch
from diffusion_lessons.engine.config import RunConfig
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator

def timeout():
    group = torch.distributed.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

def wait(folder, early):
    if early:
        PartialState(cpu=True)
        before = timeout()
    accelerator = make_accelerator(RunConfig(output_dir=folder, report_to="none"))
    note = {"processes": accelerator.num_processes, "timeout": timeout(), "before": before if early else None}
    Path(folder, f"{early}-{accelerator.process_index}.json").write_text(json.dumps(note))

for early in (False, True):
    launch(wait, (sys.argv[1], early), num_processes=2)
"""


def test_processes_wait_a_day_for_each_other_whoever_formed_the_group(tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    done = subprocess.run([sys.executable, str(tmp_path / "patient.py"), str(tmp_path)], capture_output=True, text=True,
                          timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for early in (False, True):
        for rank in range(2):
            note = json.loads((tmp_path / f"{early}-{rank}.json").read_text())
            assert note["processes"] == 2 and note["timeout"] == 24 * 3600
            assert note["before"] == (1800 if early else None)
