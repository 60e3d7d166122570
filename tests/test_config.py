"""One dataclass, three views: notebook, command line, file."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from diffusion_lessons.engine.config import (
    PRESETS,
    InputError,
    LaunchOptions,
    TrainingConfig,
    load_config,
    option,
    parse_command_line,
    save_config,
)


def parse(*arguments: str) -> TrainingConfig:
    return parse_command_line(arguments, TrainingConfig, PRESETS, "train-butterflies")[0]


def test_the_defaults_are_the_tutorials():
    config = TrainingConfig()
    expected = dict(
        image_size=128,
        train_batch_size=16,
        eval_batch_size=16,
        num_epochs=50,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        lr_warmup_steps=500,
        save_image_epochs=10,
        save_model_epochs=30,
        seed=0,
        push_to_hub=False,
        hub_private_repo=False,
        overwrite_output_dir=True,
        mixed_precision=None,
        dataset_name="meadow",
        prediction_type="epsilon",
        ddpm_num_steps=1000,
        ddpm_beta_schedule="linear",
        model_config_name_or_path="tutorial-128",
        adam_weight_decay=1e-2,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        lr_scheduler="cosine",
        use_ema=False,
    )
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_flag_of_the_reference_script_is_understood(shared_data, monkeypatch):
    """Walks the table of train_unconditional.py: each flag parses, and sets the field of that name or of its alias."""
    text = (shared_data.parent / "reference" / "reference_flags.md").read_text()
    table = text.split("train_unconditional.py (45 flags)")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `--(\w+)` \| (\w+) \| `(.*?)` \|", table, flags=re.MULTILINE)
    assert len(rows) == 45
    monkeypatch.delenv("HF_HUB_OFFLINE")  # offline, --push_to_hub is refused
    aliases = {alias.lstrip("-"): each.name for each in fields(TrainingConfig) for alias in each.metadata["aliases"]}
    samples = {"int": "7", "float": "0.25", "str": "text"}
    special = {
        "mixed_precision": "bf16",
        "prediction_type": "sample",
        "logger": "wandb",
        "lr_scheduler": "linear",
        "ddpm_beta_schedule": "scaled_linear",
        "resolution": "32",
        "ema_max_decay": "0.5",
    }
    for flag, kind, _ in rows:
        name = aliases.get(flag, flag)
        if flag == "preserve_input_precision":
            with pytest.raises(InputError, match="preserve_input_precision"):
                parse(f"--{flag}")
            continue
        value = special.get(flag, samples.get(kind))
        config = parse(f"--{flag}") if kind == "flag" else parse(f"--{flag}", value)
        assert str(getattr(config, name)) == ("True" if kind == "flag" else value), flag


def test_precedence_is_default_preset_file_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("resolution: 48\nlearning_rate: 1e-3\nseed: 3\n")
    config = parse("--preset", "quick", "--config", str(file), "--seed", "5")
    assert (config.train_batch_size, config.image_size, config.learning_rate, config.seed) == (4, 48, 1e-3, 5)
    assert config.num_epochs == 50


def test_a_flag_that_repeats_the_default_still_goes_over_the_preset():
    assert parse("--preset", "quick", "--image_size", "128").image_size == 128


def test_saved_configs_come_back_equal_and_without_the_token(tmp_path):
    config = TrainingConfig(seed=9, hub_token="hf_secret", snr_gamma=5.0, num_inference_steps=7)
    save_config(config, tmp_path / "training_config.json")
    text = (tmp_path / "training_config.json").read_text()
    assert "hf_secret" not in text and "hub_token" not in text and "hf_secret" not in repr(config)
    config.hub_token = None
    assert load_config(tmp_path / "training_config.json", TrainingConfig) == config
    assert parse("--config", str(tmp_path / "training_config.json")) == config


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "unknown flag", "--learning_rate"]),
        (["--image_size", "big"], ["--image_size", "big"]),
        (["--image_size", "0"], ["--image_size 0", "1 or more"]),
        (["--image_size"], ["--image_size", "expected"]),
        (["--preset", "slow"], ["--preset slow", "quick"]),
        (["--train_batch_size", "-1"], ["--train_batch_size -1"]),
        (["--learning_rate", "0"], ["--learning_rate 0", "above 0"]),
        (["--lr_scheduler", "cosin"], ["--lr_scheduler", "cosin", "cosine"]),
        (["--dataset_name", "imagefolder"], ["--dataset_name imagefolder", "--train_data_dir"]),
        (["--num_inference_steps", "2000"], ["--num_inference_steps 2000", "1000"]),
        (["--num_processes", "0"], ["--num_processes 0"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml", "cannot be read"]),
        (["--image", "64"], ["--image", "unknown flag"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_flag(arguments, words):
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("lerning_rate: 1", ["unknown field 'lerning_rate'", "learning_rate"]),
        ("seed: [1", ["not valid YAML", "line"]),
        ("- 1\n- 2", ["field: value"]),
        ("seed: soon", ["--seed", "soon"]),
        ("\x00", ["not valid YAML"]),
    ],
)
def test_a_bad_config_file_is_named_with_its_fault(tmp_path, content, words):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        parse("--config", str(file))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_yaml_spellings_that_surprise_are_read_as_meant(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nmixed_precision: no\n")
    config = parse("--config", str(file))
    assert config.learning_rate == 1e-4 and config.mixed_precision == "no"


def test_the_help_lists_every_field_with_its_default():
    code = (
        "from diffusion_lessons.engine.config import *;"
        "parse_command_line(['--help'], TrainingConfig, PRESETS, 'train-butterflies')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for each in (*fields(TrainingConfig), *fields(LaunchOptions)):
        assert f"--{each.name}" in done.stdout, each.name
    assert "default: 0.0001" in " ".join(done.stdout.split())


def test_parsing_does_not_import_torch():
    code = (
        "import sys; from diffusion_lessons.engine.config import *;"
        "parse_command_line(['--preset', 'quick'], TrainingConfig, PRESETS, 'x');"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_field_documents_itself():
    for each in (*fields(TrainingConfig), *fields(LaunchOptions)):
        assert len(each.metadata["help"].split()) >= 2, each.name


def test_option_keeps_secrets_out_of_repr():
    from dataclasses import dataclass

    @dataclass
    class Small:
        token: str = option("t0ken", "a token", secret=True)

    assert "t0ken" not in repr(Small())


def test_presets_name_only_fields_that_exist_and_build():
    for name, values in PRESETS.items():
        assert set(values) <= {each.name for each in fields(TrainingConfig)}, name
        TrainingConfig(**values)


def test_paths_with_spaces_and_other_scripts_survive(tmp_path):
    folder = Path(tmp_path) / "나비 사진"
    assert parse("--output_dir", str(folder)).output_dir == str(folder)


def test_none_can_be_said_on_the_command_line():
    assert parse("--snr_gamma", "None", "--max_train_steps", "None", "--preset", "quick").max_train_steps is None
    with pytest.raises(InputError, match="--train_batch_size None: must be int"):
        parse("--train_batch_size", "None")
    with pytest.raises(InputError, match="invalid float value: 'none'"):
        parse("--snr_gamma", "none")
