"""The flags of DreamBooth in JAX: those of the Flax script are walked through; what it lacked, and what is refused."""

import json
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from script_flags import CLASS, IN_ALL_SCRIPTS, NEEDED, as_words, table_of_script

from diffusion_lessons.dreambooth.config import DREAMBOOTH_PRESETS, DreamBoothConfig, OtherModelOptions
from diffusion_lessons.engine.config import InputError, load_config, save_config
from diffusion_lessons.jax.config import (
    DREAMBOOTH_JAX_PRESETS,
    JAX_PACKAGES,
    DreamBoothJaxConfig,
    FlaxOptions,
    TorchOnlyOptions,
    parse_dreambooth_jax,
)

# flag: its type and default in train_dreambooth_flax.py, and some other value to give it
FLAX = IN_ALL_SCRIPTS | {
    "pretrained_vae_name_or_path": (str, None, "a/vae"),
    "output_dir": (str, "text-inversion-model", "out"),
    "save_steps": (int, None, 50),
    "seed": (int, 0, 7),
    "learning_rate": (float, 5e-06, 1e-05),
    "mixed_precision": (str, "no", "bf16"),
}
# What the Flax script lacked, under the names of the PyTorch script and of this course.
ADDED = {
    "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "lr_scheduler": "cosine", "lr_warmup_steps": 3,
    "use_ema": True, "validation_prompt": "a photo of sks dog", "num_validation_images": 2, "validation_steps": 20,
    "checkpointing_steps": 10, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest", "force_resume": True,
    "snr_gamma": 5.0, "fidelity_model": "miniature", "subject_model": "none", "on_bad_image": "skip",
    "overwrite_output_dir": False, "shard_parameters": True, "prior_generation_precision": "bf16",
    "validation_scheduler": "DDIMScheduler",
}  # fmt: skip
REFUSED = {
    "lora": True, "rank": 8, "lora_dropout": 0.1, "lora_format": "kohya", "use_8bit_adam": True, "full_bf16": True,
    "fused_backward_pass": True, "enable_xformers_memory_efficient_attention": True, "allow_tf32": True,
    "dataloader_num_workers": 2, "cache_latents": False,
}  # fmt: skip


def parse(*words: str, **values) -> DreamBoothJaxConfig:
    """The config of a command that has what every run needs."""
    return parse_dreambooth_jax([*as_words(NEEDED | values), *words])[0]


def test_the_table_is_that_of_the_script(shared_data):
    text = (shared_data.parent / "reference" / "reference_flags.md").read_text()
    there = table_of_script(text, "train_dreambooth_flax.py")
    assert len(there) == 34 and there == {name: (kind, default) for name, (kind, default, _) in FLAX.items()}


@pytest.mark.parametrize("flag", FLAX)
def test_a_flag_of_the_flax_script_means_what_it_meant(flag, monkeypatch):
    """Its default is the script's, and another value arrives under its name, in both spellings."""
    monkeypatch.delenv("HF_HUB_OFFLINE")  # offline, --push_to_hub is refused
    kind, default, other = FLAX[flag]
    if flag not in NEEDED:
        assert getattr(parse().resolve(), flag) == default
    value = getattr(parse(**(CLASS if flag == "with_prior_preservation" else {}), **{flag: other}), flag)
    assert value == other and isinstance(value, kind)
    if kind is not bool:
        words = as_words({name: given for name, given in NEEDED.items() if name != flag})
        assert getattr(parse_dreambooth_jax([*words, f"--{flag}={other}"])[0], flag) == other


@pytest.mark.parametrize("flag", ADDED)
def test_what_the_flax_script_lacked_has_the_pytorch_name_and_default(flag):
    value = getattr(parse(**{flag: ADDED[flag]}), flag)
    assert value == ([ADDED[flag]] if flag == "validation_prompt" else ADDED[flag])
    if flag not in {each.name for each in fields(FlaxOptions)}:
        assert getattr(parse(), flag) == getattr(DreamBoothConfig(**NEEDED), flag) != ADDED[flag]


def test_refused_are_just_the_flags_of_pytorch():
    assert {each.name for each in fields(TorchOnlyOptions)} == set(REFUSED)
    helps = {each.name: each.metadata["help"] for each in fields(DreamBoothJaxConfig)}
    marked = {name for name, text in helps.items() if text.startswith("refused: ")}
    assert marked == set(REFUSED) | {each.name for each in fields(OtherModelOptions)}
    assert all("train-dreambooth" in helps[name] for name in REFUSED), "the help says who has it"


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_of_pytorch_is_refused_in_one_line_and_its_default_is_not(flag):
    with pytest.raises(InputError) as error:
        parse(**{flag: REFUSED[flag]})
    message = str(error.value)
    assert message.startswith(f"--{flag} {REFUSED[flag]}: ") and "train-dreambooth" in message
    assert "\n" not in message and len(message) < 200
    usual = next(each.default for each in fields(TorchOnlyOptions) if each.name == flag)
    assert usual == next(each.default for each in fields(DreamBoothConfig) if each.name == flag)
    assert getattr(DreamBoothJaxConfig(**NEEDED, **{flag: usual}), flag) == usual


@pytest.mark.parametrize(
    "values, words",
    [
        ({"mixed_precision": "fp16"}, ["--mixed_precision fp16", "bf16"]),
        ({"prior_generation_precision": "fp16"}, ["--prior_generation_precision fp16", "bf16"]),
        ({"validation_scheduler": "DDPMScheduler"}, ["--validation_scheduler", "DDIMScheduler"]),
        ({"save_steps": 0}, ["--save_steps 0", "1 or more"]),
        ({"seed": -1}, ["--seed -1", "0 or more"]),
        ({"resolution": 100}, ["--resolution 100", "multiple of 8"]),
        ({"with_prior_preservation": True}, ["--with_prior_preservation", "--class_data_dir"]),
        ({"pretrained_vae_name_or_path": "out/vae", "output_dir": "out"}, ["--pretrained_vae_name_or_path", "clears"]),
        ({"class_data_dir": "text-inversion-model"}, ["--class_data_dir", "--output_dir"]),
        ({"num_processes": 2}, ["--num_processes 2", "JAX_NUM_PROCESSES"]),
        ({"write_deepspeed_config": "d.yaml"}, ["--write_deepspeed_config d.yaml", "--shard_parameters"]),
        ({"recipe": "16gb"}, ["--recipe 16gb", "train-dreambooth-jax has no recipes"]),
        ({"preset": "slow"}, ["--preset slow", "quick"]),
        ({"instance_promt": "x"}, ["--instance_promt", "unknown flag", "--instance_prompt"]),
        ({"shard_parameter": True}, ["--shard_parameter", "--shard_parameters"]),
    ],
)
def test_mistakes_are_answered_in_one_line(values, words):
    with pytest.raises(InputError) as error:
        parse(**values)
    message = str(error.value)
    assert "\n" not in message and len(message) < 230
    assert all(word in message for word in words), message


def test_a_vae_beside_the_output_folder_is_no_mistake():
    config = parse(pretrained_vae_name_or_path="outside/vae", output_dir="out")
    assert config.pretrained_vae_name_or_path == "outside/vae"


def test_a_saved_run_of_pytorch_is_understood(tmp_path):
    file = tmp_path / "training_config.json"
    save_config(DreamBoothConfig(**NEEDED, max_train_steps=30, output_dir="out", seed=4, mixed_precision="no"), file)
    again = parse_dreambooth_jax(["--config", str(file), "--max_train_steps", "40"])[0]
    assert (again.max_train_steps, again.seed, again.output_dir) == (40, 4, "out")
    save_config(DreamBoothConfig(**NEEDED, lora=True, seed=4, output_dir="out", mixed_precision="no"), file)
    with pytest.raises(InputError, match="--lora True: does not go with JAX"):
        parse_dreambooth_jax(["--config", str(file)])


def test_a_saved_config_comes_back_as_it_was_declared(tmp_path):
    config = DreamBoothJaxConfig(**NEEDED, hub_token="hf_secret", shard_parameters=True, save_steps=20)
    save_config(config, tmp_path / "training_config.json")
    content = json.loads((tmp_path / "training_config.json").read_text())
    assert "hub_token" not in content and content["shard_parameters"] is True
    config.hub_token = None
    assert load_config(tmp_path / "training_config.json", DreamBoothJaxConfig) == config


def test_layers_are_default_preset_file_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("resolution: 128\nmax_train_steps: 30\nsave_steps: 10\n")
    words = ["--preset", "quick", "--config", str(file), "--max_train_steps", "7", "--dry_run"]
    config, launch = parse_dreambooth_jax(words)
    assert launch.dry_run and (config.resolution, config.max_train_steps, config.save_steps) == (128, 7, 10)
    assert config.output_dir == "outputs/dreambooth-jax", "beside the PyTorch run, which stays"


def test_the_preset_is_that_of_pytorch_in_a_folder_of_its_own():
    ours, theirs = DREAMBOOTH_JAX_PRESETS["quick"], DREAMBOOTH_PRESETS["quick"]
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"output_dir"} and set(ours) == set(theirs)


def test_flags_without_effect_are_named():
    _, launch = parse_dreambooth_jax([*as_words(NEEDED), "--num_class_images", "5", "--ema_power", "0.9"])
    assert len(launch.notes) == 2 and all("does nothing without" in note for note in launch.notes)


def test_every_field_has_its_help_and_secrets_are_marked():
    mine = {each.name: each for each in fields(DreamBoothJaxConfig)}
    assert all(each.metadata["help"] and each.default is not MISSING for each in mine.values())
    assert [name for name, each in mine.items() if each.metadata["secret"]] == ["hub_token"]
    theirs = {each.name: each.metadata["fixed"] for each in fields(DreamBoothConfig)}
    assert {name: mine[name].metadata["fixed"] for name in theirs} == theirs, "what resuming guards is the same"


WITHOUT_JAX = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.jax.config import DreamBoothJaxConfig, parse_dreambooth_jax, require_jax

assert parse_dreambooth_jax(["--preset", "quick"])[0].max_train_steps == 300
try:
    require_jax()
    print("all there")
except InputError as error:
    print(error)
print(sorted({{"jax", "flax", "optax", "torch", "diffusers"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("absent", [["jax", "flax", "optax", "orbax"], ["orbax"]])
def test_without_jax_the_words_are_read_and_one_line_says_what_to_install(absent, tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX.format(absent=absent)], capture_output=True, text=True,
                          cwd=tmp_path, check=True)
    line, loaded = done.stdout.splitlines()
    names = [package for package in JAX_PACKAGES if package.split("-")[0] in absent]
    assert ", ".join(names) in line and "pip install 'diffusion_lessons[jax]'" in line and loaded == "[]"


def test_a_folder_of_that_name_is_no_jax(tmp_path):
    """Where the notebooks lie there is one, and Python would find it."""
    (tmp_path / "jax").mkdir()
    code = """
import importlib.util, sys
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.jax.config import require_jax
sys.path[:] = [place for place in sys.path if not place.endswith("site-packages")]
print(importlib.util.find_spec("jax") is not None)
try:
    require_jax()
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    found, line = done.stdout.splitlines()
    assert found == "True" and "needs jax, flax, optax, orbax-checkpoint," in line
