"""Whether a run fits its card: said before anything is loaded, in one line, with the recipe that fits."""

import json
from pathlib import Path

import pytest
import torch
from dreambooth_runs import class_folder, dreambooth_words, prior_words, subject_folder
from test_memory_estimate import SHAPES

from diffusion_lessons.dreambooth import fit, preparation
from diffusion_lessons.dreambooth import training as dreambooth
from diffusion_lessons.dreambooth.config import RECIPES, DreamBoothConfig
from diffusion_lessons.dreambooth.fit import (
    CardMemory,
    card_memory,
    certain,
    check_fit,
    memory_table,
    phases_of_run,
    surely_missing,
)
from diffusion_lessons.dreambooth.memory import PhaseMemory
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.precision import Phase
from diffusion_lessons.stable_diffusion.folder import find_model

GIB = 2**30


def a_config(**values) -> DreamBoothConfig:
    needed = {"pretrained_model_name_or_path": "anything", "instance_data_dir": "dog", "instance_prompt": "a sks dog"}
    return DreamBoothConfig(**needed | values).resolve()


def invented(config: DreamBoothConfig, folder: object = None, deepspeed: bool = False) -> list[PhaseMemory]:
    """An estimate in round numbers."""
    state = 2.0 if config.use_8bit_adam else 6.0
    weights, gradients = (1.5, 0.5) if config.full_bf16 else (3.0, 3.0)
    activations = config.train_batch_size * (0.5 if config.gradient_checkpointing else 2.0)
    if config.lora or deepspeed:
        weights, gradients, state = 1.5, 0.0 if config.lora else 1.8, 0.0
    drawing = 0.2 * config.sample_batch_size
    return [PhaseMemory(Phase.CLASS_IMAGES, weights=1.5, activations=drawing),
            PhaseMemory(Phase.ENCODE, weights=0.4, activations=0.3),
            PhaseMemory(Phase.TRAIN, weights, gradients, state, activations=activations, host=16.0 * deepspeed),
            PhaseMemory(Phase.LOOK, weights + 1.5, optimizer=state, activations=drawing)]


@pytest.fixture
def by_invention(monkeypatch):
    monkeypatch.setattr(fit, "estimate", invented)


@pytest.mark.parametrize("whole, values, said", [
    (14.0, {}, "train (3.0 of weights, 6.0 of the optimizer's, 11.0 for the work), and there are 14.0; --recipe 16gb "
               "would fit, with 8.5"),
    (14.0, {"train_batch_size": 8}, "; --recipe 16gb without --train_batch_size would fit"),
    (14.0, {"train_text_encoder": True}, "--recipe 24gb would fit"),
    (8.0, {}, "--recipe 8gb under DeepSpeed would fit, with 3.8"),
    (8.0, {"use_8bit_adam": True, "gradient_checkpointing": True, "train_batch_size": 8},
     "--recipe 8gb under DeepSpeed without --train_batch_size, --use_8bit_adam would fit"),
    (8.0, {"full_bf16": True, "use_8bit_adam": True}, "; --recipe 16gb would fit, with 4.5"),
    (3.0, {"full_bf16": True, "use_8bit_adam": True}, "--train_batch_size 1 without --full_bf16 would fit"),
    (3.0, {}, "--lora --gradient_checkpointing --train_batch_size 1 would fit, with 2.0"),
    (1.0, {}, "take a smaller --resolution or a larger card"),
])  # fmt: skip
def test_what_cannot_fit_is_answered_with_the_cheapest_way_that_does(whole, values, said, by_invention):
    with pytest.raises(InputError) as caught:
        check_fit(a_config(**values), "nowhere", CardMemory(whole, whole))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_is_certain_is_refused(by_invention):
    config = a_config(use_8bit_adam=True)  # 3 + 3 + 2 + 8, of which 14.4 are certain
    assert certain(invented(config)[2]) == pytest.approx(14.4)
    with pytest.raises(InputError):
        check_fit(config, "nowhere", CardMemory(14.3, 14.3))
    for card in (CardMemory(14.5, 14.5), CardMemory(24.0, 2.0), CardMemory(16.4, 16.4)):  # 16.4: no work space
        note = check_fit(config, "nowhere", card)
        assert "about 16.0 GiB to train" in note and "may not fit" in note, "somebody who holds the rest may go"
    assert check_fit(config, "nowhere", CardMemory(16.6, 16.6)) is None


def test_only_phases_that_the_run_has_are_compared(tmp_path, by_invention):
    small = dict(use_8bit_adam=True, gradient_checkpointing=True, train_batch_size=1, sample_batch_size=60)
    card = CardMemory(9.5, 9.5)
    assert check_fit(a_config(**small), "nowhere", card) is None
    with pytest.raises(InputError, match="to look"):
        check_fit(a_config(**small, validation_prompt="a sks dog"), "nowhere", card)
    with pytest.raises(InputError, match="to draw class images"):
        check_fit(a_config(**small, **prior_words(tmp_path / "none", 3)), "nowhere", card)
    class_folder(tmp_path / "class", 3)
    assert check_fit(a_config(**small, **prior_words(tmp_path / "class", 3)), "nowhere", card) is None


def test_class_images_are_surely_missing_where_there_are_too_few_files(tmp_path):
    assert not surely_missing(a_config()) and surely_missing(a_config(**prior_words(tmp_path / "none", 1)))
    class_folder(tmp_path / "class", 3)
    assert [surely_missing(a_config(**prior_words(tmp_path / "class", n))) for n in (3, 4)] == [False, True]


def test_without_a_card_nothing_is_estimated(monkeypatch):
    monkeypatch.setattr(fit, "estimate", lambda *_: pytest.fail("it takes seconds"))
    assert card_memory(torch.device("cpu")) is None and check_fit(a_config(), "nowhere", None) is None


@pytest.mark.parametrize("fraction, own, expected", [
    (1.0, 0, (24.0, 20.0)), (0.5, 0, (12.0, 12.0)), (1.0, 2, (24.0, 22.0)), (0.25, 8, (6.0, 6.0))])
def test_a_card_has_what_it_has_within_the_bound_of_the_process(fraction, own, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert card_memory(torch.device("cuda")) == expected


def test_a_run_that_cannot_fit_ends_before_anything_is_read(tmp_path, monkeypatch, capsys, by_invention):
    subject_folder(tmp_path / "subject")
    monkeypatch.setattr(dreambooth, "card_memory", lambda device: CardMemory(8.0, 7.0))
    for room, name in ((dreambooth, "network_fingerprints"), (preparation, "load_pipeline")):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("weights were read"))
    assert dreambooth.main(dreambooth_words(tmp_path / "subject", tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("train-dreambooth: memory: this run needs about 14.0 GiB to train") and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_fit_is_told_and_goes_on(tmp_path, monkeypatch, capsys, by_invention):
    subject_folder(tmp_path / "subject")
    monkeypatch.setattr(dreambooth, "card_memory", lambda device: CardMemory(24.0, 7.0))
    assert dreambooth.main(dreambooth_words(tmp_path / "subject", tmp_path / "run", max_train_steps=1)) == 0
    assert "note: memory: this run needs about 14.0 GiB to train" in capsys.readouterr().out


def test_the_miniature_fits_every_card():
    config = DreamBoothConfig(pretrained_model_name_or_path="miniature", instance_data_dir="meadow", resolution=64,
                              instance_prompt="a photo of a sks butterfly").resolve()
    assert check_fit(config, find_model("miniature"), CardMemory(4.0, 4.0)) is None


@pytest.fixture
def stable_diffusion(tmp_path) -> Path:
    """A folder with the configs of Stable Diffusion 1.4 and nothing else."""
    for name, about in SHAPES["1.4"].items():
        path = tmp_path / name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(about), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_recipe_for_16_gb_fits_16_gib(stable_diffusion):
    assert check_fit(a_config(**RECIPES["16gb"]), stable_diffusion, CardMemory(15.6, 15.2)) is None


@pytest.mark.slow
def test_stable_diffusion_on_a_card_of_4_gib(stable_diffusion):
    """Full fine-tuning on the card is refused, and offloading is what is left, by estimates of the real shapes."""
    with pytest.raises(InputError, match="--recipe 8gb under DeepSpeed without --use_8bit_adam, --use_ema would fit"):
        check_fit(a_config(**RECIPES["16gb"], use_ema=True), stable_diffusion, CardMemory(4.0, 4.0))


# --- as a table ---


def test_a_table_has_a_row_for_each_phase():
    table = memory_table(phases_of_run(a_config(), invented(a_config())), on_a_gpu=False)
    heading, names, *rows = table.splitlines()
    assert "as on a GPU it would be" in heading and names.split() == ["weights", "state", "work", "total"]
    assert [row.split()[-4:] for row in rows] == [["0.40", "0.00", "0.30", "0.70"], ["3.00", "6.00", "11.00", "20.00"]]
    assert "as on a GPU" not in memory_table(invented(a_config()))
    assert memory_table(invented(a_config(), deepspeed=True)).count("and 16.00 in the computer's memory") == 1


def test_a_dry_run_prints_it(tmp_path, capsys):
    subject_folder(tmp_path / "subject")
    given = dreambooth_words(tmp_path / "subject", tmp_path / "run", "--dry_run", validation_prompt="a photo")
    assert dreambooth.main(given) == 0
    said = capsys.readouterr().out
    assert "memory by phase" in said and all(name in said for name in ("encode pictures", "  train ", "  look "))
    assert "class images  " not in said.split("memory by phase")[1]
