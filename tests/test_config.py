"""One dataclass, three views: notebook, command line, file; and what was declared apart from what follows from it."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest

from diffusion_lessons.butterflies.config import PRESETS, TrainingConfig, parse_butterflies, train_butterflies
from diffusion_lessons.engine.command_line import LaunchOptions
from diffusion_lessons.engine.config import (
    InputError,
    RunConfig,
    load_config,
    option,
    public_fields,
    save_config,
)
from diffusion_lessons.engine.publishing import changed_fields
from diffusion_lessons.pictures.sets import load_images


def parse(*arguments: str) -> TrainingConfig:
    return parse_butterflies(arguments)[0]


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
    "names, below, least",
    [
        ("train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps logging_steps", 0, 1),
        ("lr_warmup_steps dataloader_num_workers adam_weight_decay seed checkpoints_total_limit", -1, 0),
        ("learning_rate max_grad_norm ema_inv_gamma", 0, 1e-6),
        ("adam_beta1 adam_beta2 ema_max_decay min_lr_rate", -0.1, 0),
        ("adam_beta1 adam_beta2 ema_max_decay min_lr_rate", 1, 0.9999),
    ],
)  # fmt: skip
def test_every_number_of_a_run_has_its_limits(names, below, least):
    for name in names.split():
        assert getattr(RunConfig(**{name: least}), name) == least
        with pytest.raises(InputError, match=f"^--{name} {below}"):
            RunConfig(**{name: below})


@pytest.mark.parametrize("name", [
    "image_size", "eval_batch_size", "num_epochs", "save_image_epochs", "save_model_epochs", "num_train_images",
    "ddpm_num_steps", "num_inference_steps", "snr_gamma",
])  # fmt: skip
def test_every_number_of_a_run_on_butterflies_has_its_limit(name):
    assert getattr(TrainingConfig(**{name: 1}), name) == 1
    with pytest.raises(InputError, match=f"^--{name} 0"):
        TrainingConfig(**{name: 0})


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


def test_parsing_does_not_import_torch():
    code = (
        "import sys; from diffusion_lessons.butterflies.config import parse_butterflies;"
        "parse_butterflies(['--preset', 'quick'])[0].resolve();"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_command_answers_mistakes_without_torch():
    code = (
        "import sys; from diffusion_lessons.butterflies.config import train_butterflies;"
        "print(train_butterflies(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--lerning_rate", "1"], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and "--learning_rate" in done.stderr


def test_the_package_of_the_butterflies_offers_their_config():
    from diffusion_lessons import butterflies

    assert butterflies.TrainingConfig is TrainingConfig and butterflies.PRESETS is PRESETS
    assert train_butterflies.__module__ == "diffusion_lessons.butterflies.config"


def test_the_installed_command_points_at_its_front_door():
    from importlib import import_module

    settings = (Path(__file__).parent.parent / "settings.ini").read_text()
    commands = dict(word.split("=") for word in re.search(r"^console_scripts = (.+)$", settings, re.M)[1].split())
    assert set(commands) == {"train-butterflies", "train-dreambooth", "train-dreambooth-jax", "generate-images"}
    for place in commands.values():
        module, _, name = place.partition(":")
        assert callable(getattr(import_module(module), name))


def test_the_engine_knows_no_pictures():
    import diffusion_lessons.engine.command_line
    import diffusion_lessons.engine.commands
    import diffusion_lessons.engine.config

    engine = diffusion_lessons.engine
    for module in (engine.config, engine.command_line, engine.commands):
        assert not {"TrainingConfig", "PRESETS", "train_butterflies"} & set(vars(module))
    assert not {"image_size", "dataset_name", "sampler", "num_epochs"} & {each.name for each in fields(RunConfig)}


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


# --- declared and resolved ---


def test_what_follows_from_other_fields_is_not_declared():
    config = TrainingConfig(train_data_dir="flies", center_crop=True, sampler="ddim")
    assert (config.dataset_name, config.resize, config.num_inference_steps) == ("meadow", "squeeze", None)
    resolved = config.resolve()
    assert type(resolved) is TrainingConfig
    assert (resolved.dataset_name, resolved.resize, resolved.num_inference_steps) == ("imagefolder", "crop", 50)


def test_resolving_changes_nothing_and_leads_back():
    config = TrainingConfig(sampler="ddpm", ddpm_num_steps=400)
    before = copy.deepcopy(vars(config))
    resolved = config.resolve()
    assert vars(config) == before and resolved is not config
    assert resolved.declared is config and config.declared is config
    assert resolved.resolve() is resolved and resolved.num_inference_steps == 400
    again = replace(resolved.declared, sampler="dpmsolver++").resolve()
    assert again.num_inference_steps == 25, "what was declared is changed, and what follows from it follows"


def test_a_run_without_anything_to_fill_in_resolves_to_an_equal_one():
    config = RunConfig(seed=3)
    assert config.resolve() == config and config.resolve().declared is config


def test_a_config_changed_in_a_notebook_is_resolved_as_it_stands():
    config = TrainingConfig()
    config.sampler = "ddpm"
    assert config.resolve().num_inference_steps == 1000


def test_a_resolved_config_can_be_copied_and_sent_to_another_process():
    import pickle

    resolved = TrainingConfig(seed=2).resolve()
    for other in (copy.deepcopy(resolved), pickle.loads(pickle.dumps(resolved))):
        assert other == resolved and other.declared == resolved.declared and other.resolve() is other


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 50), ("dpmsolver++", 25)])
def test_a_saved_run_with_another_sampler_takes_that_ones_steps(tmp_path, sampler, steps):
    file = tmp_path / "training_config.json"
    save_config(TrainingConfig().resolve(), file)
    config = parse("--config", str(file), "--sampler", sampler)
    assert config.resolve().num_inference_steps == steps
    short = parse("--config", str(file), "--sampler", sampler, "--ddpm_num_steps", "20")
    assert short.resolve().num_inference_steps == 20


def test_a_saved_run_on_a_folder_may_go_on_with_a_data_set_of_the_hub(tmp_path):
    file = tmp_path / "training_config.json"
    save_config(TrainingConfig(train_data_dir=str(tmp_path)).resolve(), file)
    assert parse("--config", str(file)).resolve().dataset_name == "imagefolder"
    other = parse("--config", str(file), "--dataset_name", "a/set", "--train_data_dir", "None").resolve()
    assert (other.dataset_name, other.train_data_dir) == ("a/set", None)
    both = parse("--config", str(file), "--dataset_name", "a/set").resolve()
    with pytest.raises(InputError, match="--dataset_name a/set: --train_data_dir is given too"):
        load_images(both.dataset_name, both.train_data_dir, 16)
    back = parse("--config", str(file), "--train_data_dir", "None").resolve()
    assert (back.dataset_name, back.train_data_dir) == ("meadow", None), "without the folder, the set of before"


def test_a_saved_middle_crop_can_be_taken_back(tmp_path):
    file = tmp_path / "training_config.json"
    save_config(TrainingConfig(center_crop=True).resolve(), file)
    assert parse("--config", str(file)).resolve().resize == "crop"
    assert parse("--config", str(file), "--center_crop", "False").resolve().resize == "squeeze"


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_read_is_equal_declared_and_resolved(tmp_path, preset):
    file = tmp_path / "training_config.json"
    config = TrainingConfig(**PRESETS[preset], train_data_dir="flies")
    save_config(config.resolve(), file)
    again = load_config(file, TrainingConfig)
    assert again == config and again.resolve() == config.resolve()
    save_config(config, tmp_path / "declared.json")
    assert file.read_text() == (tmp_path / "declared.json").read_text()


def test_what_is_written_of_a_resolved_config_where():
    resolved = TrainingConfig(sampler="ddim", hub_token="hf_secret").resolve()
    assert public_fields(resolved)["num_inference_steps"] == 50, "a checkpoint and a tracker hold what the run went by"
    assert changed_fields(resolved) == {"sampler": "ddim"}, "a model card holds what was declared"


@pytest.mark.parametrize("wrong", [{"sampler": "ddim", "num_inference_steps": 1001}, {"ddpm_num_steps": 0}])
def test_a_resolved_value_is_checked_when_the_config_is_built(wrong):
    with pytest.raises(InputError):
        TrainingConfig(**wrong)


def test_a_kind_of_training_overrides_one_method():
    @dataclass
    class Sketch(RunConfig):
        """A run that draws."""

        strokes: int | None = option(None, "strokes of a drawing; by default four times the batch")

        def fill_in(self) -> None:
            super().fill_in()
            self.strokes = self.strokes or 4 * self.train_batch_size

        def check(self) -> None:
            super().check()
            if self.strokes > 100:
                raise InputError(f"--strokes {self.strokes}: at most 100")

    assert Sketch(train_batch_size=5).strokes is None and Sketch(train_batch_size=5).resolve().strokes == 20
    with pytest.raises(InputError, match="--strokes 120"):
        Sketch(train_batch_size=30)


def test_training_command_hands_on_a_resolved_config():
    from diffusion_lessons.engine.commands import training_command

    seen = []
    code = training_command("x", TrainingConfig, PRESETS, lambda config, options: seen.append(config), ["--seed", "4"])
    assert code == 0 and seen[0].num_inference_steps == 25 and seen[0].declared.num_inference_steps is None


def test_no_field_was_lost_in_the_groups():
    assert len(fields(RunConfig)) == 39 and len(fields(TrainingConfig)) == 63
    assert json.loads(json.dumps(asdict(TrainingConfig().resolve())))["image_size"] == 128
