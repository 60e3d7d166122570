"""One text or path means one thing, whichever way it comes: Python, a flag, a YAML or JSON file, a printed command."""

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from dreambooth_runs import dreambooth_words, subject_folder
from runs import words

from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import TrainingConfig, parse_butterflies
from diffusion_lessons.dreambooth.config import DreamBoothConfig, parse_dreambooth
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig, parse_generation
from diffusion_lessons.engine.checkpointer import last_checkpoint_text
from diffusion_lessons.engine.checkpoints import latest_checkpoint
from diffusion_lessons.engine.command_line import LaunchOptions
from diffusion_lessons.engine.config import InputError, load_config, read_config_file, save_config
from diffusion_lessons.miniature.autoencoder import AutoencoderConfig
from diffusion_lessons.miniature.clip import ClipConfig
from diffusion_lessons.miniature.judge import JudgeConfig
from diffusion_lessons.miniature.latent_diffusion import DiffusionConfig
from diffusion_lessons.miniature.stages import AssemblyConfig

NASTY = ["a photo of a sks butterfly 🦋", "für Zoë", "'single' and \"double\"", "two\nlines\tand a tab", "no", "yes",
         "null", "1e-4", "1984", "1.50", "0x10", "12:30:45", "2024-05-01", "true", "~", "~/out", "- a list",
         "key: value", "#1", "[a]", "{b}", "!tag", "*star", "&and", "%", "@", "`$HOME`", " spaces  within ",
         "\u2028\x85\x07", "\\ud83e", "--flag", "None of these"]  # fmt: skip
CONFIGS = [TrainingConfig, DreamBoothConfig, GenerationConfig, LaunchOptions, AssemblyConfig, ClipConfig,
           AutoencoderConfig, DiffusionConfig, JudgeConfig]  # fmt: skip
NEEDED = {"pretrained_model_name_or_path": "miniature", "instance_data_dir": "meadow", "instance_prompt": "a photo"}


@pytest.mark.parametrize("text", NASTY)
def test_a_text_comes_back_from_a_saved_run_as_it_was(tmp_path, text):
    file = tmp_path / "training_config.json"
    config = DreamBoothConfig(**NEEDED | {"instance_prompt": text, "validation_prompt": [text, text]})
    save_config(config, file)
    assert read_config_file(file, DreamBoothConfig)["instance_prompt"] == text
    assert load_config(file, DreamBoothConfig) == config
    assert parse_dreambooth(["--config", str(file)])[0] == config
    flags = [f"--{name}={value}" for name, value in (NEEDED | {"instance_prompt": text}).items()]
    assert parse_dreambooth(flags)[0].instance_prompt == text
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(NEEDED | {"instance_prompt": text}, allow_unicode=True), encoding="utf-8")
    assert load_config(file, DreamBoothConfig).instance_prompt == text


@pytest.mark.parametrize("text", ["no", "1984", "1.50", "1e3", "0x10", "2024-05-01", "true", "12:30:45"])
def test_what_a_yaml_file_says_without_quotes_is_a_text_where_one_is_wanted(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(f"instance_prompt: {text}\nvalidation_prompt: [{text}, two]\nseed: 3\nlora: no\nrevision: null\n")
    read = DreamBoothConfig(**{**NEEDED, **read_config_file(file, DreamBoothConfig)})
    assert (read.instance_prompt, read.validation_prompt) == (text, [text, "two"])
    assert (read.seed, read.lora, read.revision) == (3, False, None)
    file.write_text(f"validation_prompt: {text}\n")
    assert DreamBoothConfig(**{**NEEDED, **read_config_file(file, DreamBoothConfig)}).validation_prompt == [text]


def test_a_file_from_an_editor_with_a_byte_order_mark_and_a_merged_one(tmp_path):
    for name, text in (("a.yaml", "seed: 3\n"), ("b.json", '{"seed": 3}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_config_file(tmp_path / name, TrainingConfig) == {"seed": 3}
    (tmp_path / "c.yaml").write_text("<<: {seed: 3}\nimage_size: 8\n")
    assert read_config_file(tmp_path / "c.yaml", TrainingConfig) == {"seed": 3, "image_size": 8}
    (tmp_path / "d.json").write_text('{"seed": 3,\n}')
    with pytest.raises(InputError, match="d.json: is not valid YAML or JSON at line 2"):
        read_config_file(tmp_path / "d.json", TrainingConfig)


def test_a_prompt_that_is_no_utf8_is_refused_and_a_path_is_kept(tmp_path):
    with pytest.raises(InputError, match=r"--instance_prompt 'caf\\udce9': holds bytes that are no UTF-8"):
        DreamBoothConfig(**NEEDED | {"instance_prompt": "caf\udce9"})
    config = TrainingConfig(output_dir="caf\udce9")
    save_config(config, tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_bytes().count(b"\\udce9") == 1
    assert load_config(tmp_path / "saved.json", TrainingConfig) == config


@pytest.mark.parametrize("name", ["a  'b' \"c\" $HOME `x` 🦋 ä", "--dash", "~"])
def test_the_printed_command_goes_on_with_the_run(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    assert main(words(f"./{name}", max_train_steps=1, num_train_images=4)) == 0
    said = last_checkpoint_text(folder, "train-butterflies").split("go on with: ")[1]
    command, *given = shlex.split(said)
    assert command == "train-butterflies" and main([*given, "--max_train_steps", "2"]) == 0, capsys.readouterr().err
    assert latest_checkpoint(folder)[0].step == 2


def test_a_prompt_with_an_emoji_is_resumed(tmp_path):
    from diffusion_lessons.dreambooth.training import main as dreambooth

    folder = tmp_path / "run"
    given = dreambooth_words(subject_folder(tmp_path / "pictures"), folder, max_train_steps=1, lora=True,
                             instance_prompt="a photo of a sks butterfly 🦋")  # fmt: skip
    assert dreambooth(given) == 0
    _, *given = shlex.split(last_checkpoint_text(folder, "train-dreambooth").split("go on with: ")[1])
    assert dreambooth([*given, "--max_train_steps", "2"]) == 0
    assert "🦋" in (folder / "training_config.json").read_text(encoding="utf-8")


def test_a_run_in_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    assert main(words(folder, max_train_steps=1, num_train_images=4, report_to="tensorboard")) == 0
    assert (folder / "README.md").is_file()


# --- paths ---

OF_PATHS = ("_dir", "_path", "_weights", "checkpoint", "compare_to", "save_pipeline", "tokenizer_name",
            "fidelity_model", "subject_model", "destination", "resume_from_checkpoint", "dataset_name", "config",
            "_name_or_path")  # fmt: skip
OTHERWISE = {"overwrite_output_dir"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_that_may_name_a_file_is_a_path_in_every_config(kind):
    hints = get_type_hints(kind)
    texts = {name for name, hint in hints.items() if "str" in str(hint) and "Literal" not in str(hint)}
    named = {name for name in texts if name.endswith(OF_PATHS)} - OTHERWISE
    assert named == {each.name for each in fields(kind) if each.metadata["path"]}
    base = {DreamBoothConfig: NEEDED, GenerationConfig: {"model_path": "miniature"}}.get(kind, {})
    for name in named:
        other = {"compare_to": ["m"]} if name == "instance_data_dir" and kind is GenerationConfig else {}
        other |= {"model_path": None} if name in ("checkpoint", "lora_weights") else {}
        for value in ("~/some/where", Path("~/some/where")):
            if name == "dataset_name" and kind is TrainingConfig:
                other["train_data_dir"] = None
            found = getattr(kind(**{**base, **other, name: value}), name)
            assert found in (os.path.expanduser("~/some/where"), [os.path.expanduser("~/some/where")]), name


def test_a_path_from_the_shell_from_python_and_from_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_butterflies(["--output_dir=~/out"])[0].output_dir == f"{tmp_path}/out"
    assert parse_generation(["--model_path=~/m", "--prompt", "a fish"]).model_path == f"{tmp_path}/m"
    (tmp_path / "run.yaml").write_text("output_dir: ~/there\n")
    assert parse_butterflies(["--config=~/run.yaml"])[0].output_dir == f"{tmp_path}/there"
    assert TrainingConfig(output_dir=Path("x")) == TrainingConfig(output_dir="x")
    config = TrainingConfig()
    config.output_dir = Path("~/later")  # a notebook changes a field after it was checked
    assert config.resolve().output_dir == f"{tmp_path}/later"
    save_config(config, tmp_path / "saved.json")
    assert load_config(tmp_path / "saved.json", TrainingConfig).output_dir == f"{tmp_path}/later"


def test_a_run_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(words("~/out", max_train_steps=1, num_train_images=4)) == 0
    assert (tmp_path / "out" / "model_index.json").is_file() and not (tmp_path / "~").exists()


# --- texts that say nothing ---


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_text_is_refused_wherever_a_text_is_meant(kind, empty):
    hints = get_type_hints(kind)
    base = {DreamBoothConfig: NEEDED, GenerationConfig: {"model_path": "miniature"}}.get(kind, {})
    for each in fields(kind):
        if {str, list[str]} & {*getattr(hints[each.name], "__args__", ()), hints[each.name]}:
            if each.name == "negative_prompt":
                assert kind(**{**base, each.name: empty}).negative_prompt == empty
                continue
            with pytest.raises(InputError, match=f"--{each.name} {empty!r}: is empty"):
                kind(**{**base, each.name: empty})


def test_an_empty_variable_starts_no_new_run_in_the_old_folder(tmp_path, capsys):
    assert main(words(tmp_path, resume_from_checkpoint="")) == 2
    assert "--resume_from_checkpoint '': is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_none_takes_a_presets_prompts_away():
    assert parse_dreambooth(["--preset", "quick", "--validation_prompt", "None"])[0].validation_prompt is None
