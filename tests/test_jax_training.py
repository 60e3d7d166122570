"""`train-dreambooth-jax`: equal to the PyTorch trainer, resumed to the bit, on many devices, and refused in a line."""
# ruff: noqa: E402

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'diffusion_lessons[jax]'")
import orbax.checkpoint as ocp
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from dreambooth_runs import CLASS, SUBJECT, class_folder, dreambooth_words, prior_words, subject_folder
from flax import nnx
from jax_runs import ended, jax_environment, jax_words, start_jax, toy_model
from PIL import Image
from safetensors.torch import load_file

from diffusion_lessons.diffusion.noise import add_noise
from diffusion_lessons.diffusion.targets import loss_weights, training_target
from diffusion_lessons.dreambooth.prior import prior_preservation_loss
from diffusion_lessons.dreambooth.training import main as torch_main
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.commands import free_port
from diffusion_lessons.engine.optimization import make_optimizer, make_schedule
from diffusion_lessons.jax.config import DreamBoothJaxConfig
from diffusion_lessons.jax.devices import device_mesh, place_parameters
from diffusion_lessons.jax.run import emptied
from diffusion_lessons.jax.step import Drawn, compiled_step, dreambooth_loss, make_adamw, noise_table, rates_of
from diffusion_lessons.jax.training import gather_for_jax, main, prepare_step
from diffusion_lessons.stable_diffusion.folder import find_model, load_pipeline
from diffusion_lessons.stable_diffusion.prompts import tokenize

torch.set_num_threads(1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small model, pictures of the subject and of the class, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("jax")
    toy_model(folder / "model")
    subject_folder(folder / "subject")
    class_folder(folder / "class")
    return folder


def environment(place: Path, devices: int = 1, **variables: str) -> dict[str, str]:
    return jax_environment(place / "cache", devices, **variables)


def same_files(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


# --- equal to PyTorch ---


@pytest.mark.parametrize("text", [False, True], ids=["unet", "with text encoder"])
def test_fifty_losses_are_those_of_the_pytorch_trainer(text, place):
    """Given the same latents, noise, timesteps and weights: the prior, min-SNR, clipping and a warm-up."""
    config = DreamBoothJaxConfig(
        pretrained_model_name_or_path="miniature", instance_data_dir="meadow", instance_prompt=SUBJECT,
        resolution=32, train_batch_size=1, max_train_steps=50, learning_rate=6e-4, lr_scheduler="cosine",
        lr_warmup_steps=5, train_text_encoder=text, snr_gamma=5.0, report_to="none", fidelity_model="none",
        output_dir=str(place / "unused"), **prior_words(place / "class")).resolve()
    found = gather_for_jax(config)
    draws = [drawn_from(found, np.random.default_rng(number)) for number in range(50)]
    ours, theirs = np.array(losses_in_jax(config, found, draws)), np.array(losses_in_torch(config, found, draws))
    assert np.abs(ours / theirs - 1).max() < 1e-4, "a thousandth was promised"
    assert ours[-10:].mean() < ours[:10].mean(), "it learns"


def drawn_from(found, rng: np.random.Generator) -> Drawn:
    latents = found.moments[rng.integers(0, len(found.moments), 1)][..., :4].astype(np.float32)
    latents = latents * found.model.autoencoder.config.scaling_factor
    noise = rng.standard_normal(latents.shape).astype(np.float32)
    return Drawn(latents, noise, rng.integers(0, 1000, latents.shape[:2]).astype(np.int32))


def losses_in_jax(config, found, draws: list[Drawn]) -> list[float]:
    state, storage, _ = prepare_step(config, found, device_mesh())
    table, rates = noise_table(found.noise_scheduler, config.snr_gamma), rates_of(config, len(draws))

    def loss_of(weights, given, key):
        networks = {name: nnx.merge(storage.structures[name], each) for name, each in weights.items()}
        words = networks["text_encoder"](found.words) if config.train_text_encoder else found.words
        return dreambooth_loss(networks["unet"], table, Drawn(*given), words, config.prior_loss_weight)

    step, losses = compiled_step(loss_of, make_adamw(config)), []
    for number, drawn in enumerate(draws):
        batch = jax.tree.map(lambda rows: rows[:, None], drawn)  # one micro-batch
        state, loss = step(state, batch, jax.random.key(0), rates.learning_rate[number], rates.decay[number])
        losses.append(float(loss))
    return losses


def losses_in_torch(config, found, draws: list[Drawn]) -> list[float]:
    pipeline = load_pipeline(find_model("miniature"))
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    text_encoder.requires_grad_(config.train_text_encoder)
    parameters = [*unet.parameters(), *(text_encoder.parameters() if config.train_text_encoder else [])]
    optimizer = make_optimizer(parameters, config)
    schedule = make_schedule(optimizer, config, len(draws))
    ids = tokenize(pipeline.tokenizer, [SUBJECT, CLASS])
    bars, kind = found.noise_scheduler.alphas_cumprod, found.noise_scheduler.config.prediction_type

    def subjects_then_class(array: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(np.concatenate([array[:, 0], array[:, 1]]))
        return rows.movedim(-1, 1).contiguous() if rows.ndim > 1 else rows.long()

    losses = []
    for drawn in draws:
        latents, noise, timesteps = map(subjects_then_class, drawn)
        words = text_encoder(ids)[0].repeat_interleave(len(latents) // 2, dim=0)
        prediction = unet(add_noise(latents, noise, timesteps, bars), timesteps, words, return_dict=False)[0]
        loss = prior_preservation_loss(
            prediction, training_target(kind, latents, noise, timesteps, bars),
            loss_weights(timesteps, bars, kind, config.snr_gamma), config.prior_loss_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- a whole run, killed and resumed ---

EVERYTHING = {
    "train_text_encoder": True, "use_ema": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    "lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 8, "offset_noise": True, "snr_gamma": 5.0,
    "validation_prompt": SUBJECT, "validation_steps": 4, "num_validation_images": 2, "save_steps": 4,
    "report_to": "tensorboard", "logging_steps": 3,
}


def everything(place: Path, output: str, *flags: str, **fields) -> list[str]:
    chosen = EVERYTHING | prior_words(place / "class") | fields
    return jax_words(place / "model", place / "subject", place / output, *flags, **chosen)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The folder of a run that was never stopped."""
    said = ended(start_jax(everything(place, "whole"), place, environment(place)))
    assert "training 8 steps on 1 device (cpu), mixed precision: no" in said
    return place / "whole"


def test_a_run_leaves_a_model_that_plain_diffusers_opens(whole, place):
    pipeline = StableDiffusionPipeline.from_pretrained(whole, safety_checker=None)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    began = StableDiffusionPipeline.from_pretrained(place / "model", safety_checker=None)
    for name in ("unet", "text_encoder"):
        weights, before = (getattr(each, name).state_dict() for each in (pipeline, began))
        assert all(weight.isfinite().all() for weight in weights.values())
        assert any(not torch.equal(weight, before[key]) for key, weight in weights.items())
    assert same_files(whole / "vae" / WEIGHTS, place / "model" / "vae" / WEIGHTS), "what was not trained is a copy"
    config = json.loads((whole / "training_config.json").read_text())
    assert config["save_steps"] == 4 and "diffusers" in (whole / "README.md").read_text()
    assert (whole / "samples" / "step-000004.png").is_file() and (whole / "samples" / "step-000008.png").is_file()
    assert any((whole / "logs").rglob("events*"))


def test_checkpoints_hold_weights_for_diffusers_and_the_state_of_what_learns_only(whole):
    checkpoints = list_checkpoints(whole)
    assert [each.step for each in checkpoints] == [2, 4, 6, 8] and all(each.fault(True) is None for each in checkpoints)
    folder = checkpoints[-1].path
    trained = sum(weight.numel() for name in ("unet", "text_encoder")
                  for weight in load_file(next((folder / name).glob("*.safetensors"))).values())
    with ocp.StandardCheckpointer() as orbax:
        moments = orbax.restore(folder / "optimizer")
    assert sum(np.size(each) for each in moments) == 2 * trained + 1, "two moments of each weight, and a count"
    averaged, weights = (load_file(folder / name / WEIGHTS) for name in ("unet_ema", "unet"))
    assert any(not torch.equal(averaged[name], weight) for name, weight in weights.items())
    assert same_files(folder / "unet_ema" / WEIGHTS, whole / "unet" / WEIGHTS), "the averages are what a run leaves"
    assert same_files(whole / "checkpoint-4" / "unet_ema" / WEIGHTS, whole / "pipeline-4" / "unet" / WEIGHTS)
    StableDiffusionPipeline.from_pretrained(whole / "pipeline-4", safety_checker=None)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 400
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists() and process.poll() is None, "it was to be stopped in the middle"


def test_terminated_killed_and_resumed_it_ends_with_the_same_bits(whole, place):
    slow = {"max_train_steps": 8, "checkpointing_steps": 1}  # many checkpoints: time to be hit
    first = start_jax(everything(place, "stopped", **slow), place, environment(place))
    wait_for(place / "stopped" / "checkpoint-1", first)
    first.send_signal(signal.SIGTERM)
    said = ended(first, 143)
    way_on = r"stopped after step \d\. Last good checkpoint: checkpoint-\d; go on with: train-dreambooth-jax --config"
    assert re.search(way_on, said)
    reached = list_checkpoints(place / "stopped")[-1].step
    resumed = everything(place, "stopped", "--resume_from_checkpoint", "latest", **slow)
    second = start_jax(resumed, place, environment(place))
    wait_for(place / "stopped" / f"checkpoint-{reached + 2}", second)
    second.kill()
    second.wait()
    assert "resuming checkpoint-" in ended(start_jax(resumed, place, environment(place)))
    for name in (f"unet/{WEIGHTS}", "text_encoder/model.safetensors", f"checkpoint-8/unet/{WEIGHTS}",
                 "samples/step-000008.png", f"pipeline-8/unet/{WEIGHTS}"):
        assert same_files(place / "stopped" / name, whole / name), name


def test_a_finished_run_is_over_and_an_earlier_one_is_replaced_whole(whole, place, capsys):
    words = everything(place, "whole", "--resume_from_checkpoint", "latest", validation_prompt=None, save_steps=None)
    assert main(words) == 0
    assert "8 of 8 steps are done" in capsys.readouterr().out
    again = [*jax_words(place / "model", place / "subject", place / "again", max_train_steps=1), "--save_steps", "1"]
    assert main(again) == 0 and main(again) == 0
    assert sorted(each.name for each in (place / "again").iterdir() if each.name.startswith(("pipe", "check"))) == [
        "checkpoint-1", "pipeline-1"]
    assert not list(place.glob("again.previous*")), "the earlier finished run made room"


def test_what_makes_another_run_is_refused_on_resume(whole, place, capsys):
    changes = ({"seed": 7}, "--seed 7"), ({"resolution": 16}, "--resolution 16"), ({"use_ema": None}, "use_ema")
    for change, word in changes:
        assert main(everything(place, "whole", "--resume_from_checkpoint", "latest", **change)) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert word in line and "--force_resume" in line


def test_neither_command_goes_on_with_a_checkpoint_of_the_other(place, capsys):
    from_jax = jax_words(place / "model", place / "subject", place / "by-jax", max_train_steps=1)
    assert main(from_jax) == 0
    fields = {"pretrained_model_name_or_path": place / "model", "fidelity_model": "none", "max_train_steps": 1}
    from_torch = dreambooth_words(place / "subject", place / "by-torch", **fields)
    assert torch_main(from_torch) == 0
    for command, words, other in ((torch_main, from_torch, "by-jax"), (main, from_jax, "by-torch")):
        named = ["--resume_from_checkpoint", str(place / other / "checkpoint-1"), "--max_train_steps", "2"]
        assert command([*words, *named]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "trains in another library" in line and "--save_pipeline" in line


def test_a_state_makes_room_before_another_is_read_and_a_step_uses_up_what_was_placed():
    """Weights, moments and averages of a real model are there once, or they do not fit."""
    state = {"weights": jax.numpy.ones((64, 64))}
    like = emptied(state)
    assert state["weights"].is_deleted() and (like["weights"].shape, like["weights"].dtype) == ((64, 64), np.float32)
    network = jax.numpy.ones((512, 512))
    address = network.unsafe_buffer_pointer()
    step = jax.jit(lambda tree: jax.tree.map(lambda each: each + 1, tree), donate_argnums=0)
    step(place_parameters({"weights": network}, device_mesh()))
    assert float(network.sum()) == 512 * 512, "whoever keeps the array still has it"
    placed = place_parameters({"weights": network}, device_mesh(), take=True)
    del network
    changed = step(placed)
    assert changed["weights"].unsafe_buffer_pointer() == address, "the memory that the weights were read into"


# --- many devices ---

PROGRAM = """
import json, sys
from diffusion_lessons.jax.devices import join_processes
joined = join_processes()
import os, jax
os.environ["RANK"] = str(jax.process_index())
from diffusion_lessons.jax.config import parse_dreambooth_jax
from diffusion_lessons.jax.training import train_in_jax
losses = train_in_jax(parse_dreambooth_jax(sys.argv[1:])[0])
print(json.dumps({"losses": losses, "processes": jax.process_count(), "devices": jax.device_count()}))
"""


def losses_on(place: Path, output: str, devices: int, processes: int = 1, **fields) -> list[dict]:
    """What each process saw of a run of eight pairs a step, on so many devices each."""
    batch = 8 // (devices * processes)
    usual = {"train_batch_size": batch, "max_train_steps": 4, "logging_steps": 2, "learning_rate": 1e-3}
    words = jax_words(place / "model", place / "subject", place / output,
                      **prior_words(place / "class") | usual | fields)
    address = {} if processes == 1 else {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
                                         "JAX_NUM_PROCESSES": str(processes)}
    started = [subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(place, devices, **address, **({"JAX_PROCESS_ID": str(number)} if address else {})))
        for number in range(processes)]
    said = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0] * processes, said[0][1][-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.fixture(scope="module")
def alone(place) -> dict:
    (seen,) = losses_on(place, "alone", 1)
    assert (seen["devices"], len(seen["losses"])) == (1, 4)
    return seen


@pytest.mark.parametrize("shard", [None, True], ids=["copies", "parts"])
def test_eight_devices_train_as_one(shard, alone, place):
    (seen,) = losses_on(place, f"eight{shard}", 8, shard_parameters=shard)
    assert seen["devices"] == 8
    np.testing.assert_allclose(seen["losses"], alone["losses"], rtol=1e-5)
    compare_models(place / f"eight{shard}", place / "alone")


def test_two_processes_train_as_one_and_leave_one_model(alone, place):
    both = losses_on(place, "two", 2, processes=2, shard_parameters=True)
    assert [(seen["processes"], seen["devices"]) for seen in both] == [(2, 4)] * 2
    for seen in both:
        np.testing.assert_allclose(seen["losses"], alone["losses"], rtol=1e-5)
    compare_models(place / "two", place / "alone")
    assert [each.step for each in list_checkpoints(place / "two")] == [2, 4]


def test_two_processes_share_the_drawing_and_one_of_them_looks(place):
    """Class images by both; validation pictures and the table's rows by the first."""
    drawn = {"class_data_dir": place / "by-two", "num_class_images": 3, "sample_batch_size": 1}
    looks = {"validation_prompt": SUBJECT, "validation_steps": 1, "num_validation_images": 2, "shard_parameters": True,
             "fidelity_model": "miniature", "max_train_steps": 1, "checkpointing_steps": 1}
    losses_on(place, "looked", 2, processes=2, **drawn, **looks)
    assert len(list((place / "by-two").glob("generated-*.png"))) == 3
    assert (place / "looked" / "samples" / "step-000001.png").is_file()
    rows = json.loads((place / "looked" / "fidelity.json").read_text())
    assert [row["step"] for row in rows] == [0, 1]


def compare_models(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "unet" / WEIGHTS) for folder in (one, other))
    assert max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items()) < 1e-4


def test_another_number_of_devices_does_not_go_on_with_a_checkpoint(alone, place):
    words = jax_words(place / "model", place / "subject", place / "alone", "--resume_from_checkpoint", "latest",
                      **prior_words(place / "class"), train_batch_size=8, max_train_steps=6, learning_rate=1e-3)
    said = ended(start_jax(words, place, environment(place, 2)), 2)
    assert "written on 1 devices, here are 2" in said.splitlines()[-1]


# --- class images ---


def test_both_commands_share_their_class_images(place, capsys):
    """JAX draws what is missing; PyTorch finds the folder full, and draws the very same pictures."""
    drawn = {"class_data_dir": str(place / "drawn"), "class_prompt": CLASS, "with_prior_preservation": True,
             "num_class_images": 3, "sample_batch_size": 2, "max_train_steps": 1}
    assert main(jax_words(place / "model", place / "subject", place / "drawing", **drawn)) == 0
    assert "generating 3 of 3 class images" in capsys.readouterr().out
    files = sorted((place / "drawn").glob("generated-*.png"))
    assert len(files) == 3
    words = dreambooth_words(place / "subject", place / "torch", fidelity_model="none", **drawn,
                             pretrained_model_name_or_path=place / "model")
    assert torch_main(words) == 0 and "generating" not in capsys.readouterr().out
    before = [np.asarray(Image.open(each), int) for each in files]
    files[1].unlink()
    assert torch_main([*words, "--seed", "1"]) == 0 and files[1].is_file()
    assert np.abs(np.asarray(Image.open(files[1]), int) - before[1]).max() <= 1


# --- answers ---

BAD = [
    ({"pretrained_model_name_or_path": "duongna/stable-diffusion-v1-4-flax"}, "CompVis/stable-diffusion-v1-4"),
    ({"pretrained_model_name_or_path": "nowhere"}, "--pretrained_model_name_or_path nowhere"),
    ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere"),
    ({"pretrained_vae_name_or_path": "nowhere"}, "--pretrained_vae_name_or_path nowhere"),
    ({"lora": True}, "--lora True: does not go with JAX"),
    ({"mixed_precision": "fp16"}, "take bf16"),
    ({"num_processes": 2}, "JAX_NUM_PROCESSES"),
    ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint checkpoint-9"),
    ({"tokenizer_max_length": 500}, "--tokenizer_max_length 500"),
    ({"report_to": "comet_ml"}, "--report_to comet_ml"),
    ({"instance_promt": "x"}, "--instance_promt"),
]


@pytest.mark.parametrize("fields, words", BAD, ids=[next(iter(fields)) for fields, _ in BAD])
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(fields, words, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(jax_words(place / "model", place / "subject", tmp_path / "out", **fields)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train-dreambooth-jax: ") and words in lines[-1] and "Traceback" not in "".join(lines)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_stays_as_it_is(place, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("three years")
    assert main(jax_words(place / "model", place / "subject", tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err and os.listdir(tmp_path) == ["thesis.txt"]


def test_a_loss_that_is_no_number_ends_the_run_with_the_way_on(place, tmp_path, capsys):
    words = jax_words(place / "model", place / "subject", tmp_path / "out", learning_rate=1e30, max_train_steps=6,
                      logging_steps=1)
    assert main(words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in line and "full log" in line


def test_an_old_checkpoint_that_cannot_go_does_not_end_the_run(place, tmp_path, capsys, monkeypatch):
    def locked(*_):
        raise OSError("Permission denied")

    monkeypatch.setattr("diffusion_lessons.engine.checkpointer.prune_checkpoints", locked)
    words = jax_words(place / "model", place / "subject", tmp_path / "out", max_train_steps=2,
                      checkpoints_total_limit=1)
    assert main(words) == 0
    assert "checkpoint-2 is complete, but an older one could not be removed" in capsys.readouterr().out


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(place, tmp_path, capsys):
    prior = prior_words(tmp_path / "class") | {"num_class_images": 7}
    words = jax_words(place / "model", place / "subject", tmp_path / "out", "--dry_run", **prior, max_train_steps=None)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "3 pictures of the subject, 7 class images to generate, 7 steps an epoch, 7 steps in 1 epochs" in said
    assert re.search(r"memory of each device: 0\.\d{3} GiB", said) and re.search(r"\d s to compile the step", said)
    assert not list(tmp_path.iterdir())


def test_in_bf16_weights_stay_in_32_bits_and_learn(place, tmp_path):
    words = jax_words(place / "model", place / "subject", tmp_path / "out", mixed_precision="bf16", max_train_steps=3)
    assert main(words) == 0
    weights, before = load_file(tmp_path / "out" / "unet" / WEIGHTS), load_file(place / "model" / "unet" / WEIGHTS)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
    assert sum(not torch.equal(weight, before[name]) for name, weight in weights.items()) > 0.9 * len(weights)


def test_another_autoencoder_is_learned_with_and_written(place, tmp_path):
    vae = AutoencoderKL.from_pretrained(place / "model" / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    words = jax_words(place / "model", place / "subject", tmp_path / "out", max_train_steps=1,
                      pretrained_vae_name_or_path=tmp_path / "vae")
    assert main(words) == 0
    assert same_files(tmp_path / "out" / "vae" / WEIGHTS, tmp_path / "vae" / WEIGHTS)
