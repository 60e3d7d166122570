"""What a run keeps and what it tells: the earlier result, the newest sound checkpoint, and no place on this machine."""

import json
import os
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from dreambooth_runs import dreambooth_words, subject_folder
from huggingface_hub import HfApi, RepoUrl
from runs import TINY, words

from diffusion_lessons.butterflies import command
from diffusion_lessons.butterflies import training as butterflies
from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.fidelity import read_rows, write_rows
from diffusion_lessons.dreambooth.training import Watch
from diffusion_lessons.dreambooth.training import main as dreambooth
from diffusion_lessons.engine import checkpointer, checkpoints
from diffusion_lessons.engine import run as training
from diffusion_lessons.engine.checkpoints import (
    PROGRESS,
    Checkpoint,
    Digests,
    atomic_folder,
    find_checkpoint,
    list_checkpoints,
    place_parts,
    remove_folder,
    seal_folder,
    take_up_all,
    write_json,
)
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.output_folder import OutputFolder, is_unfinished
from diffusion_lessons.engine.precision import PrecisionPlan
from diffusion_lessons.engine.publishing import push_to_hub, save_parts

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """Eight steps in two epochs, a checkpoint every two steps, a grid each epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(folder, max_train_steps=16, checkpointing_steps=4, save_image_epochs=1, logging_dir="diary",
                      report_to="tensorboard")) == 0  # fmt: skip
    return folder


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def aged(folder: Path) -> None:
    """Files of an hour ago: what was read of them is remembered."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def fail_at_step(monkeypatch, error: BaseException, number: int = 1) -> None:
    done = []

    def spoiled(run) -> None:
        done.append(1)
        if len(done) == number:
            raise error
        real(run)

    real = training.Run.step
    monkeypatch.setattr(training.Run, "step", spoiled)


# --- the old result stays until the new one stands ---


def test_a_run_that_fails_in_its_first_step_costs_nothing_of_the_finished_one(finished, monkeypatch, capsys):
    before = (finished / WEIGHTS).read_bytes()
    with monkeypatch.context() as patch:
        fail_at_step(patch, torch.OutOfMemoryError("CUDA out of memory"))
        assert main(words(finished, max_train_steps=2)) == 1
    aside = finished.with_name("run.previous")
    assert f"The earlier result is in {aside}" in capsys.readouterr().err
    assert (aside / WEIGHTS).read_bytes() == before and (aside / "samples" / "0001.png").is_file()
    assert [each.step for each in list_checkpoints(aside)] == [4, 8, 12, 16]
    assert (aside / "diary").is_dir() and not (finished / "diary").exists(), "the logs go with their run"

    assert main(words(finished, max_train_steps=2)) == 0, "the next try, without --resume_from_checkpoint"
    assert sorted(path.name for path in finished.parent.iterdir()) == ["run"], "all of them are replaced by now"
    assert not (finished / ".replaces.json").exists()


def test_a_run_that_was_killed_and_resumed_to_its_end_drops_what_it_replaced(finished, monkeypatch):
    notes = finished / "notes.txt"
    notes.write_text("mine")
    with monkeypatch.context() as patch:
        fail_at_step(patch, KeyboardInterrupt(), number=4)
        assert main(words(finished, max_train_steps=6, checkpointing_steps=2)) == 130
    assert finished.with_name("run.previous").is_dir()
    assert main(words(finished, max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")) == 0
    assert not finished.with_name("run.previous").exists() and notes.read_text() == "mine"


def test_only_a_folder_that_is_such_a_copy_is_removed(finished, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at_step(patch, RuntimeError("no"), number=4)
        assert main(words(finished, max_train_steps=6, checkpointing_steps=2)) == 1
    aside = finished.with_name("run.previous")
    (aside / "found here.txt").write_text("somebody's")
    os.rename(aside, finished.with_name("saved"))
    shutil.copytree(finished.with_name("saved"), aside, ignore=shutil.ignore_patterns(".*"))
    assert main(words(finished, max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")) == 0
    assert (aside / WEIGHTS).is_file() and (finished.with_name("saved") / WEIGHTS).is_file()

    aside_again = OutputFolder(finished)
    aside_again.claim(overwrite=True, resuming=False)
    (finished.with_name("run.previous-2") / "found here.txt").write_text("somebody's")
    aside_again.drop_replaced()
    aside_again.release()
    left = sorted(path.name for path in finished.with_name("run.previous-2").iterdir())
    assert left == ["found here.txt"], "what no run wrote stays, wherever it lies"


@pytest.mark.parametrize("call", range(8))
def test_a_move_aside_that_is_killed_at_any_rename_is_undone_by_the_next_start(finished, monkeypatch, call):
    before = {path.relative_to(finished) for path in finished.rglob("*") if path.name != ".lock"}
    made, real = [], os.rename

    def killed(*names) -> None:
        if len(made) == call:
            raise KeyboardInterrupt
        made.append(names)
        real(*names)

    output = OutputFolder(finished)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        output.claim(overwrite=True, resuming=False)
    output.release()
    output = OutputFolder(finished)
    output.claim(overwrite=False, resuming=True)
    output.release()
    after = {path.relative_to(finished) for path in finished.rglob("*") if path.name != ".lock"}
    assert after == before and not finished.with_name("run.previous").exists()


def test_a_run_whose_checkpoints_are_all_damaged_counts_as_unfinished_and_its_copy_stays(finished):
    for checkpoint in list_checkpoints(finished):
        (checkpoint.path / "optimizer.bin").write_bytes(b"half")
    assert is_unfinished(finished)
    assert main(words(finished, max_train_steps=2)) == 0
    assert (finished.with_name("run.previous") / WEIGHTS).is_file()


def test_the_lock_is_held_until_the_trackers_have_ended(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    seen, real = [], TensorBoardTracker.finish

    def finish(tracker) -> None:
        with pytest.raises(InputError, match="another run is writing there"):
            OutputFolder(tmp_path / "run").claim(overwrite=True, resuming=True)
        seen.append(1)
        real(tracker)

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    assert main(words(tmp_path / "run", max_train_steps=1, report_to="tensorboard")) == 0
    assert seen == [1]


def text(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
            and path.name != "manifest.json"}  # fmt: skip


def cut(monkeypatch, call: int, work) -> bool:
    """Do the work with a power cut before the `call`-th rename or removal; whether there was one."""
    made = []

    class PowerCut(BaseException):
        pass

    def counted(real):
        def wrapper(*args, **settings):
            if len(made) == call:
                raise PowerCut
            made.append(args)
            return real(*args, **settings)

        return wrapper

    with monkeypatch.context() as patch:
        for place, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(place, name, counted(getattr(place, name)))
        try:
            work()
        except PowerCut:
            return True
    return False


def test_a_folder_that_replaces_another_is_old_or_new_after_every_kill(tmp_path, monkeypatch):
    for call in range(20):
        folder = tmp_path / str(call)
        for version in ("old", "new"):
            partial = checkpoints.begin_folder(folder / "part")
            (partial / "weights").write_text(version)
            (partial / "config").write_text(version)
            if version == "old":
                seal_folder(partial, folder / "part")
        was_cut = cut(monkeypatch, call, lambda partial=partial, folder=folder: seal_folder(partial, folder / "part"))
        take_up_all(folder)
        state = set(text(folder / "part").values())
        assert state in ({"old"}, {"new"}), "never half, never gone"
        if not was_cut:
            break
    assert state == {"new"} and call > 3


def test_the_parts_of_a_pipeline_are_all_old_or_all_new_after_every_kill_and_the_next_start(tmp_path, monkeypatch):
    def write(version: str, folder: Path) -> None:
        for name in ("unet/weights", "vae/weights", "model_index.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps({"version": version, "unet": ["a", "B"], "vae": ["a", "B"]}))

    for call in range(20):
        folder = tmp_path / str(call)
        folder.mkdir()
        save_parts(folder, lambda place: write("old", place))
        was_cut = cut(monkeypatch, call, lambda folder=folder: save_parts(folder, lambda place: write("new", place)))
        place_parts(folder)
        versions = {name: json.loads(content)["version"] for name, content in text(folder).items() if name[0] != "."}
        assert len(versions) == 3 and len(set(versions.values())) == 1, "one pipeline and not two halves"
        if not was_cut:
            break
    assert set(versions.values()) == {"new"} and call > 4


def test_a_result_leaves_nothing_of_the_one_before_it_and_takes_nothing_else(tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "model_index.json").write_text(json.dumps({"..": ["a", "B"], "/tmp": ["a", "B"], "samples": 1}))
    (tmp_path / "samples").mkdir()
    save_parts(tmp_path, lambda folder: (folder / "pytorch_lora_weights.safetensors").write_text("new"))
    assert text(tmp_path) == {"pytorch_lora_weights.safetensors": "new", "notes.txt": "old"}
    assert (tmp_path / "samples").is_dir() and Path("/tmp").is_dir()


# --- the newest sound checkpoint ---


def test_latest_goes_past_a_flipped_byte_and_says_so_and_a_named_one_is_refused(finished, capsys):
    flip(finished / "checkpoint-16" / WEIGHTS)
    flip(finished / "checkpoint-12" / "optimizer.bin")
    again = dict(max_train_steps=16, checkpointing_steps=4, logging_dir="diary")
    assert main(words(finished, **again, resume_from_checkpoint="checkpoint-16")) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    assert main(words(finished, **again, resume_from_checkpoint="latest")) == 0
    said = capsys.readouterr().out
    assert f"skipped checkpoint-16: {WEIGHTS} is damaged (its SHA-256 differs)" in said
    assert "skipped checkpoint-12: optimizer.bin is damaged" in said and "resuming checkpoint-8" in said
    assert all(each.fault(thorough=True) is None for each in list_checkpoints(finished)), "all are sound again"


def test_digests_are_read_once_for_each_state_of_a_file(finished, monkeypatch):
    aged(finished)
    read, real = [], checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", lambda path: read.append(path.name) or real(path))
    for _ in range(3):
        assert find_checkpoint(finished, "latest")[0].step == 16
    assert len(read) == len(set(read)) > 4
    flip(finished / "checkpoint-16" / "optimizer.bin")
    assert find_checkpoint(finished, "latest")[0].step == 12, "a file that was changed is read again"
    aged(finished)
    assert find_checkpoint(finished, "latest")[0].step == 12
    assert Checkpoint(finished / "checkpoint-16", 16).fault() is not None, "what was found out is not forgotten"


def test_a_checkpoint_that_the_disk_does_not_give_back_is_passed_over(finished, monkeypatch):
    def broken(path: Path) -> str:
        if "checkpoint-16" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    real = checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", broken)
    found, notes = find_checkpoint(finished, "latest")
    assert found.step == 12 and "cannot be read (Input/output error)" in notes[0]


def test_a_prune_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpointer, "prune_checkpoints", refuse)
    assert main(words(tmp_path / "run", max_train_steps=2, checkpoints_total_limit=1)) == 0
    said = capsys.readouterr()
    assert "checkpoint-2 is complete, but an older one could not be removed" in said.out
    assert "could not be written" not in said.out + said.err


@pytest.mark.parametrize("error", [TypeError("odd"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_no_error_in_a_save_leaves_a_partial_folder(tmp_path, monkeypatch, error):
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(checkpointer, "complete_folder", fail)
    assert main(words(tmp_path / "run", max_train_steps=2)) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert not list((tmp_path / "run").glob(".*.partial"))


def test_files_are_hashed_while_others_are_written_and_the_manifest_is_right(tmp_path):
    digests = Digests(tmp_path)
    (tmp_path / "first").write_bytes(b"1" * 1000)
    digests.take()
    (tmp_path / "second").write_bytes(b"2")
    entries = digests.entries()
    digests.close()
    assert {name: entry["bytes"] for name, entry in entries.items()} == {"first": 1000, "second": 1}
    assert all(entry["sha256"] == checkpoints._sha256(tmp_path / name) for name, entry in entries.items())


def test_the_optimizer_is_being_hashed_before_the_models_are_written(tmp_path, monkeypatch):
    events, save, take = [], checkpointer.ModelFolders.save, Digests.take
    monkeypatch.setattr(checkpointer.ModelFolders, "save", lambda *args: events.append("models") or save(*args))

    def noted(digests) -> None:
        before = set(digests._found)
        take(digests)
        events.append(sorted(path.name for path in set(digests._found) - before))

    monkeypatch.setattr(Digests, "take", noted)
    assert main(words(tmp_path / "run", max_train_steps=1, use_ema=True)) == 0
    of_a_model = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert events[1:] == ["models", of_a_model, "models", of_a_model, ["progress.json"]]
    assert "optimizer.bin" in events[0]


# --- a branch that was left ---


def test_butterflies_that_go_back_keep_no_grid_of_the_branch_they_left(finished):
    again = dict(max_train_steps=12, checkpointing_steps=4, save_image_epochs=5, logging_dir="diary")
    assert main(words(finished, **again, resume_from_checkpoint="checkpoint-8")) == 0, "the end of the first epoch"
    names = sorted(path.name for path in (finished / "samples").iterdir())
    assert names == ["0000.png", "0001.png", "abandoned-0001.png"]
    assert "(samples/0001.png)" in (finished / "README.md").read_text()


def test_resuming_at_the_end_of_an_epoch_keeps_its_grid(finished):
    before = (finished / "samples" / "0001.png").read_bytes()
    again = dict(max_train_steps=16, save_image_epochs=1, logging_dir="diary", resume_from_checkpoint="latest")
    assert main(words(finished, **again)) == 0
    assert not list((finished / "samples").glob("abandoned-*"))
    assert (finished / "samples" / "0001.png").read_bytes() == before


def test_abandoned_checkpoints_stay_without_a_limit_and_are_the_first_to_go_with_one(finished, capsys):
    fields = dict(max_train_steps=8, checkpointing_steps=2, logging_dir="diary", resume_from_checkpoint="checkpoint-4")
    assert main(words(finished, **fields)) == 0
    aside = ["abandoned-checkpoint-12", "abandoned-checkpoint-16", "abandoned-checkpoint-8"]
    assert sorted(path.name for path in finished.glob("abandoned-*")) == aside
    assert "of a branch that this run has left" in capsys.readouterr().out
    assert main(words(finished, **fields)) == 0
    assert (finished / "abandoned-checkpoint-8-2").is_dir(), "that of the first branch stays, too"
    assert main(words(finished, **fields, checkpoints_total_limit=5)) == 0
    assert [each.step for each in list_checkpoints(finished)] == [4, 6, 8]
    assert len(list(finished.glob("abandoned-*"))) == 2


def test_rows_of_a_branch_that_was_left_go_also_where_the_run_keeps_no_table(tmp_path):
    rows = [{"step": step, "score": 0.5} for step in (0, 2, 4)]
    write_rows(tmp_path / "fidelity.json", rows)
    run = SimpleNamespace(output_dir=tmp_path, global_step=2, is_main=True, total_steps=4)
    run.accelerator = SimpleNamespace(sync_gradients=True)
    config = DreamBoothConfig(pretrained_model_name_or_path="miniature", instance_data_dir="x",
                              instance_prompt="a sks fly", output_dir=str(tmp_path))  # fmt: skip
    run.sample_due = lambda *_, **__: None
    Watch(config, None, None, PrecisionPlan(torch.device("cpu")))(run)
    assert read_rows(tmp_path / "fidelity.json") == rows[:2]


def test_the_next_branch_begins_only_where_the_left_one_is_aside(finished, monkeypatch):
    """Killed between the two, `latest` must be the checkpoint that the new branch grew from."""
    monkeypatch.setattr(checkpointer, "place_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    fields = dict(max_train_steps=16, checkpointing_steps=1, logging_dir="diary", resume_from_checkpoint="checkpoint-4")
    assert main(words(finished, **fields)) == 130
    assert find_checkpoint(finished, "latest")[0].step == 4


# --- private things ---


class Hub:
    """A stand-in for the Hub: what it is asked, and what was in the folder when it was sent."""

    def __init__(self, monkeypatch) -> None:
        self.created, self.sent = [], {}
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, name: str, **settings) -> RepoUrl:
        self.created.append(settings)
        return RepoUrl(f"https://huggingface.co/somebody/{name}")

    def upload_folder(self, folder_path: Path, **settings) -> None:
        self.sent = {path.relative_to(folder_path).as_posix(): path.read_bytes()
                     for path in Path(folder_path).rglob("*") if path.is_file()}  # fmt: skip


def test_what_is_uploaded_says_nothing_of_this_machine_and_the_local_config_all(tmp_path, monkeypatch):
    from diffusers import DDPMPipeline

    from diffusion_lessons.diffusion.targets import make_noise_scheduler
    from diffusion_lessons.diffusion.unet import make_unet

    base, folder = tmp_path / "base", tmp_path / "run"
    DDPMPipeline(make_unet("tiny-16", 16, seed=0), make_noise_scheduler()).save_pretrained(base)
    assert main(words(folder, max_train_steps=1, pretrained_model_name_or_path=str(base), report_to="tensorboard")) == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "samples" / "abandoned-0009.png").write_text("left")
    hub = Hub(monkeypatch)
    push_to_hub(TrainingConfig(output_dir=str(folder), hub_token="hf_x"))
    assert {"training_config.json", "README.md", "model_index.json", WEIGHTS, "samples/0000.png"} <= set(hub.sent)
    assert not [name for name in hub.sent if name.startswith(("checkpoint", "logs", ".")) or "abandoned" in name]
    assert "notes.txt" not in hub.sent, "only what the run made for others"
    telling = [name for name, content in hub.sent.items() if str(tmp_path).encode() in content]
    assert telling == []
    shown = json.loads(hub.sent["training_config.json"])
    assert shown["output_dir"] == "run" and shown["pretrained_model_name_or_path"] == "base"
    assert json.loads((folder / "training_config.json").read_text())["output_dir"] == str(folder)
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize("flag, private", [(False, None), (True, True)])
def test_a_repository_is_private_if_somebody_says_so_and_else_as_its_owner_wants(tmp_path, monkeypatch, flag, private):
    hub = Hub(monkeypatch)
    push_to_hub(TrainingConfig(output_dir=str(tmp_path), hub_token="hf_x", hub_private_repo=flag))
    assert hub.created == [{"private": private, "exist_ok": True}]


def test_logs_in_a_folder_named_in_full_stay_at_home(tmp_path, monkeypatch):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "events").write_text("here")
    hub = Hub(monkeypatch)
    push_to_hub(TrainingConfig(output_dir=str(tmp_path), logging_dir=str(tmp_path / "diary"), hub_token="hf_x"))
    assert hub.sent == {}


def test_a_tracker_is_told_names_and_no_places(tmp_path, monkeypatch):
    from accelerate import Accelerator

    told, real = [], Accelerator.init_trackers

    def noted(*args, config, **rest) -> None:
        told.append(config)
        real(*args, config=config, **rest)

    monkeypatch.setattr(Accelerator, "init_trackers", noted)
    assert main(words(tmp_path / "run", max_train_steps=1, report_to="tensorboard")) == 0
    assert str(tmp_path) not in json.dumps(told) and told[0]["output_dir"] == "run"


# --- files ---


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        assert main(words(tmp_path / "run", max_train_steps=1, use_ema=True, report_to="tensorboard")) == 0
        pictures = subject_folder(tmp_path / "pictures")
        assert dreambooth(dreambooth_words(pictures, tmp_path / "lora", "--lora", "--lora_format=kohya",
                                           max_train_steps=1)) == 0  # fmt: skip
        with atomic_folder(tmp_path / "sealed") as folder:
            (folder / "old").write_text("1")
            (folder / "old").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): oct(stat.S_IMODE(path.stat().st_mode))
             for path in tmp_path.rglob("*") if path.is_file()}  # fmt: skip
    assert len(modes) > 30 and {name: found for name, found in modes.items() if found != oct(mode)} == {}


def test_a_checkpoint_that_is_a_link_is_unlinked_and_its_target_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / PROGRESS).write_text("{}")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    remove_folder(tmp_path / "checkpoint-2")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere"] and (tmp_path / "elsewhere" / PROGRESS).is_file()


def test_json_is_there_in_its_old_form_until_the_new_one_is_whole(tmp_path):
    write_json(tmp_path / "a.json", {"version": "old"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"version": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"version": "old"}


# --- no checkpoint beside a model that stands ---


def test_with_a_limit_of_0_the_model_stays_and_no_checkpoint(tmp_path, capsys):
    """Until the result stands the newest checkpoint is there; then none, and a mark by which a resume knows it."""
    folder, seen = tmp_path / "run", []
    chosen = words(folder, max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=0)
    real = butterflies.save_pipeline

    def saving(pipeline, output_dir):
        seen.append([each.step for each in list_checkpoints(folder)])
        real(pipeline, output_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(butterflies, "save_pipeline", saving)
        assert main(chosen) == 0
    assert seen[-1] == [5], "it could be resumed, had the writing failed"
    assert list_checkpoints(folder) == [] and DDPMPipeline.from_pretrained(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in (".lock",)}
    capsys.readouterr()
    for more in ({}, {"max_train_steps": 9}):
        again = words(folder, **{"max_train_steps": 5, "checkpointing_steps": 2, "checkpoints_total_limit": 0,
                                 "resume_from_checkpoint": "latest"} | more)  # fmt: skip
        assert main(again) == 0
        assert "is finished and kept no checkpoint" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}, "an unattended restart changes nothing"
    with pytest.raises(InputError, match="is finished and kept no checkpoint"):
        config = TrainingConfig(**TINY, output_dir=str(folder), resume_from_checkpoint="latest")
        command.train(command.settle(config), command.load_data(config))
    assert main(words(folder, max_train_steps=3, checkpointing_steps=2)) == 0
    assert [each.step for each in list_checkpoints(folder)] == [2, 3], "a new run is a new run"


def test_a_failure_after_the_last_step_leaves_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(butterflies, "save_pipeline", full)
    assert main(words(tmp_path / "run", max_train_steps=3, checkpoints_total_limit=0)) == 1
    assert [each.step for each in list_checkpoints(tmp_path / "run")] == [3]
    monkeypatch.undo()
    assert main(words(tmp_path / "run", max_train_steps=3, checkpoints_total_limit=0,
                               resume_from_checkpoint="latest")) == 0  # fmt: skip
    assert list_checkpoints(tmp_path / "run") == [] and (tmp_path / "run" / "model_index.json").is_file()
