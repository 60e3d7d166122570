"""Captions, held-out triples, the tokenizer, captioned pictures, and what all stages share."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature import captions
from diffusion_lessons.miniature.captions import (
    ATTRIBUTES,
    CONTEXT_LENGTH,
    HELD_OUT,
    UNSAID,
    CaptionedSet,
    Said,
    StageConfig,
    all_captions,
    encode_attributes,
    join_pair,
    learn_merges,
    render_scenes,
    say_some,
    split_word,
    to_caption,
    train_tokenizer,
    training_scenes,
)
from diffusion_lessons.pictures.batches import make_dataloader
from diffusion_lessons.pictures.meadow import COLOURS, KINDS, TRIPLES, caption, scenes
from diffusion_lessons.stable_diffusion.folder import shipped
from diffusion_lessons.stable_diffusion.prompts import tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(all_captions())


# --- what is said ---


def test_every_kind_in_every_colour_misses_exactly_one_place():
    assert len(set(HELD_OUT)) == 40 and set(HELD_OUT) <= set(TRIPLES)
    assert {(colour, kind) for colour, kind, _ in HELD_OUT} == set(itertools.product(COLOURS, KINDS))
    assert set(Counter(place for _, _, place in HELD_OUT).values()) == {6, 7}


def test_any_two_words_of_a_held_out_triple_meet_in_training():
    seen = set(TRIPLES) - set(HELD_OUT)
    for triple in HELD_OUT:
        for column in range(3):
            rest = [word for place, word in enumerate(triple) if place != column]
            assert any([word for place, word in enumerate(other) if place != column] == rest for other in seen)


def test_attributes_are_positions_in_their_lists():
    encoded = encode_attributes([("red", "butterfly", "meadow"), ("white", "flower", "night")])
    assert encoded.tolist() == [[0, 0, 0], [9, 3, 5]] and encoded.dtype == torch.int64
    assert encode_attributes([]).shape == (0, 3) and encode_attributes([]).dtype == torch.int64


@pytest.mark.parametrize("triple", [("teal", "fish", "sea"), ("red", "sea", "fish")])
def test_an_unknown_word_is_named(triple):
    with pytest.raises(InputError, match=r"'(teal|sea)' is not known; choose from (red|butterfly), "):
        encode_attributes([triple])


def test_the_full_caption_is_the_meadows_own():
    for triple, row in zip(TRIPLES, encode_attributes(TRIPLES).tolist(), strict=True):
        assert to_caption(row) == caption(*triple)


@pytest.mark.parametrize(
    ("said", "long", "brief"),
    [
        ((0, 0, UNSAID), "a photo of a red butterfly", "a red butterfly"),
        ((UNSAID, 2, 3), "a photo of a fish on sea", "a fish on sea"),
        ((UNSAID, 1, UNSAID), "a photo of a beetle", "a beetle"),
        ((4, UNSAID, 3), "", ""),
    ],
)
def test_what_is_unsaid_leaves_no_trace(said, long, brief):
    assert to_caption(said) == long and to_caption(said, brief=True) == brief


def test_rows_are_the_places_of_the_sentences():
    every = all_captions()
    assert len(every) == 770 and len(set(every)) == 617 and every.count("") == 154
    rows = torch.cartesian_prod(*(torch.arange(UNSAID, len(names)) for names in ATTRIBUTES))
    for brief in (False, True):
        said = Said(rows, torch.full((len(rows),), brief))
        assert [every[row] for row in said.rows.tolist()] == said.captions
    assert sorted(said.rows.tolist()) == list(range(385, 770)), "each row is used once"


def test_shares_of_what_captions_say():
    said = say_some(torch.zeros(60_000, 3, dtype=torch.int64), torch.Generator().manual_seed(0), empty=0.2)
    speaks = said.attributes[:, 1] != UNSAID
    assert abs(speaks.float().mean() - 0.8) < 0.007
    spoken = said.attributes[speaks]
    for column in (0, 2):
        assert abs((spoken[:, column] == UNSAID).float().mean() - 1 / 6) < 0.007
    assert abs((spoken[:, [0, 2]] == UNSAID).all(dim=1).float().mean() - 1 / 36) < 0.004, "independently"
    assert abs(said.brief.float().mean() - 1 / 5) < 0.007
    assert (said.attributes[~speaks] == UNSAID).all(), "without a kind nothing is said"


def test_what_is_said_is_true_and_depends_on_the_generator():
    attributes = encode_attributes(TRIPLES)
    first, same, other = (say_some(attributes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.captions == same.captions != other.captions
    assert ((first.attributes == attributes) | (first.attributes == UNSAID)).all()
    never = say_some(attributes, torch.Generator().manual_seed(1), empty=0)
    assert "" not in never.captions and set(say_some(attributes, torch.Generator(), empty=1).captions) == {""}


# --- the tokenizer ---


def test_pairs_are_joined_from_left_to_right():
    assert join_pair(["a", "a", "a"], ("a", "a")) == ["aa", "a"]
    assert join_pair(["b", "a", "n", "a", "n"], ("a", "n")) == ["b", "an", "an"]
    assert split_word("on") == ["o", "n</w>"] and split_word("a") == ["a</w>"]


def test_merges_by_hand():
    # "ab" 3 times and "b" last in "cb": a+b</w> is most frequent, then c+b</w>; then nothing is left to join.
    assert learn_merges({"ab": 3, "cb": 2}) == [("a", "b</w>"), ("c", "b</w>")]
    assert learn_merges({"cb": 2, "ab": 2}) == [("a", "b</w>"), ("c", "b</w>")], "a tie goes by the alphabet"
    assert learn_merges({"ab": 1, "ac": 1}) == learn_merges({"ac": 1, "ab": 1}) == [("a", "b</w>"), ("a", "c</w>")]
    assert learn_merges({"aab": 5}) == [("a", "a"), ("aa", "b</w>")]
    assert learn_merges({}) == []


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == 593 and sorted(vocabulary.values()) == list(range(593))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (591, 592, 592)
    assert vocabulary["sks</w>"] == 590 and vocabulary["butterfly</w>"] == 538
    assert tokenizer("a photo of a red butterfly on meadow").input_ids == [
        591, 320, 518, 515, 320, 570, 538, 512, 554, 592]  # fmt: skip


def test_the_shipped_tokenizer_has_the_same_numbers(tokenizer):
    assert AutoTokenizer.from_pretrained(shipped("miniature/tokenizer")).get_vocab() == tokenizer.get_vocab()


def test_another_process_trains_the_same(tokenizer):
    """Ties must not be broken by the order of a hash table; these words have many of them."""
    words = ["ab", "ac", "ad", "ae", "af", "bc", "bd", "be", "bf"]
    code = (
        "from diffusion_lessons.miniature.captions import all_captions, train_tokenizer;"
        f"print(train_tokenizer([*all_captions(), *{words}]).backend_tokenizer.to_str())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == train_tokenizer([*all_captions(), *words]).backend_tokenizer.to_str()


def test_every_word_of_a_caption_is_one_token(tokenizer):
    for text in all_captions():
        assert len(tokenizer.tokenize(text)) == len(text.split())


@pytest.mark.parametrize("identifiers", [("ohwx", "sks"), ("shoe", "banana", "abab"), ("fish",), ("übel",), ()])
def test_identifiers_are_single_last_tokens_that_change_nothing_else(tokenizer, identifiers):
    other = train_tokenizer(all_captions(), identifiers)
    for word in identifiers:
        assert len(other.tokenize(word)) == 1, word
    for text in all_captions():
        assert other.tokenize(text) == tokenizer.tokenize(text)
    new = [word for word in identifiers if word != "fish"]
    last_learned = tokenizer.convert_tokens_to_ids("black</w>")
    numbers = [other(word).input_ids[1] for word in new]
    assert [last_learned, *numbers] == sorted({last_learned, *numbers})


@pytest.mark.parametrize("identifier", ["two words", "sks1", "", " "])
def test_identifiers_of_several_words_are_refused(identifier):
    with pytest.raises(InputError, match=r"identifiers: '.*' is not one word to CLIP"):
        train_tokenizer(all_captions(), (identifier,))


@pytest.mark.parametrize("text", ["zebra", "ein käfer", "蝶", "sks zebra", "π ≈ 3"])
def test_any_text_comes_back(tokenizer, text):
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_tokens_are_padded_and_cut_to_the_context(tokenizer):
    tokens = tokenize(tokenizer, ["", "a fish", "a fish " * 40])
    assert tokens.shape == (3, CONTEXT_LENGTH) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [591] + [592] * 31 and (tokens[1, 3:] == 592).all()
    assert tokens[2, 0] == 591 and tokens[2, -1] == 592 and (tokens[2, 1:-1] < 591).all(), "a cut prompt keeps its end"


def test_plain_transformers_reads_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*all_captions(), "sks zebra", "A Red  Fish, on SEA!", "ein Käfer", "a fish " * 40]
    assert torch.equal(tokenize(read, texts), tokenize(tokenizer, texts)) and read.model_max_length == CONTEXT_LENGTH


# --- pictures ---


def test_pictures_come_with_what_is_in_them():
    images, drawn = render_scenes(12, seed=3, size=16), scenes(12, 16, 3, exclude=HELD_OUT)
    assert images.pixels.shape == (12, 3, 16, 16) and images.pixels.flags.c_contiguous
    for index, row in enumerate(drawn):
        assert np.array_equal(images.pixels[index].transpose(1, 2, 0), np.asarray(row["image"]))
        assert to_caption(images.attributes[index].tolist()) == row["caption"]


def test_held_out_triples_are_not_drawn_unless_wanted():
    held = {tuple(row) for row in encode_attributes(HELD_OUT).tolist()}
    drawn, everything = (render_scenes(60, size=8, exclude=exclude) for exclude in (HELD_OUT, ()))
    assert not held & {tuple(row) for row in drawn.attributes.tolist()}
    assert held & {tuple(row) for row in everything.attributes.tolist()}


def test_batches_slices_and_single_pictures_hold_both():
    images = render_scenes(10, size=8)
    batch = next(iter(make_dataloader(images, 4, generator=torch.Generator().manual_seed(0))))
    assert batch["images"].shape == (4, 3, 8, 8) and batch["attributes"].shape == (4, 3)
    for picture, attributes in zip(batch["images"], batch["attributes"], strict=True):
        row = next(index for index in range(10) if torch.equal(images[index]["images"], picture))
        assert torch.equal(attributes, images.attributes[row])
    assert torch.equal(images[-1]["attributes"], images.attributes[9])
    assert torch.equal(images[2:5]["attributes"], images.attributes[2:5]) and len(images[5:5]["attributes"]) == 0
    with pytest.raises(IndexError):
        images[10]


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (4,)])
def test_attributes_must_fit_the_pictures(shape):
    with pytest.raises(InputError, match=r"attributes must have the shape \(4, 3\), not"):
        CaptionedSet(np.zeros((4, 3, 8, 8), np.uint8), torch.zeros(shape, dtype=torch.int64))


def test_drawn_pictures_are_kept_and_found_again(tmp_path, monkeypatch):
    first = render_scenes(6, size=8, folder=tmp_path)
    monkeypatch.setattr(captions, "scenes", lambda *_, **__: pytest.fail("drawn again"))
    again = render_scenes(6, size=8, folder=tmp_path)
    assert np.array_equal(first.pixels, again.pixels) and torch.equal(first.attributes, again.attributes)


def test_a_folder_cut_off_while_drawing_is_not_taken_for_whole(tmp_path, monkeypatch):
    whole = datasets.Dataset.save_to_disk

    def cut_off(self: datasets.Dataset, path: str) -> None:
        whole(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(datasets.Dataset, "save_to_disk", cut_off)
        with pytest.raises(KeyboardInterrupt):
            render_scenes(6, size=8, folder=tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir()], "nothing is left of it"
    assert len(render_scenes(6, size=8, folder=tmp_path)) == 6
    (drawn,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert drawn.name.startswith("scenes-6-8-0-")
    drawn.rename(tmp_path / f".{drawn.name}.partial")  # what a killed process leaves
    assert len(render_scenes(6, size=8, folder=tmp_path)) == 6
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [drawn.name]


def test_other_triples_left_out_are_other_folders(tmp_path):
    """Lists of equal length must not be taken for each other; the order of a list does not matter."""
    first, second = TRIPLES[:120], TRIPLES[120:]
    for exclude in (first, second):
        drawn = render_scenes(24, size=8, exclude=exclude, folder=tmp_path)
        assert drawn.fingerprint == render_scenes(24, size=8, exclude=exclude).fingerprint
        absent = {tuple(row) for row in encode_attributes(exclude).tolist()}
        assert not absent & {tuple(row) for row in drawn.attributes.tolist()}
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2
    render_scenes(24, size=8, exclude=first[::-1], folder=tmp_path)
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2


# --- stages ---


def test_stages_with_the_same_numbers_see_the_same_pictures(tmp_path):
    one, two, other = (
        training_scenes(StageConfig(num_train_images=16, data_dir=folder, seed=seed))
        for folder, seed in ((None, 0), (str(tmp_path), 0), (None, 1))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert [path.name[:12] for path in tmp_path.iterdir() if path.is_dir()] == ["scenes-16-64"], "drawn once for all"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_train_images": 8}, "--num_train_images 8: must be at least the batch, 16"),
        ({"sample_steps": 0}, "--sample_steps 0"),
        ({"train_batch_size": 0}, "--train_batch_size 0"),
    ],
)
def test_bad_numbers_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        StageConfig(**fields)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the miniature is trained in one process"):
        StageConfig()


def test_a_part_that_is_not_installed_is_named():
    with pytest.raises(InputError, match="has no trained giant; install the package again"):
        shipped("giant")
