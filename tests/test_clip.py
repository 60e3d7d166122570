"""The two towers: their loss, a small training, what it leaves, and what the shipped ones can do."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature.captions import (
    CONTEXT_LENGTH,
    HELD_OUT,
    UNSAID,
    all_captions,
    encode_attributes,
    render_scenes,
    say_some,
    to_caption,
    train_tokenizer,
)
from diffusion_lessons.miniature.clip import (
    ClipConfig,
    caption_matches,
    contrastive_loss,
    make_clip,
    make_image_processor,
    similarities,
    train_clip,
)
from diffusion_lessons.pictures.batches import to_model_range
from diffusion_lessons.pictures.figures import to_pil
from diffusion_lessons.pictures.meadow import TRIPLES, scenes
from diffusion_lessons.stable_diffusion.folder import MINIATURE_TEXT_WIDTH, shipped
from diffusion_lessons.stable_diffusion.prompts import tokenize


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(all_captions())


@pytest.fixture(scope="module")
def fresh(tokenizer) -> CLIPModel:
    return make_clip(tokenizer)


@pytest.fixture(scope="module")
def trained() -> CLIPModel:
    return CLIPModel.from_pretrained(shipped("miniature/clip"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.as_tensor(render_scenes(16, seed=1).pixels)


# --- the towers ---


def test_the_seed_decides_the_weights_and_nothing_else_does(tokenizer, fresh):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    same, other = make_clip(tokenizer), make_clip(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    for (name, one), two in zip(fresh.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(fresh.text_projection.weight, other.text_projection.weight)


def test_shapes_and_marks(tokenizer, fresh):
    text = fresh.config.text_config
    assert (text.hidden_size, text.max_position_embeddings) == (MINIATURE_TEXT_WIDTH, CONTEXT_LENGTH)
    assert text.vocab_size == len(tokenizer)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (591, 592, 592)
    tokens = tokenize(tokenizer, ["a fish", ""])
    assert fresh.text_model(tokens).last_hidden_state.shape == (2, CONTEXT_LENGTH, MINIATURE_TEXT_WIDTH)
    seen = fresh.vision_model(torch.zeros(1, 3, 64, 64)).last_hidden_state
    assert seen.shape == (1, 65, 128), "64 patches and a class"


def test_the_summary_is_taken_at_the_first_end_mark(tokenizer, fresh):
    """transformers does so only if the config knows the end mark; otherwise it takes the largest number."""
    tokens = tokenize(tokenizer, ["a photo of a red butterfly on meadow"])
    output = fresh.eval().text_model(tokens)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 9])
    changed = tokens.clone()
    changed[0, 10:] = 77
    assert torch.allclose(fresh.text_model(changed).pooler_output, output.pooler_output, atol=1e-6)


def test_the_image_processor_does_what_training_did(pictures):
    prepared = make_image_processor()([to_pil(picture) for picture in pictures], return_tensors="pt").pixel_values
    assert torch.allclose(prepared, to_model_range(pictures), atol=1e-6)


def test_similarities_are_cosines_of_bytes_or_floats(tokenizer, fresh, pictures):
    fresh.train()
    captions = ["a fish", "a red fish", ""]
    cosines = similarities(fresh, tokenizer, pictures[:4], captions)
    assert cosines.shape == (4, 3) and cosines.abs().max() <= 1 and not cosines.requires_grad and fresh.training
    assert torch.allclose(cosines, similarities(fresh, tokenizer, to_model_range(pictures[:4]), captions))
    output = fresh(input_ids=tokenize(tokenizer, ["a fish"]), pixel_values=to_model_range(pictures[:1]))
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    assert torch.allclose(cosines[0, 0], cosine, atol=1e-5)


# --- the loss ---


def test_matches_by_hand():
    pictures = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 1]])
    said = torch.tensor([[0, 0, 0], [0, 0, UNSAID], [UNSAID, 0, 1], [UNSAID, UNSAID, UNSAID], [1, 0, 0]])
    expected = [[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]
    assert caption_matches(pictures, said).int().tolist() == expected


def test_a_caption_is_true_of_its_own_picture():
    attributes = encode_attributes(TRIPLES)
    said = say_some(attributes, torch.Generator().manual_seed(0))
    assert caption_matches(attributes, said.attributes).diagonal().all()


def test_with_one_right_answer_it_is_the_loss_of_transformers(tokenizer, fresh, pictures):
    captions = [to_caption(row) for row in encode_attributes(TRIPLES[:16]).tolist()]
    with torch.no_grad():
        output = fresh(input_ids=tokenize(tokenizer, captions), pixel_values=to_model_range(pictures), return_loss=True)
    ours = contrastive_loss(output.logits_per_image, torch.eye(16, dtype=torch.bool))
    assert abs(ours - output.loss) < 1e-5
    shifted = contrastive_loss(output.logits_per_image, torch.eye(16, dtype=torch.bool).roll(1, 0))
    assert abs(shifted - output.loss) > 1e-4, "and another assignment is another loss"


def test_with_several_it_is_the_mean_over_the_right_ones():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    matches = torch.eye(5, dtype=torch.bool)
    matches[0, 1] = matches[3, 1] = matches[4, 2] = True
    rows = [-logits.log_softmax(1)[i, matches[i]].mean() for i in range(5)]
    columns = [-logits.log_softmax(0)[matches[:, j], j].mean() for j in range(5)]
    assert torch.allclose(contrastive_loss(logits, matches), (sum(rows) + sum(columns)) / 10)
    assert not torch.allclose(contrastive_loss(logits, matches), cross_entropy(logits, torch.arange(5)))


def test_the_floor_is_reached_where_right_answers_share_everything():
    matches = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    logits = torch.where(matches, 50.0, 0.0)
    floor = (2 * math.log(2) + 3 * math.log(3)) / 5
    assert abs(contrastive_loss(logits, matches).item() - floor) < 1e-5
    logits[0, 0] += 1
    assert contrastive_loss(logits, matches) > floor + 1e-3, "preferring one of two right answers costs"


# --- training ---


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = ClipConfig(
        output_dir=str(folder / "run"), model_dir=str(folder / "model"), data_dir=None, report_to="none",
        num_train_images=32, train_batch_size=8, max_train_steps=24, lr_warmup_steps=4)  # fmt: skip
    return folder, train_clip(config)


def test_it_learns_and_leaves_its_parts(small_run):
    folder, losses = small_run
    assert len(losses) == 24 and abs(losses[0] - math.log(8)) < 0.8
    assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.2
    assert {path.name for path in (folder / "model").iterdir()} == {
        "clip", "text_encoder", "tokenizer", "feature_extractor"}  # fmt: skip
    assert (folder / "run" / "checkpoint-24").is_dir() and (folder / "run" / "training_config.json").is_file()


def test_plain_transformers_reads_the_parts_and_they_agree(small_run, pictures):
    model_dir = small_run[0] / "model"
    tokenizer = CLIPTokenizer.from_pretrained(model_dir / "tokenizer")
    clip = CLIPModel.from_pretrained(model_dir / "clip").eval()
    text_encoder = CLIPTextModel.from_pretrained(model_dir / "text_encoder").eval()
    processor = CLIPImageProcessor.from_pretrained(model_dir / "feature_extractor")
    tokens = tokenize(tokenizer, ["a photo of a red butterfly on meadow", ""])
    with torch.no_grad():
        inside, alone = clip.text_model(tokens), text_encoder(tokens)
    assert torch.equal(inside.last_hidden_state, alone.last_hidden_state)
    assert torch.equal(inside.pooler_output, alone.pooler_output)
    prepared = processor([to_pil(pictures[0])], return_tensors="pt").pixel_values
    assert torch.allclose(prepared, to_model_range(pictures[:1]), atol=1e-6)


def test_a_token_that_no_caption_holds_is_not_trained(small_run, fresh, tokenizer):
    before = fresh.text_model.embeddings.token_embedding.weight.detach()
    clip = CLIPModel.from_pretrained(small_run[0] / "model" / "clip")
    after = clip.text_model.embeddings.token_embedding.weight.detach()
    alike = torch.cosine_similarity(before, after)
    sks, red = (tokenizer.convert_tokens_to_ids(token) for token in ("sks</w>", "red</w>"))
    assert alike[sks] > 0.9999 > alike[red], "weight decay shortens it, and nothing turns it"


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="--num_train_images 32: must be at least the batch, 64"):
        ClipConfig(num_train_images=32)


# --- what ships ---


def test_the_shipped_towers_read_pictures_they_never_saw(trained, tokenizer):
    images, triples = render_scenes(100, seed=1), encode_attributes(TRIPLES)
    pixels, captions = torch.as_tensor(images.pixels), [to_caption(row) for row in triples.tolist()]
    read = triples[similarities(trained, tokenizer, pixels, captions).argmax(dim=1)]
    assert (read == images.attributes).all(dim=1).float().mean() > 0.93
    mirrored = triples[similarities(trained, tokenizer, pixels.flip(-1), captions).argmax(dim=1)]
    assert (mirrored == read).all(dim=1).float().mean() > 0.9, "and their mirror images alike"


def test_held_out_triples_are_read_in_colour_and_place(trained, tokenizer):
    drawn, triples = scenes(seed=1, attributes=HELD_OUT), encode_attributes(TRIPLES)
    pixels = torch.stack([pil_to_tensor(picture) for picture in drawn["image"]])
    cosines = similarities(trained, tokenizer, pixels, [to_caption(row) for row in triples.tolist()])
    colour, kind, place = (triples[cosines.argmax(dim=1)] == encode_attributes(HELD_OUT)).float().mean(dim=0)
    assert min(colour, place) > 0.9 and kind > 0.6


def test_the_shipped_text_encoder_is_the_tower_of_the_shipped_clip(trained):
    text_encoder = CLIPTextModel.from_pretrained(shipped("miniature/text_encoder"), dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(shipped("miniature/tokenizer"))
    tokens = tokenize(tokenizer, ["a photo of a red butterfly on meadow", "sks", ""])
    with torch.no_grad():
        assert torch.equal(text_encoder(tokens).last_hidden_state, trained.text_model(tokens).last_hidden_state)


def test_the_record_tells_of_the_full_run():
    record = json.loads((shipped("record") / "record.json").read_text())["clip"]
    assert record["steps"] == ClipConfig().max_train_steps and record["seconds"] > 60
    assert record["loss"][0][1] > 2 > 0.8 > record["loss"][-1][1]
