"""The benchmarks: what they measure with, and both of them with toys."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent
BENCHMARKS = CHECKOUT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import materials  # noqa: E402
import measuring  # noqa: E402
import rehearsal  # noqa: E402
from overlays import overlay  # noqa: E402

FUNCTIONS = {
    f"{path.name}: {node.name}": node
    for path in BENCHMARKS.glob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def script(name: str, *arguments: str, limit: float = 900) -> subprocess.CompletedProcess:
    """Run a benchmark with one thread, as a person starts it."""
    words = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=limit, env=os.environ | {"PYTHONPATH": ""})


# ── measuring ────────────────────────────────────────────────────────────────────────────


def test_the_peak_is_that_of_each_process_alone(tmp_path):
    """A later, smaller process does not inherit the peak of an earlier one."""
    code = f"""
import sys
from pathlib import Path
import measuring
for size in (300, 60):
    words = [sys.executable, "-S", "-c", f"held = b'x' * ({{size}} << 20)"]
    print(measuring.run_process(words, Path({str(tmp_path / "log")!r})).memory * 1024)
"""
    # From a small process, as the rehearsal is one: the kernel counts what forked into the peak of what was forked.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    )
    first, second = map(float, done.stdout.split())
    assert 300 < first < 340 and 60 < second < 100, "MiB"


def test_a_process_is_killed_when_the_time_has_come(tmp_path):
    endless = python("import time, pathlib; pathlib.Path('begun').touch(); time.sleep(600)")
    there = tmp_path / "begun"
    done = measuring.run_process(endless, tmp_path / "log", cwd=tmp_path, kill_when=there.exists)
    assert done.code == -9 and there.exists()
    assert measuring.run_process(endless, tmp_path / "log", cwd=tmp_path, limit=0.1).code == -9


def test_the_pace_is_that_of_the_right_bar(tmp_path):
    """Bars of other lengths are passed over; the last line is an error, and no bar."""
    bars = r"""
import sys, time
print('\rLoading:  50%|##| 1/2 [00:00<00:00, 12.1it/s]', file=sys.stderr, flush=True)
for n in range(4):
    print(f'\r {n}%|##| {n}/3 [00:01<00:00, 1.36step/s, loss=0.7]', end='', file=sys.stderr, flush=True)
    time.sleep(.05)
print('\nValueError: too large', file=sys.stderr)
"""
    done = measuring.run_process(python(bars), tmp_path / "log", total=3)
    assert [step for _, step in done.marks] == [0, 1, 2, 3]
    assert done.last_line == "ValueError: too large"


def test_steps_from_marks():
    marks = [(0.0, 0), (9.0, 1), (11.0, 2), (30.0, 3), (34.0, 5)]
    assert measuring.quickest_step(marks) == 2, "the first step is slow, and a checkpoint was written before the third"
    assert measuring.mean_step(marks, skipped=2) == pytest.approx(23 / 3)
    assert measuring.quickest_step(marks[:1]) is None and measuring.mean_step(marks[:2]) is None


def test_results_keep_what_they_had(tmp_path):
    about = {"date": "2026-01-02 03:04 UTC", "cpu": "Some CPU (R), 2 cores"}
    results = measuring.Results(tmp_path, "rehearsal", about, "Rehearsal")
    assert results.path.name == "rehearsal-2026-01-02-some-cpu-r.json"
    results.section("a", title="A", rows=[{"size": 64, "GiB": 1.23456, "failed": None}])
    results.section("b", state="skipped", seconds=3.2)
    results.section("a", state="ok")
    assert results.content["sections"]["a"]["rows"][0]["size"] == 64 and results.content["about"] == about
    page = results.page.read_text(encoding="utf-8")
    assert "| 64 | 1.23 | – |" in page and "## A\n\nok" in page and "skipped, 3 s" in page
    assert "nvidia-h100" in measuring.Results(tmp_path, "gpu", about | {"card": "NVIDIA H100, 81 GiB"}, "").path.name


def test_the_code_of_a_card_is_taken_as_it_stands(tmp_path):
    picture = tmp_path / "picture.png"
    card = "# x\n\n```python\npipeline = load('DIR_OF_THE_BASE_MODEL')\nimage = pipeline('sks').images[0]\n```\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    code = measuring.card_code(tmp_path, Path("/base"), 2, 64, picture)
    assert "load('/base')" in code and code.index("pipeline.to(torch.float32)") < code.index("image = pipeline")
    assert "pipeline('sks', num_inference_steps=2, height=64, width=64).images[0]" in code and str(picture) in code
    (tmp_path / "README.md").write_text("# x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="shows no code"):
        measuring.card_code(tmp_path, Path("/base"), 2, 64, picture)


# ── materials ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", materials.MODELS)
def test_shapes_are_those_of_the_published_models(name):
    """Counted without memory; the folders themselves are built at real size by `make rehearsal` alone."""
    for part, config in materials.configs_of(name).items():
        if part in materials.KINDS:
            assert sum(map(torch.numel, materials.empty_network(part, config).parameters())) == (
                materials.PARAMETERS[name][part]
            )


def test_random_weights_stay_within_16_bits():
    weights = materials.random_weights("unet", materials.configs_of("2.1", small=True)["unet"])
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())
    assert weights["conv_norm_out.weight"].eq(1).all() and weights["conv_in.bias"].eq(0).all()
    spread = weights["mid_block.resnets.0.conv1.weight"].float().std()
    assert spread == pytest.approx((3 * 32 * 9) ** -0.5, rel=0.1), "as PyTorch's own, uniform within 1 / √inputs"


def test_another_size_changes_one_number_and_not_the_model(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    materials.build("1.4", model, small=True)
    materials.resized(model, other, 4)
    sizes = [json.loads((each / "unet" / "config.json").read_text())["sample_size"] for each in (model, other)]
    assert sizes == [8, 4]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (model / weights).samefile(other / weights)


def test_a_text_encoder_in_32_bits_is_the_same(tmp_path):
    model = tmp_path / "model"
    materials.build("1.4", model, small=True)
    files = [folder / "text_encoder" / "model.safetensors" for folder in (model, materials.in_32_bits(model))]
    narrow, wide = map(materials.load_file, files)
    assert all(wide[name].dtype == torch.float32 and wide[name].equal(narrow[name].float()) for name in narrow)


# ── the rehearsal ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def toys(tmp_path) -> rehearsal.Rehearsal:
    results = measuring.Results(tmp_path, "rehearsal", {"date": "2026-01-02", "cpu": "some"}, "Rehearsal")
    made = rehearsal.Rehearsal(tmp_path, results, rehearsal.SMALL, small=True, threads=1)
    made.runs.mkdir()
    return made


def test_a_phase_fails_by_its_exit_code_by_what_it_left_or_by_ending_too_early(toys):
    def absent(done: measuring.Finished) -> None:
        rehearsal.exists(toys.runs / "model")

    toys.measure("one", "", python("raise SystemExit('out of luck')"), lambda done: None)
    toys.measure("two", "", python(""), absent)
    toys.measure("three", "", python(""), lambda done: None, kill_when=lambda: False)
    toys.measure("four", "", python(""), lambda done: None)
    assert [row["result"] for row in toys.rows] == [
        "FAILED: exit code 1: out of luck", "FAILED: it left no model", "FAILED: exit code 0: ", "ok",
    ]  # fmt: skip
    assert len(toys.results.content["sections"]["phases"]["rows"]) == 4


def test_what_earlier_phases_did_not_leave_is_skipped(toys):
    toys.draw()
    toys.open()
    assert len(toys.rows) == 7 and all(row["result"].startswith("skipped") for row in toys.rows)


def test_the_room_is_checked_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "memory_gib", lambda: 12.0)
    monkeypatch.setattr(measuring, "disk_gib", lambda folder: 100.0)
    assert rehearsal.check_room(tmp_path, ["lora", "draw", "recipe-8gb-fused"]) is None
    assert "memory: 18 GiB are needed and 12.0 are free" in rehearsal.check_room(tmp_path, ["lora", "full"])
    monkeypatch.setattr(measuring, "disk_gib", lambda folder: 3.0)
    assert "disk" in rehearsal.check_room(tmp_path, ["draw"]), "the models are not there yet"


def test_a_recipe_whose_package_is_missing_is_skipped_with_a_word(toys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in rehearsal.RECIPES:
        toys.recipe(name)
    said = {row["phase"]: row["result"] for row in toys.rows}
    assert said["recipe-16gb"].startswith("skipped: there is no bitsandbytes")
    assert "ao/torchao" in said["recipe-8gb-fused"] and "ds/deepspeed" in said["recipe-8gb"] and len(said) == 5


def test_a_recipe_for_which_there_is_no_room_is_skipped_with_a_word(toys, tmp_path, monkeypatch):
    toys.overlays, toys.small = tmp_path, False
    (tmp_path / "ds" / "deepspeed").mkdir(parents=True)
    monkeypatch.setattr(measuring, "memory_gib", lambda: 12.0)
    toys.recipe("8gb")
    assert toys.rows[0]["result"] == "skipped: memory: 22 GiB are needed and 12.0 are free"


def test_an_unknown_phase_is_refused():
    done = script("rehearsal.py", "--small", "--phases", "lora,inpainting")
    assert done.returncode == 2 and "inpainting: there is no such phase; choose from lora, " in done.stderr


@pytest.mark.slow
def test_the_rehearsal_with_toys(tmp_path):
    """A minute and a half of one core: two dozen processes, each of which imports everything."""
    folders = {name: overlay(name) for name in ("bnb", "ao", "ds")}
    done = script("rehearsal.py", "--small", "--threads", "1", "--folder", tmp_path / "models",
                  "--overlays", folders["bnb"].parent)  # fmt: skip
    table = json.loads(next((tmp_path / "models" / "small" / "results").glob("*.json")).read_text(encoding="utf-8"))
    rows = {row["phase"]: row for row in table["sections"]["phases"]["rows"]}
    there = importlib.util.find_spec("jax") is not None
    in_jax = "ok" if there else "skipped: there is no JAX; pip install 'diffusion_lessons[jax]'"
    assert {name: row["result"] for name, row in rows.items()} == {
        **dict.fromkeys(rows, "ok"), "full": "killed", "jax": in_jax,
    }, done.stdout + done.stderr  # fmt: skip
    assert done.returncode == 0 and len(rows) == 19
    trained = ["lora", "lora-2.1", "prior", "full", "resume", *(f"recipe-{name}" for name in rehearsal.RECIPES)]
    assert [name for name, row in rows.items() if row["estimated GiB"]] == trained
    assert all(row["peak GiB"] > 0.3 for name, row in rows.items() if name != "models" and row["seconds"])
    assert rows["resume"]["what"].startswith("the rest of it, from checkpoint-")
    assert not (tmp_path / "models" / "small" / "runs").exists()


# ── the GPU script ───────────────────────────────────────────────────────────────────────

# In the place of a reference script: takes its flags, and shows its progress bar.
STUB = r"""
import argparse, sys, time
parser = argparse.ArgumentParser()
for flag in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "resolution", "train_batch_size",
             "max_train_steps", "mixed_precision", "checkpointing_steps", "seed", "output_dir"):
    parser.add_argument(f"--{flag}", required=True)
for flag in ("gradient_checkpointing", "train_text_encoder"):
    parser.add_argument(f"--{flag}", action="store_true")
words = parser.parse_args()
if words.train_text_encoder:
    raise ValueError("Text encoder loaded as datatype torch.float16")
for n in range(int(words.max_train_steps) + 1):
    print(f"\rSteps:  1%|#| {n}/{words.max_train_steps} [00:01<00:00, 1.36it/s, loss=0.7]", end="", file=sys.stderr)
    sys.stderr.flush()
    time.sleep(.01)
"""


def test_the_gpu_script_rehearses_every_piece(tmp_path):
    for name in ("train_dreambooth.py", "train_dreambooth_lora.py"):
        (tmp_path / name).write_text(STUB, encoding="utf-8")
    done = script("gpu.py", "--rehearse", "--scripts", tmp_path, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = next((tmp_path / "results").glob("gpu-rehearsed-*.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["about"]["torch"] == torch.__version__.split("+")[0]
    sections = content["sections"]
    assert list(sections) == list("abfcdeg")
    states = {name: section["state"] for name, section in sections.items()}
    in_jax = states.pop("g")
    assert states == {"a": "all open in plain diffusers in fp16", **dict.fromkeys("bcdef", "ok")}
    rows = {name: section.get("rows") for name, section in sections.items()}
    assert rows["a"][0]["killed"] == "killed after checkpoint-2" and rows["a"][0]["steps after it"] == 4
    assert rows["a"][0]["largest difference"] == 0, "on a CPU a resumed run ends as one that never stopped"
    assert all(row["finite"] for row in rows["a"])
    capped = {row["recipe"]: row for row in rows["f"]}
    assert list(capped) == ["LoRA", "8gb-fused", "12gb", "16gb", "24gb", "8gb"]
    assert [row["cap GB"] for row in capped.values()] == [4, 8, 12, 16, 24, 8]
    assert capped["LoRA"]["steps a second"] > 0 and capped["LoRA"]["estimate GiB"] > 0, capped
    needs = {"8gb-fused": "torchao", "8gb": "deepspeed", "16gb": "bitsandbytes"}
    for name, package in needs.items():
        found = capped[name].get("seconds a step", 0) > 0
        assert found or f"{package} is not installed; pip install" in capped[name]["result"].lower(), capped[name]
    modes = [(row["trained"], row["gradient checkpointing"]) for row in rows["b"]]
    assert len(set(modes)) == len(modes) == 6 and all(row["seconds a step"] > 0 for row in rows["b"])
    assert sorted(modes) == sorted((row["trained"], row["gradient checkpointing"]) for row in rows["c"])
    results = {row["trained"]: row["result"] for row in rows["c"]}
    assert results["LoRA"] == results["full"] == "ok" and "datatype torch.float16" in results["text encoder"]
    assert rows["d"][0]["images a second"] > 0 and [row["at a time"] for row in rows["e"]] == [1, 2]
    if importlib.util.find_spec("jax") is None:
        assert in_jax == "skipped: JAX: it is not installed"
    else:
        assert in_jax == "ok" and rows["g"][0]["seconds a step"] > 0 and rows["g"][0]["seconds to compile"] > 0
    pictures = {picture for section in sections.values() for picture in section.get("pictures", ())}
    assert len(pictures) == 3 and all((path.parent / picture).is_file() for picture in pictures)
    assert "## b: Stable Diffusion 1.4's shape" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_a_piece_that_fails_or_takes_too_long_leaves_what_it_had_and_the_next_one_comes(tmp_path):
    """In a process of its own: pieces are forked, and this one has threads."""
    code = """
import sys, time
from pathlib import Path
import gpu, measuring
results = measuring.Results(Path(sys.argv[1]), "gpu", {"date": "2026-01-02", "cpu": "some"}, "")
def slow(bench): bench.rows("a", [], {"number": 1}); time.sleep(600)
def broken(bench): bench.rows("b", [], {"number": 2}); raise ValueError("too large")
def dead(bench): import os; os._exit(9)
for name, work in (("a", slow), ("b", broken), ("c", dead), ("d", lambda bench: None)):
    deadline = time.monotonic() + (1 if name == "a" else 60)
    gpu.run_piece(name, gpu.Piece(name, work, 1), gpu.Bench(Path(sys.argv[1]), results, gpu.TOY, None, deadline))
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": str(BENCHMARKS)}, timeout=120, check=True)
    sections = json.loads(next(tmp_path.glob("gpu-*.json")).read_text(encoding="utf-8"))["sections"]
    assert [sections[name]["state"].split(":")[0] for name in "abcd"] == ["FAILED", "FAILED", "FAILED", "ok"]
    assert "time was over" in sections["a"]["state"] and "ValueError: too large" in sections["b"]["state"]
    assert "exit code 9" in sections["c"]["state"]
    assert sections["a"]["rows"] == [{"number": 1}] and sections["b"]["rows"] == [{"number": 2}]


@pytest.mark.parametrize("words", [["--only", "abx"], ["--skip", "z"]])
def test_an_unknown_piece_is_refused(words):
    done = script("gpu.py", *words)
    assert done.returncode == 2 and "there is no piece" in done.stderr and "abfcdeg" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    done = script("gpu.py", "--results", tmp_path)
    assert done.returncode == 1 and "--rehearse" in done.stderr and not list(tmp_path.iterdir())


# ── both ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_short_and_say_what_they_do(name):
    node = FUNCTIONS[name]
    documented = ast.get_docstring(node) is not None
    assert documented or node.name.startswith("_") or node.name in ("check", "work", "weights")
    if isinstance(node, ast.FunctionDef):
        first = node.body[1 if documented and len(node.body) > 1 else 0]
        assert node.end_lineno - first.lineno + 1 <= 25
