"""Memory: what is said when it runs out, in each phase; whose peak is reported; what an estimate says it contains."""

import pytest
import torch
from dreambooth_runs import class_folder, dreambooth_words, prior_words, subject_folder
from runs import words
from torch.utils.data import DataLoader, TensorDataset

from diffusion_lessons.butterflies import training as butterflies
from diffusion_lessons.butterflies.command import main as train_butterflies
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.dreambooth import class_images, loop
from diffusion_lessons.dreambooth import training as dreambooth
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.engine.commands import RunFailed
from diffusion_lessons.engine.config import RunConfig
from diffusion_lessons.engine.devices import (
    forget_accelerator,
    is_out_of_memory,
    make_accelerator,
    on_main,
    out_of_memory_named,
    out_of_memory_text,
    smaller_batch,
)
from diffusion_lessons.engine.optimization import memory_text, training_memory
from diffusion_lessons.engine.precision import Phase
from diffusion_lessons.engine.run import start_run
from diffusion_lessons.engine.tracking import ProgressMeter

# --- advice ---


@pytest.mark.parametrize("batch", range(2, 40))
@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
def test_a_smaller_batch_takes_as_many_pictures_in_a_step(batch, accumulation):
    half, times = smaller_batch(batch, accumulation)
    assert half * times == batch * accumulation and half < batch and half <= (batch + 1) // 2


def butterflies_config(**fields) -> TrainingConfig:
    return TrainingConfig(**({"mixed_precision": "no", "report_to": "none"} | fields))


def subject_config(**fields) -> DreamBoothConfig:
    chosen = dict(pretrained_model_name_or_path="miniature", instance_data_dir="meadow", report_to="none",
                  instance_prompt="a photo of a sks butterfly", mixed_precision="bf16", train_batch_size=1)  # fmt: skip
    return DreamBoothConfig(**(chosen | fields))


PRIOR = dict(with_prior_preservation=True, class_data_dir="class", class_prompt="a photo of a butterfly")


@pytest.mark.parametrize("config, phase, remedies", [
    (butterflies_config(), Phase.TRAIN, ["train_batch_size 8 --gradient_accumulation_steps 2", "mixed_precision bf16"]),
    (butterflies_config(mixed_precision="bf16", train_batch_size=5, gradient_accumulation_steps=3), Phase.TRAIN,
     ["train_batch_size 3 --gradient_accumulation_steps 5"]),
    (butterflies_config(train_batch_size=1), Phase.TRAIN, ["mixed_precision bf16", "use_8bit_adam", "image_size 96"]),
    (butterflies_config(train_batch_size=1, use_8bit_adam=True, image_size=32), Phase.TRAIN, ["mixed_precision bf16"]),
    (butterflies_config(), Phase.LOOK, ["eval_batch_size 8", "image_size 96"]),
    (butterflies_config(eval_batch_size=1, image_size=32), Phase.LOOK, []),
    (subject_config(train_batch_size=4), Phase.TRAIN,
     ["train_batch_size 2 --gradient_accumulation_steps 2", "gradient_checkpointing"]),
    (subject_config(), Phase.TRAIN, ["gradient_checkpointing", "use_8bit_adam", "lora", "resolution 384"]),
    (subject_config(gradient_checkpointing=True, use_8bit_adam=True), Phase.TRAIN, ["lora", "resolution 384"]),
    (subject_config(gradient_checkpointing=True, use_8bit_adam=True, train_text_encoder=True, use_ema=True),
     Phase.TRAIN, ["lora", "resolution 384", "no --train_text_encoder", "no --use_ema"]),
    (subject_config(lora=True), Phase.TRAIN, ["gradient_checkpointing", "resolution 384"]),
    (subject_config(lora=True, gradient_checkpointing=True, resolution=768), Phase.TRAIN, ["resolution 576"]),
    (subject_config(), Phase.LOOK, ["num_validation_images 2", "resolution 384"]),
    (subject_config(), Phase.ENCODE, ["resolution 384"]),
    (subject_config(**PRIOR), Phase.CLASS_IMAGES, ["sample_batch_size 2"]),
    (subject_config(**PRIOR, sample_batch_size=1, prior_generation_precision="fp32"), Phase.CLASS_IMAGES,
     ["prior_generation_precision fp16"]),
    (subject_config(**PRIOR, sample_batch_size=1), Phase.CLASS_IMAGES, []),
])  # fmt: skip
def test_what_is_advised_is_not_set_yet_and_helps_there(config, phase, remedies):
    said = out_of_memory_text(config, phase)
    offered = said.partition("; try ")[2].partition("; or several")[0].split(", or ") if remedies else []
    assert [each.removeprefix("--") for each in offered] == remedies
    assert remedies or said.endswith("nothing is left to lower: take a smaller model, or a device with more memory")


def test_a_pipeline_that_is_tuned_further_keeps_its_size():
    config = butterflies_config(pretrained_model_name_or_path="google/ddpm-cat-256", image_size=256, train_batch_size=1)
    assert "image_size" not in out_of_memory_text(config)


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 9 bytes. Error code 12 (Cannot allocate memory)"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB, max allowed: 9.07 GB)."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (MemoryError(), True), (RuntimeError("shapes do not match"), False), (ValueError("out of memory"), False),
    (RunFailed("out of memory while samples were drawn; try --eval_batch_size 1"), False),
])  # fmt: skip
def test_memory_runs_out_under_several_names(error, expected):
    assert is_out_of_memory(error) is expected
    naming = out_of_memory_named(butterflies_config(), Phase.LOOK, lambda: "Go on there")
    with pytest.raises(RunFailed if expected else type(error)) as caught, naming:
        raise error
    assert (caught.value is error) is not expected
    if expected:
        said = str(caught.value)
        assert said.startswith("out of memory while samples") and said.endswith(". Go on there")


def test_what_runs_out_on_the_main_process_is_named_by_whoever_knows_the_phase(tmp_path):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory")

    accelerator = make_accelerator(RunConfig(output_dir=str(tmp_path), report_to="none"))
    with pytest.raises(torch.OutOfMemoryError):
        on_main(accelerator, exhausted)
    forget_accelerator(accelerator)


def exhausted(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you")


def test_a_grid_that_does_not_fit_is_no_matter_of_the_training_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(butterflies, "evaluate", exhausted)
    assert train_butterflies(words(tmp_path / "run", max_train_steps=2)) == 1
    said = capsys.readouterr().err
    assert "out of memory while samples were drawn; try --eval_batch_size 1. Last good checkpoint: checkpoint-2" in said
    assert "train_batch_size" not in said and "Traceback" not in said


@pytest.mark.parametrize("module, name, said", [
    (class_images, "draw", "while class images were drawn; try --sample_batch_size 2"),
    (dreambooth, "load_subject", "while pictures and prompts were encoded; nothing is left"),
    (loop, "draw", "while samples were drawn; try --num_validation_images 2. "),
    (loop, "noise_batch", "with --train_batch_size 1; try --gradient_checkpointing, or --mixed_precision bf16, or "),
])  # fmt: skip
def test_each_phase_of_dreambooth_has_advice_of_its_own(module, name, said, tmp_path, capsys, monkeypatch):
    subject_folder(tmp_path / "subject")
    class_folder(tmp_path / "class", 2)
    monkeypatch.setattr(module, name, exhausted)
    fields = prior_words(tmp_path / "class", 3) | {"validation_prompt": "a photo", "validation_steps": 1}
    assert dreambooth.main(dreambooth_words(tmp_path / "subject", tmp_path / "run", **fields)) == 1
    error = capsys.readouterr().err
    assert f"out of memory {said}" in error and "Traceback" not in error


def test_too_little_memory_for_a_checkpoint_is_not_a_full_disk(tmp_path, monkeypatch):
    model = make_unet("tiny-16", 16)
    config = RunConfig(output_dir=str(tmp_path), report_to="none", max_train_steps=1, train_batch_size=2)
    loader = DataLoader(TensorDataset(torch.zeros(4, 3, 16, 16)), 2)
    starting = start_run(config, {"unet": model}, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    with pytest.raises(RunFailed, match="out of memory with --train_batch_size 2"), starting as run:
        monkeypatch.setattr(run.accelerator, "save_state", exhausted)
        run.save_checkpoint()
    assert not list(tmp_path.glob(".*.partial"))


# --- peaks ---


class FakeGPU:
    """A GPU that keeps a peak as PyTorch does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: setattr(self, "peak", self.now))

    def use(self, gib: float) -> None:
        """Take so much more for a moment."""
        self.peak = max(self.peak, self.now + int(gib * 2**30))


def test_the_peak_that_is_reported_is_that_of_training(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    meter = ProgressMeter(10, 4, "cuda", shown=False)
    gpu.now = 2**30
    gpu.use(20)  # loading and encoding
    with meter.running(0):
        gpu.use(3)
        with meter.aside():
            gpu.use(30)  # validation
        gpu.use(2)
        assert meter.text(5).endswith("peak memory of training 4.0 GiB")
        gpu.use(5)
        with meter.aside():
            pass
    assert meter.text(10).endswith("peak memory of training 6.0 GiB")


def test_looking_does_not_count_as_training(tmp_path, monkeypatch):
    gpu, model = FakeGPU(monkeypatch), torch.nn.Linear(2, 1)
    model.config = {}
    config = RunConfig(output_dir=str(tmp_path), report_to="none", max_train_steps=1, train_batch_size=2)
    with start_run(config, {"line": model}, torch.optim.SGD(model.parameters(), lr=0.1),
                   DataLoader(TensorDataset(torch.zeros(4, 2)), 2)) as run:  # fmt: skip
        run.meter.device_type = "cuda"
        with run.meter.running(0):
            gpu.use(1)
            with run.looking():
                gpu.use(7)
            assert run.meter.text(1).endswith("peak memory of training 1.0 GiB")


def test_an_estimate_says_what_is_in_it():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert memory_text(1.5, cpu) == "1.500 GiB for weights, gradients and moments, without activations"
    assert memory_text(1.5, cpu, use_ema=True).startswith("1.500 GiB for weights, gradients, moments and average, ")
    assert memory_text(1.5, cuda, use_ema=True) == "1.500 GiB, the measured peak of a micro-step"
    layer = torch.nn.Linear(100, 100, bias=False)
    assert round(training_memory([layer], cpu) * 2**30) == 40_000 * 4 + 4, "and the optimizer's counter of steps"
    assert round(training_memory([layer], cpu, use_8bit_adam=True) * 2**30) == (
        40_000 * 2 + 10_000 * 2 + 2 * 40 * 4 + 2048), "with scales and tables"


@pytest.mark.parametrize("averaged", [False, True])
def test_a_dry_run_names_an_average_only_where_one_is_kept(averaged, tmp_path, capsys):
    fields = {"use_ema": True} if averaged else {}
    assert train_butterflies(words(tmp_path / "run", dry_run=True, **fields)) == 0
    said = capsys.readouterr().out
    expected = "gradients, moments and average" if averaged else "gradients and moments"
    assert f"GiB for weights, {expected}, without activations; " in said
