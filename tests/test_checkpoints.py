"""Loading trained parts: every weight from the file, or a line that says why not."""
import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.checkpoints import (
    MANIFEST,
    PROGRESS,
    Checkpoint,
    atomic_folder,
    folder_fault,
    load_part,
    without_warnings,
    write_json,
)
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.output_folder import clear_output_dir


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A network of diffusers and one of transformers, as `save_pretrained` writes them, in 16 bits."""
    home = tmp_path_factory.mktemp("parts")
    make_unet("tiny-16", seed=0).half().save_pretrained(home / "unet")
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          vocab_size=50)  # fmt: skip
    CLIPTextModel(text).half().save_pretrained(home / "text")
    return home


KINDS = {"unet": UNet2DModel, "text": CLIPTextModel}


@pytest.mark.parametrize("name", KINDS)
def test_a_part_is_read_in_32_bits(parts, name):
    part, reference = load_part(KINDS[name], parts / name, ""), KINDS[name].from_pretrained(parts / name)
    assert {each.dtype for each in part.parameters()} == {torch.float32}
    for read, stored in zip(part.parameters(), reference.parameters(), strict=True):
        assert torch.equal(read, stored.float())


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_said_in_one_line(parts, tmp_path, name, capfd):
    with pytest.raises(InputError, match="nowhere: is missing; try again"):
        load_part(KINDS[name], tmp_path / "nowhere", "try again")
    shutil.copytree(parts / name, tmp_path / name)
    weights = next((tmp_path / name).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{name}: is damaged: {weights.name} is cut off"):
        load_part(KINDS[name], tmp_path / name, "try again")
    weights.unlink()
    with pytest.raises(InputError, match=rf"{name}: is incomplete: it has no \*.safetensors"):
        load_part(KINDS[name], tmp_path / name, "try again")
    shutil.copytree(parts / name, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / name / "config.json").write_text("{")
    with pytest.raises(InputError, match=f"{name}: cannot be read as a {KINDS[name].__name__}"):
        load_part(KINDS[name], tmp_path / name, "try again")
    (tmp_path / name / "config.json").unlink()
    with pytest.raises(InputError, match=f"{name}: is incomplete: it has no config.json"):
        load_part(KINDS[name], tmp_path / name, "try again")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_of_several_is_named_and_the_index_of_another_format_is_not_asked(parts, tmp_path, name):
    folder = tmp_path / name
    KINDS[name].from_pretrained(parts / name).save_pretrained(folder, max_shard_size="4KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and load_part(KINDS[name], folder, "")
    files[1].unlink()
    with pytest.raises(InputError, match=f"{name}: is incomplete: it has no {files[1].name}; try again"):
        load_part(KINDS[name], folder, "try again")
    for file in files[:1] + files[2:]:
        file.unlink()
    whole = next((parts / name).glob("*.safetensors"))
    shutil.copy(whole, folder / f"{whole.stem}.fp16.safetensors")  # as a download of one format leaves a folder
    assert folder_fault(folder) is None


@pytest.mark.parametrize("name, kind", [("unet", AutoencoderKL), ("unet", CLIPTextModel), ("text", UNet2DModel)])
def test_gaps_are_not_filled_with_random_numbers(parts, name, kind, capfd):
    with pytest.raises(InputError, match=f"{name}: (is another model's|cannot be read)"):
        load_part(kind, parts / name, "try again")
    assert "newly initialized" not in capfd.readouterr().err, "one line of ours instead of a page of the library's"


@pytest.mark.parametrize("shown", [True, False])
def test_bars_and_warnings_are_as_before_when_the_block_has_ended(shown):
    libraries = (diffusers_logging, transformers_logging)
    before = [each.get_verbosity() for each in libraries]
    if not shown:
        diffusers_logging.disable_progress_bar()
    with pytest.raises(ZeroDivisionError), without_warnings():
        assert not any(each.is_progress_bar_enabled() for each in libraries)
        assert [each.get_verbosity() for each in libraries] == [logging.ERROR] * 2
        raise ZeroDivisionError
    assert diffusers_logging.is_progress_bar_enabled() == shown
    assert [each.get_verbosity() for each in libraries] == before and logging.ERROR not in before
    diffusers_logging.enable_progress_bar()


@pytest.mark.parametrize("entry", [1, None, "abc", [], {}, {"bytes": 3}])
def test_a_manifest_with_odd_entries_is_damaged_and_no_traceback(entry, tmp_path):
    with atomic_folder(tmp_path / "checkpoint-1") as folder:
        write_json(folder / PROGRESS, {"step": 1})
    checkpoint = Checkpoint(tmp_path / "checkpoint-1", 1)
    assert checkpoint.fault(thorough=True) is None
    write_json(checkpoint.path / MANIFEST, {PROGRESS: entry})
    assert checkpoint.fault() == checkpoint.fault(thorough=True) == f"{MANIFEST} is damaged"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "unet/../../secret", "..\\secret", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_damaged(tmp_path, name):
    (tmp_path / "secret").write_text("1")
    with atomic_folder(tmp_path / "checkpoint-1") as partial:
        write_json(partial / PROGRESS, {})
    checkpoint = Checkpoint(tmp_path / "checkpoint-1", 1)
    assert checkpoint.fault(thorough=True) is None
    manifest = json.loads((checkpoint.path / MANIFEST).read_text())
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"1").hexdigest()}
    write_json(checkpoint.path / MANIFEST, manifest | {name: entry})
    assert checkpoint.fault(thorough=True) == f"{MANIFEST} is damaged"


def test_what_a_run_left_is_moved_and_nothing_outside_of_its_folder(tmp_path):
    """The names of its parts come from a file in it."""
    run = tmp_path / "place" / "run"
    (run / "unet").mkdir(parents=True)
    (run / ".git").mkdir()
    (tmp_path / "place" / "mine").mkdir()
    write_json(run / "training_config.json", {})
    write_json(run / "model_index.json", {name: ["a", "b"] for name in ("unet", "..", "../mine", ".git")})
    aside, _ = clear_output_dir(run)
    moved = [".copy.json", "model_index.json", "training_config.json", "unet"]
    assert sorted(path.name for path in aside.iterdir()) == moved
    assert (run / ".git").is_dir() and (tmp_path / "place" / "mine").is_dir()
