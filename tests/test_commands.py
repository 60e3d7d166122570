"""How commands start and end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import command, words

from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.commands import Interrupted, RunFailed, StopSignals, Terminated, launch, run_command
from diffusion_lessons.engine.config import InputError


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("--x 1: no"), 2),
        (RunFailed("disk"), 1),
        (ValueError("v"), 1),
        (Interrupted(), 130),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
        (SystemExit(0), 0),
        (SystemExit(3), 3),
    ],
)
def test_exit_codes(error, code, capsys, tmp_path):
    assert run_command("demo", raising(error), lambda: tmp_path) == code
    assert capsys.readouterr().err.count("\n") == (1 if code in (1, 2) else 0)
    assert (tmp_path / "error.log").exists() == (code == 1)


def test_whoever_leaves_with_words_instead_of_a_number_has_failed(capsys):
    assert run_command("demo", raising(SystemExit("no licence"))) == 1
    assert capsys.readouterr().err == "demo: no licence\n", "and the words are passed on"
    assert run_command("demo", raising(SystemExit())) == 0


def test_the_failure_line_names_the_log_and_the_log_has_the_traceback(capsys, tmp_path):
    run_command("demo", raising(ValueError("first\nsecond")), lambda: tmp_path)
    line = capsys.readouterr().err
    assert "ValueError: first second" in line and str(tmp_path / "error.log") in line
    assert "Traceback" in (tmp_path / "error.log").read_text()


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the launcher passes a terminal's Ctrl-C on
        assert stop.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    assert isinstance(stop.exception(), Interrupted)


def test_a_second_signal_after_a_while_ends_at_once():
    with StopSignals() as stop:
        stop.PATIENCE = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("error", [InputError("--a b: c"), RunFailed("the disk is full"), Terminated("stop")])
def test_a_childs_failure_reaches_the_parent_as_what_it_was(error):
    with pytest.raises(type(error), match=str(error)):
        launch(raising(error), (1,), num_processes=2)


@pytest.mark.parametrize("failures, cause", [
    ([RunFailed("the connection broke"), Terminated("stop")], Terminated),
    ([Interrupted("stop"), InputError("--a b: c")], InputError),
    ([Terminated("stop"), Interrupted("stop")], Interrupted),
])  # fmt: skip
def test_of_several_failures_the_one_that_explains_the_others_is_raised(monkeypatch, failures, cause):
    left = iter(failures)

    def one_after_the_other(child, args, number, use_port):
        for _ in range(number):
            with pytest.raises(SystemExit):
                child(*args)
        raise RuntimeError("a child failed")

    monkeypatch.setattr("accelerate.notebook_launcher", one_after_the_other)
    with pytest.raises(cause):
        launch(lambda: raising(next(left))(), num_processes=2)


def test_a_launch_on_processors_is_not_announced_as_cuda(capfd):
    launch(lambda: print("hello", flush=True), num_processes=2)
    said = capfd.readouterr().out
    assert said.count("hello") == 2 and "CUDA" not in said and "Launching" not in said


def test_an_unforeseen_failure_in_a_child_names_its_log():
    with pytest.raises(RunFailed, match=r"ZeroDivisionError: oh \(full log: .*\.log\)"):
        launch(raising(ZeroDivisionError("oh")), num_processes=2)


@pytest.mark.parametrize(
    "number, code, processes", [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 2)]
)
def test_an_interrupted_run_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, number, code, processes):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(
            *words(
                folder,
                max_train_steps=100000,
                checkpointing_steps=30,
                checkpoints_total_limit=2,
                save_image_epochs=100000,
                save_model_epochs=100000,
                num_processes=processes,
            )
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not list_checkpoints(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == code, complained
    assert "--resume_from_checkpoint latest" in said and "Traceback" not in complained
    last = list_checkpoints(folder)[-1]
    assert last.fault(thorough=True) is None and f"stopped after step {last.step}" in said
    if processes == 1:
        resumed = subprocess.run(
            command(
                "--config",
                str(folder / "training_config.json"),
                "--resume_from_checkpoint",
                "latest",
                "--max_train_steps",
                str(last.step + 2),
            ),
            capture_output=True,
            text=True,
        )
        assert resumed.returncode == 0 and f"resuming {last.path.name}" in resumed.stdout, resumed.stderr


def test_help_is_quick_to_answer_and_exits_with_0():
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_lessons.butterflies", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--preset" in done.stdout
