"""The command `generate-images`: every way to load, what is refused, what is said, files, sheets and saved models."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from dreambooth_runs import CLASS, SUBJECT, subject_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusion_lessons import miniature
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.dreambooth import inference, training
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig
from diffusion_lessons.dreambooth.inference import (
    about_pictures,
    main,
    missing_word_notes,
    model_name,
    next_number,
    save_numbered,
)
from diffusion_lessons.dreambooth.loading import (
    find_base,
    fits,
    load_checkpoint,
    loading_of,
    rename_for,
    run_config,
    same_weights,
    save_as_model,
)
from diffusion_lessons.dreambooth.training import train
from diffusion_lessons.engine.checkpoints import PROGRESS, write_json
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures.sheets import caption_row, comparison_sheet, label
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import check_new_folder, load_pipeline

SETTINGS = ["--num_inference_steps", "2", "--size", "16", "--num_images", "2", "--guidance_scale", "2"]
ON_SNOW = "a photo of a sks butterfly on snow"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What four runs left: both models trained, adapters of both, an average, and the UNet without a class prompt."""
    place = tmp_path_factory.mktemp("runs")
    pictures = subject_folder(place / "pictures")
    fields = dict(pretrained_model_name_or_path="miniature", instance_data_dir=str(pictures), instance_prompt=SUBJECT,
                  class_prompt=CLASS, resolution=16, train_batch_size=1, max_train_steps=2, checkpointing_steps=1,
                  learning_rate=1e-2, report_to="none", seed=0)  # fmt: skip
    for name, more in (("both", {"train_text_encoder": True}), ("lora", {"lora": True, "train_text_encoder": True}),
                       ("ema", {"use_ema": True, "ema_max_decay": 0.5}), ("plain", {"class_prompt": None})):
        train(DreamBoothConfig(**fields | more, output_dir=str(place / name)))
    return place


def fresh() -> StableDiffusionPipeline:
    return load_pipeline(miniature.path())


def pictures_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    return draw(pipeline, [ON_SNOW] * 2, seed=5, num_inference_steps=2, size=16, guidance_scale=2.0)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def drawn(folder: Path) -> torch.Tensor:
    """The numbered pictures of a folder."""
    from numpy import asarray

    paths = sorted(folder.glob("[0-9]*.png"))
    return torch.stack([torch.tensor(asarray(Image.open(path))).permute(2, 0, 1) for path in paths])


# --- checkpoints ---


def test_a_checkpoint_is_what_the_guides_own_lines_load(runs):
    checkpoint = runs / "both" / "checkpoint-1"
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    guides = StableDiffusionPipeline.from_pretrained(
        miniature.path(), unet=unet, text_encoder=text_encoder, safety_checker=None
    )
    guides.set_progress_bar_config(disable=True)
    ours = fresh()
    assert load_checkpoint(ours, checkpoint) == "weights"
    assert same(ours.unet, unet) and same(ours.text_encoder, text_encoder)
    assert not same(ours.unet, fresh().unet) and not same(ours.text_encoder, fresh().text_encoder)
    assert torch.equal(pictures_of(ours), pictures_of(guides))
    assert not torch.equal(pictures_of(ours), pictures_of(fresh()))


def test_a_checkpoint_without_a_text_encoder_leaves_the_bases_in_place(runs):
    ours, untouched = fresh(), fresh()
    load_checkpoint(ours, runs / "plain" / "checkpoint-2")
    assert same(ours.text_encoder, untouched.text_encoder) and not same(ours.unet, untouched.unet)
    assert same(ours.unet, UNet2DConditionModel.from_pretrained(runs / "plain" / "unet")), "the last one is the result"


def test_the_average_is_drawn_where_a_run_kept_one(runs):
    checkpoint, ours = runs / "ema" / "checkpoint-2", fresh()
    load_checkpoint(ours, checkpoint)
    assert same(ours.unet, UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema"))
    assert not same(ours.unet, UNet2DConditionModel.from_pretrained(checkpoint / "unet"))


def test_the_adapter_of_a_checkpoint_is_loaded(runs):
    ours, theirs = fresh(), fresh()
    assert load_checkpoint(ours, runs / "lora" / "checkpoint-1") == "adapter"
    theirs.load_lora_weights(str(runs / "lora" / "checkpoint-1"))
    assert torch.equal(pictures_of(ours), pictures_of(theirs))
    assert not torch.equal(pictures_of(ours), pictures_of(fresh()))


OLD = {  # files, and whether the text encoder's names have the prefix of transformers before 5.6
    "safetensors": ("model.safetensors", "model_1.safetensors", True),
    "safetensors, new names": ("model.safetensors", "model_1.safetensors", False),
    "pickles": ("pytorch_model.bin", "pytorch_model_1.bin", True),
    "pickles, new names": ("pytorch_model.bin", "pytorch_model_1.bin", False),
    "text encoder first": ("model_1.safetensors", "model.safetensors", True),
    "unet alone": ("pytorch_model.bin", None, True),
}


@pytest.mark.parametrize("name", OLD)
def test_the_old_layout_is_told_apart_by_names_and_shapes(name, runs, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(runs / "both" / "checkpoint-2" / "unet")
    text = CLIPTextModel.from_pretrained(runs / "both" / "checkpoint-2" / "text_encoder")
    first, second, prefixed = OLD[name]
    bare = {name.removeprefix("text_model."): weight for name, weight in text.state_dict().items()}
    named = {f"text_model.{name}": weight for name, weight in bare.items()} if prefixed else bare
    named["text_model.embeddings.position_ids"] = torch.arange(32)[None]  # a buffer that old versions saved
    for file, state in ((first, unet.state_dict()), (second, named)):
        if file is not None and file.endswith(".bin"):
            torch.save(state, tmp_path / file)
        elif file is not None:
            save_file({name: weight.contiguous() for name, weight in state.items()}, tmp_path / file)
    (tmp_path / "scheduler.bin").write_bytes(b"never read")
    ours, expected = fresh(), fresh()
    assert load_checkpoint(ours, tmp_path) == "weights in the old layout"
    load_checkpoint(expected, runs / "both" / "checkpoint-2")
    assert same(ours.unet, unet)
    assert same(ours.text_encoder, text if second else fresh().text_encoder)
    if second:
        assert torch.equal(pictures_of(ours), pictures_of(expected))


class Harmful:
    """What a pickle may do when it is read carelessly."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_cannot_execute_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    torch.save({"weight": Harmful()}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(fresh(), "old")
    assert not (tmp_path / "harm").exists()


ANOTHERS = {"conv_in.weight": torch.zeros(2)}
DAMAGED = [b"", b"half a pickle", bytes(range(256)) * 4]


@pytest.mark.parametrize(
    "file, content", [*(("pytorch_model.bin", each) for each in (*DAMAGED, ANOTHERS, [1, 2, 3], None)),
                      *(("model.safetensors", each) for each in (*DAMAGED, ANOTHERS))],
)  # fmt: skip
def test_an_old_file_that_is_damaged_or_anothers_is_one_line(file, content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif file.endswith(".bin"):
        torch.save(content, tmp_path / file)
    else:
        save_file(content, tmp_path / file)
    with pytest.raises(InputError, match=re.escape(f"--checkpoint {tmp_path / file}: ")) as caught:
        load_checkpoint(fresh(), tmp_path)
    assert "\n" not in str(caught.value)


def test_another_models_checkpoint_is_refused(runs, tmp_path):
    small = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=128, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    small.save_pretrained(tmp_path / "checkpoint-1" / "unet")
    before, ours = fresh(), fresh()
    with pytest.raises(InputError, match="its unet does not fit the model"):
        load_checkpoint(ours, tmp_path / "checkpoint-1")
    assert same(before.unet, ours.unet)


@pytest.mark.parametrize(
    "folder, said",
    [("nowhere", "no such folder"), ("pictures", "holds neither a unet"), ("both/unet", "holds neither a unet")],
)
def test_what_is_no_checkpoint_is_named(folder, said, runs):
    with pytest.raises(InputError, match=f"--checkpoint {runs / folder}: .*{said}"):
        load_checkpoint(fresh(), runs / folder)


def test_a_damaged_checkpoint_is_named(runs, tmp_path):
    checkpoint = Path(shutil.copytree(runs / "both" / "checkpoint-2", tmp_path / "checkpoint-2"))
    weights = checkpoint / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(InputError, match=f"{checkpoint / 'text_encoder'}: is damaged"):
        load_checkpoint(fresh(), checkpoint)


# --- the command: every way to load draws the same as plain diffusers ---


def plainly(runs: Path, source: str) -> StableDiffusionPipeline:
    """What the source is, loaded with nothing of ours but the folder of the miniature."""
    if source == "model":
        pipeline = StableDiffusionPipeline.from_pretrained(runs / "both", safety_checker=None)
    else:
        pipeline = fresh()
    if source == "checkpoint":
        pipeline.unet = UNet2DConditionModel.from_pretrained(runs / "both" / "checkpoint-1" / "unet")
        pipeline.text_encoder = CLIPTextModel.from_pretrained(runs / "both" / "checkpoint-1" / "text_encoder")
    if source.startswith("adapter"):
        pipeline.load_lora_weights(str(runs / "lora"), adapter_name="subject")
        pipeline.set_adapters(["subject"], [0.5 if source == "adapter, half of it" else 1.0])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def plain_pictures(runs: Path, source: str) -> torch.Tensor:
    return pictures_of(plainly(runs, source))


SOURCES = {
    "model": ["--model_path", "both"],
    "checkpoint": ["--checkpoint", "both/checkpoint-1"],
    "adapter": ["--lora_weights", "lora"],
    "adapter, a file": ["--lora_weights", "lora/pytorch_lora_weights.safetensors", "--model_path", "miniature"],
    "adapter, half of it": ["--lora_weights", "lora", "--lora_scale", "0.5"],
    "untouched": ["--model_path", "miniature"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_command_draws_what_plain_diffusers_draws(source, runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(runs)
    words = [*SOURCES[source], "--prompt", ON_SNOW, "--seed", "5", "--output_dir", str(tmp_path), *SETTINGS]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "2 pictures are in" in said.out and said.err == ""
    expected = plain_pictures(runs, source)
    assert (drawn(tmp_path).int() - expected.int()).abs().max() <= 1
    others = [plain_pictures(runs, other) for other in ("model", "untouched") if other != source]
    assert all((expected.int() - other.int()).abs().max() > 2 for other in others), "and nothing else"


def test_batch_size_changes_no_picture(runs, tmp_path):
    for size in ("1", "4"):
        assert main(["--model_path", str(runs / "both"), "--prompt", ON_SNOW, SUBJECT, "--batch_size", size,
                     "--output_dir", str(tmp_path / size), *SETTINGS]) == 0  # fmt: skip
    assert (drawn(tmp_path / "1").int() - drawn(tmp_path / "4").int()).abs().max() <= 1


def test_a_negative_prompt_is_heard(runs, tmp_path):
    for number, words in enumerate(([], ["--negative_prompt", "a photo of a red fish on sand"])):
        assert main(["--model_path", str(runs / "both"), "--prompt", ON_SNOW, *words, *SETTINGS,
                     "--output_dir", str(tmp_path / str(number))]) == 0  # fmt: skip
    assert not torch.equal(drawn(tmp_path / "0"), drawn(tmp_path / "1"))


# --- which model ---


def test_the_base_is_found_from_what_a_run_left(runs):
    for name in ("both/checkpoint-1", "both"):
        assert find_base(GenerationConfig(checkpoint=str(runs / name))) == "miniature"
    for name in ("lora", "lora/checkpoint-2", "lora/pytorch_lora_weights.safetensors"):
        assert find_base(GenerationConfig(lora_weights=str(runs / name))) == "miniature"
    assert find_base(GenerationConfig(checkpoint=str(runs / "both"), model_path="mine")) == "mine"


def test_the_config_of_a_run_is_found_and_that_of_a_neighbour_is_not(runs, tmp_path, monkeypatch):
    assert run_config(runs / "both" / "checkpoint-1")["instance_prompt"] == SUBJECT
    monkeypatch.chdir(runs / "both")
    for name in ("miniature", "CompVis/stable-diffusion-v1-4", None, tmp_path):
        assert run_config(name) == {}, "a Hub id in a folder that has a training_config.json"


def test_a_base_is_loaded_as_the_flags_say_and_otherwise_as_its_run_loaded_it(tmp_path):
    run = {"pretrained_model_name_or_path": "somebody/base", "revision": "theirs", "variant": "fp16",
           "tokenizer_max_length": 9}  # fmt: skip
    write_json(tmp_path / "training_config.json", run)
    config = GenerationConfig(lora_weights=str(tmp_path), revision="mine")
    expected = {"revision": "mine", "variant": "fp16", "tokenizer_name": None, "tokenizer_max_length": 9}
    assert loading_of("somebody/base", config, str(tmp_path)) == expected
    another = {"revision": "mine", "variant": None, "tokenizer_name": None, "tokenizer_max_length": None}
    assert loading_of("another/base", config, str(tmp_path)) == another


def test_a_checkpoint_that_does_not_say_its_base_asks_for_it(runs, tmp_path, capfd):
    (tmp_path / "checkpoint-1").mkdir()
    shutil.copytree(runs / "plain" / "checkpoint-1" / "unet", tmp_path / "checkpoint-1" / "unet")
    words = ["--checkpoint", str(tmp_path / "checkpoint-1"), "--prompt", SUBJECT, "--output_dir", str(tmp_path / "out")]
    assert main([*words, *SETTINGS]) == 2
    assert "--model_path is missing" in capfd.readouterr().err
    assert main([*words, *SETTINGS, "--model_path", "miniature"]) == 0


MISTAKES = {
    "an adapter named as model": (["--model_path", "lora"], "is an adapter; name it with --lora_weights"),
    "checkpoints and no model": (["--model_path", "killed"], "holds checkpoints and no finished model"),
    "a checkpoint named as model": (["--model_path", "both/checkpoint-1"], "is a checkpoint; name it with --"),
    "a model named as adapter": (["--lora_weights", "both", "--model_path", "miniature"], "has no pytorch_lora"),
    "no model at all": (["--model_path", "nowhere"], "--model_path nowhere: is no folder, and the Hub"),
    "another kind of model": (["--model_path", "sdxl"], "is a StableDiffusionXLPipeline"),
    "nothing named": ([], "--model_path is missing"),
    "both weights": (["--checkpoint", "both/checkpoint-1", "--lora_weights", "lora"], "leave out --lora_weights"),
    "a size": (["--model_path", "both", "--size", "20"], "--size 20: must be a multiple of 8"),
    "too many steps": (["--model_path", "both", "--num_inference_steps", "1001"], "must lie between 1 and 1000"),
    "guidance": (["--model_path", "both", "--guidance_scale", "0.5"], "--guidance_scale 0.5: must be 1 or more"),
    "a saved model in use": (["--model_path", "both", "--save_pipeline", "both"], "--save_pipeline both: holds"),
    "a file as folder": (["--model_path", "both", "--output_dir", "file"], "--output_dir file: cannot be written"),
    "pictures without a sheet": (["--model_path", "both", "--instance_data_dir", "meadow"], "belongs to the sheet"),
    "another's checkpoint on a sheet": (["--model_path", "both", "--compare_to", "pictures"], "holds neither a unet"),
}


@pytest.fixture(scope="module")
def place(runs) -> Path:
    """The runs, and beside them what somebody may name by mistake."""
    shutil.copytree(runs / "both" / "checkpoint-1", runs / "killed" / "checkpoint-1")
    shutil.copytree(miniature.path(), runs / "sdxl")
    index = runs / "sdxl" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    (runs / "file").write_text("not a folder")
    return runs


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_drawn(name, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    words, said = MISTAKES[name]
    before = sorted(str(path) for path in place.rglob("*"))
    assert main(["--prompt", SUBJECT, "--num_images", "1", "--num_inference_steps", "1", "--size", "16", *words]) == 2
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and err.startswith("generate-images: ") and said in err, err
    assert sorted(str(path) for path in place.rglob("*")) == before


def test_a_prompt_is_needed_unless_a_model_is_to_be_saved(runs, tmp_path, capfd):
    assert main(["--model_path", str(runs / "both")]) == 2
    assert '--prompt is missing: say what to draw: --prompt "' in capfd.readouterr().err
    words = ["--checkpoint", str(runs / "both" / "checkpoint-1"), "--save_pipeline", str(tmp_path / "kept")]
    assert main([*words, "--output_dir", str(tmp_path / "generated")]) == 0
    assert (tmp_path / "kept" / "model_index.json").is_file() and not (tmp_path / "generated").exists()


# --- the identifier ---


@pytest.mark.parametrize(
    "prompt, taught, of_class, said",
    [("a photo of a butterfly on snow", SUBJECT, CLASS, "has no `sks`: it draws the class"),
     (ON_SNOW, SUBJECT, CLASS, None), ("A Photo of a SKS butterfly", SUBJECT, CLASS, None),
     ("sks, on the moon", SUBJECT, CLASS, None), ("sksy butterfly", SUBJECT, CLASS, "has no `sks`"),
     ("a dog", "a photo of sks olis dog", "a photo of dog", "has no `sks` `olis`"),
     ("an olis dog", "a photo of sks olis dog", "a photo of dog", None),
     ("a dog in a bucket", "a photo of sks dog", None, "has no `sks`; the subject was learned as 'a photo of sks dog'"),
     ("sks dog in a bucket", "a photo of sks dog", None, None),
     ("a cat", "a photo of sks dog", None, "has no `sks`;"), ("sks im Schnee", "ein Foto von sks Hund", None, None),
     ("a cat", "a photo of my dog", None, "has no `dog`"),
     ("a dog", "a photo of dog", "a photo of dog", None)],
)  # fmt: skip
def test_a_prompt_without_its_identifier_is_said(prompt, taught, of_class, said):
    notes = missing_word_notes([prompt], {"instance_prompt": taught, "class_prompt": of_class})
    assert len(notes) == (said is not None)
    assert said is None or (said in notes[0] and repr(prompt) in notes[0])


def test_a_prompt_that_does_not_fit_is_said_with_what_is_lost(runs, tmp_path, capsys):
    words = ["--model_path", str(runs / "both"), "--prompt", "a sks red butterfly on snow " * 6 + "a fish", *SETTINGS]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "is longer than the 32 tokens that are read; lost: '" in note and note.endswith("a fish'")


def test_of_an_unknown_model_nothing_is_said():
    assert missing_word_notes(["a dog"], {}) == []


@pytest.mark.parametrize("words", [["--model_path", "both"], ["--checkpoint", "both/checkpoint-1"],
                                   ["--lora_weights", "lora"]])  # fmt: skip
def test_the_note_comes_once_for_each_prompt_that_lacks_it(words, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    prompts = ["--prompt", "a butterfly on sand", ON_SNOW]
    assert main([*words, *prompts, *SETTINGS, "--output_dir", str(tmp_path)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: your prompt 'a butterfly on sand' has no `sks`: it draws the class, not the subject"]


# --- files ---


def test_numbers_go_on_and_nothing_is_overwritten(runs, tmp_path, capsys):
    for name in ("0007.png", "mine.png", "comparison.png", "0009.txt"):
        (tmp_path / name).write_bytes(b"somebody's")
    assert next_number(tmp_path) == 8 and next_number(tmp_path / "new") == 0
    words = ["--model_path", str(runs / "both"), "--prompt", ON_SNOW, *SETTINGS]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert "from 0008.png on" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "0007.png", "mine.png", "comparison.png", "0009.txt", "0008.png", "0009.png"}  # fmt: skip
    assert (tmp_path / "0007.png").read_bytes() == b"somebody's"


def test_a_picture_says_how_to_draw_it_again(runs, tmp_path):
    words = ["--checkpoint", str(runs / "both" / "checkpoint-1"), "--prompt", SUBJECT, ON_SNOW, "--seed", "40"]
    assert main([*words, *SETTINGS, "--output_dir", str(tmp_path / "one")]) == 0
    made = [json.loads(Image.open(path).text["parameters"]) for path in sorted((tmp_path / "one").iterdir())]
    assert [(each["prompt"], each["seed"]) for each in made] == [
        (SUBJECT, 40), (SUBJECT, 41), (ON_SNOW, 40), (ON_SNOW, 41)]  # fmt: skip
    assert made[3] == {"prompt": ON_SNOW, "seed": 41, "model": "miniature", "checkpoint": "both/checkpoint-1",
                       "num_inference_steps": 2, "guidance_scale": 2.0}  # fmt: skip
    last = made[3]
    again = ["--checkpoint", str(runs / last["checkpoint"]), "--prompt", last["prompt"], "--seed", str(last["seed"]),
             "--guidance_scale", str(last["guidance_scale"]), "--num_inference_steps", str(last["num_inference_steps"]),
             "--num_images", "1", "--size", "16", "--output_dir", str(tmp_path / "two")]  # fmt: skip
    assert main(again) == 0
    assert (drawn(tmp_path / "two")[0].int() - drawn(tmp_path / "one")[3].int()).abs().max() <= 1


def test_metadata_name_the_adapter_and_no_disk(runs):
    config = GenerationConfig(lora_weights=str(runs / "lora"), lora_scale=0.5, negative_prompt="blur", prompt=[SUBJECT],
                              num_images=1)  # fmt: skip
    (about,) = about_pictures(config, str(runs / "both"))
    assert about["lora_weights"].endswith("/lora") and about["lora_scale"] == 0.5 and about["negative_prompt"] == "blur"
    assert str(runs.parent) not in json.dumps(about) and about["model"].endswith("/both")


def test_a_name_is_the_end_of_a_path(runs, monkeypatch):
    monkeypatch.chdir(runs)
    names = {"miniature": "miniature", "both": "both", "both/checkpoint-1/": "both/checkpoint-1",
             str(runs / "both" / "checkpoint-1"): "both/checkpoint-1", "CompVis/stable-diffusion-v1-4": None,
             ".": runs.name, "lora/pytorch_lora_weights.safetensors": None}  # fmt: skip
    assert {path: model_name(path) for path in names} == {path: name or path for path, name in names.items()}


def test_pictures_are_saved_pixel_for_pixel(tmp_path):
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    paths = save_numbered(pixels, tmp_path / "a" / "b", [{"n": number} for number in range(3)])
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    assert torch.equal(drawn(tmp_path / "a" / "b"), pixels)


# --- sheets ---


def solid(number: int, value: int, side: int = 16) -> torch.Tensor:
    return torch.full((number, 3, side, side), value, dtype=torch.uint8)


def test_a_sheet_has_the_subject_and_a_row_for_each_model():
    rows = {"one": torch.cat([solid(2, 10), solid(2, 20)]), "two": solid(4, 200, side=32)}
    sheet = comparison_sheet(solid(5, 90, side=16), ["first", "second"], rows, gap=8)
    width, height = 4 * 16 + 8, 20 + 16 + 2 * (20 + 20 + 16)
    assert sheet.size == (width, height)
    places = [(0, 20), (63, 35), (64, 20), (0, 76), (31, 91), (35, 80), (40, 76), (71, 91), (0, 132), (71, 147)]
    assert [sheet.getpixel(place)[0] for place in places] == [90, 90, 255, 10, 10, 255, 20, 20, 200, 200]


def test_each_prompt_stands_above_its_own_pictures():
    strip = caption_row(["on snow", "on sand", "at sea"], group=100, gap=8, width=316)
    for prompt, left in (("on snow", 0), ("on sand", 108), ("at sea", 216)):
        assert strip.crop((left, 0, left + 100, 20)).tobytes() == label(prompt, 100).tobytes(), prompt


def test_a_sheet_without_pictures_of_the_subject_begins_with_the_first_model():
    assert comparison_sheet(None, ["one"], {"a": solid(3, 0)}).size == (48, 56)


@pytest.mark.parametrize("width", [1, 8, 16, 24, 100, 1000])
def test_a_label_fits_and_keeps_its_end(width):
    """Also where not even one letter has room."""
    strip = label("a photo of a sks butterfly on snow", width)
    assert strip.size == (width, 20)
    dark = [x for x in range(width) if min(strip.getpixel((x, y))[0] for y in range(20)) < 128]
    assert not dark or max(dark) < width - 2
    assert bool(dark) == (width >= 100)


def test_the_command_draws_a_sheet_of_all_kinds(runs, tmp_path, monkeypatch, capsys):
    """Each row is what the same model draws alone: adapters and checkpoints on their own base, not the first row's."""
    monkeypatch.chdir(runs)
    shutil.copytree("both/checkpoint-1", tmp_path / "both" / "checkpoint-1")
    twin = str(tmp_path / "both" / "checkpoint-1")
    others = ["both/checkpoint-1", "lora", "lora/pytorch_lora_weights.safetensors", "miniature", twin]
    words = ["--model_path", "both", "--prompt", ON_SNOW, "--seed", "5", "--instance_data_dir", "pictures", *SETTINGS]
    assert main([*words, "--compare_to", *others, "--output_dir", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["comparison.png"]
    sheet = Image.open(tmp_path / "comparison.png")
    assert sheet.size == (32, 36 + 6 * 56), "no row takes the place of another of the same name"
    for row, source in enumerate(("model", "checkpoint", "adapter", "adapter", "untouched", "checkpoint")):
        top = 36 + row * 56 + 40
        pixels = torch.tensor(list(sheet.crop((0, top, 32, top + 16)).tobytes())).view(16, 2, 16, 3).permute(1, 3, 0, 2)
        assert (pixels - plain_pictures(runs, source).int()).abs().max() <= 1, source


# --- saved models ---


@pytest.mark.parametrize("source", ["checkpoint", "adapter", "adapter, half of it"])
def test_what_is_saved_is_a_model_for_plain_diffusers(source, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    kept = tmp_path / "models" / "kept"
    assert main([*SOURCES[source], "--save_pipeline", str(kept)]) == 0
    assert f"the model is in {kept}" in capsys.readouterr().out
    saved = StableDiffusionPipeline.from_pretrained(kept, safety_checker=None)
    saved.set_progress_bar_config(disable=True)
    assert (pictures_of(saved).int() - plain_pictures(runs, source).int()).abs().max() <= 2
    assert not hasattr(saved.unet, "peft_config") and not list(kept.rglob("*lora*"))
    for part in ("vae", "tokenizer", "scheduler", "feature_extractor"):
        for file in (miniature.path() / part).iterdir():
            assert (kept / part / file.name).read_bytes() == file.read_bytes()
    assert not any(path.name.startswith(".") for path in kept.parent.iterdir()), "nothing half-written is left"


def test_a_checkpoint_is_saved_bit_for_bit(runs, tmp_path):
    pipeline = fresh()
    load_checkpoint(pipeline, runs / "both" / "checkpoint-1")
    (tmp_path / "kept").mkdir()
    save_as_model(pipeline, "miniature", tmp_path / "kept")  # an empty folder is as good as none
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        folders = (runs / "both" / "checkpoint-1", tmp_path / "kept")
        first, second = (load_file(folder / part / file) for folder in folders)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_in_use_is_refused_before_anything_is_drawn(runs, tmp_path, capfd):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").write_text("years of work")
    words = ["--model_path", str(runs / "both"), "--prompt", SUBJECT, "--save_pipeline", str(tmp_path / "kept")]
    assert main([*words, *SETTINGS, "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds something already; name a new folder" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "kept").iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="save_pipeline"):
        check_new_folder(tmp_path / "kept" / "thesis.tex", "--save_pipeline kept")


# --- models without prompts ---


@pytest.fixture(scope="module")
def wordless(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wordless") / "butterflies"
    DDPMPipeline(make_unet("tiny-16", 16, seed=0), make_noise_scheduler()).save_pretrained(folder)
    return folder


def test_an_unconditional_folder_draws_without_a_prompt(wordless, tmp_path, capsys):
    words = ["--model_path", str(wordless), "--num_images", "3", "--num_inference_steps", "2", "--batch_size", "2"]
    for name, seed in (("one", "0"), ("two", "0"), ("three", "9")):
        assert main([*words, "--seed", seed, "--output_dir", str(tmp_path / name)]) == 0
    assert "3 pictures are in" in capsys.readouterr().out
    one, two, three = (drawn(tmp_path / name) for name in ("one", "two", "three"))
    assert one.shape == (3, 3, 16, 16) and torch.equal(one, two) and not torch.equal(one, three)
    made = json.loads(Image.open(tmp_path / "three" / "0001.png").text["parameters"])
    assert made["seed"] == 10 and made["model"].endswith("/butterflies")


@pytest.mark.parametrize(
    "words, said",
    [(["--prompt", SUBJECT], "the model takes none: it is unconditional"), (["--size", "32"], "draws at 16 px"),
     (["--lora_weights", "x"], "--lora_weights x: is for Stable Diffusion"),
     (["--checkpoint", "x"], "--checkpoint x: is for Stable Diffusion"),
     (["--compare_to", "miniature"], "--compare_to"), (["--save_pipeline", "x"], "--save_pipeline x")],
)  # fmt: skip
def test_an_unconditional_folder_takes_no_words(words, said, wordless, tmp_path, capfd):
    assert main(["--model_path", str(wordless), "--output_dir", str(tmp_path / "out"), *words]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_s_progress_is_read_with_care(tmp_path):
    write_json(tmp_path / PROGRESS, {"step": 1})
    assert run_config(tmp_path) == {}
    (tmp_path / PROGRESS).write_text("{")
    with pytest.raises(InputError, match=PROGRESS):
        run_config(tmp_path)


def test_the_command_is_installed_under_its_name(monkeypatch, capsys):
    from diffusion_lessons.dreambooth import drawing_config

    monkeypatch.setattr("sys.argv", ["generate-images", "--help"])
    assert drawing_config.generate_images() == 0
    assert "--compare_to" in capsys.readouterr().out
    assert inference.main(["--help"]) == 0


def test_a_saved_checkpoint_keeps_the_tokenizer_that_its_run_had(tmp_path):
    run = tmp_path / "run"
    assert training.main([
        "--pretrained_model_name_or_path", "miniature", "--instance_data_dir", "meadow", "--instance_prompt",
        "a photo of a sks butterfly", "--resolution", "16", "--train_batch_size", "1", "--max_train_steps", "1",
        "--report_to", "none", "--lora", "--tokenizer_max_length", "16", "--output_dir", str(run)]) == 0  # fmt: skip
    assert main(["--checkpoint", str(run / "checkpoint-1"), "--save_pipeline", str(tmp_path / "kept")]) == 0
    stored = json.loads((tmp_path / "kept" / "tokenizer" / "tokenizer_config.json").read_text())
    assert stored["model_max_length"] == 16


def named(prefix: bool) -> torch.nn.Module:
    """A layer as a text encoder has it, with or without the prefix in which versions of transformers differ."""
    inner = torch.nn.ModuleDict({"final": torch.nn.Linear(2, 2)})
    return torch.nn.ModuleDict({"text_model": inner}) if prefix else inner


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_weights_of_either_naming_fit_a_model_of_either(stored, wanted):
    file, model = named(stored).state_dict(), named(wanted)
    assert fits(file, model)
    model.load_state_dict(rename_for(file, model))
    for one, other in zip(file.values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_weights_are_the_same_to_the_bit_or_not():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert same_weights(one, other)
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(9.0))
    assert not same_weights(one, other)
