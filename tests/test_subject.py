"""What DreamBooth learns from: pictures of any kind as squares, the identifier, the prompts, and what is remembered."""

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from dreambooth_runs import CLASS, SMALL, SUBJECT, class_folder, subject_folder
from PIL import Image
from torch.utils.data import DataLoader

from diffusion_lessons.dreambooth.config import INTERPOLATION, DreamBoothConfig
from diffusion_lessons.dreambooth.subject import (
    RARE_WORDS,
    CroppedPairs,
    Prompts,
    encoded_pairs,
    identifier_notes,
    identifier_words,
    instance_source,
    load_subject,
    middle,
    pictures_fingerprint,
    read_pictures,
    single_tokens,
)
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.data import HeldData, SeededDataset, repeatable
from diffusion_lessons.miniature.captions import train_tokenizer
from diffusion_lessons.pictures.batches import to_model_range
from diffusion_lessons.pictures.meadow import subject
from diffusion_lessons.stable_diffusion.folder import load_pipeline, network_fingerprints, shipped
from diffusion_lessons.stable_diffusion.latents import encode_moments, scaled_latents


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: one sees at once which way it lies."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


def noisy_pictures(number: int, height: int = 16, width: int = 16, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (number, 3, height, width), dtype=np.uint8))


def read(folder: Path, size: int = 32, **options) -> list[np.ndarray]:
    return read_pictures(instance_source(str(folder), size), size, **options)


def config(folder: Path, **fields) -> DreamBoothConfig:
    return DreamBoothConfig(**(SMALL | {"instance_data_dir": str(folder), "class_prompt": CLASS} | fields))


@pytest.fixture
def pipeline():
    pipeline = load_pipeline(shipped("miniature"))
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def tokenizer():
    return load_pipeline(shipped("miniature")).tokenizer


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=16, **blocks)


CPU = torch.device("cpu")


# --- pictures ---


def test_the_meadow_is_five_pictures_of_its_subject():
    pictures = read_pictures(instance_source("meadow", 64), 64)
    drawn = [np.asarray(row["image"]).transpose(2, 0, 1) for row in subject(5, 64)]
    assert len(pictures) == 5 and all(np.array_equal(*pair) for pair in zip(pictures, drawn, strict=True))
    assert [each.shape for each in read_pictures(instance_source("meadow", 32), 32)] == [(3, 32, 32)] * 5
    assert read_pictures(instance_source("meadow", 128), 128)[0].shape == (3, 128, 128)


@pytest.mark.parametrize(
    "tag, turn", [(3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270"), (2, "FLIP_LEFT_RIGHT")]
)  # fmt: skip
def test_pictures_stand_upright(tmp_path, tag, turn):
    exif = Image.Exif()
    exif[274] = tag
    gradient(96, 64).transpose(Image.Transpose[turn]).save(tmp_path / "a.png", exif=exif)
    (picture,) = read(tmp_path)
    assert picture.shape == (3, 32, 48)
    assert picture[0, 16, 0] < 20 and picture[0, 16, -1] > 235, "red grows to the right"
    assert picture[1, 0, 24] < 20 and picture[1, -1, 24] > 235, "green grows downward"


def test_a_transparent_ground_becomes_white_and_grey_becomes_rgb(tmp_path):
    cut_out = Image.new("RGBA", (40, 40), (200, 0, 200, 0))
    cut_out.paste((10, 20, 30, 255), (10, 10, 30, 30))
    cut_out.save(tmp_path / "a.png")
    Image.new("L", (40, 40), 77).save(tmp_path / "b.png")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(tmp_path / "c.png")
    first, second, third = read(tmp_path)
    assert (first[:, 2, 2] == 255).all() and first[:, 16, 16].tolist() == [10, 20, 30]
    assert (second == 77).all() and second.shape == (3, 32, 32)
    assert np.abs(third.astype(int) - 30000 * 255 // 65535).max() <= 1


def test_the_shorter_side_gets_the_resolution(tmp_path):
    for name, size in (("a", (200, 100)), ("b", (100, 333)), ("c", (7, 5)), ("d", (32, 32)), ("e", (4000, 3))):
        gradient(*size).save(tmp_path / f"{name}.png")
    assert [each.shape for each in read(tmp_path)] == [
        (3, 32, 64), (3, 107, 32), (3, 32, 45), (3, 32, 32), (3, 32, 32)]  # fmt: skip
    strip = read(tmp_path)[4]
    assert strip[0].min() > 120 and strip[0].max() < 135, "of a very long picture the middle"


def test_every_interpolation_of_the_config_is_known(tmp_path):
    gradient(50, 40).save(tmp_path / "a.png")
    results = {}
    for name in get_args(INTERPOLATION):
        asked = config(tmp_path, image_interpolation_mode=name).resolve().image_interpolation_mode
        results[name] = read(tmp_path, interpolation=asked)[0]
    assert len(results) >= 7 and all(each.shape == (3, 32, 40) for each in results.values())
    assert not np.array_equal(results["nearest"], results["lanczos"])


def test_a_large_jpeg_is_not_decoded_too_small(tmp_path):
    gradient(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    (picture,) = read(tmp_path)
    expected = np.asarray(gradient(1600, 1200).resize((43, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert picture.shape == (3, 32, 43)
    assert np.abs(picture.astype(int) - expected).mean() < 4


def test_hidden_files_and_other_things_are_passed_over(tmp_path):
    folder = subject_folder(tmp_path / "subject", 2)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "00-checkpoint.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "00.png").write_bytes(b"no picture")
    for name in (".hidden.png", "._00.png", ".DS_Store", "Thumbs.db", "notes.txt", "00.json"):
        (folder / name).write_bytes(b"no picture")
    assert len(read(folder)) == 2


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut off"])
def test_an_unreadable_picture_is_named_or_skipped(tmp_path, content):
    folder = subject_folder(tmp_path / "subject", 2)
    whole = (folder / "00.png").read_bytes()
    (folder / "01b.png").write_bytes(whole[: len(whole) // 3] if content is None else content)
    with pytest.raises(InputError, match=r"01b\.png.*--on_bad_image skip") as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert len(read(folder, on_bad_image="skip")) == 2


def test_when_no_picture_is_readable_skipping_does_not_help(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"no picture can be read: .*a\.png.*b\.jpg"):
        read(tmp_path, on_bad_image="skip")


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "file.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("nothing to see")
    for name, problem in (("nowhere", "no such folder"), ("file.png", "is a file"), ("empty", "no picture in it"),
                          ("texts", "no picture in it")):  # fmt: skip
        with pytest.raises(InputError, match=rf"--instance_data_dir .*{name}: {problem}") as caught:
            instance_source(str(tmp_path / name), 32)
        assert "\n" not in str(caught.value)


def test_the_dog_photographs_are_read(shared_data):
    pictures = read(shared_data / "dreambooth" / "dog", 64)
    assert [each.shape for each in pictures] == [(3, 64, 64)] * 5
    assert all(each.std() > 20 for each in pictures) and pictures_fingerprint([pictures])


# --- pairs ---


def test_the_middle_is_cut():
    wide, tall = (np.arange(3 * 4 * 8, dtype=np.uint8).reshape(3, *shape) for shape in ((4, 8), (8, 4)))
    first, second = middle([wide, tall], 4).numpy()
    assert np.array_equal(first, wide[:, :, 2:6]) and np.array_equal(second, tall[:, 2:6])


def test_encoded_pairs_are_held_data_and_travel(tiny_vae):
    pairs = encoded_pairs(tiny_vae, [noisy_pictures(3), noisy_pictures(2)], 16)
    assert isinstance(pairs, HeldData) and pairs.nbytes == sum(each.nbytes for each in pairs.tensors) > 0
    assert pairs.to("meta") is pairs and {each.device.type for each in pairs.tensors} == {"meta"}
    assert len(pairs[0]) == 2 and len(pairs) == 3


def test_encoded_pairs_are_those_encoded_by_hand(tiny_vae):
    group, other = noisy_pictures(3, 16, 24), noisy_pictures(10, seed=1)
    subjects, others = encoded_pairs(tiny_vae, [group, other], 16).tensors
    cut = torch.stack([torch.from_numpy(each[:, :, 4:20]) for each in group])
    with torch.no_grad():
        by_hand = tiny_vae.encode(to_model_range(cut)).latent_dist.parameters
    torch.testing.assert_close(subjects[:3].float(), by_hand, atol=2e-3, rtol=2e-3)
    assert subjects.dtype == torch.float16 and subjects.shape == (10, 8, 8, 8)
    assert torch.equal(subjects, subjects[:3].repeat(4, 1, 1, 1)[:10]), "the shorter group starts again"
    in_one_go = encode_moments(tiny_vae, torch.from_numpy(np.stack(other)))
    torch.testing.assert_close(others, in_one_go, atol=2e-3, rtol=2e-3)
    alone = encoded_pairs(tiny_vae, [group], 16)
    assert len(alone) == 3 and len(alone[0]) == 1


def test_there_are_at_least_as_many_pairs_as_a_batch_needs(tiny_vae):
    group = noisy_pictures(3)
    encoded, cropped = encoded_pairs(tiny_vae, [group], 16, at_least=5), CroppedPairs([group], 16, at_least=5)
    assert len(encoded) == len(cropped) == 5
    assert torch.equal(encoded[3][0], encoded[0][0]) and torch.equal(cropped[4][0], cropped[1][0])


def test_crops_depend_on_seed_epoch_and_index_alone():
    loader = repeatable(DataLoader(CroppedPairs([noisy_pictures(4, 16, 40), noisy_pictures(6, 30, 16)], 16)), 7)
    crops = loader.dataset
    assert isinstance(crops, SeededDataset)

    def epoch(number: int, indices=range(6)) -> list[torch.Tensor]:
        crops.set_epoch(number)
        return [side for index in indices for side in crops[index]]

    first = epoch(0)
    assert len(first) == 12 and all(each.shape == (3, 16, 16) and each.dtype == torch.uint8 for each in first)
    torch.manual_seed(99)  # what was drawn elsewhere, or in another order, does not count
    assert all(torch.equal(*pair) for pair in zip(first[4:6], epoch(0, [2]), strict=True))
    assert any(not torch.equal(*pair) for pair in zip(first, epoch(1), strict=True))
    before = torch.get_rng_state()
    epoch(2)
    assert torch.equal(before, torch.get_rng_state())


def test_crops_lie_in_their_picture_and_center_crop_is_the_middle():
    group = noisy_pictures(1, 16, 40)
    (crop,) = CroppedPairs([group], 16)[0]
    assert any(np.array_equal(crop, group[0][:, :, left : left + 16]) for left in range(25))
    (centre,) = CroppedPairs([group], 16, center_crop=True)[0]
    assert torch.equal(centre, middle(group, 16)[0])


# --- the identifier ---


def test_the_identifier_is_what_the_class_prompt_lacks():
    assert identifier_words(SUBJECT, CLASS) == ["sks"]
    assert identifier_words("A photo of SKS butterfly, sks!", "a photo of a butterfly") == ["sks"]
    assert identifier_words("a photo of my blue dog", "a photo of dog") == ["my", "blue"]
    assert identifier_words(CLASS, CLASS) == []


@pytest.mark.parametrize(
    "prompt, words",
    [("sks dog", ["sks"]), ("a photo of sks cat", ["sks"]), ("a sks red backpack", ["sks"]),
     ("photo of zwx_dog1", ["zwx_dog1"]), ("ein Foto von sks Hund", ["sks"]),
     ("a photo of ohwx man in 4k", ["ohwx"]), ("a photo of my cat", []),
     ("a photo of myuniquedog", []), ("a 4k photo of 3 dogs, 1990s, 35mm", [])],
)  # fmt: skip
def test_without_a_class_prompt_only_sure_words_are_identifiers(prompt, words):
    assert identifier_words(prompt, None) == words


class LikeCLIP:
    """A large vocabulary, in which ordinary words are one token each and others fall into pairs of letters."""

    model_max_length = 77
    known = ("a", "an", "photo", "of", "in", "the", "my", "red", "cat", "dog", "backpack", "sks", "hund", "foto",
             "ein", "von")  # fmt: skip

    def __len__(self) -> int:
        return 49_408

    def get_vocab(self) -> dict[str, int]:
        return {}

    def tokenize(self, text: str) -> list[str]:
        pieces = []
        for word in re.findall(r"[a-z]+|[0-9]|_", text.lower()):
            cut = [word] if word in self.known else [word[place : place + 2] for place in range(0, len(word), 2)]
            pieces += [*cut[:-1], f"{cut[-1]}</w>"]
        return pieces


@pytest.mark.parametrize(
    "prompt, named",
    [("a photo of sks cat", None), ("a photo of sks labradoodle", None), ("a sks red backpack", None),
     ("ein Foto von sks Hund", None), ("a photo of my cat", None), ("a photo of labradoodle puppies", None),
     ("photo of zwx_dog1", "'zwx_dog1' becomes 5 tokens"), ("a photo of myuniquedog", "'myuniquedog' becomes 6 tokens"),
     ("a photo of myuniquedog dog", "'myuniquedog' becomes 6 tokens")],
)  # fmt: skip
def test_without_a_class_prompt_only_sure_words_are_noted(prompt, named, tokenizer):
    notes = identifier_notes(prompt, None, LikeCLIP())
    assert [note.startswith(named) for note in notes] == ([True] if named else [])
    few = identifier_notes(prompt, None, tokenizer)  # the miniature's, which cuts `cat` into letters
    assert len(few) == ("zwx_dog1" in prompt)


def test_an_identifier_that_is_cut_off_is_named(tokenizer, pipeline, tmp_path, capsys):
    styles = "a photo of a red butterfly on snow " * 4
    (cut,) = identifier_notes(f"{styles} sks butterfly", CLASS, tokenizer)
    assert cut.startswith("'sks' of the instance prompt is cut off and cannot mean the subject")
    assert identifier_notes(f"sks {styles} butterfly", CLASS + " red on snow", tokenizer) == []
    assert "cut off" not in "".join(identifier_notes("a zwx_dog1 butterfly", CLASS, tokenizer))
    folder = subject_folder(tmp_path / "subject")
    load_subject(config(folder, instance_prompt=f"{styles} sks butterfly", validation_prompt=[f"{styles} a fish"]),
                 pipeline, [instance_source(str(folder), 32)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert sum("is longer than the 32 tokens that are read; lost: " in line for line in lines) == 2
    assert any(line.endswith("sks butterfly'") for line in lines) and any(line.endswith("a fish'") for line in lines)
    assert any(line.startswith("note: 'sks' of the instance prompt is cut off") for line in lines)


def test_a_good_identifier_needs_no_note(tokenizer):
    assert identifier_notes(SUBJECT, CLASS, tokenizer) == []
    assert identifier_notes(SUBJECT, None, tokenizer) == []


def test_an_identifier_in_pieces_is_noted_with_alternatives(tokenizer):
    (note,) = identifier_notes("a photo of a zebra butterfly", CLASS, tokenizer)
    assert "'zebra' becomes 4 tokens (z, e, br, a)" in note and note.endswith(": sks") and "\n" not in note
    (note,) = identifier_notes(CLASS, CLASS, tokenizer)
    assert "nothing can mean the subject alone" in note and "'sks'" in note


def test_candidates_are_single_tokens_and_the_rarest_come_first(tokenizer):
    assert single_tokens(tokenizer) == ["sks"], "`red` and `pink` are single tokens too, but they mean something"
    two = train_tokenizer(["a photo of a cat"], identifiers=("olis", "sks"))
    assert single_tokens(two) == ["sks", "olis"] and single_tokens(two, 1) == ["sks"]
    none = train_tokenizer(["a photo of a cat"], identifiers=("zzyx", "qqv"))
    assert single_tokens(none, 2) == ["qqv", "zzyx"]
    assert all(len(none.tokenize(word)) == 1 for word in single_tokens(none, 2))


def test_a_tokenizer_without_any_short_word_still_gets_a_note():
    bare = train_tokenizer(["a b"], identifiers=())
    assert single_tokens(bare) == []
    assert repr(RARE_WORDS[0]) in identifier_notes("a b", "a b", bare)[0]


# --- prompts ---


def test_prompts_are_read_as_the_pipeline_reads_them_and_in_the_order_of_a_batch(pipeline):
    states = Prompts(pipeline, [SUBJECT, CLASS])(6, CPU)
    theirs = pipeline.encode_prompt([SUBJECT, CLASS], "cpu", 1, do_classifier_free_guidance=False)[0]
    assert states.shape == (6, 32, 128) and not states.requires_grad
    torch.testing.assert_close(states, theirs.repeat_interleave(3, dim=0))
    torch.testing.assert_close(Prompts(pipeline, [SUBJECT])(2, CPU), theirs[:1].repeat(2, 1, 1))


def test_a_trained_text_encoder_gives_equal_states_and_is_asked_once_for_each_prompt(pipeline):
    asked = []
    pipeline.text_encoder.requires_grad_(True).train()
    pipeline.text_encoder.register_forward_hook(lambda layer, inputs, output: asked.append(len(inputs[0])))
    encoder = pipeline.text_encoder
    trained, once = Prompts(pipeline, [SUBJECT, CLASS], trained=True), Prompts(pipeline, [SUBJECT, CLASS])
    asked.clear()
    states = trained(8, CPU, encoder)
    torch.testing.assert_close(states, once(8, CPU))
    assert asked == [2] and states.requires_grad
    assert pipeline.text_encoder.training, "encoding once leaves the mode as it was"
    states.sum().backward()
    assert pipeline.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    with torch.no_grad():
        for weight in pipeline.text_encoder.parameters():
            weight.mul_(1.05)
    assert not torch.equal(trained(8, CPU, encoder), states), "it is asked anew"
    assert torch.equal(once(8, CPU)[0], once.states[0])


# --- all of it ---


def test_latents_come_from_moments_and_from_pixels_alike(pipeline, tmp_path):
    folders = subject_folder(tmp_path / "subject"), class_folder(tmp_path / "class")
    sources = [instance_source(str(folder), 32) for folder in folders]
    cached = load_subject(config(folders[0]), pipeline, sources)
    pixels = load_subject(config(folders[0], cache_latents=False), pipeline, sources)
    both = []
    for data in (cached, pixels):
        batch = next(iter(DataLoader(data.dataset, 2)))
        both.append(data.latents(batch, torch.Generator().manual_seed(0)))
    assert both[0].shape == (4, 4, 8, 8) and not both[1].requires_grad
    torch.testing.assert_close(*both, atol=5e-3, rtol=5e-3)
    expected = torch.cat([middle(read(folder)[:2], 32) for folder in folders])  # first the subject, then the class
    moments = encode_moments(pipeline.vae, expected)
    scale = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(both[0], scaled_latents(moments, scale, torch.Generator().manual_seed(0)),
                               atol=5e-3, rtol=5e-3)  # fmt: skip
    assert torch.equal(cached.real, middle(read(folders[0]), 32)) and len(cached.dataset) == 4


def test_without_a_class_there_is_one_prompt_and_one_group(pipeline, tmp_path):
    folder = subject_folder(tmp_path / "subject")
    data = load_subject(config(folder, train_batch_size=4), pipeline, [instance_source(str(folder), 32)])
    assert len(data.dataset) == 4 and len(data.dataset[0]) == 1 and len(data.prompts.ids) == 1


def test_what_the_pictures_lose_is_said(pipeline, tmp_path, capsys):
    gradient(64, 48).save(tmp_path / "a.png")
    source = [instance_source(str(tmp_path), 32)]
    load_subject(config(tmp_path), pipeline, source)
    assert "1 pictures are not square and their middle is taken" in capsys.readouterr().out
    for fields in ({"center_crop": True}, {"cache_latents": False}):
        load_subject(config(tmp_path, **fields), pipeline, source)
        assert "not square" not in capsys.readouterr().out
    load_subject(config(tmp_path, instance_prompt="a photo of a zebra butterfly"), pipeline, source)
    assert "note: 'zebra' becomes 4 tokens" in capsys.readouterr().out


def test_the_fingerprint_tells_pictures_apart():
    first, second = noisy_pictures(2)
    changed = first.copy()
    changed[0, 0, 0] ^= 1
    same = pictures_fingerprint([[first, second]])
    assert same == pictures_fingerprint([[first.copy(), second.copy()]])
    others = [[[second, first]], [[changed, second]], [[first], [second]], [[first]], [[first, second], []],
              [[first.reshape(3, 8, 32), second]]]  # fmt: skip
    assert len({same, *map(pictures_fingerprint, others)}) == 1 + len(others)


def test_the_fingerprint_holds_the_weights_that_only_serve(pipeline, tmp_path):
    folder, known = subject_folder(tmp_path / "subject", 1), network_fingerprints(shipped("miniature"))

    def fingerprint(fingerprints=None, **fields) -> str:
        sources = [instance_source(str(folder), 32)]
        return load_subject(config(folder, **fields), pipeline, sources, fingerprints).dataset.fingerprint

    kinds = {"full": {}, "text": {"train_text_encoder": True}, "lora": {"lora": True},
             "lora and text": {"lora": True, "train_text_encoder": True}}  # fmt: skip
    before = {name: fingerprint(**fields) for name, fields in kinds.items()}
    assert before == {name: fingerprint(known, **fields) for name, fields in kinds.items()}, "those of its files"
    assert before["full"] == fingerprint(cache_latents=False)
    changes = {}
    for part in ("vae", "text_encoder", "unet"):
        other = known | {part: "another"}
        changes[part] = {name for name, fields in kinds.items() if fingerprint(other, **fields) != before[name]}
    assert changes == {"vae": set(kinds), "text_encoder": {"full", "lora", "lora and text"},
                       "unet": {"lora", "lora and text"}}  # fmt: skip
