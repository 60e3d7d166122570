"""The contract of a lesson: its parts, its proportions, and that what is stored in it was made by running it."""
import ast
import base64
import builtins
import io
import itertools
import re
import symtable
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / ".ci"))
from claims import uncovered
from execute_notebooks import SKIPPING_FLAGS, directives, is_skipped, lighter_png

NBS = Path(__file__).resolve().parent.parent / "nbs"
PATHS = sorted(NBS.rglob("[0-9]*.ipynb"))
PLACES = {path.stem: path for path in PATHS}
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
EXPORTS = {"export", "exports", "exporti"}
each_lesson = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(name: str) -> list:
    """The code cells that belong to the lesson: without the installing and the exporting cell."""
    cells = [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code" and cell.source.strip()]
    return [cell for cell in cells if "%pip" not in cell.source and "nbdev_export(" not in cell.source]


def prose(name: str) -> list[str]:
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]


def statements(cell) -> list[ast.stmt]:
    return ast.parse(cell.source).body


def is_exported(cell) -> bool:
    return bool(EXPORTS & set(directives(cell.source)))


def is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom)


def figures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def words(text: str) -> int:
    """Words of prose; code blocks, formulas and addresses do not count."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return len(re.findall(r"[A-Za-z][A-Za-z'’-]*", text))


def unknown_names(code: str) -> set[str]:
    """The names that some line asks of the notebook and that no line outside of its functions binds."""
    scopes, used = [symtable.symtable(code, "lesson", "exec")], set()
    known = {each.get_name() for each in scopes[0].get_symbols() if each.is_assigned() or each.is_imported()}
    for scope in scopes:  # grows on the way
        scopes += scope.get_children()
        used |= {each.get_name() for each in scope.get_symbols()
                 if each.is_referenced() and (scope is scopes[0] or each.is_global())}  # fmt: skip
    return used - known - {*dir(builtins), "display", "get_ipython"}


@pytest.mark.parametrize(("code", "unknown"), [
    ("print(count)", {"count"}), ("count = 1\nprint(count)", set()),
    ("def f():\n    count = 1\nassert count == 1", {"count"}),  # what a function binds is its own
    ("def f():\n    return count", {"count"}), ("def f(count):\n    return [count for each in range(count)]", set()),
    ("import numpy as np\nclass A:\n    b = np.ones(1)\nwith open('f') as file:\n    file, A", set()),
])  # fmt: skip
def test_unknown_names_are_found(code, unknown):
    assert unknown_names(code) == unknown


@each_lesson
def test_no_name_is_used_that_the_lesson_does_not_know(name):
    """In a second, what otherwise only a run of all lessons tells: an import that went with what needed it."""
    tree = ast.Module([statement for cell in code_cells(name) for statement in statements(cell)], [])
    assert unknown_names(ast.unparse(tree)) == set()


@pytest.mark.parametrize("path", [NBS / "index.ipynb", *PATHS], ids=lambda path: path.stem)
def test_every_notebook_names_the_kernel_that_runs_it(path):
    """Without it JupyterLab asks which one to take. `nbdev_clean` keeps this, under the name it gives."""
    kernel = nbformat.read(path, as_version=4).metadata.get("kernelspec")
    assert kernel == {"display_name": "python3", "language": "python", "name": "python3"}


def test_there_are_lessons():
    assert len(NOTEBOOKS) >= 7
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in NOTEBOOKS)


def test_no_two_lessons_share_a_number():
    numbers = [path.name[:2] for path in PATHS]
    assert len(set(numbers)) == len(numbers)


# The first digits of the lessons of a part.
TENS = {"nbs": "0", "butterflies": "1", "miniature": "2", "dreambooth": "3", "jax": "5", "workshop": "6789"}


def test_every_part_of_the_course_has_its_tens():
    """The numbers are the reading order, and the parts follow each other in it."""
    assert {path.parent.name for path in PATHS} <= set(TENS)
    assert all(path.name[0] in TENS[path.parent.name] for path in PATHS)


@each_lesson
def test_opens_with_badge_title_and_description(name):
    first, second, third = NOTEBOOKS[name].cells[:3]
    assert first.source.startswith("[![Open in Colab](") and "\n" not in first.source
    assert re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*", second.source.strip()), "a cell `# Title`, blank, `> line`"
    introduced = third.cell_type == "markdown" and words(third.source) >= 30
    assert introduced, "say what one will learn, how long it takes, on what hardware"


@each_lesson
def test_has_one_title(name):
    text = "\n".join(re.sub(r"```.*?```", "", source, flags=re.DOTALL) for source in prose(name))
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


@each_lesson
def test_imports_stand_in_one_exported_cell_at_the_top(name):
    importing = [cell for cell in code_cells(name) if is_exported(cell) and any(map(is_import, statements(cell)))]
    assert len(importing) <= 1
    for cell in importing:
        assert all(map(is_import, statements(cell))), "the exported import cell holds imports only"
        assert cell is next(other for other in code_cells(name) if statements(other))


@each_lesson
def test_import_cells_hold_imports_only(name):
    """nbdev runs cells with imports when it makes the site; whatever else is in them would run as well."""
    for cell in code_cells(name):
        body = statements(cell)
        if any(map(is_import, body)) and not is_skipped(cell):
            assert all(map(is_import, body)), cell.source[:200]


@each_lesson
def test_exported_cells_define_and_do_nothing_else(name):
    for cell in filter(is_exported, code_cells(name)):
        for statement in statements(cell):
            allowed = isinstance(
                statement,
                ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom | ast.If,
            )
            assert allowed, ast.unparse(statement)[:200]
            if isinstance(statement, ast.If):  # the entry point of `python -m`, which must not run in a notebook
                test = ast.unparse(statement.test)
                assert "__name__" in test and "globals()" in test, test


@each_lesson
def test_is_made_of_ideas_shown_and_asserted(name):
    trees = [ast.parse(cell.source) for cell in code_cells(name)]
    assert sum(any(isinstance(node, ast.Assert) for node in ast.walk(tree)) for tree in trees) >= 5
    assert sum(figures(cell) for cell in code_cells(name)) >= 2


@each_lesson
def test_is_written_and_not_only_coded(name):
    cells = NOTEBOOKS[name].cells
    assert sum(map(words, prose(name))) >= 900
    assert len(prose(name)) / len(cells) >= 0.4
    assert 25 <= len(cells) <= 90


@each_lesson
def test_closes_with_recap_exercises_and_next(name):
    headings = [heading for source in prose(name) for heading in re.findall(r"^## (.+?)\s*$", source, re.MULTILINE)]
    assert headings[-3:] == ["Recap", "Exercises", "Next"]
    text = "\n".join(prose(name))
    exercises = text.rsplit("## Exercises", 1)[1].split("\n## Next")[0]
    if "\n### " in exercises:  # with solutions and checks: see below
        assert 2 <= len(re.findall(r"^### \d · \S.* \(\d+ minutes?\)$", exercises, re.MULTILINE)) <= 4
    else:
        assert 3 <= len(re.findall(r"^(?:\d+\.|-) ", exercises, re.MULTILINE)) <= 5


def exercises(name: str) -> list[list]:
    """The cells of each exercise that has a solution: the question, then what belongs to it."""
    cells = NOTEBOOKS[name].cells
    begin = next(n for n, cell in enumerate(cells) if re.search(r"^## Exercises$", cell.source, re.MULTILINE))
    end = next(n for n, cell in enumerate(cells) if re.search(r"^## Next$", cell.source, re.MULTILINE))
    starts = [n for n in range(begin, end) if cells[n].source.startswith("### ")]
    return [cells[first:last] for first, last in itertools.pairwise([*starts, end])]


@each_lesson
def test_an_exercise_has_a_folded_solution_and_a_check(name):
    for question, *rest in exercises(name):
        rest = [cell for cell in rest if not cell.source.startswith("#| hide")]  # tidying up
        assert [cell.cell_type for cell in rest] == ["code", "code"], question.source
        solution, check = rest
        lines = solution.source.splitlines()
        assert lines[:3] == ["#| code-fold: true", '#| code-summary: "Solution"', "# @title Solution"], question.source
        folded = dict(solution.metadata)
        assert folded == {"cellView": "form", "jupyter": {"source_hidden": True}}, "folded in Colab and JupyterLab, too"
        assert check.source.startswith("# Check"), question.source
        tree, solved = ast.parse(check.source), list(ast.walk(ast.parse(solution.source)))
        answers = {node.id for node in solved if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        answers |= {node.name for node in solved if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "a wrong answer has to fail"
        asked = set(re.findall(r"`([A-Za-z_]\w*)", question.source)) & answers & used
        assert asked, f"the question names what the check looks at: {question.source}"


@each_lesson
def test_figures_say_in_words_what_is_to_be_seen(name):
    """`#| fig-alt: "..."` is read aloud in the place of the picture; YAML has to be able to read it."""
    lines = [re.findall(r"^#\| fig-alt: .*$", cell.source, re.MULTILINE) for cell in code_cells(name) if figures(cell)]
    texts = [str(yaml.safe_load(found[0][2:])["fig-alt"] or "") if found else "" for found in lines]
    missing = sum(words(text) < 4 for text in texts)
    assert not missing, f"{missing} of {len(texts)} cells with figures have no `#| fig-alt`"


DRAWING = {"plot", "hist", "errorbar", "scatter", "step", "fill_between", "semilogx", "semilogy", "loglog", "stairs",
           "bar", "barh"}
WAYS = {"linestyle", "ls", "marker", "fmt", "linewidth", "hatch", "histtype", None}  # None: **looks
FORMATS = {"style", "mark", "marker", "line"}


def by_colour_only(tree: ast.AST) -> list[str]:
    """Calls in a loop that draw what a legend names, and in which nothing varies from turn to turn but the colour."""
    found = []
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    for call in {node for loop in loops for part in loop.body for node in ast.walk(part) if isinstance(node, ast.Call)}:
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        in_legend = "label" in named and not isinstance(named["label"], ast.Constant | ast.IfExp)
        if in_legend and getattr(call.func, "attr", "") in DRAWING:
            ways = [value for name, value in named.items() if name in WAYS]
            if call.func.attr == "plot":  # plot(x, y, "o--"), plot(y, style)
                ways += call.args[2:] or [each for each in call.args[1:] if getattr(each, "id", "") in FORMATS]
            if all(isinstance(way, ast.Constant) for way in ways):
                found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(("code", "is_found"), [
    ("ax.plot(x, y, label=name)", True), ("ax.plot(x, y, '.', label=name, color=c)", True),
    ("ax.plot(x, y, style, label=name)", False), ("ax.plot(x, y, label=name, linestyle=line)", False),
    ("ax.hist(x, label=name, color=c)", True), ("ax.hist(x, label=name, histtype=kind)", False),
    ("ax.bar(x, y, label=name)", True), ("ax.bar(x, y, label=name, hatch=lines)", False),
    ("ax.plot(x, y)", False), ("ax.plot(x, y, label='all')", False),
])  # fmt: skip
def test_the_search_for_colours_knows_other_ways(code, is_found):
    assert bool(by_colour_only(ast.parse(f"for name in names:\n    {code}"))) == is_found


@each_lesson
def test_curves_differ_by_more_than_their_colour(name):
    assert [each for cell in code_cells(name) for each in by_colour_only(ast.parse(cell.source))] == []


def visible_lines(cell) -> int:
    """Lines of a cell that a reader sees: not blank, no directive, and none where the cell is folded."""
    given = directives(cell.source)
    if {"hide", "code-fold"} & set(given):
        return 0
    return sum(bool(line.strip()) and not line.startswith("#|") for line in cell.source.splitlines())


@each_lesson
def test_a_cell_that_is_open_fits_a_screen(name):
    assert not [cell.source[:80] for cell in code_cells(name) if visible_lines(cell) > 40], "split it, or fold it"


def closed_on_the_site(name: str, cell) -> bool:
    """Whether `.ci/pages.py` closes it: long exported source of the workshop."""
    in_workshop = PLACES[name].parent.name == "workshop"
    return in_workshop and is_exported(cell) and cell.source.count("\n") >= 12


@each_lesson
def test_a_lesson_is_one_sitting(name):
    assert sum(map(words, prose(name))) <= 1800
    assert sum(visible_lines(cell) for cell in code_cells(name) if not closed_on_the_site(name, cell)) <= 280


@each_lesson
def test_next_leads_to_an_existing_lesson(name):
    """A lesson that the course does not have yet may be named, but not linked."""
    for target in re.findall(r"\]\(([^)#:]+\.ipynb)[^)]*\)", "\n".join(prose(name))):
        assert (PLACES[name].parent / target).is_file(), target


@each_lesson
def test_is_small_enough_for_git(name):
    assert PLACES[name].stat().st_size < 1_000_000


@each_lesson
def test_stored_outputs_are_those_of_a_good_run(name):
    for cell in code_cells(name):
        assert all(output.output_type != "error" for output in cell.outputs), cell.source[:200]
        if is_skipped(cell) and not SKIPPING_FLAGS & set(directives(cell.source)):
            assert not cell.outputs, "this cell does not run; outputs from elsewhere need `#| slow` or `#| cuda`"


@each_lesson
def test_stored_text_is_free_of_noise(name):
    """No warnings, no paths of somebody's machine, no addresses in memory."""
    for cell in code_cells(name):
        for output in cell.outputs:
            text = output.get("text", "") or "".join(output.get("data", {}).get("text/plain", ""))
            assert output.get("name") != "stderr", f"{cell.source[:80]!r} wrote to stderr: {text[:200]}"
            assert not re.search(r"(/home/|/root/|/Users/|/work/|\.venv/)\w*", text), text[:200]
            assert not re.search(r"at 0x[0-9a-f]{8,}", text), text[:200]


@each_lesson
def test_names_come_from_cells_that_run(name):
    """A later cell must not need what only a cell that is passed over has bound."""
    import builtins

    bound, only_skipped = set(dir(builtins)), set()
    for cell in code_cells(name):
        tree = ast.parse(cell.source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        names |= {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if is_import(n) for a in n.names}
        if is_skipped(cell):
            only_skipped |= names - bound
            continue
        bound |= names
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert not used & only_skipped - bound, cell.source[:200]


@each_lesson
def test_a_number_in_prose_is_computed_printed_or_sourced(name):
    assert uncovered(PLACES[name]) == []


@pytest.mark.parametrize(("sentence", "found"), [
    ("It falls to 1632 after 2000 steps.", ["1632", "2000"]),  # (16, 32) is not 1632, nor 2000 a year
    ("Kingma and Welling 2013 call it 7777.", []),
    ("So says Hang et al. 2023, with 7777.", []),
    ("The sum is 65,536, the share 12.5 percent.", []),
])  # fmt: skip
def test_the_search_for_numbers_knows_years_and_pairs(sentence, found, tmp_path):
    lesson = nbformat.v4.new_notebook()
    code = nbformat.v4.new_code_cell("channels = (16,32)\nsum_of_all = 65_536\nshare = 0.125")
    lesson.cells = [code, nbformat.v4.new_markdown_cell(sentence)]
    nbformat.write(lesson, tmp_path / "lesson.ipynb")
    assert [number for number, _ in uncovered(tmp_path / "lesson.ipynb")] == found


def test_a_stored_grid_keeps_the_colours_of_each_picture():
    """Chosen by how often they occur, 256 colours would make the one orange fish among 24 pictures a yellow one."""
    from diffusion_lessons.pictures import meadow  # here, since nothing else in this file needs the package
    from diffusion_lessons.pictures.figures import make_grid

    rows = meadow.scenes(24, 64, seed=0)
    grid = make_grid([row["image"] for row in rows], 4, 6).resize((768, 512), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    stored = lighter_png(base64.b64encode(buffer.getvalue()).decode("ascii"))
    with Image.open(io.BytesIO(base64.b64decode(stored))) as image:
        assert image.mode == "P", "a grid of this size is stored with a palette"
        off = np.asarray(image.convert("RGB"), dtype=float) - np.asarray(grid, dtype=float)
    blocks = off.reshape(64, 8, 96, 8, 3).mean(axis=(1, 3))  # of 8 x 8 pixels
    assert abs(blocks).max() < 15


def index_text() -> str:
    cells = nbformat.read(str(NBS / "index.ipynb"), as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


ROW = re.compile(r"^\| (\d\d) \| \[[^\]]+\]\(([^)]+)\) \| (\d+) \|", re.MULTILINE)  # number, address, minutes
SPELLED = {"ten": 10, "a quarter of an hour": 15, "fifteen": 15, "twenty": 20, "twenty-five": 25, "half an hour": 30,
           "thirty": 30, "thirty-five": 35}  # fmt: skip


def test_next_follows_the_path():
    """Each lesson of a path ends with the way to the next one of its path, and the first path to the second."""
    paths = index_text().split("## Four paths")[1]
    course, in_jax = paths.split("Beside the path")[0], paths.split("### The same in JAX")[1].split("### Build")[0]
    course, in_jax = ([Path(address) for _, address, _ in ROW.findall(text)] for text in (course, in_jax))
    assert len(course) >= 15 and course[0].stem == "00_start" and len(in_jax) >= 10
    for lesson, following in [*itertools.pairwise(course), *itertools.pairwise(in_jax)]:
        closing = "\n".join(prose(lesson.stem)).rsplit("## Next", 1)[1]
        assert f"{following.name})" in closing, f"{lesson.stem} leads to {following.stem}"


def opening(name: str) -> str:
    """The cell below the title, in one line."""
    return " ".join(NOTEBOOKS[name].cells[2].source.split())


def reading_minutes(name: str) -> int:
    """How many minutes a lesson says that reading takes."""
    said = re.search(r"Reading takes (?:about )?(\d+|[a-z -]+?)(?: minutes)?[.;,]", opening(name))
    assert said, f"{name}: say how many minutes reading takes"
    return int(SPELLED.get(said[1], said[1]))


@each_lesson
def test_a_lesson_says_how_long_it_takes(name):
    """In one form, and roughly what its words and lines of code take: the factors are those of the course's lessons."""
    lines = [line for cell in code_cells(name) for line in cell.source.splitlines()]
    code = sum(bool(line.strip()) and not line.startswith("#|") for line in lines)
    minutes = 1.7 * sum(map(words, prose(name))) / 200 + 0.023 * code
    assert 0.65 <= reading_minutes(name) / minutes <= 1.75, f"{name}: {minutes:.0f} minutes by its words and lines"
    runs = r"Reading takes [^.]+\. The code (?:runs|needs|takes|trains) [^.]*(?:second|minute)s?[^.]* CPU cores?\b"
    assert re.search(runs, opening(name)), f"{name}: say after that how long the code runs, on how many cores"


def test_the_index_calls_a_lesson_by_its_title():
    """The whole title, or what stands before its colon."""
    rows = re.findall(r"^\|[^|\n]*\| \[([^\]]+)\]\(([^)]+\.ipynb)\)", index_text(), re.MULTILINE)
    assert len(rows) > 60
    titles = {address: prose(Path(address).stem)[1].splitlines()[0].removeprefix("# ") for _, address in rows}
    assert not [(shown, titles[address]) for shown, address in rows
                if shown not in (titles[address], titles[address].partition(":")[0])]  # fmt: skip


def test_the_index_says_the_minutes_that_the_lesson_says():
    rows = ROW.findall(index_text())
    assert len(rows) >= 20
    for _, address, minutes in rows:
        assert int(minutes) == reading_minutes(Path(address).stem), address


def test_the_workshop_leads_from_lesson_to_lesson():
    """As the index lists them: the engine, then pictures."""
    rows = re.findall(r"^\| \d\d \| \[[^\]]+\]\(workshop/([^)]+)\)", index_text(), re.MULTILINE)
    rows = [row for row in rows if row < "79"]
    assert len(rows) == 19 and rows == sorted(rows)
    for lesson, following in itertools.pairwise(rows):
        closing = "\n".join(prose(Path(lesson).stem)).rsplit("## Next", 1)[1]
        assert f"({following})" in closing, f"{lesson} leads to {following}"


@each_lesson
def test_a_link_says_lesson_and_not_the_name_of_a_file(name):
    text = re.sub(r"```.*?```", "", "\n".join(prose(name)), flags=re.DOTALL)
    assert not re.findall(r"\[`?\d\d_\w+(?:\.ipynb)?`?\]\(|`\d\d_\w+\.ipynb`", text), "[lesson 71](71_data.ipynb)"


def test_the_index_names_every_lesson():
    text = index_text()
    assert [path.name for path in PATHS if path.relative_to(NBS).as_posix() not in text] == []


def test_the_glossary_is_sorted_and_leads_to_lessons_that_use_the_word():
    text = (NBS / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+? \| ([^|]+) \|$", text, re.MULTILINE)
    rows = [(word, links) for word, links in rows if word not in ("word", "---")]
    assert len(rows) > 40
    names = [re.sub(r"[^a-z ]", "", word.lower()) for word, _ in rows]
    assert names == sorted(names)
    for word, links in rows:
        named = re.split(r"[,(]", word.replace("$\\epsilon$", ""))[0].strip().lower()
        found = re.findall(r"\]\(([^)]+)\)", links)
        assert found and all((NBS / address).is_file() for address in found), word
        said = " ".join("\n".join(prose(Path(address).stem)).lower() for address in found)
        assert named in " ".join(said.split()), f"{found} say nothing of {named}"


# Words of one author, and what they stand for: a config has settings, networks have parameters, pictures a background.
PET_WORDS = {
    "told (settings, options)": r"\b(?:is|are|be|being) told\b(?!\s+apart)", "untold": r"\buntold\b",
    "ground (background, place)": r"\bplain ground\b|\bfrom the ground\b(?! truth)|\bground first\b",
    "numbers (parameters)": r"\bnumbers (?:that )?(?:learn|are trained)\b|\bso many numbers adds\b",
    "storeys (parts)": r"\bstoreys?\b", "so-manieth": r"\bso-manieth\b", "mood": r"\bmoods?\b", "bribe": r"\bbrib\w+",
    "dice (chance)": r"\bdice\b", "drawer (module)": r"(?<!museum's )(?<!real )\bdrawers? (?:for|of)\b",
}  # fmt: skip


@each_lesson
def test_no_pet_words(name):
    cells = [cell.source for cell in NOTEBOOKS[name].cells]
    cells += [str(output.get("text", "")) for cell in code_cells(name) for output in cell.outputs]
    found = [(word, match[0]) for word, pattern in PET_WORDS.items() for source in cells
             for match in re.finditer(pattern, source, re.IGNORECASE)]  # fmt: skip
    assert found == []
