"""No terminal, console or tracker can end a run."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dreambooth_runs import dreambooth_words, subject_folder
from runs import command, words

from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.commands import (
    LastingStream,
    StopSignals,
    Terminated,
    lasting_output,
    one_line,
    run_command,
    say,
    write_error_log,
)
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.tracking import LastingTracker, log_image, start_tracker
from diffusion_lessons.pictures import meadow

LONG = dict(max_train_steps=100000, checkpointing_steps=10, checkpoints_total_limit=2, save_image_epochs=100000,
            save_model_epochs=100000)  # fmt: skip


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not list_checkpoints(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert list_checkpoints(folder), "the run began"


def is_finished(folder: Path, step: int) -> bool:
    return (folder / "model_index.json").is_file() and (folder / f"checkpoint-{step}").is_dir()


# --- consoles that are gone ---


def test_a_run_whose_terminal_hangs_up_trains_to_the_end_and_writes_its_model(tmp_path):
    folder = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*words(folder, max_train_steps=150, checkpointing_steps=10, report_to="tensorboard")),
        stdin=theirs, stdout=theirs, stderr=theirs)  # fmt: skip
    os.close(theirs)
    with contextlib.suppress(OSError):
        wait_for_checkpoint(folder, process)
        assert process.poll() is None, "the end of the terminal comes in the middle"
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert is_finished(folder, 150)


def test_the_shells_closed_streams_end_no_run_and_spoil_no_exit_code(tmp_path):
    line = " ".join(command(*words(tmp_path / "run", max_train_steps=2, num_train_images=4)))
    done = subprocess.run(["bash", "-c", f"{line} >&- 2>&-"], timeout=120)
    assert done.returncode == 0 and is_finished(tmp_path / "run", 2)


def test_what_a_library_prints_into_a_closed_descriptor_goes_into_no_file(tmp_path):
    (tmp_path / "room.py").write_text("""
import os, subprocess
def main(words):
    with open("checkpoint", "w") as file:
        file.write(f"{file.fileno()}")
        file.flush()
        for number in (1, 2):
            os.write(number, b"a warning in C")
        subprocess.run(["sh", "-c", "echo from a child; echo and more >&2"])
    return 0
""")
    (tmp_path / "start.py").write_text("""
from diffusion_lessons.engine.commands import front_door
raise SystemExit(front_door("demo", lambda words: None, "room"))
""")
    done = subprocess.run(["bash", "-c", f"{sys.executable} start.py <&- >&- 2>&-"], cwd=tmp_path, timeout=60,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})  # fmt: skip
    assert done.returncode == 0 and int((tmp_path / "checkpoint").read_text()) > 2


def test_a_pipe_whose_reader_has_left_changes_no_exit_code(tmp_path):
    for given, code in ((["--help"], 0), (["--seed", "-1"], 2), (words(tmp_path, max_train_steps=1), 0)):
        reading, writing = os.pipe()
        os.close(reading)
        process = subprocess.run(command(*given), stdout=writing, stderr=writing, timeout=120)
        os.close(writing)
        assert process.returncode == code, given


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_prompt_that_the_console_cannot_show_ends_no_run(tmp_path, encoding):
    from diffusion_lessons.dreambooth.training import main as dreambooth

    prompt, folder = "a photo of a sks Schmetterling 🦋 für Zoë", tmp_path / "für 🦋"
    console = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with contextlib.redirect_stdout(console[0]), contextlib.redirect_stderr(console[1]):
        code = dreambooth(dreambooth_words(subject_folder(tmp_path / "pictures"), folder, max_train_steps=1,
                                           instance_prompt=prompt, lora=True))  # fmt: skip
    assert code == 0 and (folder / "pytorch_lora_weights.safetensors").is_file()
    said = console[0].buffer.getvalue().decode(encoding)
    assert "\\U0001f98b" in said and ("für" in said) == (encoding != "ascii")


def test_the_command_in_an_ascii_process(tmp_path):
    folder = tmp_path / "나비 🦋"
    given = command(*words(folder, max_train_steps=1, num_train_images=4))
    done = subprocess.run(given, capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"\\U0001f98b" in done.stdout and is_finished(folder, 1)


@pytest.mark.parametrize("kind", ["none", "closed", "hung up", "ascii"])
def test_whoever_prints_within_a_run_is_not_ended(monkeypatch, kind):
    closed = io.StringIO()
    closed.close()

    class HungUp(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    stream = {"none": None, "closed": closed, "hung up": HungUp(),
              "ascii": io.TextIOWrapper(io.BytesIO(), encoding="ascii")}[kind]  # fmt: skip
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)

    def speak() -> None:
        import logging
        import warnings

        from tqdm import tqdm

        print("ä 🦋", flush=True)
        print("ö", file=sys.stderr)
        say("ü 🦋")
        warnings.warn("a library warns 🦋", stacklevel=1)
        logging.getLogger("somebody").warning("and logs 🦋")
        assert list(tqdm(range(3), "bär 🦋", mininterval=0)) == [0, 1, 2]
        assert sys.stdout.isatty() is False

    assert run_command("demo", speak) == 0
    say("outside of a command, too 🦋")


def test_only_the_failure_to_print_is_swallowed():
    with pytest.raises(TypeError), lasting_output():
        sys.stdout.write(b"bytes are no text")
    with pytest.raises(BrokenPipeError), lasting_output():
        raise BrokenPipeError("of the work itself")


def test_streams_are_put_back_and_wrapped_once():
    before = sys.stdout, sys.stderr
    with lasting_output():
        outer = sys.stdout
        assert isinstance(outer, LastingStream)
        with lasting_output():
            assert sys.stdout is outer
        assert sys.stdout is outer and outer.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


def test_a_notebooks_run_outlives_its_output_as_well(tmp_path, monkeypatch):
    from diffusion_lessons.butterflies.command import load_data, train

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    config = TrainingConfig(output_dir=str(tmp_path / "run"), image_size=16, model_config_name_or_path="tiny-16",
                            num_train_images=4, train_batch_size=4, eval_batch_size=1, num_inference_steps=2,
                            max_train_steps=1, report_to="none")  # fmt: skip
    train(config, load_data(config))
    assert is_finished(tmp_path / "run", 1)


def test_a_message_keeps_the_spaces_of_its_paths_and_a_full_disk_the_line(tmp_path, monkeypatch, capsys):
    assert one_line(ValueError("in 'my  run'\n  lies  ")) == "in 'my  run' lies"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert write_error_log(ValueError("\udce4"), tmp_path) is None

    def fail() -> None:
        raise ValueError("oh")

    assert run_command("demo", fail) == 1
    assert capsys.readouterr().err == "demo: the run failed: ValueError: oh (full log: could not be written)\n"


# --- the terminal's signal ---


def test_a_hangup_is_noted_as_a_termination_unless_it_was_ignored_before():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP and isinstance(stop.exception(), Terminated)
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hangup_leaves_a_checkpoint_and_ends_as_a_termination(tmp_path, processes):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(*words(folder, num_processes=processes, **LONG)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)  # fmt: skip
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGHUP)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 143, complained
    last = list_checkpoints(folder)[-1]
    assert last.fault(thorough=True) is None and f"stopped after step {last.step}" in said


@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_a_hangup_changes_nothing(tmp_path, processes):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        ["nohup", *command(*words(folder, num_processes=processes, **LONG | {"max_train_steps": 60}))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and is_finished(folder, 60), said


# --- trackers ---


class Failing:
    """A tracker that fails in everything it does."""

    name, tracker = "wandb", "the unwrapped one"

    def fail(self, *_, **__):
        raise ConnectionError("the server is down")

    log = log_images = store_init_configuration = finish = start = fail


def test_a_tracker_that_fails_is_named_once_and_goes_on(capsys):
    tracker = LastingTracker(Failing())
    accelerator = SimpleNamespace(trackers=[tracker])
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step=step)
        log_image(accelerator, "samples", meadow.specimens(1, size=16)[0]["image"], step)
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--report_to wandb failed (the server is down); the run goes on" in said
    assert tracker.name == "wandb" and tracker.tracker == "the unwrapped one"


def test_a_run_whose_tracker_breaks_in_the_middle_finishes(tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    log, seen = TensorBoardTracker.log, []

    def breaks(self, values, step=None, **named):
        seen.append(step)
        if step > 2:
            raise OSError(28, "No space left on device")
        return log(self, values, step=step, **named)

    monkeypatch.setattr(TensorBoardTracker, "log", breaks)
    monkeypatch.setattr(TensorBoardTracker, "finish", Failing.fail)
    folder = tmp_path / "run"
    assert main(words(folder, max_train_steps=4, logging_steps=1, report_to="tensorboard")) == 0
    assert max(seen) == 4 and is_finished(folder, 4)
    assert capsys.readouterr().out.count("--report_to tensorboard failed") == 1


def test_a_tracker_that_cannot_start_is_named_and_leaves_the_others(tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    config = TrainingConfig(output_dir=str(tmp_path), report_to="tensorboard")
    monkeypatch.setattr(TensorBoardTracker, "start", Failing.fail)
    accelerator = make_accelerator(config)
    start_tracker(accelerator, config, "demo")
    assert accelerator.trackers == []
    forget_accelerator(accelerator)
    said = capsys.readouterr().out
    assert "--report_to tensorboard could not be started (the server is down); the run goes on without it" in said
