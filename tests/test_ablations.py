"""The paper's tables in miniature: which runs they need, what is measured, how results are kept and reported."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ablation_plan as plan  # noqa: E402
import ablation_report as report  # noqa: E402
import ablation_results as results  # noqa: E402
import ablation_run  # noqa: E402
import ablations  # noqa: E402
from ablation_plan import REAL, TABLES, TINY, Condition, Constants, Run  # noqa: E402

from diffusion_lessons import miniature  # noqa: E402
from diffusion_lessons.engine.commands import RunFailed  # noqa: E402
from diffusion_lessons.metrics import CLIPEncoder, cosine_similarities  # noqa: E402
from diffusion_lessons.miniature.judge import JudgeEncoder  # noqa: E402
from diffusion_lessons.pictures import meadow  # noqa: E402
from diffusion_lessons.stable_diffusion.drawing import draw  # noqa: E402

KIND = {"constants": "c", "miniature": "m", "eye": "e"}


def begin(*words: object, **settings: object) -> subprocess.Popen:
    """Start the command with toys, one thread, and the judge in the place of the eye."""
    fixed = ["--tiny", "--eye", "judge", "--subjects", "121"]
    return subprocess.Popen([sys.executable, str(BENCHMARKS / "ablations.py"), *fixed, *map(str, words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for it; its output."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code, said
    return said


def made_up(condition: str, subject: int, seed: int | None, steps: dict, **others: object) -> dict:
    """A line of results whose numbers nobody has measured."""
    return {"key": f"{condition} {subject} {seed}", "condition": condition, "subject": subject, "seed": seed,
            "steps": steps, "kind": KIND, "machine": {"cpu": "some"}, "finished": "2026-01-02 03:04 UTC",
            "seconds": {"all": 60.0, "core": 50.0}} | others  # fmt: skip


# ── the plan ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("constants", [Constants(), TINY], ids=["real", "tiny"])
def test_every_row_of_every_table_has_a_run_that_looks_at_its_step(constants):
    known = plan.conditions(constants)
    for name, table in TABLES.items():
        rows = table.rows(constants)
        assert len({row.label for row in rows}) == len(rows), name
        for row in rows:
            assert row.condition == REAL or int(row.step) in known[row.condition].looks, (name, row)
        said = {label for group in table.paper(constants).groups for label in group}
        assert said <= {row.label for row in rows}, f"the paper's numbers of table {name} stand in rows that it has"


def test_tables_share_their_runs():
    assert len(plan.conditions(Constants())) == 20
    runs = list(plan.all_runs(Constants(), (1, 2, 3, 4), (0, 1), list(TABLES)))
    assert len(runs) == 4 + 20 * 8 and len({run.key(KIND, "p") for run in runs}) == len(runs)
    assert [run.name for run in plan.all_runs(Constants(), [1], [0], ["b"])] == ["base", "without prior"]
    rows = TABLES["e"].rows(Constants())
    assert [row.step for row in rows if row.condition == "base"] == ["0", "50", "100", "200", "400", "800"]


def test_the_key_of_a_run_changes_with_all_that_decides_its_result():
    base = plan.conditions(Constants())["base"]
    run = Run(base, 121, 0)
    others = [Run(base, 122, 0).key(KIND, "p"), Run(base, 121, 1).key(KIND, "p"), run.key(KIND | {"eye": "f"}, "p"),
              run.key(KIND, "q"), Run(replace(base, fields={"rank": 4}), 121, 0).key(KIND, "p"),
              Run(replace(base, instances=4), 121, 0).key(KIND, "p"), Run(None, 121, 0).key(KIND, "p")]  # fmt: skip
    assert len({run.key(KIND, "p"), *others}) == 8 and run.key(dict(reversed(KIND.items())), "p") == run.key(KIND, "p")
    changed = replace(Constants(), solver_steps=13)
    assert plan.constants_fingerprint(changed) != plan.constants_fingerprint(Constants())


# ── results ──────────────────────────────────────────────────────────────────────────────


def test_half_a_line_is_left_out_and_dropped_by_the_next_one(tmp_path, capsys):
    path = tmp_path / "ablations.jsonl"
    results.append(path, {"key": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "ste')
    assert results.read_results(path) == [{"key": "a"}]
    assert "line 2: is not whole" in capsys.readouterr().out
    results.append(path, {"key": "c"})
    assert "half written" in capsys.readouterr().out
    assert path.read_bytes() == whole + b'{"key": "c"}\n'
    assert results.read_results(path) == [{"key": "a"}, {"key": "c"}] and not capsys.readouterr().out
    assert results.read_results(tmp_path / "none.jsonl") == []


def test_results_of_other_weights_are_kept_apart_and_that_is_said():
    run = Run(None, 121, None)
    mine = {"key": "k", "kind": KIND, "condition": REAL}
    lines = [{"key": "x", "kind": KIND | {"eye": "older"}}, {"key": "y", "kind": KIND | {"constants": "others"}},
             mine, mine | {"condition": "again"}, {"key": "z", "kind": KIND}]  # fmt: skip
    assert results.select(lines, {"k": run}) == [mine]
    note = results.left_out(lines, {"k": run}, KIND)
    assert note.startswith("note: 3 results are kept apart") and "2 made with other constants, eye; 1 of other" in note
    assert results.left_out([mine], {"k": run}, KIND) is None


def test_a_run_belongs_to_one_process_until_that_one_is_dead(tmp_path):
    path = tmp_path / "ablations.jsonl"
    code = (f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom pathlib import Path\n"
            f"from ablation_results import claimed\nwith claimed(Path({str(path)!r}), 'k') as mine:\n"
            "    print(mine, flush=True)\n    time.sleep(600)")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with results.claimed(path, "k") as mine, results.claimed(path, "l") as another:
        assert not mine and another
    other.kill()
    other.wait()
    other.stdout.close()
    with results.claimed(path, "k") as mine:
        assert mine


def test_hours_are_those_of_finished_runs_or_of_their_parts():
    known = plan.conditions(Constants())
    todo = [Run(known["base"], 1, 0), Run(known["text encoder"], 1, 0)]
    guessed = (1 + 800 * 0.2 + 6 * 10) + (1 + 200 * 0.2 + 10)
    assert results.estimate(todo, [], 1) == pytest.approx(guessed / 3600)
    seconds = {"start": 10.0, "step": 80.0, "steps": 800, "look": 60.0, "looks": 6, "all": 155.0}
    lines = [{"condition": "base", "steps": {"0": {}}, "seconds": seconds}]
    assert results.estimate(todo, lines, 1) == pytest.approx((155 + 10 + 200 * 0.1 + 10) / 3600)
    assert results.estimate(todo, lines, 64) >= results.estimate(todo, lines, 1) / os.cpu_count() - 1e-9


# ── the report ───────────────────────────────────────────────────────────────────────────

BASE = {(1, 0): 0.6, (1, 1): 0.7, (2, 0): 0.8, (2, 1): 0.9}


@pytest.fixture
def lines() -> list[dict]:
    """Two subjects and two seeds: with the prior DINO is higher by 0.1, against the paper; PRES agrees with it."""
    made = []
    for (subject, seed), value in BASE.items():
        steps = {"0": {"DINO": 0.1 * subject, "CLIP-I": 0.5}, "200": {"DINO": value, "PRES": 0.3, "CLIP-I": 0.7}}
        made.append(made_up("base", subject, seed, steps))
        made.append(made_up("without prior", subject, seed, {"200": {"DINO": value - 0.1, "PRES": 0.3 + value / 10}}))
    made.append(made_up(REAL, 1, None, {"among": {"DINO": 0.9, "CLIP-I": 0.6}}))
    made.append(made_up(REAL, 2, None, {"among": {"DINO": 1.0, "CLIP-I": 0.6}}))
    return made


def test_a_row_is_the_mean_with_its_standard_error(lines):
    made = report.table(lines, "b")
    with_prior, without = made["rows"]
    assert with_prior["n"] == 4 and with_prior["DINO"] == pytest.approx(0.75)
    assert with_prior["DINO ±"] == pytest.approx(math.sqrt((0.15**2 + 0.05**2) * 2 / 3) / 2)
    assert without["PRES"] == pytest.approx(0.375) and with_prior["PRES ±"] == pytest.approx(0)
    assert with_prior["CLIP-T"] is None and with_prior["paper's PRES"] == 0.493 and without["paper's PRES"] == 0.664
    assert report.table(lines[:1], "b")["rows"][0]["DINO ±"] is None, "one value has no error"


def test_what_no_run_has_changed_counts_once_for_a_subject(lines):
    rows = {row["row"]: row for row in report.table(lines, "a")["rows"]}
    assert [row["n"] for row in rows.values()] == [2, 0, 4, 2]
    assert rows["untouched model"]["DINO"] == pytest.approx(0.15)
    assert rows["untouched model"]["DINO ±"] == pytest.approx(0.05), "0.1 and 0.2: deviation 0.0707, by root two"


def test_orders_of_the_paper_are_checked_pair_by_pair(lines):
    orders = {each["column"]: each for each in report.table(lines, "b")["orders"]}
    assert list(orders) == ["PRES", "DINO"], "what was not measured has no order"
    dino, pres = orders["DINO"], orders["PRES"]
    assert (dino["more"], dino["less"], dino["paper"]) == ("without prior", "with prior", [0.712, 0.684])
    assert dino["difference"] == pytest.approx(-0.1) and dino["±"] == pytest.approx(0) and not dino["same"]
    assert pres["difference"] == pytest.approx(0.075) and pres["n"] == 4 and pres["same"]
    real = report.table(lines, "a")["orders"]
    assert [(each["column"], each["more"], each["same"]) for each in real] == [
        ("DINO", "real pictures, among themselves", True), ("CLIP-I", "real pictures, among themselves", False)]
    assert real[0]["difference"] == pytest.approx((0.3 + 0.2 + 0.2 + 0.1) / 4) and real[0]["n"] == 4


def test_the_paper_ranks_three_nouns_and_five_numbers_of_pictures():
    constants = Constants()
    names = {row.label: row.condition for row in TABLES["d"].rows(constants)}
    assert len(names) == 5
    lines = [made_up(condition, 1, 0, {"200": {"DINO": 0.1 * rank}}) for rank, condition in enumerate(names.values())]
    orders = report.table(lines, "d")["orders"]
    said = [(each["more"], each["less"], each["same"]) for each in orders]
    assert said == [("4 pictures", "3 pictures", True), ("3 pictures", "5 pictures", False),
                    ("5 pictures", "2 pictures", True), ("2 pictures", "1 picture", True)]  # fmt: skip
    assert len(TABLES["c"].paper(constants).groups[0]) == 3


@pytest.mark.parametrize(("values", "said"), [
    ((0.20, 0.21, 0.22, 0.21), "yes"), ((-0.20, -0.21, -0.22, -0.21), "**no**"),
    ((0.20, -0.21, 0.22, -0.10), "undecided"), ((0.20,), "undecided"),  # of a single pair there is no error
])  # fmt: skip
def test_a_difference_decides_when_it_is_twice_its_error(values, said):
    group = {"more": {"DINO": 0.7}, "less": {"DINO": 0.6}}
    found = {"more": {(1, seed): {"DINO": value} for seed, value in enumerate(values)},
             "less": {(1, seed): {"DINO": 0.0} for seed in range(len(values))}}  # fmt: skip
    order = report.compare(group, found)[0]
    assert report.answer(order) == said
    text = report.verdict({"b": {"is the paper's": True, "orders": [order]}})
    assert ("other way round:\n\n- table b, DINO" in text) == (said == "**no**")
    assert ("Undecided:\n\n- table b, DINO" in text) == (said == "undecided")


@pytest.fixture
def words(tmp_path):
    """The command line of a report, as far as it is asked."""
    class Words:
        constants, folder, subjects, seeds = Constants(), tmp_path, (1, 2), (0, 1)
        results, page = tmp_path / "ablations.jsonl", tmp_path / "ablations.md"

    return Words


def test_the_page_says_what_it_shows_and_where_the_miniature_disagrees(lines, words, tmp_path):
    lines.append(made_up("rate 0.003", 1, 0, {}, failed="loss is not finite"))
    report.write_report(words, lines, 164, "note: 3 results are kept apart")
    page = (tmp_path / "ablations.md").read_text(encoding="utf-8")
    unbroken = page.replace("\u00a0", "_")
    assert "|  | with prior | without prior |\n" in page, "two rows of eight columns lie on their side"
    assert "| DINO | 0.750_±_0.065 | 0.650_±_0.065 |" in unbroken and "| CLIP-T | – | – |" in page
    assert "| the paper's | PRES | DIV | DINO | CLIP-I | CLIP-T |" in page
    assert "| DINO | without prior > with prior | 0.712 > 0.684 | -0.100_±_0.000 | 4 | **no** |" in unbroken
    assert "- table b, DINO: without prior > with prior\n" in page and "- table b, PRES" not in page
    assert "- table e" not in page, "table e, which the paper has not, does not count"
    assert "points with standard errors. pres: with prior 0.30, without prior 0.38;" in page.lower()
    assert "note: 3 results" in page and "| runs | 11 of 164 |" in page and "rate 0.003, subject 1, seed 0 |" in page
    assert all("in miniature" in head for head in page.split("\n") if head.startswith("#"))
    content = json.loads((tmp_path / "ablations.json").read_text(encoding="utf-8"))
    assert content["tables"]["b"]["rows"][0]["DINO"] == pytest.approx(0.75)
    figures = sorted((tmp_path / "ablations").glob("*.png"))
    assert {"a.png", "b.png", "e.png"} <= {path.name for path in figures}
    assert all(path.stat().st_size < 60_000 and f"](ablations/{path.name})" in page for path in figures)


@pytest.mark.parametrize(("values", "said"), [
    ((0.5, 0.6), "rises from 0.50 to 0.60"), ((0.6, 0.5, 0.7), "rises from 0.60 to 0.70 with at least 0.50 between"),
    ((0.6, 0.9, 0.2, 0.5), "falls from 0.60 to 0.50 with at most 0.90 between and at least 0.20 between"),
])  # fmt: skip
def test_a_curve_in_words(values, said):
    assert report.course(values) == said


@pytest.fixture
def written(words, monkeypatch) -> Path:
    """The page that the maker writes of the results of the repository, with an empty sheet for those that lie there."""
    about = json.loads((BENCHMARKS / "results" / "ablations.json").read_text(encoding="utf-8"))["about"]
    kind = {name.removeprefix("fingerprint, "): value for name, value in about.items() if "fingerprint" in name}
    lines = results.read_results(BENCHMARKS / "results" / "ablations.jsonl", quiet=True)
    lines = [line for line in lines if line["kind"] == kind]
    sheet = report.Image.new("RGB", (8, 8))
    monkeypatch.setattr(report, "draw_sheet", lambda *about: sheet if about[-1] == report.SEEN_IN else None)
    words.subjects, words.seeds = plan.SUBJECTS, plan.SEEDS
    report.write_report(words, lines, 164, None)
    return words.page


def test_the_page_of_the_site_is_what_its_maker_writes(written):
    """Whoever changes the one changes the other."""
    checkout = BENCHMARKS.parent
    page = (checkout / "nbs/dreambooth/ablations.md").read_text(encoding="utf-8")
    assert written.read_text(encoding="utf-8") == page
    content = (checkout / "benchmarks/results/ablations.json").read_text(encoding="utf-8")
    assert json.loads(written.with_suffix(".json").read_text(encoding="utf-8")) == json.loads(content)


def test_the_page_is_for_those_who_do_not_see_its_pictures_and_for_phones(written):
    page = written.read_text(encoding="utf-8")
    seen = re.findall(r'^!\[[^\]]+\]\(ablations/[^)]+\)\{fig-alt="([^"]{60,})"\}$', page, re.MULTILINE)
    assert len(seen) == page.count("\n![") == 2 * len(TABLES) and len(set(seen)) == len(seen)
    assert " ±" not in page.split("| --- |", 1)[1] and "-dirty" not in page
    assert max(line.count("|") - 1 for line in page.splitlines() if line.startswith("|")) <= 8


# ── a run ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> ablation_run.Bench:
    torch.set_num_threads(1)
    return ablation_run.Bench(TINY, tmp_path_factory.mktemp("ablations"), eye="judge")


def test_the_untouched_model_measured_by_hand(bench):
    base = Run(Condition("base", (0, 1)), 121, 0)
    line = bench.do(base)
    pipeline, judge, clip = miniature.load(), JudgeEncoder(), CLIPEncoder()
    rows = meadow.subject(5, 64, 121)
    real = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in rows])
    settings = {"seeds": [1000, 1001], "num_inference_steps": 1, "guidance_scale": 5.0}
    nowhere = draw(pipeline, ["a photo of a sks butterfly"] * 2, **settings)
    snow = draw(pipeline, ["a photo of a sks butterfly on snow"] * 2, **settings)
    of_class = draw(pipeline, ["a photo of a butterfly"] * 2, **settings)
    texts = clip.texts(["a photo of a butterfly"] * 2 + ["a photo of a butterfly on snow"] * 2)
    drawn = torch.cat([nowhere, snow])
    found = line["steps"]["0"]
    assert found["DINO"] == pytest.approx(float(cosine_similarities(judge(drawn), judge(real)).mean()), abs=1e-3)
    assert found["CLIP-I"] == pytest.approx(float(cosine_similarities(clip(drawn), clip(real)).mean()), abs=1e-3)
    assert found["CLIP-T"] == pytest.approx(float(torch.cosine_similarity(clip(drawn), texts).mean()), abs=1e-3)
    assert found["PRES"] == pytest.approx(float(cosine_similarities(judge(of_class), judge(real)).mean()), abs=1e-3)
    apart = [1 - float(torch.cosine_similarity(*judge(each).split(1))) for each in (nowhere, snow, of_class)]
    assert found["DIV"] == pytest.approx((apart[0] + apart[1]) / 2, abs=1e-3)
    assert found["class DIV"] == pytest.approx(apart[2], abs=1e-3)
    assert line["seconds"]["steps"] == 1 and line["seconds"]["looks"] == 2 and set(line["grids"]) == {"0", "1"}
    assert line["instances"] == 5 and not list((bench.folder / "runs").iterdir()), "nothing of the training is left"


def test_real_pictures_are_not_compared_with_themselves(bench):
    line = bench.do(Run(None, 121, None))
    judge = JudgeEncoder()
    features = judge(bench.subject(121).pictures)
    pairs = [float(cosine_similarities(features[[a]], features[[b]])) for a in range(5) for b in range(5) if a != b]
    assert line["steps"]["among"]["DINO"] == pytest.approx(sum(pairs) / 20, abs=1e-4)
    assert line["steps"]["new"]["DINO"] == pytest.approx(
        float(cosine_similarities(features[5:], features[:5]).mean()), abs=1e-4)  # fmt: skip
    assert line["steps"]["among"]["place"] >= 0.8, "the judge knows real places"
    assert line["seed"] is None and "fields" not in line


def test_one_picture_of_the_subject_is_enough_and_looks_change_nothing(bench):
    often = bench.do(Run(Condition("often", (1, 2, 3), instances=1), 121, 0))
    once = bench.do(Run(Condition("once", (3,), instances=1), 121, 0))
    assert list(often["steps"]) == ["1", "2", "3"] and often["steps"]["3"] == once["steps"]["3"]
    assert often["steps"]["1"] != often["steps"]["3"] and often["data"] == once["data"]
    assert len(list((bench.folder / "instances").glob("121-*-1/*.png"))) == 1


@pytest.mark.parametrize("name", ["without prior", "no class noun", "text encoder", "LoRA, rank 4", "prior weight 0.5"])
def test_kinds_of_runs(bench, name):
    run = Run(plan.conditions(TINY)[name], 121, 1)
    config = bench.config(run)
    assert {key: getattr(config, key) for key in run.condition.fields} == dict(run.condition.fields)
    line = bench.do(run)
    assert str(run.looks[-1]) in line["steps"] and "failed" not in line
    unet = sum(each.numel() for each in miniature.load().unet.parameters())
    wanted = {"text encoder": line["trained"] > unet, "LoRA, rank 4": line["trained"] < unet / 20}
    assert wanted.get(name, line["trained"] == unet)
    asked = {"no class noun": ("a photo of a sks", "a photo of a")}
    usual = ("a photo of a sks butterfly", "a photo of a butterfly")
    assert (config.instance_prompt, config.class_prompt) == asked.get(name, usual)


def test_a_run_that_diverges_is_a_result_and_a_full_disk_is_none(bench, monkeypatch):
    def fails(said: str):
        def train(config, looks):
            looks.line["steps"]["1"] = {"DINO": 0.5}
            raise RunFailed(said)

        monkeypatch.setattr(ablation_run, "train", train)
        return bench.do(Run(plan.conditions(TINY)["rate 0.003"], 121, 0))

    line = fails("loss is not finite in step 2")
    assert line["failed"].startswith("loss is not finite") and line["steps"] == {"1": {"DINO": 0.5}}
    with pytest.raises(RunFailed, match="free some space"):
        fails("checkpoint-3 could not be written; free some space")


def test_a_picture_among_the_class_images_that_the_model_did_not_draw_is_refused(bench):
    run = Run(Condition("wrong", (1,), noun="fish"), 121, 0)
    folder = Path(bench.config(run).class_data_dir)
    folder.mkdir(parents=True)
    meadow.subject(1, 64, 121)[0]["image"].save(folder / "subject.png")
    with pytest.raises(ablation_run.InputError, match=r"subject\.png is no class image that the model drew"):
        bench.do(run)


# ── the command ──────────────────────────────────────────────────────────────────────────


def test_a_worker_whose_parent_is_gone_begins_nothing(bench, tmp_path, monkeypatch):
    monkeypatch.setenv(ablations.PARENT, str(os.getppid() + 1))
    with pytest.raises(SystemExit):
        ablations.work(bench, {"k": Run(None, 121, None)}, tmp_path / "ablations.jsonl")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(ablations.PARENT, str(os.getppid()))
    ablations.work(bench, {"k": Run(None, 121, None)}, tmp_path / "ablations.jsonl")
    assert [line["condition"] for line in results.read_results(tmp_path / "ablations.jsonl")] == [REAL]


def begun(folder: Path) -> dict[str, int]:
    """How often each run was begun, by key."""
    return {path.stem: path.read_text(encoding="utf-8").count("begun by process")
            for path in (folder / "tiny" / "logs").glob("*.log")}  # fmt: skip


def test_killed_it_goes_on_with_two_workers_and_makes_nothing_twice(tmp_path):
    words, path = ["--only", "b", "c", "--seeds", 0, "--folder", tmp_path], tmp_path / "tiny" / "ablations.jsonl"
    first, logs = begin(*words), tmp_path / "tiny" / "logs"
    deadline = time.monotonic() + 240
    while not (path.is_file() and len(list(logs.glob("*.log"))) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = path.read_bytes()
    assert kept.count(b"\n") == 1 and list(begun(tmp_path).values()) == [1, 1], "one is finished, one was under way"
    path.write_bytes(kept + b'{"key": "half')
    said = finish(begin(*words, "--workers", 2))
    assert "4 runs, 1 of them finished, 3 to do: about" in said and "half written" in said
    lines = results.read_results(path)
    assert path.read_bytes().startswith(kept) and len({line["key"] for line in lines}) == len(lines) == 4
    assert {line["condition"] for line in lines} == {"base", "without prior", "no class noun", "wrong class noun"}
    assert sorted(begun(tmp_path).values()) == [1, 1, 1, 2], "only the one that was killed was begun again"
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| no class noun | 1 |" in page and "ablations/c-pictures.jpg" in page
    # The eye itself has other weights than the judge in its place: nothing of this is in its report.
    said = finish(begin(*words, "--report", "--eye", "miniature"), code=2)
    assert "holds no result of these weights, constants" in said and "4 results are kept apart" in said
    assert "4 made with other eye" in said and "Traceback" not in said
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page and sum(begun(tmp_path).values()) == 5


# ── what is kept ─────────────────────────────────────────────────────────────────────────

KEPT = BENCHMARKS / "results" / "ablations.jsonl"
PAGE = BENCHMARKS.parent / "nbs" / "dreambooth" / "ablations.md"


def test_the_kept_tables_are_those_of_the_kept_runs():
    lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 4 + 20 * 8
    assert len({json.dumps(line["kind"], sort_keys=True) for line in lines}) == 1, "of one set of weights"
    kept = json.loads(KEPT.with_suffix(".json").read_text(encoding="utf-8"))["tables"]
    made = {name: report.table(lines, name) for name in TABLES}
    assert json.loads(json.dumps(made)) == kept
    page = PAGE.read_text(encoding="utf-8")
    assert report.verdict(made) in page
    assert all(report.markdown(table) in page for table in made.values())
    for name in TABLES:
        assert all((PAGE.parent / f"ablations/{name}{end}").is_file() for end in (".png", "-pictures.jpg")), name


def test_the_kept_runs_are_of_the_weights_that_are_shipped():
    kind = json.loads(KEPT.read_text(encoding="utf-8").splitlines()[0])["kind"]
    assert ablation_run.Bench(Constants(), Path("nowhere")).kind == kind, "make ablations, or keep the old weights"


def test_the_lesson_on_the_prior_prints_the_kept_tables(monkeypatch, capsys):
    import nbformat

    cells = nbformat.read(PAGE.parent / "33_prior.ipynb", as_version=4).cells
    cell = next(each for each in cells if "results/ablations.json" in each.source)
    monkeypatch.chdir(PAGE.parent.parent)
    exec(cell.source, {"json": json, "Path": Path})
    assert capsys.readouterr().out == "".join(output["text"] for output in cell.outputs)
