"""Low-rank adapters: the equation, the file that every tool opens, going on, and adapters for another model."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from dreambooth_runs import SUBJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.adapters import (
    KOHYA_FILE,
    LORA_FILE,
    AdapterFile,
    adapter_state,
    check_adapter,
    load_adapter,
    read_adapter,
    save_adapters,
    to_kohya,
)
from diffusion_lessons.dreambooth.lora import ADAPTED, adapter_size, add_adapters
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.stable_diffusion.drawing import draw

RANK = 3


def picture(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    return draw(pipeline, [SUBJECT] * 2, num_inference_steps=2, size=32, guidance_scale=3.0)[:, :, ::2].int()


def off(first: torch.Tensor, second: torch.Tensor) -> int:
    return int((first - second).abs().max())


def shake(models: dict[str, torch.nn.Module], seed: int = 0) -> None:
    """Give every adapter numbers as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.3, generator=generator)


def adapted(rank: int = RANK, text: bool = True, seed: int = 0) -> tuple[StableDiffusionPipeline, dict]:
    """A miniature with adapters that have learned something random, and its models."""
    pipeline = miniature.load()
    models = {"unet": pipeline.unet} | ({"text_encoder": pipeline.text_encoder} if text else {})
    add_adapters(models, rank, seed=seed)
    shake(models, seed)
    return pipeline, models


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    """What the untouched model draws."""
    return picture(miniature.load())


@pytest.fixture(scope="module")
def trained() -> tuple[StableDiffusionPipeline, dict]:
    return adapted()


@pytest.fixture(scope="module")
def expected(trained, base) -> torch.Tensor:
    """What the trained pipeline draws, which is something else."""
    drawn = picture(trained[0])
    assert off(drawn, base) > 20
    return drawn


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("adapter") / "run"
    save_adapters(trained[1], place, "kohya")
    return place


@pytest.fixture
def plain() -> StableDiffusionPipeline:
    """The miniature by diffusers alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.path())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = miniature.load().scheduler
    return pipeline


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the equation ---


def test_zero_at_the_start_and_nothing_but_adapters_is_trained(base):
    pipeline = miniature.load()
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    state = torch.get_rng_state()
    add_adapters(models, RANK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(picture(pipeline), base)
    for name, model in models.items():
        named = dict(model.named_parameters())
        trained = {key for key, parameter in named.items() if parameter.requires_grad}
        assert trained == {key for key in named if ".lora_A." in key or ".lora_B." in key}
        assert all(named[key].dtype == torch.float32 for key in trained)
        assert all(named[key].count_nonzero() == 0 for key in trained if ".lora_B." in key)
        assert all(named[key].std() > 0 for key in trained if ".lora_A." in key)
        layers = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in trained}
        assert layers <= {wanted.rsplit(".")[-1] for wanted in ADAPTED[name]} and len(layers) == 4
        after = model.state_dict()
        frozen = {key.replace(".base_layer", ""): value for key, value in after.items() if "lora_" not in key}
        assert same(frozen, before[name])
    attentions = sum(key.endswith("to_q.weight") for key in before["unet"])
    assert len(adapter_state({"unet": pipeline.unet})) == attentions * 4 * 2


def test_every_projection_becomes_the_equation():
    pipeline, _ = adapted(text=False)
    untouched, found = miniature.load().unet, adapter_state({"unet": pipeline.unet})
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    checked = 0
    for name, layer in pipeline.unet.named_modules():
        if f"unet.{name}.lora_A.weight" in found:
            A, B = (found[f"unet.{name}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(layer(x), untouched.get_submodule(name)(x) + x @ A.T @ B.T)
            checked += 1
    assert checked == len(found) / 2 > 20


def test_the_seed_decides_how_adapters_begin():
    def begin(seed):
        pipeline = miniature.load()
        add_adapters({"unet": pipeline.unet}, RANK, seed=seed)
        return adapter_state({"unet": pipeline.unet})

    assert same(begin(1), begin(1)) and not same(begin(1), begin(2))


def test_dropout_reaches_the_adapters():
    pipeline = miniature.load()
    add_adapters({"unet": pipeline.unet}, RANK, dropout=0.25)
    rates = {module.p for name, module in pipeline.unet.named_modules() if name.endswith("lora_dropout.default")}
    assert rates == {0.25}


def test_the_size_is_what_the_file_takes(trained, folder):
    size = adapter_size(trained[1])
    numbers = sum(value.numel() for value in adapter_state(trained[1]).values())
    assert size["trained"] == numbers and size["bytes"] == 4 * numbers
    assert size["of"] == sum(p.numel() for model in trained[1].values() for p in model.parameters())
    assert size["trained"] < 0.02 * size["of"]
    assert size["bytes"] < (folder / LORA_FILE).stat().st_size < size["bytes"] + 30_000
    both, unet = adapter_size(adapted(2 * RANK)[1]), adapter_size({"unet": trained[1]["unet"]})
    assert both["trained"] == 2 * size["trained"] and unet["trained"] < size["trained"]


# --- the file ---


def test_names_in_the_file_are_those_of_stable_diffusion(folder):
    names = list(load_file(folder / LORA_FILE))
    assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for name in names)
    assert "text_encoder.text_model.text_model" not in " ".join(names)


def test_plain_diffusers_draws_what_the_trained_pipeline_draws(plain, folder, expected):
    plain.load_lora_weights(folder)
    assert off(picture(plain), expected) <= 1


def test_scaled_fused_and_unloaded_in_plain_diffusers(plain, folder, expected, base):
    plain.load_lora_weights(str(folder), adapter_name="subject")
    plain.set_adapters(["subject"], [0.0])
    assert off(picture(plain), base) <= 1
    plain.set_adapters(["subject"], [0.5])
    half = picture(plain)
    assert off(half, base) > 5 < off(half, expected)
    plain.set_adapters(["subject"], [1.0])
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert off(picture(plain), expected) <= 1
    assert not any("lora" in name for name, _ in plain.unet.named_modules())


def test_unloaded_it_is_the_untouched_model(plain, folder, base):
    plain.load_lora_weights(folder)
    plain.fuse_lora()
    plain.unfuse_lora()
    plain.unload_lora_weights()
    assert off(picture(plain), base) <= 1


def test_kohyas_names(trained, folder):
    content = load_file(folder / KOHYA_FILE)
    layers = {name.split(".")[0] for name in content}
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert set(content) == {f"{layer}.{part}" for layer in layers for part in parts}
    expected = set()
    for name in adapter_state(trained[1]):
        part, layer = name.rsplit(".lora_", 1)[0].split(".", 1)
        expected.add({"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + layer.replace(".", "_"))
    assert layers == expected
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in layers
    assert all(content[f"{layer}.alpha"] == RANK == len(content[f"{layer}.lora_down.weight"]) for layer in layers)
    with safe_open(folder / KOHYA_FILE, "pt") as file:
        about = file.metadata()
    assert about["ss_network_module"] == "networks.lora"
    assert about["ss_network_dim"] == about["ss_network_alpha"] == str(RANK)


def test_kohyas_file_is_only_written_when_it_is_asked_for(trained, tmp_path):
    save_adapters(trained[1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_the_text_encoder_is_not_the_first_of_two(trained):
    """diffusers' own conversion says lora_te1, which is kohya's name in files for Stable Diffusion XL."""
    assert not [name for name in to_kohya(adapter_state(trained[1])) if name.startswith("lora_te1")]
    assert not [name for name in to_kohya(adapter_state({"unet": trained[1]["unet"]})) if "lora_te" in name]


def test_kohyas_file_opens_in_diffusers_with_the_same_picture(plain, folder, expected):
    plain.load_lora_weights(folder, weight_name=KOHYA_FILE)
    assert off(picture(plain), expected) <= 1


# --- reading and loading ---


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE, ""])
def test_both_formats_are_read_bit_for_bit(name, text, tmp_path, trained):
    models = trained[1] if text else {"unet": trained[1]["unet"]}
    save_adapters(models, tmp_path, "kohya")
    found = {key: value for key, value in read_adapter(tmp_path / name).items() if not key.endswith("alpha")}
    assert same(found, adapter_state(models))


@pytest.mark.parametrize("scale, name", [(1.0, ""), (1.0, KOHYA_FILE), (1.0, LORA_FILE), (0.0, "")])
def test_an_adapter_is_loaded_at_its_scale(scale, name, folder, expected, base, capfd):
    pipeline = miniature.load()
    load_adapter(pipeline, folder / name if name else folder, scale)
    assert off(picture(pipeline), expected if scale else base) <= 1
    assert "No LoRA keys" not in capfd.readouterr().err


def is_down(name: str) -> bool:
    """Whether this is the name of an A; of two libraries, with two habits."""
    return "lora_A" in name or "lora.down" in name or "lora_linear_layer.down" in name


def changed(folder: Path, place: Path, change) -> Path:
    """An adapter in which `change(name, matrix)` has renamed or altered every matrix; None leaves one out."""
    place.mkdir()
    content = dict(filter(None, (change(name, value) for name, value in load_file(folder / LORA_FILE).items())))
    save_file({name: value.contiguous() for name, value in content.items()}, place / LORA_FILE, {"format": "pt"})
    return place


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda name, value: (name, value.repeat(1, 2) if is_down(name) else value), "256 numbers here, 128 in the"),
        (lambda name, value: (name, value if is_down(name) else value.repeat(3, 1)), "384 numbers here, 128 in the"),
        (lambda name, value: (name.replace("down_blocks.1", "down_blocks.7"), value), "no such layer in the model"),
        (lambda name, value: (name.replace("layers.0", "layers.11"), value), "no such layer in the model"),
    ],
    ids=["wider", "longer", "deeper unet", "deeper text encoder"],
)  # fmt: skip
def test_an_adapter_for_another_model_is_refused(change, said, folder, tmp_path, base):
    pipeline = miniature.load()
    place = changed(folder, tmp_path / "other", change)
    with pytest.raises(InputError, match=f"--lora_weights .*was made for another model .*{said}") as caught:
        load_adapter(pipeline, place)
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in pipeline.unet.named_modules()), "nothing has been loaded"


def test_a_file_without_adapters_is_refused(tmp_path):
    save_file({"unet.conv_in.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(InputError, match="holds no adapter for a Stable Diffusion"):
        load_adapter(miniature.load(), tmp_path)


def test_an_adapter_that_is_for_another_kind_of_model_in_part_is_refused(folder, tmp_path):
    state = load_file(folder / LORA_FILE)
    part = next(name for name in state if name.startswith("unet."))
    for other in ("transformer.blocks.0.attn.to_q.lora_A.weight", "text_encoder_2.text_model.q_proj.lora_A.weight"):
        save_file(state | {other: state[part].clone()}, tmp_path / LORA_FILE)
        with pytest.raises(InputError, match=f"--lora_weights .*: holds {other}, which a Stable Diffusion"):
            load_adapter(miniature.load(), tmp_path)


@pytest.mark.parametrize("fault", ["garbage", "half", "empty folder", "nowhere", "a model"])
def test_what_cannot_be_read_is_input_and_not_a_traceback(fault, folder, tmp_path):
    place = tmp_path / "adapter"
    if fault == "garbage":
        place = tmp_path / "adapter.safetensors"
        place.write_bytes(b"no adapter at all, but long enough to be one")
    elif fault == "half":
        shutil.copytree(folder, place)
        (place / LORA_FILE).write_bytes((folder / LORA_FILE).read_bytes()[:5000])
    elif fault == "empty folder":
        place.mkdir()
    elif fault == "a model":
        place = next((miniature.path() / "unet").glob("*.safetensors"))
    with pytest.raises(InputError, match="--lora_weights") as caught:
        load_adapter(miniature.load(), place)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_adapter_is_checked_against_a_model_that_has_one_already(trained):
    check_adapter(adapter_state(trained[1]), trained[0], "here")


# --- checkpoints ---


def test_a_checkpoint_gives_back_every_number(trained, tmp_path):
    storage, other = AdapterFile(), adapted(seed=5)
    averages = adapted(seed=6)
    storage.save(trained[1], tmp_path)
    storage.save(averages[1], tmp_path, "_ema")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")) == sorted(
        [LORA_FILE, f"ema/{LORA_FILE}"])  # fmt: skip
    for suffix, wanted in (("", trained), ("_ema", averages)):
        assert not same(adapter_state(other[1]), adapter_state(wanted[1]))
        assert storage.load(other[1], tmp_path, suffix)
        assert same(adapter_state(other[1]), adapter_state(wanted[1]))
    trainable = [p for model in other[1].values() for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.requires_grad for p in trainable), "a loaded adapter is still trained"


def test_without_averages_load_says_so_and_changes_nothing(trained, tmp_path):
    AdapterFile().save(trained[1], tmp_path)
    other = adapted(seed=5)
    before = adapter_state(other[1])
    assert AdapterFile().load(other[1], tmp_path, "_ema") is False
    assert same(adapter_state(other[1]), before)


def test_a_checkpoint_is_a_folder_for_load_lora_weights(trained, tmp_path, plain, expected):
    AdapterFile().save(trained[1], tmp_path / "checkpoint-3")
    plain.load_lora_weights(tmp_path / "checkpoint-3")
    assert off(picture(plain), expected) <= 1


@pytest.mark.parametrize("rank, text", [(RANK + 1, True), (RANK, False)])
def test_another_rank_or_other_layers_cannot_go_on(rank, text, trained, tmp_path):
    AdapterFile().save(trained[1] if text else {"unet": trained[1]["unet"]}, tmp_path)
    with pytest.raises(InputError, match="--resume_from_checkpoint .*has another shape") as caught:
        AdapterFile().load(adapted(rank)[1], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    AdapterFile().save(trained[1], tmp_path)
    (tmp_path / LORA_FILE).write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="--resume_from_checkpoint .*cannot be read"):
        AdapterFile().load(adapted()[1], tmp_path)
