"""The contract of a lesson: its parts, its proportions, and that what is stored in it was made by running it."""
import ast
import itertools
import re
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from execute_notebooks import SKIPPING_FLAGS, directives, is_skipped

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


def test_there_are_lessons():
    assert len(NOTEBOOKS) >= 7
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in NOTEBOOKS)


def test_no_two_lessons_share_a_number():
    numbers = [path.name[:2] for path in PATHS]
    assert len(set(numbers)) == len(numbers)


TENS = {"nbs": "0", "butterflies": "1", "miniature": "2", "dreambooth": "3", "workshop": "6789"}  # first digits


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


def test_the_index_names_every_lesson():
    cells = nbformat.read(str(NBS / "index.ipynb"), as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert [path.name for path in PATHS if path.relative_to(NBS).as_posix() not in text] == []
