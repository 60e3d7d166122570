"""The judge: three questions answered by one network, trained on pictures of its own, and what it says of others."""
import json
import math

import numpy as np
import pytest
import torch

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature.captions import ATTRIBUTES, HELD_OUT, encode_attributes, render_scenes
from diffusion_lessons.miniature.judge import (
    JudgeConfig,
    Verdict,
    judge_loss,
    judge_pictures,
    load_judge,
    make_judge,
    soften,
    split_answers,
    train_judge,
    wilson_interval,
)
from diffusion_lessons.pictures.meadow import PLACES, TRIPLES, background
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import load_pipeline, shipped


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def newborn():
    return make_judge().eval()


@pytest.fixture(scope="module")
def exam():
    """240 pictures that no part was trained on."""
    return render_scenes(240, seed=1, exclude=())


@pytest.fixture(scope="module")
def verdict(exam) -> Verdict:
    return judge_pictures(load_judge(shipped("judge")), exam[:]["images"])


# ------------------------------------------------------------------------------------------------------ the network
def test_it_has_an_answer_for_every_word(newborn):
    words = [word for group in ATTRIBUTES for word in group]
    assert list(newborn.config.id2label.values()) == words
    assert newborn(torch.zeros(1, 3, 64, 64)).logits.shape == (1, len(words))


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(newborn):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = make_judge(), make_judge(1)
    assert torch.equal(torch.rand(1), expected)
    assert all(map(torch.equal, newborn.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(newborn.classifier[1].weight, other.classifier[1].weight)


def test_answers_are_cut_where_the_words_are():
    colour, kind, place = split_answers(torch.arange(20.0)[None])
    assert colour.tolist() == [list(range(10))]
    assert kind.tolist() == [[10, 11, 12, 13]]
    assert place.tolist() == [[14, 15, 16, 17, 18, 19]]


def test_loss_of_a_shrug_is_the_sum_of_three_logarithms():
    attributes = torch.tensor([[3, 1, 5], [0, 0, 0]])
    assert judge_loss(torch.zeros(2, 20), attributes).item() == pytest.approx(math.log(10 * 4 * 6), rel=1e-6)


@pytest.mark.parametrize("column", range(3))
def test_loss_looks_at_every_question(column):
    right = torch.tensor([[3, 1, 5]])
    logits = torch.zeros(1, 20)
    logits[0, [3, 11, 19]] = 30.0
    assert judge_loss(logits, right).item() == pytest.approx(0, abs=1e-6)
    wrong = right.clone()
    wrong[0, column] = 0
    assert judge_loss(logits, wrong).item() == pytest.approx(30, rel=1e-5)


def test_loss_by_hand():
    logits = torch.zeros(1, 20)
    logits[0, 2], logits[0, 10] = 1.0, -1.0
    expected = math.log(math.e + 9) - 1 + math.log(3 + 1 / math.e) + 1 + math.log(6)
    assert judge_loss(logits, torch.tensor([[2, 0, 4]])).item() == pytest.approx(expected, rel=1e-6)


# -------------------------------------------------------------------------------------------------------- softening
def test_half_of_the_batches_lose_their_edges():
    edges = torch.ones(1, 3, 64, 64)
    edges[..., ::2] = -1
    contrast = [soften(edges, generator(seed)).std().item() for seed in range(200)]
    blurred = sum(value < 0.9 for value in contrast) / 200
    assert 0.4 < blurred < 0.6
    assert min(contrast) > 0.04, "and some noise stays on the softest"


def test_noise_has_the_strength_that_is_written():
    flat = soften(torch.zeros(8, 3, 64, 64), generator())
    assert flat.mean().abs() < 1e-3
    assert flat.std().item() == pytest.approx(0.05, rel=0.02)


def test_softening_is_drawn_from_the_generator_and_keeps_its_input():
    images = torch.rand(2, 3, 64, 64, generator=generator(1))
    kept = images.clone()
    assert torch.equal(soften(images, generator(3)), soften(images, generator(3)))
    assert not torch.equal(soften(images, generator(3)), soften(images, generator(4)))
    assert torch.equal(images, kept)


def test_softening_never_goes_below_half_the_pixels(monkeypatch):
    sizes = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr("diffusion_lessons.miniature.judge.F.interpolate",
                        lambda images, size, mode: sizes.append(size) or interpolate(images, size, mode=mode))
    for seed in range(300):
        soften(torch.zeros(1, 3, 64, 64), generator(seed))
    detours = sizes[::2]
    assert 32 < min(detours) <= 36 and 60 <= max(detours) <= 64
    assert set(sizes[1::2]) == {64}


# --------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of sixty steps, with its folder."""
    folder = tmp_path_factory.mktemp("judge")
    config = JudgeConfig(
        output_dir=str(folder / "run"), judge_dir=str(folder / "judge"), model_dir=str(folder / "model"),
        data_dir=None, num_train_images=160, train_batch_size=32, max_train_steps=60, lr_warmup_steps=5,
        report_to="none")
    return folder, train_judge(config)


def test_it_learns(trained):
    losses = trained[1]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(240), abs=0.6)
    assert sum(losses[-5:]) / 5 < 3.2


def test_a_run_leaves_a_judge_and_a_record(trained):
    folder = trained[0]
    assert {"config.json", "model.safetensors"} <= {path.name for path in (folder / "judge").iterdir()}
    assert (folder / "run" / "checkpoint-60").is_dir()
    assert json.loads((folder / "run" / "training_config.json").read_text())["seed"] == 2
    assert not (folder / "model").exists(), "it is no part of the miniature"


def test_what_it_learned_is_what_was_saved(trained):
    images = render_scenes(96, seed=2, exclude=())
    said = judge_pictures(load_judge(trained[0] / "judge"), images[:]["images"]).agrees_with(images.attributes)
    assert said["place"] > 0.6 and said["colour"] > 0.25 and said["kind"] > 0.3


def test_it_is_trained_on_all_triples_and_on_a_seed_of_its_own(monkeypatch):
    asked = {}

    class Enough(Exception):
        pass

    def render(num_images, **settings):
        asked.update(settings, num_images=num_images)
        raise Enough

    monkeypatch.setattr("diffusion_lessons.miniature.judge.render_scenes", render)
    with pytest.raises(Enough):
        train_judge(JudgeConfig(data_dir="somewhere"))
    assert asked == {"num_images": 20_000, "seed": 2, "exclude": (), "folder": "somewhere"}


# ---------------------------------------------------------------------------------------------------------- verdict
def test_a_verdict_is_the_softmax_of_the_logits(newborn):
    images = torch.rand(5, 3, 64, 64, generator=generator()) * 2 - 1
    said = judge_pictures(newborn, images, batch_size=2)
    newborn.eval()
    with torch.no_grad():
        logits = newborn(images).logits
    for column, answers in enumerate(split_answers(logits)):
        assert torch.equal(said.attributes[:, column], answers.argmax(dim=1))
        torch.testing.assert_close(said.confidence[:, column], answers.softmax(dim=1).amax(dim=1))
    head = newborn.classifier[1]
    torch.testing.assert_close(said.features @ head.weight.T + head.bias, logits)


def test_bytes_and_floats_are_judged_alike(newborn):
    pixels = torch.randint(256, (3, 3, 64, 64), generator=generator(), dtype=torch.uint8)
    of_bytes, of_floats = judge_pictures(newborn, pixels), judge_pictures(newborn, pixels / 127.5 - 1)
    torch.testing.assert_close(of_bytes.features, of_floats.features, rtol=1e-4, atol=1e-5)


def test_asking_does_not_change_the_judge(newborn):
    newborn.train()
    before = {name: value.clone() for name, value in newborn.state_dict().items()}
    judge_pictures(newborn, torch.zeros(2, 3, 64, 64))
    assert newborn.training
    assert all(torch.equal(value, before[name]) for name, value in newborn.state_dict().items())
    newborn.eval()


def test_agreement_is_counted_by_question():
    said = Verdict(torch.tensor([[0, 1, 2], [0, 1, 3], [5, 1, 4], [0, 0, 0]]), torch.ones(4, 3), torch.zeros(4, 128))
    shares = said.agrees_with(torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 1, 2]]))
    assert shares == {"colour": 0.5, "kind": 0.75, "place": 0.25}


# ---------------------------------------------------------------------------------------------------------- loading
def test_a_folder_without_a_judge_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: holds no judge"):
        load_judge(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="train one with the stage `judge`"):
        load_judge(tmp_path)


def test_half_a_judge_is_refused(tmp_path, newborn):
    newborn.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged: model.safetensors is cut off"):
        load_judge(tmp_path)


@pytest.mark.parametrize("part", ["miniature/clip", "miniature/vae"])
def test_another_model_is_no_judge(part):
    with pytest.raises(InputError, match="holds no judge"):
        load_judge(shipped(part))


def test_a_classifier_of_other_things_is_no_judge(tmp_path, newborn):
    newborn.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["0"] = "tench"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds no judge"):
        load_judge(tmp_path)


def test_a_saved_judge_comes_back_in_32_bits(tmp_path, newborn):
    make_judge().half().save_pretrained(tmp_path)
    loaded = load_judge(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.classifier[1].weight, newborn.classifier[1].weight.half().float())


# ----------------------------------------------------------------------------------------------- the judge that ships
def test_the_shipped_judge_is_right(verdict, exam):
    shares = verdict.agrees_with(exam.attributes)
    assert all(share >= 0.97 for share in shares.values()), shares


def test_it_is_right_about_triples_that_no_other_part_saw():
    images = render_scenes(60, seed=1, exclude=[triple for triple in TRIPLES if triple not in HELD_OUT])
    shares = judge_pictures(load_judge(shipped("judge")), images[:]["images"]).agrees_with(images.attributes)
    assert all(share >= 0.9 for share in shares.values()), shares


def test_it_judges_content_and_not_sharpness(exam):
    images = exam[:120]["images"].float() / 127.5 - 1
    soft = torch.nn.functional.interpolate(
        torch.nn.functional.interpolate(images, 36, mode="area"), 64, mode="bilinear")
    shares = judge_pictures(load_judge(shipped("judge")), soft).agrees_with(exam.attributes[:120])
    assert all(share >= 0.9 for share in shares.values()), shares


def test_it_is_less_sure_where_it_errs(exam):
    images = exam[:]["images"].float() / 127.5 - 1
    hard = torch.nn.functional.interpolate(
        torch.nn.functional.interpolate(images, 16, mode="area"), 64, mode="bilinear")
    said = judge_pictures(load_judge(shipped("judge")), hard)
    right = said.attributes == exam.attributes
    assert (~right).sum() > 10
    assert said.confidence[right].mean() > said.confidence[~right].mean() + 0.1


def test_it_doubts_the_colour_of_nothing_and_still_knows_the_place():
    rng = np.random.default_rng(0)
    empty = np.stack([np.array(background(PLACES[index % 6], 64, rng)) for index in range(60)])
    said = judge_pictures(load_judge(shipped("judge")), torch.from_numpy(empty).permute(0, 3, 1, 2))
    assert (said.attributes[:, 2] == torch.arange(60) % 6).float().mean() > 0.9, "the place is there"
    assert said.confidence[:, 0].mean() < 0.8, "a colour of nothing"


def test_near_features_mean_alike_pictures(verdict, exam):
    units = torch.nn.functional.normalize(verdict.features, dim=1)
    cosines = (units @ units.T).fill_diagonal_(-1)
    same = (exam.attributes[cosines.argmax(dim=1)] == exam.attributes).float().mean(dim=0)
    assert (same > 0.6).all(), same


# --------------------------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("right, total, low, high", [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (480, 480, 0.9921, 1.0), (50, 100, 0.4038, 0.5962),
])  # fmt: skip
def test_the_interval_is_that_of_wilson(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_holds_the_true_share_as_often_as_it_says():
    shares = np.random.default_rng(0).binomial(100, 0.97, 4000)
    held = [low <= 0.97 <= high for low, high in (wilson_interval(int(right), 100) for right in shares)]
    assert 0.92 < np.mean(held) < 0.99


# ------------------------------------------------------------------------------------------------------ labels by eye
@pytest.fixture(scope="module")
def labelled() -> dict:
    return json.loads((shipped("labels") / "labels.json").read_text())


def test_a_hundred_pictures_are_labelled_with_what_there_is(labelled):
    pictures = labelled["pictures"]
    assert len({each["seed"] for each in pictures}) == 100
    assert encode_attributes(each["label"] for each in pictures).shape == (100, 3)
    assert all(word in each["label"] for each in pictures for words in ATTRIBUTES for word in words
               if word in each["prompt"].split())


@pytest.mark.slow
def test_the_judge_reads_the_labelled_pictures_as_recorded(labelled):
    pictures = labelled["pictures"]
    drawn = draw(load_pipeline(shipped("miniature")), [each["prompt"] for each in pictures],
                 seeds=[each["seed"] for each in pictures], **labelled["settings"])
    said = judge_pictures(load_judge(shipped("judge")), drawn).attributes
    recorded = encode_attributes(each["judge"] for each in pictures)
    assert (said == recorded).float().mean() > 0.98, "some are close calls"
