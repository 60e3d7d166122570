"""A run whose networks have the formats of an accelerator: carried out on the CPU, where bf16 can be computed, too."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from dreambooth_runs import CLASS, SMALL, SUBJECT, class_folder, prior_words, subject_folder

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth import class_images, fidelity, loop, preparation, training
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.memory import precision_plan
from diffusion_lessons.dreambooth.training import train
from diffusion_lessons.engine.precision import Phase, PrecisionPlan
from diffusion_lessons.stable_diffusion import drawing
from diffusion_lessons.stable_diffusion.drawing import draw, in_format, ready_to_draw, visiting

BF16, FP32 = torch.bfloat16, torch.float32


class AsOnAnAccelerator(PrecisionPlan):
    """Everything lies on the CPU, in the formats that it would have on a GPU."""

    def placement(self, phase, network):
        gpu = PrecisionPlan(torch.device("cuda", 0), *(getattr(self, each.name) for each in fields(self)[1:]))
        return gpu.placement(phase, network)._replace(device=torch.device("cpu"))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    def plan(config, device):
        made = precision_plan(config, device)
        return AsOnAnAccelerator(*(getattr(made, each.name) for each in fields(made)))

    monkeypatch.setattr(training, "precision_plan", plan)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return subject_folder(tmp_path_factory.mktemp("subject") / "pictures", 2)


def config(pictures: Path, folder: Path, **chosen) -> DreamBoothConfig:
    usual = SMALL | {"instance_data_dir": str(pictures), "output_dir": str(folder), "mixed_precision": "bf16",
                     "max_train_steps": 3}  # fmt: skip
    return DreamBoothConfig(**usual | chosen)


KINDS = {"full": {}, "text": {"train_text_encoder": True, "use_ema": True}, "lora": {"lora": True},
         "lora and text": {"lora": True, "train_text_encoder": True, "use_ema": True},
         "pixels": {"cache_latents": False}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_formats_of_an_accelerator_give_the_run_of_a_cpu_up_to_rounding(kind, pictures, tmp_path, request):
    with_32_bits = train(config(pictures, tmp_path / "cpu", **KINDS[kind]))
    request.getfixturevalue("as_on_a_gpu")
    with_16_bits = train(config(pictures, tmp_path / "gpu", **KINDS[kind]))
    assert with_16_bits == pytest.approx(with_32_bits, rel=0.05) and with_16_bits != with_32_bits


def test_every_phase_works_in_its_own_format(as_on_a_gpu, pictures, tmp_path, monkeypatch):
    """Class images and validation are drawn from halves; what is trained is never rounded, not even before."""
    drawn: dict[str, list] = {"class": [], "look": [], "table": []}

    def noting(name):
        def spy(pipeline, prompts, **settings):
            drawn[name].append({part: getattr(pipeline, part).dtype for part in ("unet", "vae", "text_encoder")})
            assert not torch.is_autocast_enabled("cpu"), "the weights have the format, nothing is cast"
            return draw(pipeline, prompts, **settings | {"num_inference_steps": 1, "size": 32})

        return spy

    for name, room in (("class", class_images), ("look", loop), ("table", fidelity)):
        monkeypatch.setattr(room, "draw", noting(name))
    seen = []
    monkeypatch.setattr(training, "load_subject", lambda config, pipeline, *rest, real=training.load_subject: (
        seen.append({part: getattr(pipeline, part).dtype for part in ("unet", "vae", "text_encoder")}),
        real(config, pipeline, *rest))[1])
    train(config(pictures, tmp_path / "run", **prior_words(tmp_path / "class", 2), prior_generation_precision="bf16",
                 validation_prompt=[SUBJECT], validation_steps=2, num_validation_images=1, fidelity_model="miniature",
                 max_train_steps=2))  # fmt: skip
    half = dict.fromkeys(("unet", "vae", "text_encoder"), BF16)
    assert drawn["class"] and drawn["look"] and drawn["table"]
    assert all(each == half for calls in drawn.values() for each in calls)
    assert seen == [{"unet": FP32, "vae": BF16, "text_encoder": BF16}], "the UNet learns next: it keeps 32 bits"


def test_looking_changes_nothing(as_on_a_gpu, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw", lambda *args, **settings: draw(*args, **settings | {"num_inference_steps": 1}))
    chosen = {"lora": True, "use_ema": True, "max_train_steps": 4}
    plain = train(config(pictures, tmp_path / "plain", **chosen))
    looked = train(config(pictures, tmp_path / "looked", **chosen, validation_prompt=[SUBJECT], validation_steps=1,
                          num_validation_images=1, fidelity_model="none"))  # fmt: skip
    assert plain == looked
    assert len(list((tmp_path / "looked" / "samples").glob("step-*.png"))) == 4


def test_what_is_drawn_while_training_is_what_the_average_draws(as_on_a_gpu, pictures, tmp_path, monkeypatch):
    """The halves are made of the averaged weights, not of the last ones."""
    halves, averages = [], []
    monkeypatch.setattr(loop, "draw", lambda pipeline, prompts, **_: (
        halves.append(pipeline.unet.conv_in.weight.clone()),
        torch.zeros(len(prompts), 3, 32, 32, dtype=torch.uint8))[1])  # fmt: skip
    real = training.dreambooth_loop

    def watched(run, *rest):
        real(run, *rest)
        with run.averaged_weights():
            averages.append(run.models["unet"].conv_in.weight.detach().clone())

    monkeypatch.setattr(training, "dreambooth_loop", watched)
    train(config(pictures, tmp_path / "run", use_ema=True, ema_max_decay=0.5, learning_rate=1e-2, fidelity_model="none",
                 validation_prompt=[SUBJECT], validation_steps=3, num_validation_images=1))  # fmt: skip
    assert torch.equal(halves[-1], averages[-1].to(BF16))


# --- copies, visits ---


def test_a_copy_in_half_shares_what_has_the_format_and_draws_alone():
    pipeline = miniature.load()
    whole = pipeline.unet.state_dict()
    half = in_format(pipeline.unet, BF16)
    assert half.dtype == BF16 and not any(each.requires_grad for each in half.parameters())
    assert all(torch.equal(value, whole[name].to(BF16)) for name, value in half.state_dict().items())
    assert pipeline.unet.dtype == FP32 and pipeline.unet.state_dict().keys() == whole.keys()
    assert in_format(half, BF16) is half
    half.conv_in.float()
    mixed = in_format(half, BF16)
    assert mixed.conv_out.weight is half.conv_out.weight and mixed.conv_in.weight is not half.conv_in.weight
    assert mixed.conv_in.bias.dtype == BF16


def test_a_copy_computes_with_its_own_weights_also_of_a_network_that_a_run_has_wrapped():
    """Accelerate puts a `forward` on the instance; a copy with that one would compute with the original's weights."""
    from accelerate import Accelerator

    from diffusion_lessons.engine.devices import forget_accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        accelerator.prepare(network)
        half = in_format(network, BF16)
        with torch.no_grad():
            half[0].weight.fill_(3.0)
        assert half(torch.ones(1, 2, dtype=BF16)).item() == 6.0 and half(torch.ones(1, 2, dtype=BF16)).dtype == BF16
        assert network[0].weight.dtype == FP32
    finally:
        forget_accelerator(accelerator)


def test_networks_visit_the_device_one_after_the_other_and_leave_it(monkeypatch):
    """A device named `meta` holds no numbers; it is only noted who would be there, when."""
    pipeline, there, steps = miniature.load(), set(), []
    names = {id(getattr(pipeline, name)): name for name in ("unet", "vae", "text_encoder")}

    class Visit:
        def __init__(self, network, device):
            assert device == torch.device("cuda", 0)
            self.name = names[id(network)]

        def __enter__(self):
            there.add(self.name)
            steps.append(frozenset(there))

        def __exit__(self, *_):
            there.discard(self.name)

    monkeypatch.setattr(drawing, "visiting", Visit)
    draw(pipeline, [CLASS], num_inference_steps=1, size=32, device=torch.device("cuda", 0))
    assert steps == [{"text_encoder"}, {"unet"}, {"unet", "vae"}] and not there


def test_a_visitor_goes_home_also_after_an_error():
    network = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(KeyboardInterrupt), visiting(network, torch.device("meta")):
        raise KeyboardInterrupt
    moved = []
    monkey = torch.nn.Linear(2, 2)
    monkey._apply = lambda *_, **__: moved.append(1) or monkey
    with pytest.raises(KeyboardInterrupt), visiting(monkey, torch.device("meta")):
        raise KeyboardInterrupt
    assert len(moved) == 2, "there, and back"


def test_a_pipeline_whose_formats_fit_is_used_as_it_is():
    pipeline = miniature.load()
    plan = PrecisionPlan(torch.device("cpu"), "bf16")
    with ready_to_draw(pipeline, plan, Phase.LOOK) as same:
        assert same is pipeline and torch.get_autocast_dtype("cpu") == BF16 and torch.is_autocast_enabled("cpu")
    with ready_to_draw(pipeline, replace(plan, mixed_precision="no"), Phase.LOOK) as same:
        assert same is pipeline and not torch.is_autocast_enabled("cpu")
    with ready_to_draw(pipeline, AsOnAnAccelerator(torch.device("cpu"), "bf16"), Phase.LOOK) as other:
        assert other is not pipeline and other.unet.dtype == BF16 and other.scheduler is pipeline.scheduler
        assert other.tokenizer is pipeline.tokenizer and pipeline.unet.dtype == FP32


def test_prior_pictures_are_not_drawn_where_none_is_missing(pictures, tmp_path, monkeypatch):
    """Then no second model is loaded either."""
    loaded = []
    monkeypatch.setattr(preparation, "load_model", lambda config, folder, plan, phase, real=preparation.load_model: (
        loaded.append(phase), real(config, folder, plan, phase))[1])
    class_folder(tmp_path / "class", 2)
    train(config(pictures, tmp_path / "run", max_train_steps=1, **prior_words(tmp_path / "class", 2)))
    assert loaded == [Phase.TRAIN]


def test_a_run_looks_its_model_up_once(pictures, tmp_path, monkeypatch):
    """A Hub id may mean other files a minute later: what draws the class images is what is trained."""
    found, real = [], training.find_model
    for room in (training, preparation):
        monkeypatch.setattr(room, "find_model", lambda *args: found.append(real(*args)) or found[-1])
    monkeypatch.setattr(class_images, "draw", lambda *args, **settings: draw(
        *args, **settings | {"num_inference_steps": 1, "size": 32}))
    train(config(pictures, tmp_path / "run", max_train_steps=1, **prior_words(tmp_path / "class", 2)))
    assert len(found) == 1 and len(list((tmp_path / "class").glob("generated-*.png"))) == 2
