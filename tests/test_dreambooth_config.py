"""The flags of both DreamBooth scripts: every one is walked through; then what is checked, filled in and layered."""

import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from typing import get_args

import pytest
from script_flags import CLASS, IN_ALL_SCRIPTS, NEEDED, as_words, table_of_script

from diffusion_lessons.dreambooth.config import (
    DREAMBOOTH_PRESETS,
    INTERPOLATION,
    DreamBoothConfig,
    OtherModelOptions,
    parse_dreambooth,
    train_dreambooth,
)
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig, parse_generation
from diffusion_lessons.engine.config import InputError, RunConfig, load_config, save_config

# flag: its type and default in train_dreambooth.py and train_dreambooth_lora.py, and some other value to give it
SAME_IN_BOTH = IN_ALL_SCRIPTS | {
    "variant": (str, None, "fp16"),
    "seed": (int, None, 7),
    "checkpointing_steps": (int, 500, 100),
    "checkpoints_total_limit": (int, None, 2),
    "resume_from_checkpoint": (str, None, "checkpoint-100"),
    "gradient_accumulation_steps": (int, 1, 2),
    "gradient_checkpointing": (bool, False, True),
    "lr_scheduler": (str, "constant", "cosine_with_restarts"),
    "lr_warmup_steps": (int, 500, 0),
    "lr_num_cycles": (int, 1, 2),
    "lr_power": (float, 1.0, 2.0),
    "use_8bit_adam": (bool, False, True),
    "dataloader_num_workers": (int, 0, 2),
    "allow_tf32": (bool, False, True),
    "report_to": (str, "tensorboard", "wandb"),
    "validation_prompt": (str, None, "a photo of sks dog in a bucket"),
    "num_validation_images": (int, 4, 2),
    "mixed_precision": (str, None, "bf16"),
    "prior_generation_precision": (str, None, "fp32"),
    "enable_xformers_memory_efficient_attention": (bool, False, True),
    "pre_compute_text_embeddings": (bool, False, True),
    "tokenizer_max_length": (int, None, 77),
    "text_encoder_use_attention_mask": (bool, False, True),
    "validation_images": (list, None, "small.png"),
    "class_labels_conditioning": (str, None, "timesteps"),
}
FULL = SAME_IN_BOTH | {
    "output_dir": (str, "dreambooth-model", "out"),
    "learning_rate": (float, 5e-06, 1e-05),
    "validation_steps": (int, 100, 50),
    "set_grads_to_none": (bool, False, True),
    "offset_noise": (bool, False, True),
    "snr_gamma": (float, None, 5.0),
    "skip_save_text_encoder": (bool, False, True),
    "validation_scheduler": (str, "DPMSolverMultistepScheduler", "DDPMScheduler"),
}
LORA = SAME_IN_BOTH | {
    "output_dir": (str, "lora-dreambooth-model", "out"),
    "learning_rate": (float, 5e-04, 1e-04),
    "validation_epochs": (int, 50, 10),
    "rank": (int, 4, 16),
    "lora_dropout": (float, 0.0, 0.1),
    "image_interpolation_mode": (str, "lanczos", "bicubic"),
}
REFUSED = {
    "text_encoder_use_attention_mask": "DeepFloyd IF",
    "skip_save_text_encoder": "DeepFloyd IF",
    "class_labels_conditioning": "DeepFloyd IF",
    "validation_images": "upscalers",
}
TABLES = {"train_dreambooth.py": FULL, "train_dreambooth_lora.py": LORA}
WALK = [(script, flag) for script, table in TABLES.items() for flag in table]


def parse(*words: str, **values) -> DreamBoothConfig:
    """The config of a command that has what every run needs."""
    return parse_dreambooth([*as_words(NEEDED | values), *words])[0]


# --- the walk of the table ---


def test_the_tables_are_those_of_the_scripts(shared_data):
    text = (shared_data.parent / "reference" / "reference_flags.md").read_text()
    for script, table in TABLES.items():
        there = {name: (kind, default) for name, (kind, default, _) in table.items()}
        assert table_of_script(text, script) == there


def test_the_tables_are_complete():
    assert (len(FULL), len(LORA), len(WALK)) == (61, 59, 120)
    assert {flag for _, flag in WALK} <= {each.name for each in fields(DreamBoothConfig)}


@pytest.mark.parametrize("script, flag", WALK)
def test_a_flag_of_the_scripts_means_what_it_meant(script, flag, monkeypatch):
    """Its default, without or with --lora, is the script's; another value arrives under its name, or is refused."""
    monkeypatch.delenv("HF_HUB_OFFLINE")  # offline, --push_to_hub is refused
    kind, default, other = TABLES[script][flag]
    lora = {"lora": True} if TABLES[script] is LORA else {}
    config = parse(**lora).resolve()
    if flag not in NEEDED:
        assert getattr(config, flag) == default, "the default"
    if flag in REFUSED:
        with pytest.raises(InputError, match=rf"--{flag} .* serves {REFUSED[flag]} only"):
            parse(**lora, **{flag: other})
        return
    config = parse(**lora, **(CLASS if flag == "with_prior_preservation" else {}), **{flag: other})
    value = getattr(config, flag)
    assert value == ([other] if flag == "validation_prompt" else other)
    assert isinstance(value, list if flag == "validation_prompt" else kind)
    if kind is not bool:  # the other spelling
        words = as_words({name: given for name, given in (NEEDED | lora).items() if name != flag})
        assert getattr(parse_dreambooth([*words, f"--{flag}={other}"])[0], flag) == value


@pytest.mark.parametrize("flag", NEEDED)
def test_what_the_scripts_require_is_required(flag):
    with pytest.raises(InputError, match=f"^--{flag} is missing: add --{flag} "):
        parse_dreambooth(as_words({name: value for name, value in NEEDED.items() if name != flag}))
    with pytest.raises(InputError, match=f"--{flag} '': is empty"):
        parse(**{flag: ""})


@pytest.mark.parametrize(
    "flag, choices",
    [
        ("mixed_precision", ["no", "fp16", "bf16"]),
        ("prior_generation_precision", ["no", "fp32", "fp16", "bf16"]),
        ("validation_scheduler", ["DPMSolverMultistepScheduler", "DDPMScheduler"]),
        ("report_to", ["tensorboard", "wandb", "comet_ml", "all"]),
        ("lr_scheduler",
         ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]),
        ("image_interpolation_mode",
         ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]),
    ],
)  # fmt: skip
def test_every_choice_of_the_scripts_is_a_choice(flag, choices):
    for choice in choices:
        assert str(getattr(parse(**{flag: choice}), flag)).replace("-", "_") == choice
    with pytest.raises(InputError, match=flag):
        parse(**{flag: "best"})


def test_interpolations_are_those_that_pictures_can_be_resized_with():
    from diffusion_lessons.dreambooth.subject import RESAMPLING

    configs = [parse(image_interpolation_mode=choice) for choice in get_args(INTERPOLATION)]
    modes = {config.resolve().image_interpolation_mode for config in configs}
    assert [config.image_interpolation_mode for config in configs] == list(get_args(INTERPOLATION)), "as declared"
    assert len(modes) == 7 and modes <= set(RESAMPLING)


# --- what is filled in ---


def test_lora_moves_the_defaults_and_nothing_that_was_named():
    full, lora = DreamBoothConfig(**NEEDED).resolve(), DreamBoothConfig(**NEEDED, lora=True).resolve()
    moved = {name for name, value in asdict(full).items() if value != getattr(lora, name)} - {"lora"}
    assert moved == {"learning_rate", "output_dir", "image_interpolation_mode", "validation_steps", "validation_epochs"}
    named = dict(learning_rate=1e-4, output_dir="here", image_interpolation_mode="box", validation_steps=20)
    config = DreamBoothConfig(**NEEDED, lora=True, **named).resolve()
    assert {name: getattr(config, name) for name in named} == named and config.validation_epochs is None
    assert DreamBoothConfig(**NEEDED, validation_epochs=3).resolve().validation_steps is None


def saved(folder, **values) -> str:
    """The file that a run with these values leaves."""
    save_config(DreamBoothConfig(**NEEDED | values).resolve(), folder / "training_config.json")
    return str(folder / "training_config.json")


def moved_by_lora(config: DreamBoothConfig) -> tuple:
    """The fields in which the two scripts differ."""
    return (config.learning_rate, config.output_dir, config.image_interpolation_mode, config.validation_steps,
            config.validation_epochs)


FULL_DEFAULTS = (5e-6, "dreambooth-model", "bilinear", 100, None)
LORA_DEFAULTS = (5e-4, "lora-dreambooth-model", "lanczos", None, 50)


def test_a_saved_full_run_with_lora_has_loras_defaults(tmp_path):
    file = saved(tmp_path)
    assert moved_by_lora(parse_dreambooth(["--config", file])[0].resolve()) == FULL_DEFAULTS
    assert moved_by_lora(parse_dreambooth(["--config", file, "--lora"])[0].resolve()) == LORA_DEFAULTS


def test_a_saved_adapter_run_without_lora_has_the_full_runs_defaults(tmp_path):
    file = saved(tmp_path, lora=True)
    assert moved_by_lora(parse_dreambooth(["--config", file])[0].resolve()) == LORA_DEFAULTS
    assert moved_by_lora(parse_dreambooth(["--config", file, "--lora", "False"])[0].resolve()) == FULL_DEFAULTS


def test_what_was_named_stays_when_a_saved_run_gets_lora(tmp_path):
    file = saved(tmp_path, learning_rate=5e-6, image_interpolation_mode="nearest_exact", validation_epochs=3)
    config = parse_dreambooth(["--config", file, "--lora"])[0]
    assert moved_by_lora(config.resolve()) == (5e-6, "lora-dreambooth-model", "nearest-exact", None, 3)
    assert config.image_interpolation_mode == "nearest_exact", "as it was written"


def test_resolving_leaves_the_config_as_it_was_declared():
    config = DreamBoothConfig(**NEEDED, lora=True)
    before = asdict(config)
    resolved = config.resolve()
    assert asdict(config) == before and moved_by_lora(config) == (None,) * 5
    assert moved_by_lora(resolved) == LORA_DEFAULTS and resolved.declared is config and resolved.resolve() is resolved
    assert resolved.seed is None, "a seed is drawn where the run begins"


def test_folders_are_checked_by_what_follows_from_the_flags():
    assert parse(class_data_dir="dreambooth-model", lora=True).resolve().output_dir == "lora-dreambooth-model"
    with pytest.raises(InputError, match="--class_data_dir lora-dreambooth-model"):
        parse(class_data_dir="lora-dreambooth-model", lora=True)


def test_a_saved_config_comes_back_as_it_was_declared(tmp_path):
    config = DreamBoothConfig(**NEEDED, lora=True, hub_token="hf_secret", validation_prompt="one prompt")
    save_config(config, tmp_path / "training_config.json")
    assert "hf_secret" not in (tmp_path / "training_config.json").read_text() + repr(config)
    again = load_config(tmp_path / "training_config.json", DreamBoothConfig)
    config.hub_token = None
    assert again == config and again.validation_prompt == ["one prompt"] and again.learning_rate is None
    assert again.resolve() == config.resolve() and again.resolve().learning_rate == 5e-4


def test_what_a_run_has_in_common_keeps_its_names_and_marks():
    mine = {each.name: each for each in fields(DreamBoothConfig)}
    assert {each.name for each in fields(RunConfig)} <= set(mine)
    fixed = {name for name, each in mine.items() if each.metadata["fixed"]}
    assert {"pretrained_model_name_or_path", "instance_prompt", "resolution", "lora", "rank", "seed", "use_ema",
            "train_text_encoder", "with_prior_preservation", "prior_loss_weight", "cache_latents"} <= fixed  # fmt: skip
    assert not fixed & {"learning_rate", "max_train_steps", "validation_prompt", "checkpointing_steps", "report_to"}
    assert [name for name, each in mine.items() if each.metadata["secret"]] == ["hub_token"]
    assert all(each.metadata["help"] and each.default is not MISSING for each in mine.values())


# --- what is checked ---


@pytest.mark.parametrize(
    "values, words",
    [
        ({"with_prior_preservation": True}, ["--with_prior_preservation", "--class_data_dir"]),
        ({"with_prior_preservation": True, "class_data_dir": "c"}, ["--with_prior_preservation", "--class_prompt"]),
        ({"with_prior_preservation": True, "class_prompt": "c"}, ["--with_prior_preservation", "--class_data_dir"]),
        ({"instance_data_dir": "dog", "class_data_dir": "./dog/../dog/"}, ["--class_data_dir", "of the subject"]),
        ({"class_data_dir": "out/class", "output_dir": "./out"}, ["--class_data_dir out/class", "--output_dir"]),
        ({"output_dir": "dogs/out", "class_data_dir": "dogs"}, ["--output_dir dogs/out", "class images"]),
        ({"instance_data_dir": "out/samples", "output_dir": "out"}, ["--instance_data_dir out/samples", "clears"]),
        ({"class_data_dir": "dreambooth-model"}, ["--class_data_dir dreambooth-model", "--output_dir"]),
        ({"pretrained_model_name_or_path": "out/", "output_dir": "out"}, ["--output_dir out", "model"]),
        ({"instance_data_dir": "dog", "output_dir": "dog"}, ["--output_dir dog", "subject"]),
        ({"resolution": 100}, ["--resolution 100", "multiple of 8", "96"]),
        ({"resolution": 3}, ["--resolution 3", "such as 8"]),
        ({"resolution": 0}, ["--resolution 0", "multiple of 8"]),
        ({"resolution": -64}, ["--resolution -64", "multiple of 8"]),
        ({"rank": 8}, ["--rank", "--lora"]),
        ({"lora_dropout": 0.1}, ["--lora_dropout", "--lora"]),
        ({"lora_format": "kohya"}, ["--lora_format", "--lora"]),
        ({"lora": True, "rank": 0}, ["--rank 0", "1 or more"]),
        ({"lora": True, "lora_dropout": 1.0}, ["--lora_dropout 1.0", "below 1"]),
        ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, ["--pre_compute_text_embeddings"]),
        ({"prior_loss_weight": -0.5}, ["--prior_loss_weight -0.5", "0 or more"]),
        ({"prior_loss_weight": "nan"}, ["--prior_loss_weight nan", "0 or more"]),
        ({"snr_gamma": 0}, ["--snr_gamma 0", "above 0"]),
        ({"num_class_images": 0}, ["--num_class_images 0", "1 or more"]),
        ({"sample_batch_size": 0}, ["--sample_batch_size 0", "1 or more"]),
        ({"num_train_epochs": 0}, ["--num_train_epochs 0", "1 or more"]),
        ({"num_validation_images": 0}, ["--num_validation_images 0", "1 or more"]),
        ({"validation_steps": 0}, ["--validation_steps 0", "1 or more"]),
        ({"validation_epochs": 0}, ["--validation_epochs 0", "1 or more"]),
        ({"tokenizer_max_length": 0}, ["--tokenizer_max_length 0", "1 or more"]),
        ({"train_batch_size": 0}, ["--train_batch_size 0", "1 or more"]),
        ({"learning_rate": 0}, ["--learning_rate 0", "above 0"]),
        ({"learning_rate": "nan"}, ["--learning_rate nan", "above 0"]),
        ({"seed": -1}, ["--seed -1", "0 or more"]),
        ({"seed": "soon"}, ["--seed", "soon", "int"]),
        ({"push_to_hub": True}, ["--push_to_hub", "HF_HUB_OFFLINE"]),
        ({"on_bad_image": "ignore"}, ["--on_bad_image", "ignore"]),
        ({"instance_promt": "x"}, ["--instance_promt", "unknown flag", "--instance_prompt"]),
        ({"preset": "slow"}, ["--preset slow", "quick"]),
    ],
)
def test_mistakes_are_answered_in_one_line(values, words):
    with pytest.raises(InputError) as error:
        parse(**values)
    message = str(error.value)
    assert "\n" not in message and len(message) < 200
    assert all(word in message for word in words), message


def test_a_class_without_its_prior_is_no_mistake():
    assert parse(**CLASS).class_prompt == CLASS["class_prompt"]
    assert parse(with_prior_preservation=True, **CLASS).with_prior_preservation


def test_folders_of_their_own_are_no_mistake():
    assert parse(class_data_dir="out-class", output_dir="out").class_data_dir == "out-class"
    assert parse(output_dir="miniature").output_dir == "miniature", "the embedded model lies elsewhere"


@pytest.mark.parametrize("field", ["output_dir", "class_data_dir"])
def test_what_lies_in_the_subjects_folder_would_be_read_as_the_subject(field):
    with pytest.raises(InputError, match=f"--{field} dog/below: is or lies in the folder of the subject"):
        parse(instance_data_dir="dog", **{field: "dog/below"})
    assert getattr(parse(instance_data_dir="dog", **{field: "dogs"}), field) == "dogs", "a name that begins alike"


def test_refused_flags_may_be_given_with_their_default():
    assert {each.name for each in fields(OtherModelOptions)} == set(REFUSED)
    assert parse("--skip_save_text_encoder", "False", "--class_labels_conditioning", "None").lora is False


# --- layers ---


def test_layers_are_default_preset_file_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("resolution: 128\nmax_train_steps: 30\nlearning_rate: 1e-5\n")
    words = ["--preset", "quick", "--config", str(file), "--max_train_steps", "7", "--dry_run"]
    config, launch = parse_dreambooth(words)
    assert launch.dry_run and (config.resolution, config.max_train_steps, config.learning_rate) == (128, 7, 1e-5)
    assert config.num_class_images == 48 and config.prior_loss_weight == 1.0
    assert not parse_dreambooth(["--preset", "quick", "--with_prior_preservation", "False"])[0].with_prior_preservation


def test_none_takes_a_presets_value_away():
    config, _ = parse_dreambooth(
        ["--preset", "quick", "--lora", "--learning_rate", "None", "--validation_steps", "None"])  # fmt: skip
    config = config.resolve()
    assert (config.learning_rate, config.validation_steps, config.validation_epochs) == (5e-4, None, 50)


def test_an_unknown_field_in_a_file_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("instance_promt: a photo of sks dog\n")
    with pytest.raises(InputError, match="unknown field 'instance_promt'. Did you mean instance_prompt"):
        parse("--config", str(file))


def test_the_preset_is_a_run_of_the_embedded_model():
    config = DreamBoothConfig(**DREAMBOOTH_PRESETS["quick"])
    assert (config.pretrained_model_name_or_path, config.instance_data_dir) == ("miniature", "meadow")
    assert config.with_prior_preservation and config.max_train_steps % config.checkpointing_steps == 0


# --- drawing ---


def test_drawing_takes_the_promised_words():
    config = parse_generation(["--model_path", "miniature", "--prompt", "a red fish", "a blue fish"])
    assert config.prompt == ["a red fish", "a blue fish"]
    assert (config.num_images, config.num_inference_steps, config.guidance_scale, config.seed) == (4, 50, 7.5, 0)
    assert parse_generation(["--checkpoint", "run/checkpoint-1"]).model_path is None
    assert parse_generation(["--model_path", "m", "--resolution", "64"]).size == 64


def test_drawing_is_checked_when_it_is_built_in_a_notebook_too():
    assert GenerationConfig(model_path="miniature", prompt="one prompt").prompt == ["one prompt"]
    assert GenerationConfig(model_path="miniature", guidance_scale="5").guidance_scale == 5.0
    with pytest.raises(InputError, match="--num_images 'many'"):
        GenerationConfig(model_path="miniature", num_images="many")


@pytest.mark.parametrize(
    "words, answer",
    [
        ("--prompt fish", "--model_path is missing"),
        ("--checkpoint a --lora_weights b", "--checkpoint a: .*--lora_weights"),
        ("--model_path m --num_images 0", "--num_images 0: must be 1 or more"),
        ("--model_path m --batch_size 0", "--batch_size 0: must be 1 or more"),
        ("--model_path m --seed -1", "--seed -1: must be 0 or more"),
        ("--model_path m --instance_data_dir dog", "--instance_data_dir dog: .*--compare_to"),
        ("--model_pth m", "unknown flag. Did you mean --model_path"),
    ],
)
def test_mistakes_in_drawing_are_answered_in_one_line(words, answer):
    with pytest.raises(InputError, match=answer):
        parse_generation(words.split())


# --- the front doors ---


def test_the_command_answers_mistakes_without_torch():
    code = """
import sys
from diffusion_lessons.dreambooth.config import train_dreambooth
from diffusion_lessons.dreambooth.drawing_config import generate_images
print(train_dreambooth(), generate_images(), "torch" in sys.modules, "diffusers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, "--rank", "0"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "2", "False", "False"], done.stderr
    assert len(done.stderr.splitlines()) == 2 and "--rank: unknown flag" in done.stderr.splitlines()[1]


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train-dreambooth", "--help"])
    assert train_dreambooth() == 0
    text = capsys.readouterr().out
    missing = [each.name for each in fields(DreamBoothConfig) if f"--{each.name}" not in text]
    assert not missing and "DeepFloyd IF" in text and "--preset" in text
