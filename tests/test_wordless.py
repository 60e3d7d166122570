"""Unconditional pipelines that somebody trained: what they say of themselves is used and recorded, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from PIL import Image
from runs import TINY, words

from diffusion_lessons.butterflies import command
from diffusion_lessons.butterflies import training as butterflies
from diffusion_lessons.butterflies.command import build_model, check_before_work, load_data, main, settle, size_note
from diffusion_lessons.butterflies.config import TrainingConfig, parse_butterflies
from diffusion_lessons.butterflies.training import evaluate, train_loop
from diffusion_lessons.diffusion.pipelines import check_weights, load_unconditional, read_unconditional
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import UNETS, make_unet
from diffusion_lessons.dreambooth.inference import main as generate_images
from diffusion_lessons.engine import run as run_room
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures.sets import make_dataloader

WEIGHTS = "diffusion_pytorch_model.safetensors"
BARE = {name: value for name, value in TINY.items() if name not in ("image_size", "model_config_name_or_path")}


def save(folder: Path, unet: UNet2DModel | None = None, scheduler=None, kind: type = DDPMPipeline) -> Path:
    """A pipeline as plain diffusers writes it, untrained: by default of 16 px, epsilon and 1000 linear timesteps."""
    kind(unet or make_unet("tiny-16", seed=0), scheduler or make_noise_scheduler()).save_pretrained(folder)
    return folder


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flatten(folder: Path, target: Path) -> Path:
    """The same pipeline in the layout of the first ones on the Hub: all files side by side."""
    target.mkdir(parents=True)
    for path in [folder / "model_index.json", *folder.glob("unet/*"), *folder.glob("scheduler/*")]:
        shutil.copy(path, target)
    return target


def on_the_hub(folder: Path, cache: Path, name: str, monkeypatch) -> str:
    """Put a folder into a cache of the Hub as its client lays it out: names that lead to blobs."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c0ffee" * 6 + "abcd")
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob = home / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        link = home / "snapshots" / ("c0ffee" * 6 + "abcd") / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return name


def tune(output_dir: Path, pipeline: Path | str, **fields) -> int:
    """One step of fine-tuning through the command; nothing but the pipeline says size, network and noise."""
    chosen = BARE | {"max_train_steps": 1, "pretrained_model_name_or_path": pipeline} | fields
    flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in chosen.items()]
    return main(["--output_dir", str(output_dir), *(word for flag in flags for word in flag)])


def refused(monkeypatch, capfd, output_dir: Path, pipeline: Path | str, **fields) -> str:
    """The one line of a refusal, which comes before any picture is loaded and leaves nothing behind."""
    def never(*_, **__):
        raise AssertionError("pictures were loaded")

    monkeypatch.setattr(command, "load_images", never)
    assert tune(output_dir, pipeline, **fields) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and not output_dir.exists()
    return said


# --- size ---


@pytest.mark.parametrize("given, trained", [({}, 16), ({"image_size": 32}, 32), ({"image_size": 16}, 16)])
def test_training_grids_pipeline_and_card_have_one_size(tmp_path, capsys, given, trained):
    theirs = save(tmp_path / "theirs")
    assert tune(tmp_path / "run", theirs, **given) == 0
    out = capsys.readouterr().out
    assert (f"{theirs} is made for pictures of 16 px; it is trained at 32 px" in out) == (trained == 32)
    saved = json.loads((tmp_path / "run/unet/config.json").read_text())
    assert saved["sample_size"] == trained
    assert json.loads((tmp_path / "run/training_config.json").read_text())["image_size"] == trained
    grid = Image.open(next((tmp_path / "run/samples").iterdir()))
    assert grid.height == trained and grid.width == 2 * trained
    assert f"pictures of {trained} px" in (tmp_path / "run/README.md").read_text()
    draw = ["--model_path", str(tmp_path / "run"), "--num_images", "1", "--num_inference_steps", "2"]
    assert generate_images([*draw, "--output_dir", str(tmp_path / "drawn")]) == 0
    assert Image.open(tmp_path / "drawn/0000.png").size == (trained, trained)
    plain = DDPMPipeline.from_pretrained(tmp_path / "run")
    plain.set_progress_bar_config(disable=True)
    assert plain(num_inference_steps=1).images[0].size == (trained, trained)


def test_a_size_is_needed_where_the_pipeline_names_no_square(tmp_path, monkeypatch, capfd):
    for name, size in (("none", None), ("wide", [16, 32])):
        edit(save(tmp_path / name) / "unet/config.json", sample_size=size)
        assert "--image_size is missing" in refused(monkeypatch, capfd, tmp_path / "run", tmp_path / name)
        model, _ = build_model(settle(TrainingConfig(pretrained_model_name_or_path=str(tmp_path / name), image_size=8)))
        assert model.config.sample_size == 8
    edit(tmp_path / "wide/unet/config.json", sample_size=[16, 16])
    assert settle(TrainingConfig(pretrained_model_name_or_path=str(tmp_path / "wide"))).image_size == 16


def test_a_size_that_the_network_cannot_halve_is_refused(tmp_path, monkeypatch, capfd):
    said = refused(monkeypatch, capfd, tmp_path / "run", save(tmp_path / "theirs"), image_size=17)
    assert "--image_size 17" in said and "use 16 or 18" in said


def test_a_grid_takes_steps_and_size_of_the_pipeline_in_python(tmp_path):
    pipeline = DDPMPipeline(make_unet("tiny-16", 8, seed=0), make_noise_scheduler(7))
    config = TrainingConfig(output_dir=str(tmp_path), pretrained_model_name_or_path="nowhere", eval_batch_size=2)
    assert config.resolve().num_inference_steps is None
    assert evaluate(config, 0, pipeline).size == (16, 8)


# --- noise and network ---


def test_what_the_pipeline_was_trained_with_is_used_and_recorded(tmp_path):
    theirs = save(tmp_path / "theirs", scheduler=make_noise_scheduler(77, "squaredcos_cap_v2", "v_prediction"))
    assert tune(tmp_path / "run", theirs, use_ema=True, num_inference_steps=2) == 0
    noise = DDPMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler").config
    assert (noise.prediction_type, noise.num_train_timesteps, noise.beta_schedule) == (
        "v_prediction", 77, "squaredcos_cap_v2")  # fmt: skip
    recorded = json.loads((tmp_path / "run/training_config.json").read_text())
    wanted = {"prediction_type": "v_prediction", "ddpm_num_steps": 77, "ddpm_beta_schedule": "squaredcos_cap_v2"}
    assert {name: recorded[name] for name in wanted} == wanted
    assert recorded["model_config_name_or_path"] is None
    assert '"prediction_type": "v_prediction"' in (tmp_path / "run/README.md").read_text()
    again = ["--config", str(tmp_path / "run/training_config.json"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0, "what is recorded can be started again"


@pytest.mark.parametrize(
    "field, value, theirs",
    [("prediction_type", "epsilon", "v_prediction"), ("ddpm_num_steps", 1000, "77"),
     ("ddpm_beta_schedule", "linear", "squaredcos_cap_v2"),
     ("model_config_name_or_path", "quick-64", "another network")],
)  # fmt: skip
def test_a_flag_that_contradicts_the_pipeline_is_refused_also_where_it_names_the_default(
    tmp_path, monkeypatch, capfd, field, value, theirs
):
    pipeline = save(tmp_path / "theirs", scheduler=make_noise_scheduler(77, "squaredcos_cap_v2", "v_prediction"))
    said = refused(monkeypatch, capfd, tmp_path / "run", pipeline, **{field: value})
    assert f"--{field} {value}: " in said and theirs in said and "leave the flag out" in said
    again = refused(monkeypatch, capfd, tmp_path / "run", pipeline, dry_run=True, **{field: value})
    assert f"--{field} {value}: " in again


def test_flags_that_agree_are_taken(tmp_path):
    theirs = save(tmp_path / "theirs", scheduler=make_noise_scheduler(77, prediction_type="sample"))
    chosen = {"prediction_type": "sample", "ddpm_num_steps": 77, "ddpm_beta_schedule": "linear", "image_size": 16}
    for network in ("tiny-16", str(theirs), str(theirs / "unet/config.json")):
        config = TrainingConfig(pretrained_model_name_or_path=str(theirs), model_config_name_or_path=network, **chosen)
        assert {name: getattr(settle(config), name) for name in chosen} == chosen
        assert settle(settle(config)) == settle(config)


def test_a_preset_makes_way_for_the_pipeline(tmp_path):
    theirs = str(save(tmp_path / "theirs"))
    for preset in ("quick", "tutorial"):
        config, _ = parse_butterflies(["--preset", preset, "--pretrained_model_name_or_path", theirs])
        settled = settle(config)
        assert (settled.image_size, settled.prediction_type, settled.ddpm_beta_schedule) == (16, "epsilon", "linear")
    assert parse_butterflies(["--preset", "quick"])[0].prediction_type == "v_prediction"
    command = ["--preset", "quick", "--pretrained_model_name_or_path", theirs, "--image_size", "32"]
    chosen, _ = parse_butterflies(command)
    assert settle(chosen).image_size == 32 and chosen.train_batch_size == 4


def test_without_a_pipeline_the_defaults_are_the_tutorials_and_the_card_does_not_list_them(tmp_path):
    config = TrainingConfig()
    assert (config.image_size, config.model_config_name_or_path) == (128, "tutorial-128")
    assert (config.prediction_type, config.ddpm_num_steps, config.ddpm_beta_schedule) == ("epsilon", 1000, "linear")
    assert settle(config) is config
    assert main(words(tmp_path / "run", max_train_steps=1)) == 0
    card = (tmp_path / "run/README.md").read_text()
    assert "license: apache-2.0" in card
    assert '"image_size": 16' in card and "prediction_type" not in card and "ddpm_num_steps" not in card


# --- which networks and schedules ---


def another_unet(**values) -> dict:
    return {**UNETS["tiny-16"], "_class_name": "UNet2DModel", **values}


@pytest.mark.parametrize(
    "values, said",
    [({"in_channels": 1, "out_channels": 1}, "takes 1 channels and gives 1"),
     ({"in_channels": 4, "out_channels": 4}, "takes 4 channels and gives 4"),
     ({"in_channels": 6}, "takes 6 channels and gives 3"), ({"out_channels": 6}, "takes 3 channels and gives 6"),
     ({"num_class_embeds": 10}, "wants the class"), ({"class_embed_type": "timestep"}, "wants the class"),
     ({"time_embedding_type": "fourier"}, "wants a noise level"),
     ({"down_block_types": ["NoSuchBlock", "DownBlock2D"]}, "builds no UNet2DModel"),
     ({"norm_num_groups": 3}, "builds no UNet2DModel"),
     ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel")],
    ids=lambda value: "" if isinstance(value, dict) else value,
)  # fmt: skip
def test_a_network_of_another_kind_is_one_line_before_data_is_loaded(tmp_path, monkeypatch, capfd, values, said):
    theirs = save(tmp_path / "theirs")
    edit(theirs / "unet/config.json", **values)
    line = refused(monkeypatch, capfd, tmp_path / "run", theirs)
    assert f"--pretrained_model_name_or_path {theirs}: " in line and said in line
    with pytest.raises(InputError, match=said):
        make_unet(theirs)
    command = ["--model_config_name_or_path", str(theirs), "--image_size", "16", "--dry_run"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 2
    assert f"--model_config_name_or_path {theirs}: " in capfd.readouterr().err
    assert generate_images(["--model_path", str(theirs), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--model_path {theirs}: " in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["ScoreSdeVePipeline", "LDMPipeline", "DiTPipeline", "StableDiffusionPipeline", None])
def test_which_pipelines_are_served_is_said(tmp_path, monkeypatch, capfd, kind):
    theirs = save(tmp_path / "theirs")
    edit(theirs / "model_index.json", _class_name=kind)
    line = refused(monkeypatch, capfd, tmp_path / "run", theirs)
    assert f"is a {kind}" in line and "DDPMPipeline, DDIMPipeline, PNDMPipeline" in line


SOLVERS = {
    "ddim": DDIMScheduler(num_train_timesteps=60, beta_start=0.002, beta_schedule="scaled_linear", clip_sample=False),
    "dpm": DPMSolverMultistepScheduler(num_train_timesteps=60, beta_end=0.03, timestep_spacing="trailing"),
    "pndm": PNDMScheduler(num_train_timesteps=60, beta_start=0.001, prediction_type="v_prediction"),
    "trained": DDPMScheduler(num_train_timesteps=60, trained_betas=[0.01] * 60),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_noise_of_any_solver_is_that_of_its_betas(tmp_path, name):
    solver = SOLVERS[name]
    kind = DDIMPipeline if name == "ddim" else DDPMPipeline
    theirs = save(tmp_path / "theirs", scheduler=solver, kind=kind)
    if name != "ddim":  # DDIMPipeline turns every solver into DDIM, DDPMPipeline takes what it gets
        written = json.loads((theirs / "scheduler/scheduler_config.json").read_text())
        assert written["_class_name"] == type(solver).__name__
    _, noise = load_unconditional(str(theirs))
    assert type(noise) is DDPMScheduler and torch.equal(noise.betas, solver.betas)
    assert noise.config.prediction_type == solver.config.prediction_type
    assert noise.config.clip_sample == solver.config.get("clip_sample", True)
    settled = settle(TrainingConfig(pretrained_model_name_or_path=str(theirs)))
    assert settled.ddpm_num_steps == 60 and (settled.ddpm_beta_schedule is None) == (name == "trained")
    assert tune(tmp_path / "run", theirs) == 0
    again = DDPMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler")
    assert torch.equal(again.betas, solver.betas)


def test_a_named_schedule_contradicts_trained_betas(tmp_path, monkeypatch, capfd):
    theirs = save(tmp_path / "theirs", scheduler=SOLVERS["trained"])
    said = refused(monkeypatch, capfd, tmp_path / "run", theirs, ddpm_beta_schedule="linear")
    assert "--ddpm_beta_schedule linear" in said and "a schedule of its own" in said


@pytest.mark.parametrize(
    "values, said",
    [({"variance_type": "learned_range"}, "predicts a variance"), ({"trained_betas": [0.1, 0.2]}, "1000 timesteps"),
     ({"prediction_type": "flow_prediction"}, "'flow_prediction'"), ({"beta_schedule": "steep"}, "'steep'"),
     ({"_class_name": "ScoreSdeVeScheduler", "beta_schedule": None}, "ScoreSdeVeScheduler knows no betas")],
    ids=lambda value: "" if isinstance(value, dict) else value,
)  # fmt: skip
def test_a_schedule_of_another_kind_is_one_line(tmp_path, monkeypatch, capfd, values, said):
    theirs = save(tmp_path / "theirs")
    edit(theirs / "scheduler/scheduler_config.json", **values)
    assert said in refused(monkeypatch, capfd, tmp_path / "run", theirs)


# --- layouts, the Hub, and files ---


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("hub", [False, True])
def test_both_layouts_load_from_a_folder_and_from_the_hub(tmp_path, monkeypatch, capsys, flat, hub):
    whole = save(tmp_path / "whole", scheduler=make_noise_scheduler(prediction_type="sample"))
    source = flatten(whole, tmp_path / "flat") if flat else whole
    name = on_the_hub(source, tmp_path / "cache", "somebody/ddpm-cat-16", monkeypatch) if hub else str(source)
    model, noise = load_unconditional(name)
    assert torch.equal(model.conv_in.weight, make_unet("tiny-16", seed=0).conv_in.weight)
    assert noise.config.prediction_type == "sample" and model.config.sample_size == 16
    assert make_unet(name).config.block_out_channels == model.config.block_out_channels
    assert tune(tmp_path / "run", name) == 0
    card = (tmp_path / "run/README.md").read_text()
    assert (f"base_model: {name}" in card) == hub and str(tmp_path) not in card
    assert "license:" not in card, "what was fine-tuned has one, and nobody has said which"
    assert 'DDPMPipeline.from_pretrained("run")' in card
    assert DDPMPipeline.from_pretrained(tmp_path / "run").unet.config.sample_size == 16
    draw = ["--model_path", name, "--num_images", "1", "--num_inference_steps", "2", "--output_dir"]
    assert generate_images([*draw, str(tmp_path / "out")]) == 0
    assert json.loads(Image.open(tmp_path / "out/0000.png").text["parameters"])["num_inference_steps"] == 2


def test_a_hub_id_that_nobody_can_reach_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "is no unconditional pipeline that can be read" in refused(
        monkeypatch, capfd, tmp_path / "run", "somebody/ddpm-cat-16")  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
def test_pickled_weights_are_refused_with_the_reason(tmp_path, monkeypatch, capfd, flat):
    theirs = save(tmp_path / "theirs")
    theirs, place = (flatten(theirs, tmp_path / "flat"), ".") if flat else (theirs, "unet")
    (theirs / place / WEIGHTS).unlink()
    (theirs / place / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    assert "may carry code" in refused(monkeypatch, capfd, tmp_path / "run", theirs)


def test_missing_torn_and_foreign_weights_are_found_before_data_is_loaded(tmp_path, monkeypatch, capfd):
    whole = save(tmp_path / "whole")
    content = (whole / "unet" / WEIGHTS).read_bytes()
    (whole / "unet" / WEIGHTS).unlink()
    assert "has no diffusion_pytorch_model" in refused(monkeypatch, capfd, tmp_path / "run", whole)
    (whole / "unet" / WEIGHTS).write_bytes(content[:-9])
    assert "is damaged" in refused(monkeypatch, capfd, tmp_path / "run", whole, dry_run=True)
    (whole / "unet" / WEIGHTS).write_bytes(content)
    edit(whole / "unet/config.json", block_out_channels=[8, 24])
    assert "weights of another network" in refused(monkeypatch, capfd, tmp_path / "run", whole)
    (whole / "scheduler/scheduler_config.json").unlink()
    edit(whole / "unet/config.json", block_out_channels=[8, 16])
    assert "scheduler_config.json is missing or damaged" in refused(monkeypatch, capfd, tmp_path / "run", whole)


def test_weights_of_several_files_and_of_half_precision_are_read_into_32_bits(tmp_path):
    whole = save(tmp_path / "whole")
    weight = make_unet("tiny-16", seed=0).conv_in.weight
    make_unet("tiny-16", seed=0).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*.safetensors"))) > 1
    for path in (whole / "unet").iterdir():
        path.unlink()
    shutil.copytree(tmp_path / "sharded", whole / "unet", dirs_exist_ok=True)
    assert torch.equal(load_unconditional(str(whole))[0].conv_in.weight, weight)
    half = save(tmp_path / "half", make_unet("tiny-16", seed=0).half())
    model, _ = load_unconditional(str(half))
    assert model.dtype == torch.float32 and torch.equal(model.conv_in.weight, weight.half().float())


@pytest.mark.parametrize("gone", ["one piece", "all pieces", "index"])
def test_a_piece_of_weights_in_several_files_that_is_missing_is_named(tmp_path, gone):
    folder = save(tmp_path / "theirs")
    unet = make_unet("tiny-16", seed=0)
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    pieces = sorted((folder / "unet").glob("*.safetensors"))
    index, = (folder / "unet").glob("*.index.json")
    assert len(pieces) > 2
    check_weights(folder / "unet", unet, "--model theirs")
    missing = {"one piece": pieces[1:2], "all pieces": pieces, "index": [index]}[gone]
    for path in missing:
        path.unlink()
    wanted = "-*-of-*" if gone == "all pieces" else missing[0].name
    with pytest.raises(InputError, match=r"--model theirs: its network is incomplete: it has no ") as caught:
        check_weights(folder / "unet", unet, "--model theirs")
    assert wanted in str(caught.value) and "another network" not in str(caught.value)


def test_a_torn_file_beside_a_pickle_is_called_torn(tmp_path):
    folder = save(tmp_path / "theirs") / "unet"
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(InputError, match="cut off"):
        check_weights(folder, make_unet("tiny-16", seed=0), "--model theirs")


def test_the_check_before_the_work_reads_no_weights(tmp_path, monkeypatch):
    theirs = save(tmp_path / "theirs")
    monkeypatch.setattr("diffusion_lessons.diffusion.pipelines.load_part", None)
    check_before_work(TrainingConfig(output_dir=str(tmp_path / "run"), pretrained_model_name_or_path=str(theirs),
                                     report_to="none"))  # fmt: skip
    with torch.device("meta"):
        model, _ = load_unconditional(str(theirs), 32)
    assert model.device.type == "meta" and model.config.sample_size == 32


def test_the_card_of_an_uploaded_model_loads_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(run_room, "check_login", lambda config: None)
    monkeypatch.setattr(butterflies, "push_to_hub", lambda config: "https://example.org")
    chosen = {"max_train_steps": 1, "push_to_hub": True, "hub_model_id": "me/butterflies"}
    assert main(words(tmp_path / "run", **chosen)) == 0
    assert 'DDPMPipeline.from_pretrained("me/butterflies")' in (tmp_path / "run/README.md").read_text()


# --- drawing ---


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("wordless") / "theirs", scheduler=make_noise_scheduler(5))


def draw(model: Path | str, folder: Path, *more: str) -> int:
    return generate_images(["--model_path", str(model), "--output_dir", str(folder), "--num_images", "1", *more])


@pytest.mark.parametrize("size, drawn", [([16, 32], (32, 16)), ([16, 16], (16, 16)), (32, (32, 32))])
def test_pictures_have_the_pipelines_size_square_or_not(theirs, tmp_path, size, drawn):
    model = shutil.copytree(theirs, tmp_path / "model")
    edit(model / "unet/config.json", sample_size=size)
    assert draw(model, tmp_path / "out") == 0
    assert Image.open(tmp_path / "out/0000.png").size == drawn


def test_a_pipeline_without_a_size_is_told_one(theirs, tmp_path, capfd):
    model = shutil.copytree(theirs, tmp_path / "model")
    edit(model / "unet/config.json", sample_size=None)
    assert draw(model, tmp_path / "out") == 2
    assert f"--size is missing: {model} names no size" in capfd.readouterr().err
    assert draw(model, tmp_path / "out", "--size", "9") == 2
    assert "--size 9: this UNet halves" in capfd.readouterr().err
    assert draw(model, tmp_path / "out", "--size", "24") == 0
    assert Image.open(tmp_path / "out/0000.png").size == (24, 24)


def test_the_precision_that_was_asked_for_is_drawn_in(theirs, tmp_path, monkeypatch):
    from diffusion_lessons.dreambooth import inference

    drawn_in, sample = [], inference.sample_images
    monkeypatch.setattr(inference, "sample_images", lambda unet, *rest, **options: (
        drawn_in.append(unet.dtype), sample(unet, *rest, **options))[1])  # fmt: skip
    assert draw(theirs, tmp_path / "out") == draw(theirs, tmp_path / "out", "--mixed_precision", "bf16") == 0
    assert drawn_in == [torch.float32, torch.bfloat16]


def test_fewer_steps_than_asked_for_are_named(theirs, tmp_path, capsys):
    assert draw(theirs, tmp_path / "out", "--num_inference_steps", "9") == 0
    assert "5 timesteps; it draws in so many steps, not in 9" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["negative_prompt", "variant"])
def test_what_means_nothing_without_words_is_refused(theirs, tmp_path, capfd, flag):
    assert draw(theirs, tmp_path / "out", f"--{flag}", "x") == 2
    assert f"--{flag} x: is for Stable Diffusion" in capfd.readouterr().err


def test_errors_name_the_flag_that_was_given(tmp_path, capfd):
    broken = save(tmp_path / "broken")
    shutil.rmtree(broken / "scheduler")
    assert draw(broken, tmp_path / "out") == 2
    assert f"--model_path {broken}: scheduler_config.json is missing" in capfd.readouterr().err


def test_a_name_that_is_neither_is_answered_as_before(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert draw("somebody/something", tmp_path / "out", "--prompt", "x") == 2
    assert "--model_path somebody/something: is no folder" in capfd.readouterr().err


def test_the_size_of_what_is_read_is_known(theirs):
    assert read_unconditional(str(theirs)).size == (16, 16)


def test_a_fresh_network_of_another_size_than_the_default_is_named(tmp_path):
    named = TrainingConfig(model_config_name_or_path="quick-64")
    assert "quick-64 is made for pictures of 64 px; it is trained at 128 px" in size_note(named)
    assert size_note(TrainingConfig()) is size_note(TrainingConfig(image_size=64)) is None


def test_a_model_of_another_size_than_the_config_is_named_by_the_loop(tmp_path, capsys):
    chosen = {name: value for name, value in TINY.items() if name != "image_size"}
    config = TrainingConfig(output_dir=str(tmp_path / "run"), image_size=8, max_train_steps=1, **chosen)
    model, noise = build_model(config)
    model.register_to_config(sample_size=16)
    optimizer = torch.optim.AdamW(model.parameters())
    train_loop(config, model, noise, optimizer, make_dataloader(load_data(config), 4))
    assert "the config says 8 px; grids and pipeline are drawn at the model's 16 px" in capsys.readouterr().out
