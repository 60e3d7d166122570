"""Recipes: what each sets, what lies over it, what undoes it, and what a machine has of it."""

import shlex
from dataclasses import asdict, replace

import pytest
import torch
from dreambooth_runs import dreambooth_words, subject_folder
from runs import words

from diffusion_lessons.butterflies import command as butterflies
from diffusion_lessons.dreambooth import fit, loop
from diffusion_lessons.dreambooth import training as dreambooth
from diffusion_lessons.dreambooth.config import RECIPES, DreamBoothConfig, costs_more, parse_dreambooth
from diffusion_lessons.dreambooth.fit import recipe_notes, settle_recipe
from diffusion_lessons.engine.config import InputError, RunConfig, save_config
from diffusion_lessons.engine.devices import out_of_memory_text
from diffusion_lessons.engine.precision import Phase

NEEDED = ["--pretrained_model_name_or_path", "miniature", "--instance_data_dir", "meadow", "--instance_prompt", "a dog"]
XFORMERS = "enable_xformers_memory_efficient_attention"


def parse(flags: str = ""):
    return parse_dreambooth([*NEEDED, *shlex.split(flags)])


def configured(flags: str = "") -> DreamBoothConfig:
    return parse(flags)[0]


# --- what is set, and what lies over it ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_flags_that_it_stands_for(recipe):
    flags = " ".join(f"--{name} {value}" for name, value in RECIPES[recipe].items())
    config, launch = parse(f"--recipe {recipe}")
    assert config == configured(flags)
    changed = {name for name, value in asdict(config).items() if value != asdict(configured())[name]}
    assert changed <= RECIPES[recipe].keys(), "nothing else"
    assert launch.recipe_text.startswith(f"recipe {recipe}: --") and "over it" not in launch.recipe_text


def test_default_preset_recipe_file_and_flag_go_over_each_other_in_this_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_batch_size: 3\nsample_batch_size: 5\n", encoding="utf-8")
    config, launch = parse_dreambooth(
        ["--preset", "quick", "--recipe", "8gb-fused", "--config", str(file), "--sample_batch_size", "6"])
    assert config.max_train_steps == 300 and not config.use_ema, "the preset, and the recipe over it"
    assert (config.train_batch_size, config.sample_batch_size) == (3, 6)
    assert launch.recipe_text.endswith(
        "; over it: --train_batch_size 3 of the config file, --sample_batch_size 6 of a flag")


def test_a_saved_run_needs_no_recipe_to_be_repeated(tmp_path):
    config = configured("--recipe 16gb --train_batch_size 2")
    save_config(config.resolve(), tmp_path / "training_config.json")
    assert parse_dreambooth(["--config", str(tmp_path / "training_config.json")])[0] == config


@pytest.mark.parametrize("main, given, said", [
    (dreambooth.main, [*NEEDED, "--recipe", "10gb"],
     "train-dreambooth: --recipe 10gb: choose one of 24gb, 16gb, 12gb, 8gb, 8gb-fused"),
    (butterflies.main, ["--recipe", "12gb"],
     "train-butterflies: --recipe 12gb: train-butterflies has no recipes; leave it out"),
])  # fmt: skip
def test_a_recipe_that_is_not_known_is_one_line(main, given, said, capsys):
    assert main(given) == 2
    assert capsys.readouterr().err.strip() == said


def test_the_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        parse_dreambooth(["--help"])
    assert "a recipe (24gb, 16gb, 12gb, 8gb, 8gb-fused) over the preset" in " ".join(capsys.readouterr().out.split())


# --- what undoes it ---


@pytest.mark.parametrize("flags, field, why", [
    ("--recipe 12gb --train_batch_size 8", "train_batch_size 8", "activations grow"),
    ("--recipe 12gb --train_text_encoder", "train_text_encoder True", "a second network"),
    ("--recipe 16gb --gradient_checkpointing False", "gradient_checkpointing False", "all activations"),
    ("--recipe 16gb --use_8bit_adam False", "use_8bit_adam False", "eight bytes"),
    ("--recipe 24gb --use_ema", "use_ema True", "one more copy"),
    ("--recipe 24gb --resolution 768", "resolution 768", "the area"),
    ("--recipe 12gb --no_cache_latents", "cache_latents False", "the autoencoder"),
    ("--recipe 8gb --mixed_precision no", "mixed_precision no", "32 bits"),
    ("--recipe 8gb --use_ema", "use_ema True", "one more copy"),
    ("--recipe 8gb-fused --fused_backward_pass False", "fused_backward_pass False", "all gradients"),
    ("--recipe 8gb-fused --full_bf16 False", "full_bf16 False", "32 bits"),
    ("--recipe 8gb-fused --sample_batch_size 4", "sample_batch_size 4", "drawn at a time"),
])  # fmt: skip
def test_a_flag_that_defeats_a_recipe_is_named_with_what_it_costs(flags, field, why):
    config, launch = parse(flags)
    (note,) = recipe_notes(config.resolve(), launch.recipe, launch.given)
    assert note.startswith(f"--{field}: --recipe {launch.recipe} counts on ") and why in note
    assert note.endswith(f"more than {launch.recipe.split('gb')[0]} GB")


@pytest.mark.parametrize("flags", [
    "--recipe 24gb", "--recipe 24gb --train_text_encoder", "--recipe 24gb --train_text_encoder False",
    "--recipe 12gb --set_grads_to_none False", "--recipe 12gb --lora", "--recipe 16gb --resolution 256",
    "--recipe 8gb-fused --seed 3", "--recipe 16gb --gradient_accumulation_steps 4", "--recipe 12gb --preset quick",
])  # fmt: skip
def test_what_costs_nothing_is_not_named(flags):
    config, launch = parse(flags)
    assert recipe_notes(config.resolve(), launch.recipe, launch.given) == []


def test_a_file_undoes_a_recipe_as_a_flag_does(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("gradient_checkpointing: false\n", encoding="utf-8")
    config, launch = parse(f"--recipe 12gb --config {file}")
    assert len(recipe_notes(config, "12gb", launch.given)) == 1, "also where it is the default"


@pytest.mark.parametrize("flags", ["--use_ema", "--gradient_accumulation_steps 4", "--lora", "--mixed_precision fp16"])
def test_what_cannot_work_with_a_recipe_is_refused_and_the_recipe_is_named(flags):
    with pytest.raises(InputError, match="set by --recipe 8gb-fused"):
        parse(f"--recipe 8gb-fused {flags}")


def test_a_mistake_that_is_not_the_recipes_does_not_name_it():
    with pytest.raises(InputError) as caught:
        parse("--recipe 8gb-fused --resolution 100")
    assert "recipe" not in str(caught.value)


# --- what a machine has of it ---


def test_xformers_is_left_out_of_a_recipe_where_it_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(fit, "xformers_fault", lambda: "xFormers is not installed")
    settled = settle_recipe(*parse("--recipe 12gb"))
    assert not getattr(settled.declared, XFORMERS), "a resumed run does not stumble over it"
    assert "recipe 12gb: xFormers is not installed; PyTorch's own attention is used" in capsys.readouterr().out
    typed, launch = parse(f"--recipe 12gb --{XFORMERS}")
    assert getattr(settle_recipe(typed, launch), XFORMERS), "a flag stays, and is refused where it does not run"
    monkeypatch.setattr(fit, "xformers_fault", lambda: None)
    assert getattr(settle_recipe(*parse("--recipe 12gb")), XFORMERS)


def test_xformers_is_not_tried_out_before_processes_are_forked(monkeypatch, capsys):
    monkeypatch.setattr(fit, "xformers_fault", lambda: pytest.fail("this starts the GPU"))
    assert not getattr(settle_recipe(*parse("--recipe 12gb --num_processes 2")), XFORMERS)


def test_8gb_is_no_good_without_deepspeed(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert dreambooth.main([*NEEDED, "--recipe", "8gb"]) == 2
    said = capsys.readouterr().err
    assert "--write_deepspeed_config ds.yaml" in said and "accelerate launch --config_file ds.yaml" in said
    assert len(said.strip().splitlines()) == 1
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    on_a_cpu = settle_recipe(*parse("--recipe 8gb"))
    assert on_a_cpu.mixed_precision == ("fp16" if torch.cuda.is_available() else "bf16")


def test_no_recipe_changes_nothing(monkeypatch):
    monkeypatch.setattr(fit, "xformers_fault", lambda: pytest.fail("nobody asked"))
    config, launch = parse()
    assert settle_recipe(config, launch) == config.resolve()


def test_a_run_says_its_recipe_and_records_what_it_had(tmp_path, capsys):
    subject_folder(tmp_path / "subject")
    given = dreambooth_words(tmp_path / "subject", tmp_path / "run", "--recipe", "12gb", "--use_8bit_adam", "False",
                             max_train_steps=1)
    assert dreambooth.main(given) == 0
    said = capsys.readouterr().out
    assert "recipe 12gb: --use_8bit_adam, --gradient_checkpointing, --train_batch_size 1" in said
    assert "over it: --use_8bit_adam False of a flag" in said and "note: --use_8bit_adam False: --recipe 12gb" in said
    saved = parse_dreambooth(["--config", str(tmp_path / "run" / "training_config.json")])[0]
    assert saved.gradient_checkpointing and not saved.use_8bit_adam


# --- when memory has run out ---


@pytest.mark.parametrize("flags, following", [
    ("", "--recipe 16gb"), ("--train_text_encoder", "--recipe 24gb"),
    ("--recipe 24gb", "--recipe 8gb under DeepSpeed without --use_8bit_adam"),
    ("--recipe 12gb", "--recipe 8gb under DeepSpeed without --use_8bit_adam"),
    ("--recipe 16gb --train_batch_size 2", "--recipe 16gb without --train_batch_size"),
    ("--recipe 8gb-fused", None),
    ("--recipe 8gb-fused --train_batch_size 2", "--recipe 8gb-fused without --train_batch_size"),
    ("--lora", "--recipe 16gb"), ("--lora --gradient_checkpointing --train_batch_size 1", None),
])  # fmt: skip
def test_the_next_recipe_asks_for_less_than_what_is_set(flags, following):
    config = configured(flags).resolve()
    assert config.next_recipe() == following
    said = out_of_memory_text(config, Phase.TRAIN)
    assert (f"; or several at once, by {following}" in said) if following else ("recipe" not in said)


def test_under_deepspeed_the_fused_step_is_next(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    config = configured("--recipe 8gb --mixed_precision bf16").resolve()
    assert "by --recipe 8gb-fused" in out_of_memory_text(config, Phase.TRAIN)


def test_the_engine_itself_has_no_recipes():
    assert RunConfig().next_recipe() is None and "recipe" not in out_of_memory_text(RunConfig(), Phase.TRAIN)


def test_memory_that_runs_out_names_checkpoint_and_recipe(tmp_path, capsys, monkeypatch):
    subject_folder(tmp_path / "subject")
    steps, really = [], loop.noise_batch

    def runs_out(*given, **named):
        steps.append(1)
        if len(steps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return really(*given, **named)

    monkeypatch.setattr(loop, "noise_batch", runs_out)
    assert dreambooth.main(dreambooth_words(tmp_path / "subject", tmp_path / "run", max_train_steps=4)) == 1
    said = capsys.readouterr().err
    assert "by --recipe 16gb. " in said and "checkpoint-2" in said


# --- comparing ---


def test_values_are_compared_in_the_direction_in_which_they_cost():
    assert costs_more({"train_batch_size": 2}, {"train_batch_size": 2, "use_ema": False}) == {}
    assert list(costs_more({"full_bf16": False, "use_ema": True}, RECIPES["8gb-fused"])) == ["use_ema", "full_bf16"]
    assert costs_more({"mixed_precision": None}, RECIPES["8gb"]) == {}, "half on a GPU, if nobody says otherwise"


def test_recipes_stand_in_the_order_of_what_they_ask_for():
    base = configured("--train_text_encoder")
    for larger, smaller in (("24gb", "16gb"), ("16gb", "12gb"), ("12gb", "8gb-fused")):
        assert not costs_more(asdict(replace(base, **RECIPES[smaller])), asdict(replace(base, **RECIPES[larger])))


def test_butterflies_go_on_without(tmp_path, capsys):
    assert butterflies.main(words(tmp_path / "run", max_train_steps=1)) == 0
    assert "recipe" not in capsys.readouterr().out
