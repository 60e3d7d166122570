"""Model folders: which kind is served, what is missing or cut off, variants, and what is copied bit for bit."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_lessons.diffusion.samplers import make_sampler
from diffusion_lessons.engine.checkpoints import without_warnings
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.stable_diffusion import folder as pretrained
from diffusion_lessons.stable_diffusion.drawing import training_scheduler
from diffusion_lessons.stable_diffusion.folder import (
    check_kind,
    copy_part,
    find_model,
    load_pipeline,
    network_fingerprints,
    read_json,
    shipped,
    variant_of,
    weight_files,
    weights_dtype,
    write_model,
)
from diffusion_lessons.stable_diffusion.prompts import find_tokenizer, load_tokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A Stable Diffusion of a few thousand numbers in 32 bits, as plain diffusers writes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32))  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=load_tokenizer(shipped("miniature/tokenizer"), "-"),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    with without_warnings():
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def model(original, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(original, tmp_path / "model")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_variant(folder: Path, dtype: torch.dtype, variant: str) -> Path:
    """The model of a folder, beside it, as plain diffusers writes a variant."""
    target = folder.with_name(f"{folder.name}-{variant}")
    with without_warnings():
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None)
        pipeline.save_pretrained(target, variant=variant)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments, **options) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(InputError) as error:
        find_model(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- which model it is ---


def test_the_miniature_and_a_whole_folder_are_found(model):
    assert find_model("miniature") == shipped("miniature")
    assert find_model(model) == find_model(str(model)) == model


@pytest.mark.parametrize(
    "kind",
    ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline",
     "StableDiffusionUpscalePipeline", "DDPMPipeline"],
)  # fmt: skip
def test_an_index_of_another_kind_is_refused_by_its_name(model, kind):
    edit(model / "model_index.json", _class_name=kind)
    shutil.rmtree(model / "unet")  # other kinds have other parts; their absence is not what is wrong
    message = refusal(model)
    assert f"--pretrained_model_name_or_path {model}: is a {kind}" in message
    assert "Stable Diffusion 1.x and 2.x are served" in message


def test_an_index_without_a_class_is_refused(model):
    edit(model / "model_index.json", _class_name=None)
    assert "names no pipeline" in refusal(model)
    with pytest.raises(InputError, match="names no pipeline"):
        check_kind({}, "x")


def test_image_to_image_is_the_same_model(model):
    edit(model / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert type(load_pipeline(find_model(model))) is StableDiffusionPipeline


@pytest.mark.parametrize(
    "values, words",
    [
        ({"addition_embed_type": "text_time"}, ["its unet is that of Stable Diffusion XL"]),
        ({"cross_attention_dim": 2048}, ["words of width 2048", "16"]),
        ({"in_channels": 9}, ["takes 9 channels", "give 4", "inpainting"]),
        ({"in_channels": 5}, ["takes 5 channels", "depth"]),
    ],
)
def test_another_models_unet_under_an_ordinary_name_is_refused(model, values, words):
    edit(model / "unet/config.json", **values)
    message = refusal(model)
    assert all(word in message for word in [*words, "are served"]), message


def test_latents_may_have_any_number_of_channels_that_fits(model):
    edit(model / "vae/config.json", latent_channels=9)
    edit(model / "unet/config.json", in_channels=9)
    assert find_model(model) == model


# --- what is missing or damaged ---


@pytest.mark.parametrize("part", [*NETWORKS, "tokenizer", "scheduler"])
def test_a_missing_part_is_named(model, part):
    shutil.rmtree(model / part)
    assert f"its {part} is missing" in refusal(model)


@pytest.mark.parametrize("part", [*NETWORKS, "tokenizer", "scheduler"])
def test_an_empty_part_is_named(model, part):
    for path in (model / part).iterdir():
        path.unlink()
    assert f"its {part} is " in refusal(model)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize("part", NETWORKS)
def test_a_cut_file_is_found_without_reading_it(model, part, keep):
    [path] = (model / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(model)
    assert f"its {part} is damaged: {path.name}" in message and "download the model again" in message


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_a_damaged_json_is_named(model, file, content):
    (model / file).write_text(content)
    assert f"{model / file}: is missing or damaged" in refusal(model)


def test_a_missing_json_is_named(model):
    (model / "unet/config.json").unlink()
    assert "its unet is incomplete: it has no config.json" in refusal(model)
    (model / "model_index.json").unlink()
    assert "model_index.json: is missing or damaged; name the folder of a whole pipeline" in refusal(model)


def test_json_is_read_as_an_object_in_utf_8(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "Käfer"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "-") == {"name": "Käfer"}
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a\.json: is missing or damaged; try another"):
        read_json(tmp_path / "a.json", "try another")


def test_gaps_in_the_weights_are_found_when_they_are_loaded(model):
    state = load_file(model / UNET)
    save_file({name: value for name, value in state.items() if name != "conv_out.bias"}, model / UNET)
    with pytest.raises(InputError, match="1 weights of a UNet2DConditionModel are missing"):
        load_pipeline(find_model(model))


def test_weights_of_another_shape_are_found_when_they_are_loaded(model):
    edit(model / "vae/config.json", block_out_channels=[16])
    with pytest.raises(InputError, match="vae: .*AutoencoderKL"):
        load_pipeline(find_model(model))


def test_pickles_are_refused_and_not_executed(model, tmp_path):
    """The pickle that stands in for the weights would make a file; reading it must not even be tried."""
    (model / UNET).unlink()
    trap = b"cbuiltins\nopen\n(S'" + str(tmp_path / "executed").encode() + b"'\nS'w'\ntR."
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(trap)
    assert "its unet has its weights in a format that may carry code (diffusion_pytorch_model.bin)" in refusal(model)
    with pytest.raises(InputError):
        load_pipeline(model)
    assert not (tmp_path / "executed").exists()


def test_a_foreign_scheduler_is_one_line(model):
    edit(model / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(InputError, match="do not fit together .*NoSuchScheduler"):
        load_pipeline(find_model(model))


def test_a_single_file_is_answered_with_how_to_make_a_folder_of_it(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    message = refusal(file, flag="model_path")
    assert message.startswith(f"--model_path {file}: is a file") and "from_single_file" in message


# --- the hub ---


@pytest.mark.parametrize("name", ["somebody/some-model", "no-such-folder", "./no/such/folder", "a name with blanks"])
def test_a_hub_id_without_a_connection_is_one_line(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        message = refusal(name)
    assert message.startswith(f"--pretrained_model_name_or_path {name}: is no folder")
    assert "check the name and the connection" in message and len(message) < 400
    assert "".join(capfd.readouterr()) == ""


def test_the_index_is_looked_at_before_anything_is_downloaded(monkeypatch):
    def never(*_, **__):
        raise AssertionError("it began to download")

    index = {"_class_name": "StableDiffusionXLPipeline"}
    monkeypatch.setattr(pretrained.DiffusionPipeline, "load_config", lambda name, revision=None: index)
    monkeypatch.setattr(pretrained.DiffusionPipeline, "download", never)
    assert "somebody/xl: is a StableDiffusionXLPipeline" in refusal("somebody/xl")


def test_what_was_downloaded_is_checked_like_a_folder(model, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(model)

    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr(pretrained.DiffusionPipeline, "load_config", lambda name, revision=None: index)
    monkeypatch.setattr(pretrained.DiffusionPipeline, "download", download)
    assert find_model("somebody/sd", revision="v1") == model
    assert asked == {"name": "somebody/sd", "revision": "v1", "variant": None, "use_safetensors": True,
                     "safety_checker": None, "image_encoder": None}  # fmt: skip
    shutil.rmtree(model / "vae")
    assert "--pretrained_model_name_or_path somebody/sd: its vae is missing" in refusal("somebody/sd")


# --- variants ---


def test_names_tell_variants_apart():
    names = {"model.safetensors": None, "model.fp16.safetensors": "fp16", "a_b.non_ema.safetensors": "non_ema",
             "model-00001-of-00002.safetensors": None}  # fmt: skip
    assert {name: variant_of(Path(name)) for name in names} == names


def test_a_half_precision_folder_is_read_into_32_bits(model):
    folder = save_variant(model, torch.float16, "fp16")
    assert [path.name for path in weight_files(folder / "unet", "fp16")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert weights_dtype(folder / "unet", "fp16") == "F16" and weights_dtype(model / "unet") == "F32"
    assert weights_dtype(folder / "unet") == "F16", "where there is nothing else"
    full, half = load_pipeline(model), load_pipeline(find_model(folder, variant="fp16"), "fp16")
    for part in NETWORKS:
        one, two = (getattr(each, part).state_dict() for each in (full, half))
        assert {value.dtype for value in two.values() if value.is_floating_point()} == {torch.float32}
        for name, value in one.items():
            expected = value.half().float() if value.is_floating_point() else value
            assert torch.equal(two[name], expected), f"{part}: {name}"


def test_a_folder_with_variants_only_says_which(model):
    folder = save_variant(model, torch.float16, "fp16")
    assert "its unet has no weights without a variant; add --variant fp16" in refusal(folder)
    assert "no weights of the variant bf16; add --variant fp16" in refusal(folder, variant="bf16")
    assert "no weights of the variant fp16; leave out --variant" in refusal(model, variant="fp16")
    assert "--variant fp16: the miniature has none" in refusal("miniature", variant="fp16")


def test_of_several_variants_the_right_one_is_looked_at(model):
    half = save_variant(model, torch.float16, "fp16")
    for part in NETWORKS:
        for path in weight_files(half / part, "fp16"):
            shutil.copy(path, model / part)
    assert find_model(model) == find_model(model, variant="fp16") == model
    assert (weights_dtype(model / "unet"), weights_dtype(model / "unet", "fp16")) == ("F32", "F16")
    weight = load_file(model / UNET)["conv_in.weight"]
    assert torch.equal(load_pipeline(model).unet.conv_in.weight, weight)
    assert torch.equal(load_pipeline(model, "fp16").unet.conv_in.weight, weight.half().float())


# --- loading ---


def test_a_pipeline_is_ready_to_be_trained(original):
    pipeline = load_pipeline(original)
    assert (pipeline.safety_checker, pipeline.feature_extractor) == (None, None)
    assert pipeline._progress_bar_config == {"disable": True}
    assert all(getattr(pipeline, part).dtype == torch.float32 for part in NETWORKS)
    assert pipeline.device.type == "cpu"


def test_a_feature_extractor_is_not_needed_for_training(original, tmp_path):
    model = shutil.copytree(shipped("miniature"), tmp_path / "model", ignore=shutil.ignore_patterns("clip"))
    shutil.rmtree(model / "feature_extractor")
    assert load_pipeline(find_model(model)).feature_extractor is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_noise_of_training_is_the_folders_whatever_its_solver(model, prediction):
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit(model / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler", beta_end=0.02,
         prediction_type=prediction)  # fmt: skip
    scheduler = training_scheduler(load_pipeline(model))
    assert type(scheduler) is DDPMScheduler and scheduler.config.prediction_type == prediction
    expected = 1 - torch.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, expected.cumprod(0))


def test_another_tokenizer_comes_from_a_folder_or_not_at_all(original, tmp_path):
    tokenizer = find_tokenizer(str(original / "tokenizer"))
    assert len(tokenizer.tokenize("a butterfly")) == 2
    assert load_pipeline(original, tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(InputError, match="has no vocabulary"):
        find_tokenizer(str(tmp_path))
    for name in ("somebody/tokenizer", "no such folder"):
        with pytest.raises(InputError, match=f"^--tokenizer_name {name}: cannot be loaded"):
            find_tokenizer(name)


# --- writing ---


def changed_unet(folder: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 0.5
    return unet


def test_what_was_not_changed_is_copied_bit_for_bit(original, tmp_path):
    unet = changed_unet(original)
    write_model(tmp_path / "new", original, {"unet": unet})
    before, after = contents(original), contents(tmp_path / "new")
    assert set(before) == set(after)
    assert {name for name in before if before[name] != after[name]} <= {UNET, "unet/config.json", "model_index.json"}
    assert before[UNET] != after[UNET]
    assert json.loads(before["model_index.json"]) == json.loads(after["model_index.json"])
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert all(torch.equal(value, plain.unet.state_dict()[name]) for name, value in unet.state_dict().items())
    plain.set_progress_bar_config(disable=True)
    assert plain("a butterfly", 8, 8, num_inference_steps=1).images[0].size == (8, 8)


def test_the_folder_of_a_variant_is_loaded_without_one(model, tmp_path):
    base = save_variant(model, torch.float16, "fp16")
    shutil.copy(model / "vae/diffusion_pytorch_model.safetensors", base / "vae")  # a second variant, to be left behind
    write_model(tmp_path / "new", base, {"unet": changed_unet(model)}, "fp16")
    half = (base / "vae/diffusion_pytorch_model.fp16.safetensors").read_bytes()
    assert (tmp_path / "new/vae/diffusion_pytorch_model.safetensors").read_bytes() == half
    assert not list((tmp_path / "new").rglob("*fp16*"))
    assert weights_dtype(tmp_path / "new/unet") == "F32" and weights_dtype(tmp_path / "new/vae") == "F16"
    assert load_pipeline(find_model(tmp_path / "new")).unet.conv_in.bias.dtype == torch.float32


def test_of_several_weight_files_the_plain_one_is_copied(original, tmp_path):
    part = shutil.copytree(original / "unet", tmp_path / "unet")
    for name in ("non_ema.safetensors", "fp16.safetensors", "bin", "fp16.bin"):
        (part / f"diffusion_pytorch_model.{name}").write_bytes(b"other")
    (part / "._diffusion_pytorch_model.safetensors").write_bytes(b"left by a file manager")
    assert copy_part(part, tmp_path / "new", None)
    assert contents(tmp_path / "new") == contents(original / "unet")


def test_a_part_without_the_variant_is_copied_as_it_is(original, tmp_path):
    assert copy_part(original / "unet", tmp_path / "new", "fp16")
    assert contents(tmp_path / "new") == contents(original / "unet")


def with_safety_checker(model: Path) -> None:
    edit(model / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         requires_safety_checker=True)  # fmt: skip


def test_a_safety_checker_is_kept_if_it_is_safe_to_read(model, tmp_path):
    with_safety_checker(model)
    (model / "safety_checker").mkdir()
    (model / "safety_checker/config.json").write_text("{}")
    (model / "safety_checker/model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    write_model(tmp_path / "new", model, {})
    assert contents(tmp_path / "new/safety_checker") == contents(model / "safety_checker")
    assert read_json(tmp_path / "new/model_index.json", "-")["safety_checker"][1] == "StableDiffusionSafetyChecker"


@pytest.mark.parametrize("there", [True, False])
def test_a_safety_checker_that_cannot_be_read_is_in_nobodys_way(model, there):
    with_safety_checker(model)
    if there:
        (model / "safety_checker").mkdir()
        (model / "safety_checker/pytorch_model.bin").write_bytes(b"a pickle")
    assert load_pipeline(find_model(model)).safety_checker is None


@pytest.mark.parametrize("there", [True, False])
def test_a_part_that_cannot_be_copied_is_taken_off_the_index(model, tmp_path, there):
    with_safety_checker(model)
    if there:
        (model / "safety_checker").mkdir()
        (model / "safety_checker/config.json").write_text("{}")
        (model / "safety_checker/pytorch_model.bin").write_bytes(b"a pickle")
    write_model(tmp_path / "new", model, {})
    assert not (tmp_path / "new/safety_checker").exists()
    assert read_json(tmp_path / "new/model_index.json", "-")["safety_checker"] == [None, None]
    with without_warnings():
        assert StableDiffusionPipeline.from_pretrained(tmp_path / "new").safety_checker is None


def test_a_changed_tokenizer_is_written(original, tmp_path):
    tokenizer = find_tokenizer(str(original / "tokenizer"))
    tokenizer.model_max_length = 16
    write_model(tmp_path / "new", original, {"tokenizer": tokenizer})
    assert load_pipeline(tmp_path / "new").tokenizer.model_max_length == 16
    assert contents(tmp_path / "new/unet") == contents(original / "unet")


def test_latents_are_never_clipped_whatever_solver_the_folder_names(model):
    from diffusers import PNDMScheduler

    pipeline = load_pipeline(model)
    pipeline.scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)  # as Stable Diffusion 1 has
    assert "clip_sample" not in pipeline.scheduler.config
    scheduler = training_scheduler(pipeline)
    assert scheduler.config.clip_sample is False and not make_sampler(scheduler).config.thresholding


# --- fingerprints of files; models stored in half ---


def halved(folder: Path) -> Path:
    """The miniature as plain diffusers writes it in half precision: its text encoder's config says float16."""
    StableDiffusionPipeline.from_pretrained(shipped("miniature"), torch_dtype=torch.float16).save_pretrained(folder)
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    return folder


def test_a_fingerprint_is_of_the_weights_and_not_of_who_wrote_them(tmp_path):
    known = network_fingerprints(shipped("miniature"))
    assert set(known) == {"unet", "vae", "text_encoder"} and len(set(known.values())) == 3
    folder = halved(tmp_path / "half")
    assert network_fingerprints(folder) == known, "the miniature ships in half: the same numbers, another writer"
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = network_fingerprints(folder)
    assert after["unet"] != known["unet"] and after["vae"] == known["vae"]


def test_parts_are_loaded_in_the_formats_that_are_asked_for():
    pipeline = load_pipeline(shipped("miniature"), dtypes={"unet": torch.bfloat16, "text_encoder": torch.float16})
    assert [each.dtype for each in (pipeline.unet, pipeline.text_encoder, pipeline.vae)] == [
        torch.bfloat16, torch.float16, torch.float32]  # fmt: skip


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_made_from_one_stored_in_half_opens_as_its_card_says(part, tmp_path):
    """Its networks are written in 32 bits; a copied config that said float16 would bring one that does not fit."""
    base = halved(tmp_path / "half")
    write_model(tmp_path / "new", base, {part: getattr(load_pipeline(base), part)})
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert {each.dtype for each in (plain.unet, plain.text_encoder, plain.vae)} == {torch.float32}
    plain.set_progress_bar_config(disable=True)
    assert plain("a photo of a fish", num_inference_steps=1).images
    for name in {"unet", "vae", "text_encoder"} - {part}:
        for file in (base / name).glob("*.safetensors"):
            assert (tmp_path / "new" / name / file.name).read_bytes() == file.read_bytes(), "copied, bit for bit"


# --- names out of files ---

OUTSIDE = ["..", "../secret", "a/../../secret", "/etc", "..\\secret", "C:secret", ".git", "unet/deeper", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_part_that_lies_elsewhere_is_refused(model, tmp_path, name):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.json").write_text("{}")
    edit(model / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    message = refusal(model)
    assert f"names a part {name!r}" in message
    for follow in (load_pipeline, lambda folder: write_model(tmp_path / "deep" / "new", folder, {})):
        with pytest.raises(InputError, match="which is no folder in the model's"):
            follow(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def test_an_empty_entry_of_the_index_is_one_line(model, tmp_path):
    edit(model / "model_index.json", image_encoder=[])
    with pytest.raises(InputError, match="its parts do not fit together"):
        load_pipeline(model)
    write_model(tmp_path / "new", model, {})
    assert not (tmp_path / "new" / "image_encoder").exists()


def test_a_model_of_links_is_written_as_files(original, tmp_path):
    """The cache of the Hub: every file of a snapshot is a link to one that lies elsewhere."""
    for file in original.rglob("*"):
        if file.is_file():
            link = tmp_path / "snapshots" / file.relative_to(original)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    assert find_model(tmp_path / "snapshots") == tmp_path / "snapshots"
    write_model(tmp_path / "new", tmp_path / "snapshots", {})
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    assert contents(tmp_path / "new/unet") == contents(original / "unet")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_found_and_copied(original, tmp_path, variant):
    folder = shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    unet = load_pipeline(original).unet
    with without_warnings():
        unet.save_pretrained(folder / "unet", max_shard_size="40KB", variant=variant)
        for name in ("vae", "text_encoder") if variant else ():
            getattr(load_pipeline(original), name).save_pretrained(folder / name, variant=variant)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    write_model(tmp_path / "new", find_model(folder, variant=variant), {}, variant)
    written = load_pipeline(find_model(tmp_path / "new")).unet.state_dict()
    assert all(torch.equal(written[name], value) for name, value in unet.state_dict().items())
    with without_warnings():
        StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    (index,) = (folder / "unet").glob("*.index.*")
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "its unet is damaged" in refusal(folder, variant=variant)
