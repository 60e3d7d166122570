"""The ground the course stands on: metadata, commands of the Makefile, links, workflows, what git keeps and ignores."""
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parent.parent
EXTRAS = {"dev", "wandb", "trackio", "8bit", "torchao", "deepspeed", "xformers", "jax"}
COURSE = ("jupyterlab", "nbdev", "torch", "diffusers", "transformers", "accelerate", "datasets", "matplotlib",
          "torchvision", "pytest")  # fmt: skip


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def settings() -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(CHECKOUT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


PROJECT = settings()
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (CHECKOUT / ".git").exists(), reason="not a clone, or no git"
)


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)


def tracked() -> list[Path]:
    """The files of the course: those in git, and new ones that git would take."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    return [CHECKOUT / name for name in sorted(set(names)) if (CHECKOUT / name).is_file()]


# ── metadata ─────────────────────────────────────────────────────────────────────────────


def requirements(key: str) -> dict[str, Requirement]:
    found = [Requirement(text) for text in PROJECT[key].split()]
    return {requirement.name.lower(): requirement for requirement in found}


def test_requirements_are_ranges_a_user_can_live_with():
    for name, requirement in requirements("requirements").items():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, f"{name} needs a lower bound"
        assert "==" not in operators, f"{name} is pinned to one version"
    for name in ("torch", "torchvision", "numpy"):  # Colab and GPU machines bring their own: no upper bound
        assert {s.operator for s in requirements("requirements")[name].specifier} == {">="}


def test_what_is_installed_lies_within_the_ranges():
    for requirement in requirements("requirements").values():
        found = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(found, prereleases=True), f"{requirement}, but {found} is installed"


def test_extras_are_those_promised():
    named = {key.removesuffix("_requirements") for key in PROJECT if key.endswith("_requirements")}
    assert named == EXTRAS
    metadata = importlib.metadata.metadata("diffusion_lessons")
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert all(requirements(f"{extra}_requirements") for extra in EXTRAS)


def test_the_packages_of_the_course_are_required():
    assert set(COURSE) <= {*requirements("requirements"), *requirements("dev_requirements")}


def test_trackers_and_accelerators_are_not_forced_on_anyone():
    optional = {name for extra in EXTRAS - {"dev"} for name in requirements(f"{extra}_requirements")}
    assert not optional & set(requirements("requirements"))


def test_imports_of_the_package_are_requirements():
    """What a module imports at its top must come with `pip install`, not only with [dev]."""
    names = set()
    package, in_jax = CHECKOUT / "diffusion_lessons", set()
    for path in package.rglob("*.py"):
        found = set(re.findall(r"^(?:from|import) ([A-Za-z_]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE))
        if path.relative_to(package).parts[0] == "jax":
            in_jax |= found
        else:
            names |= found
    ours = set(sys.stdlib_module_names) | {"diffusion_lessons"}
    provides = {"PIL": "pillow", "yaml": "pyyaml", "orbax": "orbax-checkpoint"}
    always = set(requirements("requirements"))
    assert not {provides.get(name, name) for name in names - ours} - always
    assert not {provides.get(name, name) for name in in_jax - ours} - always - set(requirements("jax_requirements"))


def test_version_stands_in_one_place():
    import diffusion_lessons

    assert diffusion_lessons.__version__ == PROJECT["version"] == importlib.metadata.version("diffusion_lessons")
    assert f"## {PROJECT['version']}" in read("CHANGELOG.md")


def test_commands_exist():
    for entry in PROJECT["console_scripts"].split():
        command, place = entry.split("=")
        module, function = place.split(":")
        path = CHECKOUT / Path(*module.split(".")).with_suffix(".py")
        assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), entry
        assert (Path(sys.executable).parent / command).is_file()


def test_license_is_the_whole_text():
    text = read("LICENSE")
    assert text.strip().startswith("Apache License") and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


# ── the Makefile ─────────────────────────────────────────────────────────────────────────


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make as a person would, without what an outer make has put into the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=CHECKOUT, capture_output=True, text=True, env={**kept, **environment}
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@needs_make
def test_help_lists_every_target():
    targets = set(re.findall(r"^\.PHONY: (\S+)", read("Makefile"), re.MULTILINE))
    listed = {line.split()[0] for line in make("help").stdout.splitlines()}
    assert targets == listed
    assert {"butterflies", "test", "test-slow", "lab", "docs", "readme", "notebooks"} <= targets


@needs_make
def test_an_old_python_is_told_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = make("butterflies", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout and "3.9.1" in done.stdout
    absent = make("butterflies", "PYTHON=no-such-python", f"VENV={tmp_path}/venv")
    assert absent.returncode != 0 and "no-such-python" in absent.stdout


@needs_make
def test_a_second_make_does_not_install_again(tmp_path):
    """With stamps newer than the metadata, only the training is left to do."""
    venv = tmp_path / "venv"
    venv.mkdir()
    first = make("-n", "butterflies", f"VENV={venv}").stdout
    assert "pip install" in first and "[dev]" not in first
    for stamp in (".made", ".installed"):
        (venv / stamp).touch()
    second = make("-n", "butterflies", f"VENV={venv}").stdout
    assert "pip" not in second and "train-butterflies --preset quick" in second
    (venv / ".installed").unlink()
    os.utime(venv / ".made", (0, 0))  # a stamp as old as can be must not make a new environment
    assert "-m venv" not in make("-n", "butterflies", f"VENV={venv}").stdout


@needs_make
def test_one_failing_step_fails_the_whole(tmp_path):
    """Every step runs; the exit code is not that of the last one only."""
    stamps = tmp_path / "venv"
    (stamps / "bin").mkdir(parents=True)
    for stamp in (".made", ".installed", ".installed-dev"):
        (stamps / stamp).touch()
    for name, code in (("python", "exit 0"), ("ruff", "exit 1")):
        program = stamps / "bin" / name
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
    done = make("test", f"VENV={stamps}")
    assert done.returncode != 0 and "failed in lint" in done.stdout
    assert "── pytest took" in done.stdout
    (stamps / "bin" / "ruff").write_text("#!/bin/sh\nexit 0\n")
    assert make("test", f"VENV={stamps}").returncode == 0


@needs_make
def test_docs_without_quarto_says_so(tmp_path):
    if shutil.which("quarto"):
        pytest.skip("Quarto is installed")
    for stamp in (".made", ".installed", ".installed-dev"):
        (tmp_path / stamp).touch()
    done = make("docs", f"VENV={tmp_path}")
    assert done.returncode != 0 and "https://quarto.org" in done.stdout


def test_continuous_integration_runs_make_test():
    script = CHECKOUT / ".ci" / "run"
    assert os.access(script, os.X_OK) and read(".ci/run").startswith("#!/bin/bash")
    assert read(".ci/run").rstrip().endswith("exec make test")


def test_minimum_python_is_the_same_everywhere():
    version = PROJECT["min_python"]
    assert f"({version.replace('.', ', ')})" in read("Makefile")
    assert f'target-version = "py{version.replace(".", "")}"' in read("pyproject.toml")
    matrix = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"][0] == version


# ── workflows ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tests", "docs"])
def test_workflows_are_well_formed(name):
    workflow = yaml.safe_load(read(f".github/workflows/{name}.yml"))
    assert {"name", "jobs", True} <= set(workflow)  # YAML reads the key `on` as true
    for job in workflow["jobs"].values():
        assert job["runs-on"].startswith("ubuntu") and job["timeout-minutes"] <= 60
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all("@v" in step["uses"] for step in job["steps"] if "uses" in step)


def test_tests_workflow_runs_what_a_person_runs():
    steps = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["tests"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)


def test_docs_workflow_renders_with_quarto():
    workflow = yaml.safe_load(read(".github/workflows/docs.yml"))
    text = str(workflow)
    assert "quarto-dev/quarto-actions/setup" in text and "make docs" in text and "actions/deploy-pages" in text


def test_site_configuration_is_one_file():
    link = CHECKOUT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
    assert PROJECT["custom_quarto_yml"] == "True"


# ── links ────────────────────────────────────────────────────────────────────────────────


NOTEBOOKS = sorted(path for path in (CHECKOUT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badges_are_what_the_settings_yield(path):
    cells = nbformat.read(str(path), as_version=4).cells
    address = f"https://colab.research.google.com/github/{PROJECT['user']}/{PROJECT['repo']}/blob/{PROJECT['branch']}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    place = f"{PROJECT['nbs_path']}/{path.relative_to(CHECKOUT / 'nbs').as_posix()}"
    badge = f"[![Open in Colab]({image})]({address}/{place})"
    found = [cell.source for cell in cells if image in cell.source]
    assert found == [badge] or (path.stem == "index" and not found)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "index"], ids=lambda path: path.stem)
def test_lessons_can_install_the_package_in_colab(path):
    code = [cell.source for cell in nbformat.read(str(path), as_version=4).cells if cell.cell_type == "code"]
    cells = [source for source in code if "%pip install" in source]
    assert len(cells) == 1 and code[0] == cells[0]
    extra = "[jax]" if path.parent.name == "jax" else ""
    assert f'"{PROJECT["lib_name"]}{extra} @ git+{PROJECT["git_url"]}"' in cells[0]
    assert "#| eval: false" in cells[0] and "find_spec" in cells[0], "an installed package is left alone"


def test_links_are_up_to_date():
    done = subprocess.run([sys.executable, ".ci/links.py", "--check"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_links_follow_the_settings(tmp_path):
    """Another owner and name in settings.ini reach every notebook, and nothing of the old ones is left."""
    for name in (".ci", "nbs"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, symlinks=True)
    shutil.copy(CHECKOUT / "_quarto.yml", tmp_path)
    changed = re.sub(r"^user = .*$", "user = somebody", read("settings.ini"), flags=re.MULTILINE)
    changed = re.sub(r"^repo = .*$", "repo = elsewhere", changed, flags=re.MULTILINE)
    (tmp_path / "settings.ini").write_text(changed)
    subprocess.run([sys.executable, ".ci/links.py"], cwd=tmp_path, check=True)
    for path in (tmp_path / "nbs").rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert f"{PROJECT['user']}/{PROJECT['repo']}" not in text
        assert "somebody/elsewhere" in text or path.stem == "index"
    assert "href: https://github.com/somebody/elsewhere\n" in (tmp_path / "_quarto.yml").read_text()


@needs_git
def test_owner_and_name_stand_in_the_settings_alone():
    """Notebooks, README and the site's navbar carry derived lines; nobody else writes the address down."""
    allowed = {CHECKOUT / "settings.ini", CHECKOUT / "README.md", *NOTEBOOKS}
    allowed |= {CHECKOUT / "_quarto.yml", CHECKOUT / "nbs" / "_quarto.yml"}  # the second is a link to the first
    generated = CHECKOUT / "diffusion_lessons" / "_modidx.py"  # nbdev copies git_url there
    address = f"{PROJECT['user']}/{PROJECT['repo']}"
    holders = [path for path in tracked() if path not in allowed and path != generated]
    texts = ((path, path.read_text(encoding="utf-8", errors="ignore")) for path in holders)
    assert [path for path, text in texts if address in text] == []


def test_readme_works_at_the_top_level():
    text = read("README.md")
    for target in re.findall(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"", text):
        target = target[0] or target[1]
        assert re.match(r"https?:|mailto:", target) or (CHECKOUT / target.split("#")[0]).exists(), target
    assert "{{" not in text and "#|" not in text


# ── what git keeps ───────────────────────────────────────────────────────────────────────


@needs_git
@pytest.mark.parametrize(
    "name",
    [".venv/bin/python", "outputs/butterflies/model_index.json", "nbs/outputs/a.png", "_proc/a", "_docs/a.html",
     "nbs/nbdev.yml", "nbs/sidebar.yml", "dist/a.whl", "build/lib/a", "diffusion_lessons/__pycache__/a.pyc",
     "diffusion_lessons.egg-info/PKG-INFO", "nbs/.ipynb_checkpoints/a.ipynb", "outputs/x/checkpoint-5.partial/a"],
)  # fmt: skip
def test_what_runs_leave_is_ignored(name):
    assert git("check-ignore", "-q", name).returncode == 0


@needs_git
@pytest.mark.parametrize("name", ["nbs/a.ipynb", "diffusion_lessons/a.py", "nbs/_quarto.yml", "README.md"])
def test_what_belongs_to_the_course_is_not_ignored(name):
    assert git("check-ignore", "-q", name).returncode == 1


@needs_git
def test_nothing_large_is_kept():
    large = [path for path in tracked() if path.stat().st_size > 1_000_000 and "miniature" not in path.parts]
    assert not large


def test_cleaning_keeps_what_colab_needs():
    assert set(PROJECT["allowed_metadata_keys"].split()) == {"accelerator", "colab"}


# ── the executor of lessons ──────────────────────────────────────────────────────────────


def executor():
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import execute_notebooks

    return execute_notebooks


def notebook(*sources: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_flagged_cells_are_passed_over():
    skipped = executor().is_skipped
    new = nbformat.v4.new_code_cell
    exporting = "import nbdev; nbdev.nbdev_export()"
    for source in ("#| eval: false\n1", "#| eval:false\n1", "#|slow\n1", "#| hide\n#| cuda\n1", exporting):
        assert skipped(new(source)), source
    for source in ("1", "#| export\nx = 1", "# slow\n1", "#| eval: true\n1", "def f():\n    nbdev_export()"):
        assert not skipped(new(source)), source


def test_a_run_stores_outputs_and_leaves_flagged_ones(tmp_path):
    lesson = notebook("print(6 * 7)", "#| cuda\nraise RuntimeError", "assert True")
    lesson.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="from a GPU\n")]
    path = tmp_path / "99_test.ipynb"
    nbformat.write(lesson, path)
    result, problem = executor().execute(path, tmp_path, timeout=60)
    assert problem is None
    assert [cell.outputs[0].text for cell in result.cells[:2]] == ["42\n", "from a GPU\n"]
    assert all(cell.execution_count is None and "execution" not in cell.metadata for cell in result.cells)


def test_progress_bars_are_not_stored_and_warnings_are(tmp_path):
    bar = "import sys, time, tqdm\nfor _ in tqdm.tqdm(range(3), desc='decoding'): time.sleep(0.2)"
    path = tmp_path / "99_test.ipynb"
    nbformat.write(notebook(bar, bar + "\nprint('look out', file=sys.stderr)"), path)
    result, problem = executor().execute(path, tmp_path, timeout=60)
    assert problem is None
    assert result.cells[0].outputs == []
    assert [output.text for output in result.cells[1].outputs] == ["look out"]


def test_a_failing_cell_is_named(tmp_path):
    path = tmp_path / "99_test.ipynb"
    nbformat.write(notebook("x = 1", "assert x == 2, 'x is not two'"), path)
    _, problem = executor().execute(path, tmp_path, timeout=60)
    assert "99_test.ipynb, cell 1" in problem and "x is not two" in problem


def test_a_lesson_that_hangs_is_stopped(tmp_path):
    path = tmp_path / "99_test.ipynb"
    nbformat.write(notebook("import time", "time.sleep(60)"), path)
    _, problem = executor().execute(path, tmp_path, timeout=5)
    assert "cell 1" in problem and "more than 5 s" in problem


def test_heavy_figures_become_lighter_and_stay_the_same_picture():
    import base64
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    heavy = base64.b64encode(buffer.getvalue()).decode()
    light = executor().lighter_png(heavy)
    assert len(light) < len(heavy) / 2
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(light))).convert("RGB")).astype(float)
    assert seen.shape == noise.shape and np.abs(seen - noise).mean() < 20
    assert executor().lighter_png("small") == "small"
    film = io.BytesIO()
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    frames[0].save(film, format="PNG", save_all=True, append_images=frames[1:])
    animated = base64.b64encode(film.getvalue()).decode()
    assert executor().lighter_png(animated) == animated, "a film does not become a still"
