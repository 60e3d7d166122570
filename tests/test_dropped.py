"""What was given is used, refused or named; never dropped without a word."""

from dataclasses import fields
from pathlib import Path

import pytest
from dreambooth_runs import class_folder, dreambooth_words, prior_words, subject_folder
from PIL import Image
from runs import words

from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import PRESETS, TrainingConfig, parse_butterflies
from diffusion_lessons.dreambooth import inference
from diffusion_lessons.dreambooth.config import DREAMBOOTH_PRESETS, DreamBoothConfig, parse_dreambooth
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig, parse_generation
from diffusion_lessons.engine.command_line import idle_notes
from diffusion_lessons.engine.config import InputError, RunConfig, save_config
from diffusion_lessons.engine.optimization import warmup_warning
from diffusion_lessons.miniature.stages import STAGES
from diffusion_lessons.miniature.stages import main as miniature

NEEDED = ["--pretrained_model_name_or_path", "miniature", "--instance_data_dir", "meadow", "--instance_prompt", "a dog"]
OFTEN = [("--lr_power 2", "lr_power 2.0"), ("--min_lr_rate 0.1 --lr_scheduler linear", "min_lr_rate 0.1"),
         ("--lr_num_cycles 3", "lr_num_cycles 3"), ("--ema_power 0.5", "ema_power 0.5"),
         ("--ema_inv_gamma 2", "ema_inv_gamma 2.0"), ("--ema_max_decay 0.5", "ema_max_decay 0.5"),
         ("--lr_scheduler constant --lr_warmup_steps 5", "lr_warmup_steps 5"),
         ("--hub_model_id a/b", "hub_model_id a/b"),
         ("--hub_private_repo", "hub_private_repo True"), ("--force_resume", "force_resume True")]  # fmt: skip
BUTTERFLIES = [("--num_epochs 3 --max_train_steps 10", "num_epochs 3"),
               ("--dataset_config_name x", "dataset_config_name x"),
               ("--cache_dir x", "cache_dir x"), ("--on_bad_image skip", "on_bad_image skip"),
               ("--train_data_dir x --num_train_images 10", "num_train_images 10"),
               ("--train_data_dir x --dataset_config_name y", "dataset_config_name y"),
               ("--resize pad --center_crop", "resize pad"),
               ("--pretrained_model_name_or_path x --model_config_name_or_path y", "model_config_name_or_path y")]
DREAMBOOTH = [("--class_data_dir c", "class_data_dir c"), ("--class_prompt dog", "class_prompt dog"),
              ("--num_class_images 100", "num_class_images 100"), ("--prior_loss_weight 1", "prior_loss_weight 1.0"),
              ("--sample_batch_size 2", "sample_batch_size 2"), ("--validation_steps 5", "validation_steps 5"),
              ("--prior_generation_precision fp32", "prior_generation_precision fp32"),
              ("--validation_epochs 5", "validation_epochs 5"),
              ("--num_validation_images 2", "num_validation_images 2"),
              ("--validation_scheduler DDPMScheduler", "validation_scheduler DDPMScheduler"),
              ("--subject_model miniature", "subject_model miniature"),
              ("--subject_model x --validation_prompt dog --fidelity_model none", "subject_model x"),
              ("--revision x", "revision x"), ("--num_train_epochs 2 --max_train_steps 3", "num_train_epochs 2")]


def notes(parse, given: list[str]) -> list[str]:
    return list(parse(given)[1].notes)


@pytest.mark.parametrize("parse, base, line, about", [
    *((parse_butterflies, [], *case) for case in OFTEN + BUTTERFLIES),
    *((parse_dreambooth, NEEDED, *case) for case in [c for c in OFTEN if "linear" not in c[0]] + DREAMBOOTH),
])  # fmt: skip
def test_a_flag_that_does_nothing_is_named(parse, base, line, about):
    (note,) = notes(parse, [*base, *line.split()])
    assert note.startswith(f"--{about}: ") and ("--" in note.split(": ")[1] or "embedded" in note
                                                or "own" in note or "machine" in note), note  # fmt: skip


@pytest.mark.parametrize("parse, line", [
    (parse_butterflies, "--use_ema --ema_power 0.5 --lr_scheduler polynomial --lr_power 2 --lr_warmup_steps 5"),
    (parse_butterflies, "--min_lr_rate 0.1 --train_data_dir x --cache_dir y --on_bad_image skip --num_epochs 3"),
    (parse_butterflies, "--dataset_name a/b --dataset_config_name c --center_crop --snr_gamma None"),
    (parse_butterflies, "--preset quick --num_train_images 5 --resize pad --hub_model_id None"),
    (parse_dreambooth, "--preset quick --revision None --class_prompt dog --validation_steps 4"),
    (parse_dreambooth, "--preset quick --pretrained_model_name_or_path a/model --revision main --variant fp16"),
    (parse_dreambooth, "--pretrained_model_name_or_path a/model --instance_data_dir i --class_data_dir c "
                       "--output_dir o --with_prior_preservation --prior_loss_weight=1.0 --instance_prompt sks "
                       "--class_prompt dog --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 "
                       "--learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --num_class_images=200 "
                       "--max_train_steps=800"),
])  # fmt: skip
def test_a_flag_that_does_something_is_not(parse, line):
    assert notes(parse, line.split()) == []


def test_a_presets_values_are_nobodys_choice_even_in_a_saved_run(tmp_path):
    for name in PRESETS:
        assert notes(parse_butterflies, ["--preset", name]) == []
    assert notes(parse_dreambooth, ["--preset", "quick", "--with_prior_preservation", "False"]) == []
    save_config(DreamBoothConfig(**DREAMBOOTH_PRESETS["quick"]), tmp_path / "run.json")
    saved = ["--config", str(tmp_path / "run.json"), "--with_prior_preservation", "False"]
    assert notes(parse_dreambooth, saved) == []
    (tmp_path / "mine.yaml").write_text("ema_power: 0.5\nlr_power: 1.0\n")
    (note,) = notes(parse_butterflies, ["--config", str(tmp_path / "mine.yaml")])
    assert note.startswith("--ema_power 0.5: "), "the other is the default, as in every saved run"


def test_the_tables_name_fields_that_exist_and_no_secret_is_said():
    generation, here = GenerationConfig(model_path="miniature"), DreamBoothConfig(**DREAMBOOTH_PRESETS["quick"])
    for config in (TrainingConfig(), here, *(stage.config() for stage in STAGES.values())):
        if isinstance(config, RunConfig):
            known = {each.name for each in fields(config)} | {"num_epochs", "num_train_epochs"}
            assert {name for names in config.resolve().needs() for name in names.split()} <= known
    assert {n for names in generation.needs() for n in names.split()} <= {each.name for each in fields(generation)}
    (note,) = idle_notes(TrainingConfig(hub_token="hf_secret").resolve(), ["hub_token"])
    assert note == "--hub_token: does nothing without --push_to_hub"


def test_commands_say_what_does_nothing(tmp_path, capsys):
    assert main(words(tmp_path / "run", max_train_steps=1, num_train_images=4, ema_power=0.5)) == 0
    assert capsys.readouterr().out.startswith("note: --ema_power 0.5: does nothing without --use_ema\n")
    assert miniature(["clip", "--max_train_steps", "0", "--lr_power", "2"]) == 2
    assert "note" not in capsys.readouterr().out, "a mistake is answered first"


# --- sentences without quotes ---


@pytest.mark.parametrize("parse, flag", [(parse_generation, "prompt"), (parse_dreambooth, "validation_prompt")])
def test_a_sentence_without_quotes_is_refused_with_the_remedy(parse, flag):
    base = ["--model_path", "m"] if flag == "prompt" else NEEDED
    with pytest.raises(InputError) as caught:
        parse([*base, f"--{flag}", *["a", "photo", "of", "a", "sks", "butterfly"]])
    assert str(caught.value) == (f"--{flag} a photo of a sks butterfly: is 6 texts of one word each; put quotes around "
                                 f'a text: --{flag} "a photo of a sks butterfly"')
    for fine in (["butterfly"], ["a photo of a butterfly"], ["a fish", "a snail"], ["butterfly", "a fish"]):
        parse([*base, f"--{flag}", *fine])
    parse_generation(["--model_path", "m", "--prompt", "a fish", "--compare_to", "one", "two"])
    assert GenerationConfig(model_path="m", prompt=["butterfly", "fish"]).prompt == ["butterfly", "fish"]


def test_a_single_text_without_quotes_is_told_what_to_do():
    with pytest.raises(InputError, match="^photo: belongs to no flag; put quotes around a text of several words$"):
        parse_dreambooth([*NEEDED[:4], "--instance_prompt", *["a", "photo", "of", "a", "sks", "butterfly"]])


# --- the warm-up ---


def test_a_warm_up_longer_than_the_run_is_said_when_the_steps_are_known(tmp_path, capsys):
    assert main(words(tmp_path / "run", max_train_steps=2, num_train_images=4, lr_warmup_steps=8)) == 0
    said = capsys.readouterr().out
    assert "--lr_warmup_steps 8: the run has 2 steps, so the learning rate rises to 25% of --learning_rate" in said
    assert warmup_warning(TrainingConfig(lr_warmup_steps=8), 9) is None
    assert warmup_warning(TrainingConfig(lr_warmup_steps=8, lr_scheduler="constant"), 2) is None


# --- drawing ---

SMALL = ["--num_images", "1", "--num_inference_steps", "2", "--size", "32"]


def draw(folder: Path, *given: str) -> int:
    return inference.main([*given, "--output_dir", str(folder), *(SMALL if "--prompt" in given else [])])


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory) -> Path:
    from diffusion_lessons.dreambooth.training import main as dreambooth

    folder = tmp_path_factory.mktemp("adapter")
    given = dreambooth_words(subject_folder(folder / "pictures"), folder / "run", max_train_steps=1, lora=True,
                             **prior_words(class_folder(folder / "class", 2), 2))  # fmt: skip
    assert dreambooth(given) == 0
    return folder / "run"


def test_what_does_nothing_to_a_drawing_is_named(tmp_path, capsys):
    assert draw(tmp_path, "--model_path", "miniature", "--prompt", "a red fish", "--lora_scale", "0.5", "--revision",
                "main", "--guidance_scale", "1", "--negative_prompt", "snow") == 0  # fmt: skip
    said = capsys.readouterr().out
    for about in ("--lora_scale 0.5: does nothing without an adapter",
                  "--revision main: does nothing with a model that lies on this machine",
                  "--negative_prompt snow: does nothing with --guidance_scale 1.0"):  # fmt: skip
        assert f"note: {about}" in said


def test_the_scale_of_an_adapter_in_a_checkpoint_is_in_the_metadata(tmp_path, adapter_run, capsys):
    import json

    given = ["--checkpoint", str(adapter_run / "checkpoint-1"), "--prompt", "a red fish", "--lora_scale", "0.5"]
    assert draw(tmp_path, *given) == 0, capsys.readouterr().err
    assert "does nothing" not in capsys.readouterr().out
    assert json.loads(Image.open(tmp_path / "0000.png").text["parameters"])["lora_scale"] == 0.5


def test_variant_and_revision_are_those_of_the_model_that_was_named(tmp_path, monkeypatch, adapter_run):
    asked = []

    def load(base, config, checkpoint=None, lora_weights=None):
        asked.append((base, config.revision, config.variant))

    monkeypatch.setattr(inference, "load_for_drawing", load)
    config = GenerationConfig(model_path="a/model", revision="r", variant="fp16", prompt="a fish", compare_to="b/other")
    inference.load_other("b/other", "a/model", config)
    inference.load_other("a/model", "a/model", config)
    inference.load_other(str(adapter_run / "checkpoint-1"), "a/model", config)
    assert asked == [("b/other", None, None), ("a/model", "r", "fp16"), ("miniature", None, None)]


def test_what_an_unconditional_model_does_not_know_is_named(tmp_path, capsys):
    assert main(words(tmp_path / "run", max_train_steps=1, num_train_images=4)) == 0
    given = ["--model_path", str(tmp_path / "run"), "--num_images", "1", "--num_inference_steps", "2"]
    assert draw(tmp_path / "plain", *given) == 0
    assert "note:" not in capsys.readouterr().out
    assert draw(tmp_path / "drawn", *given, "--guidance_scale", "3", "--lora_scale", "0.5") == 0
    said = capsys.readouterr().out
    for about in ("guidance_scale 3.0", "lora_scale 0.5"):
        assert f"note: --{about}: does nothing: the model is unconditional" in said
    for words_of_others in (["--negative_prompt", "x"], ["--variant", "fp16"]):
        assert draw(tmp_path / "drawn", *given, *words_of_others) == 2
