"""DeepSpeed: what is refused, the file that starts it, and real runs under it on the CPU: counted, resumed, opened."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from dreambooth_runs import CLASS, SUBJECT, class_folder, dreambooth_words, subject_folder, without_our_package
from overlays import environment, overlay
from safetensors.torch import load_file

from diffusion_lessons import miniature
from diffusion_lessons.butterflies import command as butterflies
from diffusion_lessons.dreambooth import inference, training
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.engine import deepspeed
from diffusion_lessons.engine.commands import RunFailed
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import check_processes, make_accelerator

FIELDS = {
    "pretrained_model_name_or_path": "miniature",
    "instance_data_dir": "meadow",
    "instance_prompt": SUBJECT,
    "mixed_precision": "bf16",
    "report_to": "none",
}


@pytest.fixture
def under_deepspeed(monkeypatch):
    """As `accelerate launch` would have started this process."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


# --- the file ---


def write(file: Path, *more: str) -> int:
    return training.main(dreambooth_words("meadow", file.parent / "run", "--write_deepspeed_config", str(file), *more))


def test_the_command_writes_the_file_and_says_how_to_start(tmp_path, capsys):
    file = tmp_path / "ds.yaml"
    assert write(file, "--mixed_precision", "bf16", "--num_processes", "2") == 0
    said, content = capsys.readouterr().out, yaml.safe_load(file.read_text())
    assert f"accelerate launch --config_file {file} -m diffusion_lessons.dreambooth.training" in said
    chosen = [content[name] for name in ("distributed_type", "mixed_precision", "num_processes")]
    assert chosen == ["DEEPSPEED", "bf16", 2]
    assert content["deepspeed_config"] == {
        "zero_stage": 2,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "zero3_init_flag": False,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    assert not (tmp_path / "run").exists(), "nothing else was done"


def test_the_butterflies_write_it_too(tmp_path, capsys):
    file = tmp_path / "ds.yaml"
    assert butterflies.main(["--preset", "quick", "--write_deepspeed_config", str(file)]) == 0
    assert "-m diffusion_lessons.butterflies …" in capsys.readouterr().out and file.is_file()
    assert importlib.util.find_spec("diffusion_lessons.butterflies.__main__"), "which starts the command"


def test_without_a_choice_it_is_bf16_on_a_cpu_and_fp16_on_a_gpu(monkeypatch):
    for device, precision in (("cpu", "bf16"), ("cuda", "fp16")):
        monkeypatch.setattr(deepspeed, "default_device", lambda device=device: torch.device(device))
        assert yaml.safe_load(deepspeed.deepspeed_config_text())["mixed_precision"] == precision


def test_another_file_is_never_written_over(tmp_path, capsys):
    file = tmp_path / "ds.yaml"
    file.write_text("mine")
    assert write(file) == 2
    assert f"--write_deepspeed_config {file}: exists" in capsys.readouterr().err and file.read_text() == "mine"


def test_a_folder_that_is_not_there_is_said(tmp_path, capsys):
    assert write(tmp_path / "no" / "ds.yaml") == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def test_what_is_no_python_travels_in_the_wheel_too():
    checkout = Path(deepspeed.__file__).resolve().parent.parent.parent
    lines = (line.split() for line in (checkout / "MANIFEST.in").read_text().splitlines())
    named = {word for kind, *words in lines for word in words if kind in ("include", "recursive-include")}
    package = checkout / "diffusion_lessons"
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "engine" / "deepspeed.yaml" in others
    left_out = [path for path in others if not {str(each.relative_to(checkout)) for each in (path, *path.parents)
                                                if each.is_relative_to(checkout)} & named]  # fmt: skip
    assert left_out == []


# --- what is refused ---


@pytest.mark.parametrize("name", ["use_8bit_adam", "use_ema", "full_bf16", "fused_backward_pass"])
def test_what_does_not_go_together_is_refused_before_deepspeed_is_looked_for(name, under_deepspeed):
    config = DreamBoothConfig(**FIELDS).resolve()
    setattr(config, name, True)
    with pytest.raises(InputError, match=f"--{name} True: does not go with DeepSpeed"):
        deepspeed.deepspeed_plugin(config)


def test_a_missing_deepspeed_is_said_with_the_install_command(under_deepspeed, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion_lessons\[deepspeed\]'"):
        make_accelerator(DreamBoothConfig(**FIELDS))


def test_a_broken_deepspeed_is_said_with_what_it_raised(under_deepspeed, monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('libcuda is of another world')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(InputError, match="cannot be imported .RuntimeError: libcuda is of another world"):
        deepspeed.import_deepspeed()


class CUDAMismatchException(Exception):
    """As DeepSpeed names it."""


def stand_in(monkeypatch, mismatch: Exception | None = None, loading: Exception | None = None) -> None:
    """DeepSpeed's builders, which raise what they are told to."""

    def tell(error: Exception | None) -> None:
        if error is not None:
            raise error

    builders = SimpleNamespace(
        builder=SimpleNamespace(assert_no_cuda_mismatch=lambda name: tell(mismatch)),
        CPUAdamBuilder=lambda: SimpleNamespace(load=lambda: tell(loading)),
    )
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.ops", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)


def test_a_toolkit_of_another_version_is_refused_on_a_gpu_alone(monkeypatch):
    mismatch = CUDAMismatchException(">- DeepSpeed Op Builder: Installed CUDA version 12.1 does not match")
    stand_in(monkeypatch, mismatch)
    deepspeed.compile_cpu_adam()  # on a CPU nobody asks
    monkeypatch.setattr(deepspeed, "default_device", lambda: torch.device("cuda"))
    with pytest.raises(InputError, match="12.1 does not match.*set CUDA_HOME to a toolkit"):
        deepspeed.compile_cpu_adam()


def test_what_cannot_be_compiled_is_one_line_with_the_remedy(monkeypatch):
    stand_in(monkeypatch, loading=RuntimeError("Unable to JIT load the cpu_adam op\ndue to ninja not being installed."))
    with pytest.raises(InputError, match="ninja not being installed.*install a C.. compiler and ninja") as raised:
        deepspeed.compile_cpu_adam()
    assert "\n" not in str(raised.value)


def test_processes_are_those_of_accelerate_launch(under_deepspeed):
    check_processes(1)
    with pytest.raises(InputError, match="--num_processes 2: under DeepSpeed"):
        check_processes(2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_stage 3: only 2"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "optimizer: the run has one of its own"),
    ],
)
def test_a_deepspeed_config_of_another_kind_is_refused(content, said):
    with pytest.raises(InputError, match=said):
        deepspeed.settle_deepspeed(content, DreamBoothConfig(**FIELDS))


def test_the_flags_of_the_run_count_and_a_contradiction_is_said(capsys):
    content = {"zero_optimization": {"stage": 2, "allgather_bucket_size": 7}, "gradient_clipping": 3.0}
    deepspeed.settle_deepspeed(content, DreamBoothConfig(**FIELDS, max_grad_norm=0.5, train_batch_size=2))
    assert (content["gradient_clipping"], content["train_micro_batch_size_per_gpu"]) == (0.5, 2)
    assert content["zero_optimization"]["allgather_bucket_size"] == 7, "a choice that nobody contradicts"
    said = "note: --max_grad_norm 0.5 counts, and not gradient_clipping 3.0 of DeepSpeed's config"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["Current loss scale already at minimum - cannot decrease", "something else"])
def test_fp16_that_overflows_at_every_scale_is_said(text):
    def backward(loss, **_):
        raise Exception(text)  # as DeepSpeed does

    line = torch.nn.Linear(2, 2)
    accelerator = SimpleNamespace(backward=backward)
    engine = deepspeed.ZeroEngine(accelerator, {"line": line}, torch.optim.AdamW(line.parameters()))
    with pytest.raises(Exception, match="fp16 overflowed at every scale" if "minimum" in text else text) as raised:
        engine.backward(torch.zeros(()))
    assert isinstance(raised.value, RunFailed) is ("minimum" in text)


# --- real runs ---


GUIDE = dict(
    train_batch_size=1,
    sample_batch_size=1,
    gradient_accumulation_steps=1,
    gradient_checkpointing=True,
    with_prior_preservation=True,
    prior_loss_weight=1.0,
    class_prompt=CLASS,
    num_class_images=3,
    learning_rate=5e-6,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    mixed_precision="bf16",  # fp16 on a GPU
    report_to="tensorboard",
    logging_steps=1,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the pictures of subject and class, and the files for `accelerate launch`."""
    folder = tmp_path_factory.mktemp("deepspeed")
    subject_folder(folder / "dog", 3)
    class_folder(folder / "class", 3)
    for processes in (1, 2):
        file = folder / f"ds{processes}.yaml"
        deepspeed.write_deepspeed_config(file, "diffusion_lessons.dreambooth.training", "bf16", processes)
    return folder


def launch(place: Path, words: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    """What `accelerate launch` does with these words, under DeepSpeed."""
    file = ["--config_file", str(place / f"ds{processes}.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *file]
    built = overlay("ds") / ".extensions"  # what is compiled once
    env = environment("ds", TORCH_EXTENSIONS_DIR=str(built), OMP_NUM_THREADS="1", MAX_JOBS="1")
    env["PATH"] = f"{overlay('ds') / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=1200, env=env)


def launched(place: Path, name: str, *flags: str, processes: int = 1, **fields) -> subprocess.CompletedProcess:
    """The guide's 8 GB command under `accelerate launch`, with only model, folders, resolution and steps changed."""
    changed = GUIDE | {"class_data_dir": place / "class"} | fields
    words = dreambooth_words(place / "dog", place / name, *flags, **changed)
    return launch(place, ["-m", "diffusion_lessons.dreambooth.training", *words], processes)


def finished(place: Path, name: str, *flags: str, **fields) -> Path:
    done = launched(place, name, *flags, **fields)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return place / name


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for logs in (path for path in (folder / "logs").iterdir() if path.is_dir()):
        events = EventAccumulator(str(logs)).Reload()
        if name in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(name)}
    return found


def stopped_copy(folder: Path, name: str, step: int = 2) -> str:
    """A copy of a run, of that name, as it was when it had been stopped after so many steps; returns the name."""
    copy = folder.with_name(name)
    shutil.copytree(folder / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    shutil.copy(folder / "training_config.json", copy)
    return name


def weights_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def assert_same_checkpoint(one: Path, other: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        ours, theirs = weights_of(one, part), weights_of(other, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (one, other)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    for index, state in states[0].items():
        assert all(torch.equal(state[key], states[1][index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.fixture(scope="module")
def eight(place) -> Path:
    return finished(place, "eight", max_train_steps=4, checkpointing_steps=2)


@pytest.fixture(scope="module")
def plain(place) -> Path:
    words = GUIDE | {"class_data_dir": place / "class", "max_train_steps": 4, "checkpointing_steps": 2}
    assert training.main(dreambooth_words(place / "dog", place / "plain", **words)) == 0
    return place / "plain"


@pytest.mark.slow
def test_the_guides_8_gb_command_leaves_an_ordinary_pipeline(eight, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # plain diffusers, alone
    about = json.loads((eight / "checkpoint-4" / "progress.json").read_text())
    assert about["num_processes"] == 1 and about["step"] == 4
    code = (
        "from diffusers import StableDiffusionPipeline as P\n"
        "p = P.from_pretrained('eight')\nprint(p.unet.dtype, p('a', num_inference_steps=1).images[0].size)"
    )
    assert "torch.float32 (64, 64)" in without_our_package(code, eight.parent)


@pytest.mark.slow
def test_its_losses_are_those_of_the_plain_trainer(eight, plain):
    ours, theirs = scalars(eight, "train/loss"), scalars(plain, "train/loss")
    assert list(ours) == list(theirs) == [1, 2, 3, 4]
    assert [ours[step] for step in ours] == pytest.approx([theirs[step] for step in theirs], rel=0.01)


@pytest.mark.slow
def test_its_checkpoint_holds_32_bits_and_the_plain_trainers_files(eight, plain):
    names = [sorted(path.name for path in (folder / "checkpoint-2").iterdir()) for folder in (eight, plain)]
    assert names[0] == names[1]
    ours, theirs = (weights_of(folder / "checkpoint-2", "unet") for folder in (eight, plain))
    assert {each.dtype for each in ours.values()} == {torch.float32}
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert 0 < apart < 4.1 * 5e-6, "two steps of 5e-6 in either direction at most"


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(place, eight):
    again = finished(
        place, stopped_copy(eight, "again"), "--resume_from_checkpoint=latest", max_train_steps=4, checkpointing_steps=2
    )
    assert_same_checkpoint(eight / "checkpoint-4", again / "checkpoint-4", ("unet",))
    assert scalars(again, "train/loss") == {step: scalars(eight, "train/loss")[step] for step in (3, 4)}


TWO = dict(
    processes=2,
    train_text_encoder=True,
    with_prior_preservation=None,
    prior_loss_weight=None,
    class_prompt=None,
    num_class_images=None,
    class_data_dir=None,
    gradient_accumulation_steps=2,
    lr_scheduler="linear",
    max_train_steps=4,
    checkpointing_steps=2,
    validation_prompt=SUBJECT,
    validation_steps=2,
    num_validation_images=1,
    learning_rate=1e-4,
)


@pytest.fixture(scope="module")
def two(place) -> Path:
    subject_folder(place / "five", 5)  # three batches on each process: a group of two micro-steps, and one of one
    return finished(place, "two", instance_data_dir=place / "five", **TWO)


@pytest.mark.slow
def test_two_processes_and_a_trained_text_encoder(two):
    about = json.loads((two / "checkpoint-4" / "progress.json").read_text())
    assert about["num_processes"] == 2 and about["steps_per_epoch"] == 2
    assert {path.name for path in (two / "checkpoint-4").glob("generator_*")} == {
        "generator_0.safetensors",
        "generator_1.safetensors",
    }
    rates = scalars(two, "train/learning_rate")
    assert rates[4] == pytest.approx(0, abs=1e-12) and rates[2] == pytest.approx(5e-5)
    read = [weights_of(folder, "text_encoder") for folder in (miniature.path(), two)]
    before, after = ({name.removeprefix("text_model."): each.float() for name, each in state.items()} for state in read)
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert 1e-4 < moved < 5e-4, "four steps of a falling rate from 1e-4"
    pipeline = StableDiffusionPipeline.from_pretrained(two)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32


@pytest.mark.slow
def test_two_processes_resume_exactly(place, two):
    again = finished(
        place,
        stopped_copy(two, "two-again"),
        "--resume_from_checkpoint=latest",
        instance_data_dir=place / "five",
        **TWO,
    )
    assert json.loads((again / "checkpoint-4" / "progress.json").read_text())["num_processes"] == 2
    assert_same_checkpoint(two / "checkpoint-4", again / "checkpoint-4", ("unet", "text_encoder"))


@pytest.mark.slow
def test_a_run_goes_on_without_deepspeed_and_with_it(place, eight, plain, capsys):
    stopped_copy(eight, "left")
    stopped_copy(plain, "joined")
    words = GUIDE | {"class_data_dir": place / "class", "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    assert training.main(dreambooth_words(place / "dog", place / "left", **words)) == 0
    assert "resuming checkpoint-2" in capsys.readouterr().out
    finished(place, "joined", "--resume_from_checkpoint=latest", max_train_steps=4)
    for name, other in (("left", eight), ("joined", plain)):
        files = [folder / "checkpoint-4" / "optimizer.bin" for folder in (place / name, other)]
        states = [torch.load(file, weights_only=True)["state"] for file in files]
        assert {float(each["step"]) for each in states[0].values()} == {4}
        ours, theirs = (torch.cat([each["exp_avg"].flatten() for each in state.values()]) for state in states)
        apart = float((ours - theirs).norm() / theirs.norm())
        assert apart < 0.05, f"{name}: the moments went on from those of the checkpoint"


@pytest.mark.slow
def test_pictures_are_drawn_from_its_checkpoint(eight, tmp_path):
    words = ["--checkpoint", str(eight / "checkpoint-2"), "--prompt", CLASS, "--num_images", "1"]
    assert inference.main([*words, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "drawn")]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


@pytest.mark.slow
def test_adapters_are_trained_under_it_too(place):
    fields = dict.fromkeys(("with_prior_preservation", "prior_loss_weight", "class_prompt"))
    folder = finished(place, "lora", "--lora", max_train_steps=1, num_class_images=None, class_data_dir=None, **fields)
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    assert any(each.abs().max() > 0 for name, each in state.items() if "lora_B" in name or "up" in name)
    assert {each.dtype for each in state.values()} == {torch.float32}


@pytest.mark.slow
def test_a_dry_run_measures_under_it(place):
    done = launched(place, "dry", "--dry_run")
    assert done.returncode == 0 and "dry run: 3 pictures of the subject" in done.stdout, done.stderr[-2000:]
    assert not (place / "dry").exists()


A_LINE = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import sys
from pathlib import Path
import torch
from deepspeed.accelerator import get_accelerator
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.engine import devices
from diffusion_lessons.engine.optimization import TrainState, make_optimizer

config = DreamBoothConfig(
    pretrained_model_name_or_path="miniature", instance_data_dir="meadow", instance_prompt="a butterfly",
    gradient_accumulation_steps=2, lr_scheduler="linear", lr_warmup_steps=0, learning_rate=1e-2, train_batch_size=1,
    max_grad_norm=0.5, mixed_precision="no", report_to="none")
torch.manual_seed(0)
line, inputs = torch.nn.Linear(4, 3), torch.randn(8, 4)
line.config = {}


def open_state():
    accelerator = devices.make_accelerator(config)
    return TrainState(accelerator, config, {"line": line}, make_optimizer(line.parameters(), config), 4)


def loss_of(model, number, factor=1.0):
    return (model(inputs + number) - 1).square().mean() * factor
"""
COUNTING = (
    A_LINE
    + """
other = torch.nn.Linear(4, 3)
other.load_state_dict(line.state_dict())
optimizer = torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=config.adam_weight_decay)
state, micro = open_state(), 0
for step, group in enumerate([2, 1, 2]):  # the second is the last of an epoch
    for left in range(group, 0, -1):
        with state.accumulate(left if group == 1 else None):
            state.backward(loss_of(state.prepared["line"], micro))
            loss = state.step()
        theirs = loss_of(other, micro) / group
        theirs.backward()
        micro += 1
    for options in optimizer.param_groups:
        options["lr"] = 1e-2 * (1 - step / 4)
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    assert norm > 0.5, "there is something to clip"
    optimizer.step()
    optimizer.zero_grad()
    with state.in_full():
        torch.testing.assert_close(line.weight, other.weight, rtol=1e-5, atol=1e-6)
assert state.schedule.get_last_lr() == [1e-2 * (1 - 3 / 4)] and state.skipped == 0
print("counted", state.accelerator.num_processes)
"""
)
SCALING = (
    A_LINE
    + """
kind = type(get_accelerator())
kind.is_fp16_supported = lambda self: True  # it computes well enough for a line
kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
devices.choose_precision = lambda wanted, device: "fp16"
state = open_state()
skipped = []
for factor in (1e3, 1.0, 1e6, 1.0, 1.0):
    for micro in range(2):
        with state.accumulate():
            state.backward(loss_of(state.prepared["line"], 0, factor))
            state.step()
    skipped.append(state.skipped)
assert line.weight.dtype == torch.float16 and skipped[0] == 1 and skipped[-1] == skipped[-2] < 5, skipped
done = 5 - state.skipped
assert state.schedule.get_last_lr() == [1e-2 * (1 - done / 4)], "a step that was skipped does not count"
moments = state.zero.optimizer_state()
assert moments["state"][0]["step"] == done
state.zero.save(moments, Path(sys.argv[1]))
scaler = vars(state.zero.zero.loss_scaler)
before = dict(scaler)
scaler.update(cur_scale=1.0, cur_iter=0)
state.zero.load(Path(sys.argv[1]))
assert scaler == before and scaler["cur_scale"] < 65536
print("scaled")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "said"), [(COUNTING, "counted 1"), (SCALING, "scaled")], ids=["counting", "scaling"])
def test_a_line_under_it(place, tmp_path, code, said):
    """Groups that are not whole, clipping and the rate, against plain AdamW; and steps that fp16 leaves out."""
    (tmp_path / "line.py").write_text(code)
    done = launch(place, [str(tmp_path / "line.py"), str(tmp_path)])
    assert done.returncode == 0 and said in done.stdout, done.stderr[-3000:]
