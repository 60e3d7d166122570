"""Metrics by hand in two dimensions, encoders from folders like those of the Hub, and the order of resemblances."""
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from dreambooth_runs import eye_folder
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import alexnet
from transformers import AutoImageProcessor, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from diffusion_lessons import metrics, miniature
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.metrics import (
    CLIPEncoder,
    DINOEncoder,
    FeatureDistance,
    cosine_similarities,
    diversity,
    kernel_distance,
    likeness,
    lpips,
    perceptual_distances,
    prior_preservation,
    prompt_fidelity,
    subject_fidelity,
)
from diffusion_lessons.miniature.captions import render_scenes, to_caption
from diffusion_lessons.miniature.clip import make_clip, make_image_processor, similarities
from diffusion_lessons.miniature.judge import JudgeEncoder, make_judge
from diffusion_lessons.pictures.batches import check_images
from diffusion_lessons.pictures.meadow import COLOURS, KINDS, PLACES, draw_scene, draw_subject
from diffusion_lessons.stable_diffusion import encoders
from diffusion_lessons.stable_diffusion.folder import shipped


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pictures(number: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (number, 3, size, size), generator=generator(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip() -> CLIPEncoder:
    return CLIPEncoder()


@pytest.fixture(scope="module")
def judge() -> JudgeEncoder:
    return JudgeEncoder()


@pytest.fixture(scope="module")
def exam():
    """160 pictures that no part was trained on."""
    return render_scenes(160, seed=1, exclude=())


# ------------------------------------------------------------------------------------------------------- by hand, 2-D
def test_cosines_are_those_of_the_angles():
    angles = torch.tensor([0.0, 30.0, 90.0, 180.0]).deg2rad()
    around = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    found = cosine_similarities(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), around)
    expected = torch.tensor([[1, math.sqrt(3) / 2, 0, -1], [0, 0.5, 1, 0]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", [subject_fidelity, prior_preservation])
def test_fidelity_is_the_mean_over_all_pairs(metric):
    generated = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    real = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    assert metric(generated, real) == pytest.approx((1 + half + 0 + half - 1 - half) / 6, abs=1e-6)


def test_half_precision_features_are_compared_in_full():
    features = torch.randn(20, 500, generator=generator()).half()
    assert subject_fidelity(features[:1], features[:1]) == pytest.approx(1, abs=1e-6)


def test_prompt_fidelity_takes_each_picture_with_its_own_prompt():
    images, texts = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert prompt_fidelity(images, texts) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert prompt_fidelity(images, texts.flip(0)) == pytest.approx((0 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("texts", [torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 5)])
def test_prompts_that_do_not_belong_to_the_pictures_are_refused(texts):
    with pytest.raises(InputError, match="texts"):
        prompt_fidelity(torch.ones(2, 2), texts)


def test_perceptual_distance_by_hand():
    first = [torch.tensor([[3.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)]
    second = [torch.tensor([[0.0, 2.0], [5.0, 2.0]]).reshape(1, 2, 1, 2), torch.tensor([-4.0, 0.0]).reshape(1, 2, 1, 1)]
    assert perceptual_distances(first[:1], second[:1]).tolist() == pytest.approx([1.0])
    assert perceptual_distances(first, second).tolist() == pytest.approx([5.0])
    assert perceptual_distances(first, first).tolist() == [0.0]


def test_perceptual_distance_is_twice_one_minus_the_cosine():
    a, b = torch.randn(2, 6, 10, 5, 5, generator=generator())
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(perceptual_distances([a], [b]), 2 - 2 * cosine, rtol=1e-5, atol=1e-6)


def grey_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.float() - second.float()).abs().mean(dim=(1, 2, 3))


def greys(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_diversity_is_the_mean_over_all_pairs_in_any_portions(batch_size):
    assert diversity(greys(0, 10, 40), grey_distance, batch_size) == pytest.approx(80 / 3)
    values = (3, 200, 7, 90, 90, 41)
    expected = np.mean([abs(a - b) for i, a in enumerate(values) for b in values[:i]])
    assert diversity(greys(*values), grey_distance, batch_size) == pytest.approx(expected)


def test_equal_pictures_have_no_diversity():
    assert diversity(greys(9, 9, 9), grey_distance) == 0


def test_one_picture_has_no_diversity_to_measure():
    with pytest.raises(InputError, match="give 2 or more"):
        diversity(greys(5), grey_distance)


# ------------------------------------------------------------------------------------------------------ bad pictures
BAD = {
    "floats": torch.zeros(2, 3, 8, 8),
    "one picture": torch.zeros(3, 8, 8, dtype=torch.uint8),
    "grey": torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
    "channels last": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    "none": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    "a list": [torch.zeros(3, 8, 8, dtype=torch.uint8)],
}


@pytest.mark.parametrize("images", BAD.values(), ids=BAD)
def test_bad_pictures_are_refused_in_one_line(images, clip, judge):
    for use in (check_images, clip, clip.layers, judge):
        with pytest.raises(InputError, match=r"^--images .*uint8 with the shape \(N, 3, H, W\)$"):
            use(images)
    with pytest.raises(InputError, match="^--generated"):
        kernel_distance(images, random_pictures(4), judge)
    with pytest.raises(InputError, match="^--real"):
        kernel_distance(random_pictures(4), images, judge)


# ----------------------------------------------------------------------------------------------------------- encoders
def test_clip_encodes_as_the_model_itself(clip, exam):
    pictures = exam[:12]["images"]
    captions = [to_caption(row) for row in exam.attributes[:12].tolist()]
    captions[3] = ""
    expected = similarities(clip.model, clip.tokenizer, pictures, captions)
    found = cosine_similarities(clip(pictures), clip.texts(captions))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_portions_do_not_change_features(clip):
    pictures = random_pictures(70)
    torch.testing.assert_close(clip(pictures)[64:], clip(pictures[64:]), rtol=1e-4, atol=1e-5)


def test_a_long_prompt_is_cut(clip):
    words = "a photo of a red butterfly on snow " * 20
    assert clip.texts([words, "a photo"]).shape == (2, 64)


def test_layers_are_patches_in_their_places(clip):
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    corner = black.clone()
    corner[:, :, 8:16, 48:56] = 255  # patch (1, 6)
    layers = clip.layers(black), clip.layers(corner)
    assert [tuple(layer.shape) for layer in layers[0]] == [(1, 128, 8, 8)] * 4
    change = (layers[0][0] - layers[1][0]).norm(dim=1)[0]
    assert divmod(int(change.argmax()), 8) == (1, 6)


def test_distance_by_layers_is_a_distance(clip, exam):
    one, two = exam[:6]["images"], exam[6:12]["images"]
    assert clip.distance(one, one).abs().max() < 1e-6
    torch.testing.assert_close(clip.distance(one, two), clip.distance(two, one))
    assert clip.distance(one, two).min() > 0.05


@pytest.mark.parametrize("portion", [3, 64])
def test_diversity_encodes_each_picture_once(portion, clip, exam):
    pictures, encoded = exam[:8]["images"], []
    note = clip.model.vision_model.register_forward_hook(lambda module, inputs, output: encoded.append(output))
    try:
        found = diversity(pictures, clip.distance, portion)
    finally:
        note.remove()
    assert sum(len(each.pooler_output) for each in encoded) == 8, "28 pairs of 8 pictures"
    by_pairs = diversity(pictures, lambda first, second: clip.distance(first, second))
    assert found == pytest.approx(by_pairs, rel=1e-5) and found > 0.05


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP with random weights in the format of `openai/clip-vit-base-patch32`, for pictures of 32 px."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPEncoder().tokenizer
    make_clip(tokenizer, seed=1, image_size=32).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A vision transformer with random weights in the format of `facebook/dino-vits16`, for pictures of 32 px."""
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32,
                       patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406],
                      image_std=[0.229, 0.224, 0.225]).save_pretrained(folder)
    return folder


def test_a_clip_folder_plugs_in(clip_folder):
    encoder, pictures = CLIPEncoder(clip_folder), random_pictures(3, size=48)
    images, texts = encoder(pictures), encoder.texts(["a photo of a fish"] * 3)
    assert images.shape == texts.shape == (3, 64)
    assert -1 <= prompt_fidelity(images, texts) <= 1
    assert diversity(pictures, encoder.distance) > 0
    model, processor = encoder.model, AutoImageProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        pixels = processor(list(pictures), return_tensors="pt").pixel_values
        expected = model(input_ids=torch.zeros(1, 32, dtype=torch.long), pixel_values=pixels).image_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(images, dim=1), expected)


def test_a_dino_folder_plugs_in(dino_folder):
    encoder, pictures = DINOEncoder(dino_folder), random_pictures(3, size=48)
    features = encoder(pictures)
    assert features.shape == (3, 48) and features.dtype == torch.float32
    reference = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        pixels = ViTImageProcessor.from_pretrained(dino_folder)(list(pictures), return_tensors="pt").pixel_values
        expected = reference(pixels).last_hidden_state[:, 0]
    assert pixels.shape == (3, 3, 32, 32)
    torch.testing.assert_close(features, expected)
    assert subject_fidelity(features[:1], features[:1]) == pytest.approx(1, abs=1e-6)
    assert math.isfinite(kernel_distance(random_pictures(6), random_pictures(6, seed=1), encoder)[0])


@pytest.fixture(scope="module")
def pooled_folder(tmp_path_factory):
    return eye_folder(tmp_path_factory.mktemp("pooled"))


def test_a_resnet_folder_plugs_in_with_its_pooled_features(pooled_folder):
    encoder, pictures = DINOEncoder(pooled_folder), random_pictures(3, size=48)
    features = encoder(pictures)
    assert features.shape == (3, 24) and features.dtype == torch.float32
    reference = ResNetModel.from_pretrained(pooled_folder).eval()
    with torch.no_grad():
        pixels = ViTImageProcessor.from_pretrained(pooled_folder)(list(pictures), return_tensors="pt").pixel_values
        expected = reference(pixels).last_hidden_state.mean(dim=(2, 3))
    assert pixels.shape == (3, 3, 32, 32)
    torch.testing.assert_close(features, expected)


def test_a_resnet_in_half_precision_is_computed_with_in_full(pooled_folder, tmp_path):
    shutil.copytree(pooled_folder, tmp_path, dirs_exist_ok=True)
    DINOEncoder(pooled_folder).model.half().save_pretrained(tmp_path)
    assert DINOEncoder(tmp_path)(random_pictures(1)).dtype == torch.float32


@pytest.mark.parametrize("name", ["dino_folder", "pooled_folder"])
@pytest.mark.parametrize("portion", [3, 64])
def test_the_distance_by_features_is_one_minus_the_cosine(name, portion, request):
    encoder, pictures, encoded = DINOEncoder(request.getfixturevalue(name)), random_pictures(5), []
    features = encoder(pictures)
    cosines = cosine_similarities(features, features)
    torch.testing.assert_close(encoder.distance(pictures[:2], pictures[2:4]), 1 - cosines[[0, 1], [2, 3]])
    assert encoder.distance(pictures, pictures).min() >= 0 and encoder.distance(pictures, pictures).max() < 1e-6
    note = encoder.model.register_forward_hook(lambda module, inputs, output: encoded.append(len(output[0])))
    try:
        found = diversity(pictures, encoder.distance, portion)
    finally:
        note.remove()
    assert sum(encoded) == 5, "ten pairs of five pictures"
    assert found == pytest.approx(float(1 - cosines[*torch.triu_indices(5, 5, offset=1)].mean()), rel=1e-4)


def test_the_distance_by_features_by_hand():
    distance = FeatureDistance(two_numbers)
    assert distance(at((1, 0), (1, 0), (2, 2)), at((0, 5), (7, 0), (0, 1))).tolist() == pytest.approx(
        [1, 0, 1 - math.sqrt(0.5)], abs=1e-6)  # fmt: skip
    assert diversity(at((1, 0), (0, 1), (0, 7)), distance) == pytest.approx(2 / 3)


def test_without_a_name_it_is_the_shipped_eye(shipped_eye):
    pictures = random_pictures(2)
    assert torch.equal(DINOEncoder()(pictures), shipped_eye(pictures))
    assert shipped_eye(pictures).dtype == torch.float32 and shipped_eye.model.dtype == torch.float32
    assert torch.equal(DINOEncoder(shipped("eye"))(pictures), shipped_eye(pictures)), "it is an ordinary folder"


def test_the_shipped_eye_knows_a_subject_elsewhere_from_a_stranger_in_its_place(shipped_eye, relations):
    """Each of eight individuals is nearer to itself in another place than to the others in its own."""
    views, twins, *_ = relations
    cosines = cosine_similarities(shipped_eye(views), shipped_eye(twins))
    number, place = torch.arange(48) // 6, torch.arange(48) % 6
    itself_elsewhere = (number[:, None] == number) & (place[:, None] != place)
    stranger_here = (number[:, None] != number) & (place[:, None] == place)
    right = [(row[there][:, None] > row[here]).float().mean() for row, there, here in
             zip(cosines, itself_elsewhere, stranger_here, strict=True)]  # fmt: skip
    assert torch.stack(right).mean() > 0.9


def test_half_precision_folders_are_computed_with_in_full(tmp_path, clip_folder):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    encoder = CLIPEncoder(clip_folder)
    encoder.model.half().save_pretrained(tmp_path)
    assert CLIPEncoder(tmp_path)(random_pictures(1)).dtype == torch.float32


def test_another_kind_of_model_is_refused(clip_folder, dino_folder):
    with pytest.raises(InputError, match="is of the kind vit, not clip"):
        CLIPEncoder(dino_folder)
    with pytest.raises(InputError, match="is of the kind clip, not vit or dinov2 or .* or resnet; name a folder"):
        DINOEncoder(clip_folder)


@pytest.mark.parametrize("encoder", [CLIPEncoder, DINOEncoder])
def test_what_is_not_there_is_named(encoder, tmp_path):
    with pytest.raises(InputError, match="nowhere: cannot be loaded as"):
        encoder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="openai/no-such-model-here: cannot be loaded"):
        encoder("openai/no-such-model-here")


def test_a_damaged_folder_is_named(tmp_path, clip_folder):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=f"{tmp_path.name}: cannot be loaded as clip"):
        CLIPEncoder(tmp_path)


def test_an_installation_without_the_miniature_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusion_lessons.stable_diffusion.folder.files", lambda package: tmp_path)
    with pytest.raises(InputError, match="has no trained miniature"):
        miniature.path()
    with pytest.raises(InputError, match="has no trained judge"):
        JudgeEncoder()
    with pytest.raises(InputError, match="has no trained eye"):
        DINOEncoder()


def test_any_judge_plugs_in(tmp_path):
    make_judge(4).save_pretrained(tmp_path)
    assert JudgeEncoder(tmp_path)(random_pictures(2)).shape == (2, 128)
    with pytest.raises(InputError, match="holds no judge"):
        JudgeEncoder(shipped("miniature/clip"))


# ------------------------------------------------------------------------------------------- the order of resemblances
def drawn(draw) -> torch.Tensor:
    """A picture for each of eight subjects in each of six places."""
    pictures = [draw(place, number) for number in range(8) for place in PLACES]
    return torch.from_numpy(np.stack([np.array(each) for each in pictures])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def relations():
    rng = np.random.default_rng(3)
    return (
        drawn(lambda place, number: draw_subject(place, 64, rng, seed=number)),
        drawn(lambda place, number: draw_subject(place, 64, rng, seed=number)),
        drawn(lambda place, number: draw_scene("butterfly", str(rng.choice(COLOURS)), place, 64, rng)),
        drawn(lambda place, number: draw_scene(str(rng.choice(KINDS[1:])), str(rng.choice(COLOURS)), place, 64, rng)),
    )


@pytest.mark.parametrize("name", ["clip", "judge"])
def test_a_picture_resembles_itself_then_its_twin_then_its_kind_then_another(name, relations, request):
    encoder = request.getfixturevalue(name)
    views, twins, colours, kinds = map(encoder, relations)
    place = torch.arange(48) % 6
    same_place = place[:, None] == place
    itself = cosine_similarities(views, views).diagonal().mean()
    twin = cosine_similarities(views, twins).diagonal().mean()
    colour = cosine_similarities(views, colours)[same_place].mean()
    kind = cosine_similarities(views, kinds)[same_place].mean()
    assert itself == pytest.approx(1, abs=1e-5)
    assert itself > twin + 0.02 and twin > colour + 0.02 and colour > kind + 0.02, (itself, twin, colour, kind)


def test_prompts_rank_above_wrong_ones(clip, exam):
    pictures, captions = clip(exam[:60]["images"]), [to_caption(row) for row in exam.attributes[:60].tolist()]
    texts = clip.texts(captions)
    assert prompt_fidelity(pictures, texts) > prompt_fidelity(pictures, texts.roll(1, dims=0)) + 0.2


def test_a_varied_set_is_more_diverse_than_a_collapsed_one(clip):
    rng = np.random.default_rng(0)
    varied = torch.stack([torch.from_numpy(np.array(draw_scene("fish", "blue", "sand", 64, rng))).permute(2, 0, 1)
                          for _ in range(6)])
    noise = torch.randn(varied.shape, generator=generator()) * 4
    collapsed = (varied[:1] + noise).clamp(0, 255).to(torch.uint8)
    assert diversity(collapsed, clip.distance) < diversity(varied, clip.distance) / 4


# -------------------------------------------------------------------------------------------------------------- LPIPS
@pytest.fixture(scope="module")
def random_alexnet(tmp_path_factory):
    """A cache of torchvision with an AlexNet of random weights under the name of the trained one."""
    home = tmp_path_factory.mktemp("torch")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    state = alexnet().state_dict()
    for name, value in state.items():
        if name.startswith("classifier"):  # LPIPS does not use it, and it is most of the file: zeros that share memory
            state[name] = torch.zeros(1).expand(value.shape)
    torch.save(state, checkpoints / "alexnet-owt-7be5be79.pth")
    return home


def test_lpips_is_a_distance(random_alexnet, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    distance = lpips()
    one, two = random_pictures(3), random_pictures(3, seed=1)
    assert distance(one, two).shape == (3,)
    assert distance(one, one).tolist() == [0, 0, 0]
    torch.testing.assert_close(distance(one, two), distance(two, one))
    assert distance(one, two).min() > 0
    nearly = one.clone()
    nearly[:, :, :4] = 0
    assert (distance(one, nearly) < distance(one, two)).all()
    assert diversity(one, distance) > 0 and diversity(one[:1].expand(3, -1, -1, -1), distance) == 0


@pytest.mark.parametrize("network", ["alex", "squeeze"])
def test_lpips_without_its_weights_is_one_line(network, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port where nobody listens
    with pytest.raises(InputError, match=f"lpips {network}: its weights cannot be had .* go online once"):
        lpips(network)


def test_lpips_knows_three_networks():
    with pytest.raises(InputError, match="resnet: is no network of LPIPS; choose one of alex, vgg, squeeze"):
        lpips("resnet")


# ---------------------------------------------------------------------------------------------------------------- KID
def two_numbers(images: torch.Tensor) -> torch.Tensor:
    return images[:, :2, 0, 0].float()


def at(*points: tuple[int, int]) -> torch.Tensor:
    images = torch.zeros(len(points), 3, 2, 2, dtype=torch.uint8)
    images[:, :2] = torch.tensor(points, dtype=torch.uint8)[:, :, None, None]
    return images


def test_likeness_is_the_fidelity_of_what_an_encoder_says():
    generated, real = at((1, 0), (0, 1)), at((1, 0), (1, 1), (0, 7))
    by_hand = (1 + math.sqrt(.5) + 0 + 0 + math.sqrt(.5) + 1) / 6
    assert likeness(generated, real, two_numbers) == pytest.approx(by_hand, rel=1e-6)
    assert likeness(generated, real, lambda images: 3 * two_numbers(images)) == pytest.approx(by_hand, rel=1e-6)


def test_encoders_and_distances_are_had_from_the_metrics_too():
    assert set(encoders.__all__) <= set(metrics.__all__)
    assert all(getattr(metrics, name) is getattr(encoders, name) for name in encoders.__all__)


def test_kid_by_hand():
    mean, deviation = kernel_distance(at((0, 1), (0, 1)), at((1, 0), (1, 0)), two_numbers, subset_size=2)
    assert mean == pytest.approx(2 * (3 / 2) ** 3 - 2, rel=1e-6) and deviation == pytest.approx(0, abs=1e-6)
    mean, _ = kernel_distance(at((0, 0), (2, 0)), at((1, 1), (1, 3)), two_numbers, subset_size=2)
    within = 1 + 3**3  # (0·2/2 + 1)^3 and ((1 + 3)/2 + 1)^3
    across = (1 + 1 + 2**3 + 2**3) / 4
    assert mean == pytest.approx(within - 2 * across, rel=1e-5)


def test_kid_is_that_of_torchmetrics(judge, exam):
    class Features(torch.nn.Module):
        def forward(self, images):
            return judge(images)

    one, two = exam[:70]["images"], exam[70:160]["images"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(feature=Features(), subsets=7, subset_size=40)
    metric.update(two, real=True)
    metric.update(one, real=False)
    torch.manual_seed(11)
    expected = metric.compute()
    found = kernel_distance(one, two, judge, subset_size=40, subsets=7, seed=11)
    assert found == pytest.approx([float(value) for value in expected], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ["clip", "judge"])
def test_kid_is_near_zero_for_one_source_and_large_for_two(name, exam, request):
    encoder, pictures = request.getfixturevalue(name), exam[:]["images"]
    same, _ = kernel_distance(pictures[:80], pictures[80:], encoder)
    kind = exam.attributes[:, 1]
    apart, deviation = kernel_distance(pictures[kind == 0], pictures[kind == 2], encoder)
    assert apart > 5 * abs(same)
    assert apart > 3 * deviation


def test_kid_draws_from_its_seed_and_leaves_the_global_generator_alone(judge, exam):
    one, two = exam[:20]["images"], exam[20:40]["images"]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = kernel_distance(one, two, judge, subset_size=10)
    assert torch.equal(torch.rand(1), expected)
    assert kernel_distance(one, two, judge, subset_size=10) == found
    assert kernel_distance(one, two, judge, subset_size=10, seed=1) != found


def test_kid_takes_nine_tenths_by_default(judge, exam):
    one, two = exam[:20]["images"], exam[20:60]["images"]
    assert kernel_distance(one, two, judge) == kernel_distance(one, two, judge, subset_size=18)


@pytest.mark.parametrize("size", [0, 1, 21])
def test_a_subset_must_fit(size, judge, exam):
    with pytest.raises(InputError, match=f"subset_size {size}: must lie between 2 and the smaller set, 20"):
        kernel_distance(exam[:20]["images"], exam[20:60]["images"], judge, subset_size=size)


def test_kid_is_quiet(judge):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_distance(random_pictures(4), random_pictures(4, seed=1), judge)
