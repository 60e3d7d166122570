"""The shape of the package: floors, sizes, signatures. Read from the sources, so that nothing heavy is imported."""
import ast
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "diffusion_lessons"
NBS = CHECKOUT / "nbs"
NAME = PACKAGE.name
LINES = 300  # of code: blank lines, comments and docstrings are free
LONGEST_LINE = 120


def exported_module(notebook: Path) -> str | None:
    """The dotted name after `#| default_exp`, if the notebook defines a module."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        first = "".join(cell["source"]).strip().split("\n")[0]
        if cell["cell_type"] == "code" and first.startswith("#| default_exp"):
            return first.split()[-1]
    return None


LESSONS = sorted(NBS.rglob("[0-9]*.ipynb"))
ROOMS = {module: path for path in LESSONS if (module := exported_module(path))}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "_modidx.py", "__main__.py")
}
# From the ground up: a room imports from its own folder and from those before it.
FLOORS = ("engine", "pictures", "diffusion", "butterflies", "stable_diffusion", "miniature", "metrics", "dreambooth",
          "jax")  # fmt: skip
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def imported(module: str, tree: ast.Module) -> set[str]:
    """The rooms that a module imports, wherever in it the import stands."""
    here = module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            if not node.level and parts[0] != NAME:
                continue
            parts = parts if node.level else parts[1:]
            found |= {".".join(parts), *(".".join([*parts, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(f"{NAME}.") for alias in node.names if alias.name.startswith(f"{NAME}.")}
    return found & set(MODULES)


def public(tree: ast.Module):
    """Functions, classes and methods that a user may call, with their dotted names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def inherited(tree: ast.Module) -> set[str]:
    """Methods whose base class, in the same module, has a method of that name with a docstring."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    documented = {name for name, node in public(tree) if ast.get_docstring(node)}
    bases = {name: [ast.unparse(base) for base in node.bases] for name, node in classes.items()}
    return {
        name for name, _ in public(tree)
        if "." in name and any(f"{base}.{name.split('.')[1]}" in documented for base in bases[name.split(".")[0]])
    }  # fmt: skip


def floor(module: str) -> int:
    """How high a room lies: the position of its folder in `FLOORS`."""
    return FLOORS.index(module.split(".")[0])


def test_there_is_a_house():
    assert {module.split(".")[0] for module in MODULES} == set(FLOORS)


def test_every_module_has_its_notebook_and_the_other_way_round():
    assert set(MODULES) == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_its_own_folder_and_from_those_below(module):
    above = {name for name in imported(module, TREES[module]) if floor(name) > floor(module)}
    assert not above, f"{module} imports {sorted(above)}"


def test_no_rooms_import_each_other_in_a_circle():
    waiting = {module: imported(module, TREES[module]) - {module} for module in MODULES}
    while free := {module for module, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting, f"a circle among {sorted(waiting)}"


def test_the_check_sees_every_way_to_import():
    code = """
from .noise import add_noise
from . import unet
import diffusion_lessons.diffusion.sampling
def later():
    from diffusion_lessons.pictures.sets import ImageSet
"""
    found = {"diffusion.noise", "diffusion.unet", "diffusion.sampling", "pictures.sets"}
    assert imported("diffusion.noise", ast.parse(code)) == found, "absolute, relative, nested"
    assert imported("dreambooth.loop", ast.parse("from ..diffusion.noise import add_noise")) == {"diffusion.noise"}


def reached(start: str) -> set[str]:
    """The rooms that a room's imports lead to, over any number of others."""
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += imported(module, TREES[module])
    return seen - {start}


def doors(module: str, tree: ast.Module) -> set[str]:
    """The folders that a module imports as a whole: their `__init__.py` may lead to any room in them."""
    folders, here, found = {name.split(".")[0] for name in MODULES if "." in name}, module.split(".")[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            parts = parts[1:] if not node.level and parts[0] == NAME else parts if node.level else ["elsewhere"]
            found |= {alias.name for alias in node.names} if not parts else {parts[0]} if len(parts) == 1 else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(f"{NAME}.") for alias in node.names if alias.name.startswith(f"{NAME}.")}
    return found & folders


def test_the_check_sees_every_door():
    code = """
from .. import miniature
from ..butterflies import train_loop
from diffusion_lessons import dreambooth
import diffusion_lessons.engine
from ..pictures.sets import ImageSet
from elsewhere import pictures
"""
    found = {"miniature", "butterflies", "dreambooth", "engine"}
    assert doors("dreambooth.loop", ast.parse(code)) == found, "the room of a folder is no door, nor is another package"
    assert doors("metrics", ast.parse("from . import miniature")) == {"miniature"}


@pytest.mark.parametrize("module", ["dreambooth.training", "dreambooth.inference", "metrics"])
def test_nothing_that_serves_a_real_model_leads_into_the_miniature(module):
    """Not over any number of rooms, and not through the door, which resolves its names lazily."""
    for room in sorted({module} | reached(module)):
        assert not room.startswith("miniature."), f"{module} reaches {room}"
        assert "miniature" not in doors(room, TREES[room]), f"{room} goes through the miniature's door"


def test_only_the_top_floor_imports_jax():
    """Whoever has not installed it misses nothing else."""
    of_jax = {"jax", "jaxlib", "flax", "optax", "orbax"}
    for module, tree in TREES.items():
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        found = of_jax & {name.split(".")[0] for name in names}
        assert not found or module.startswith("jax."), f"{module} imports {sorted(found)}"


def test_drawing_needs_no_trainer():
    rooms = {"dreambooth.inference"} | reached("dreambooth.inference")
    assert not {room for room in rooms if room == "engine.run" or room.split(".")[-1] in ("training", "loop")}
    assert not any({"dreambooth", "butterflies"} & doors(room, TREES[room]) for room in rooms)


def test_what_all_stable_diffusions_share_rests_on_pictures_and_diffusion():
    below = {"engine", "pictures", "diffusion", "stable_diffusion"}
    for module in MODULES:
        if module.startswith("stable_diffusion."):
            assert {name.split(".")[0] for name in imported(module, TREES[module])} <= below, module


# The parts that every command's room has, under the same names.
OF_EVERY_COMMAND = {"main", "train", "micro_step", "dry_run", "check_before_work"}


def test_one_definition_of_each_public_name():
    places: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for name, _ in public(tree):
            if "." not in name and name not in OF_EVERY_COMMAND:
                places.setdefault(name, []).append(module)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not twice, f"one name, two things: {twice}"


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "common", "misc", "core"}
    assert not {name for name in MODULES if name.split(".")[-1] in drawers}


def lines_of_code(path: Path, tree: ast.Module) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return sum(1 for n, line in lines if n not in docstrings and line.strip() and not line.lstrip().startswith("#"))


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_rooms_and_not_halls(module):
    count = lines_of_code(MODULES[module], TREES[module])
    if count > LINES:
        warnings.warn(f"{module} has {count} lines of code; {LINES} is the aim", stacklevel=1)
    assert count <= LINES + 50


FUNCTION_LINES = 25  # without the docstring


def test_functions_are_one_idea_each():
    """A guidance: what is longer is named in a warning, and what is twice as long is refused."""
    lengths = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lengths[f"{module}.{node.name}"] = node.end_lineno - first.lineno + 1
    long = {name: length for name, length in lengths.items() if length > FUNCTION_LINES}
    if long:
        warnings.warn(f"longer than {FUNCTION_LINES} lines: {long}", stacklevel=1)
    assert max(lengths.values()) <= 2 * FUNCTION_LINES and len(long) <= 8


@pytest.mark.parametrize("module", MODULES)
def test_lines_fit_the_page(module):
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    generated = ("__all__ =", "           '", '"""')  # nbdev writes the list of names and the line below the title
    assert not [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(generated)]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_types_and_docstrings(module):
    problems = []
    for name, node in public(TREES[module]):
        overrides = name.split(".")[-1] in OVERRIDES
        if not ast.get_docstring(node) and not overrides and name not in inherited(TREES[module]):
            problems.append(f"{name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if untyped and not overrides:
                problems.append(f"{name} has no type for {untyped}")
            if node.returns is None and not overrides:
                problems.append(f"{name} does not say what it returns")
    assert not problems


# Methods that a base class of another package calls; their signature is not ours to choose.
OVERRIDES = {"forward", "error", "format_help", "add_argument"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_swallowed_and_input_is_not_asserted(module):
    for node in ast.walk(TREES[module]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: `python -O` removes asserts; raise an error"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            silent = all(isinstance(each, ast.Pass) for each in node.body)
            assert not (broad and silent), f"line {node.lineno}: `except Exception: pass` hides what went wrong"


HIDDEN_DICE = {
    *(f"random.{name}" for name in ("random", "choice", "choices", "sample", "shuffle", "randint", "uniform", "gauss")),
    *(f"np.random.{name}" for name in ("rand", "randn", "normal", "uniform", "randint", "choice", "shuffle")),
}
TORCH_DICE = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "bernoulli", "normal")}


@pytest.mark.parametrize("module", MODULES)
def test_no_randomness_from_a_hidden_global(module):
    """What is drawn from a global generator depends on whatever ran before."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node.func)
            assert text not in HIDDEN_DICE, f"line {node.lineno}: {text}"
            given = any(keyword.arg == "generator" for keyword in node.keywords)
            assert given or text not in TORCH_DICE, f"line {node.lineno}: {text} without a generator"
            assert not text.endswith(("randn_like", "rand_like")), f"line {node.lineno}: {text} takes no generator"


@pytest.mark.parametrize("module", [name for name in MODULES if name.endswith(("config", "command_line"))])
def test_configs_are_torch_free(module):
    """Bad arguments are answered before torch is loaded, and so is `--help`."""
    code = f"""
import sys
import {NAME}.{module}
assert "torch" not in sys.modules, "torch was imported"
assert "diffusers" not in sys.modules, "diffusers was imported"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert run.returncode == 0, run.stderr


def test_a_submodule_is_imported_without_the_rooms_behind_the_door():
    """Python asks the package's `__getattr__` for `config` before it looks for the file."""
    code = "import sys; from diffusion_lessons.butterflies import config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
