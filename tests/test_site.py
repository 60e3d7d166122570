"""The sources of the site: processed as for Quarto, then read for what a reader would miss."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter

CHECKOUT = Path(__file__).resolve().parent.parent
NBS = CHECKOUT / "nbs"
PARTS = ("butterflies", "miniature", "dreambooth", "workshop")  # in the order of the course
LESSONS = ["index", *(f"{part}/{path.stem}" for part in PARTS for path in sorted((NBS / part).glob("*.ipynb")))]
DOCUMENTS = r"\.(?:ipynb|qmd|html)$"  # `nbdev_docs` uses this by default, `nbdev_proc_nbs` has to be told


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """`_proc`, as nbdev makes it in a copy of the checkout. Quarto itself would render it; a stub stands in for it."""
    root = tmp_path_factory.mktemp("site")
    copy, programs = root / "checkout", root / "bin"
    copy.mkdir()
    programs.mkdir()
    for name in ("settings.ini", "_quarto.yml", "README.md", "setup.py", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, copy)
    generated = shutil.ignore_patterns("__pycache__", "nbdev.yml", "sidebar.yml", ".ipynb_checkpoints", "outputs")
    for name in ("nbs", "diffusion_lessons"):
        shutil.copytree(CHECKOUT / name, copy / name, symlinks=True, ignore=generated)
    stub = programs / "quarto"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["nbdev_proc_nbs", "--file_re", DOCUMENTS, "--n_workers", "2"],
        cwd=copy, env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return copy / "_proc"


@pytest.fixture(scope="module")
def pages(site) -> dict:
    return {path.relative_to(site).with_suffix("").as_posix(): nbformat.read(str(path), as_version=4)
            for path in sorted(site.rglob("*.ipynb"))}


def markdown(page) -> str:
    """All the text that a page shows: its prose and its reference entries."""
    parts = []
    for cell in page.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        for output in cell.get("outputs", []):
            parts.append(str(output.get("data", {}).get("text/markdown", "")))
    return "\n".join(parts)


def front_matter(page) -> dict:
    return yaml.safe_load(page.cells[0].source.strip().strip("-"))


def addresses(pages: dict) -> dict[str, str]:
    """The page behind each address below the site's root: `butterflies/noise.html` is `butterflies/11_noise`."""
    return {(Path(name).parent / front_matter(page)["output-file"]).as_posix(): name for name, page in pages.items()}


def test_every_lesson_becomes_a_page(pages):
    assert sorted(pages) == sorted(LESSONS)


def test_pages_have_titles_descriptions_and_addresses_of_their_own(pages):
    heads = {name: front_matter(page) for name, page in pages.items()}
    assert all(head["title"] and head["description"] for head in heads.values())
    assert len(addresses(pages)) == len(heads)
    assert len({head["title"] for head in heads.values()}) == len(heads)


def test_the_sidebar_lists_the_lessons_in_order(site):
    contents = yaml.safe_load((site / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    assert contents[0] == "index.ipynb" and [part["section"].lower() for part in contents[1:]] == list(PARTS)
    listed = [path for part in contents[1:] for path in sorted(site.glob(part["contents"]))]
    assert [path.relative_to(site).with_suffix("").as_posix() for path in listed] == LESSONS[1:]


def test_addresses_derive_from_the_settings(site):
    website = yaml.safe_load((site / "nbdev.yml").read_text())["website"]
    custom = yaml.safe_load((site / "_quarto.yml").read_text())
    assert custom["metadata-files"] == ["nbdev.yml"]
    assert website["repo-url"].startswith("https://github.com/")
    assert "repo-url" not in custom["website"] and "title" not in custom["website"]


def test_every_exported_name_is_documented(pages):
    """Functions and classes have a reference entry with their signature; constants stand in a source that is shown."""
    missing = []
    for path in sorted((CHECKOUT / "diffusion_lessons").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        notebook = re.search(r"File to edit: \.\.(?:/\.\.)*/nbs/(.+?)\.ipynb", text)
        if not notebook or path.name == "_modidx.py":
            continue
        page = pages[notebook[1]]
        shown = markdown(page) + "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")
        tree = ast.parse(text)
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    found = f"### {name}\n" in markdown(page) if name in defined else re.search(rf"\b{name}\b", shown)
                    missing += [] if found else [f"{path.stem}.{name}"]
    assert not missing


def test_reference_entries_show_signatures_and_sources_are_shown(pages):
    page = pages["workshop/72_figures"]
    entry = next(
        output["data"]["text/markdown"]
        for cell in page.cells if cell.cell_type == "code" and "show_doc(make_grid)" in cell.source
        for output in cell.outputs
    )  # fmt: skip
    assert "rows:int" in entry and "row by row" in entry
    assert any("def make_grid(" in cell.source for cell in page.cells if cell.cell_type == "code")


def test_figures_reach_the_pages(pages, site):
    for name, page in pages.items():
        stored = nbformat.read(str(site.parent / "nbs" / f"{name}.ipynb"), as_version=4)
        count = [
            sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))
            for notebook in (stored, page)
        ]
        assert count[0] == count[1], name


def test_what_serves_the_machinery_is_hidden(pages):
    for name, page in pages.items():
        code = "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")
        assert "nbdev_export(" not in code and "%pip" not in code and "default_exp" not in code, name
        assert name == "index" or "colab-badge.svg" in markdown(page), name


def heading_ids(page) -> set[str]:
    """Anchors of a page's headings, as Quarto makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", markdown(page), re.MULTILINE)
    return {re.sub(r"[^\w\s.-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_relative_link_resolves(pages, site):
    broken = []
    for name, page in pages.items():
        here = Path(name).parent
        text = re.sub(r"```.*?```|`[^`\n]*`", "", markdown(page), flags=re.DOTALL)
        for target in re.findall(r"\]\(<?([^)\s>]+)", text):
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            path = os.path.normpath(here / place)
            other = name if not place else addresses(pages).get(path, path.removesuffix(".ipynb"))
            if other in pages:
                if anchor and place.endswith(".ipynb") and anchor not in heading_ids(pages[other]):
                    broken.append(f"{name}: {target} (no such heading)")
            elif not (site / path).exists():
                broken.append(f"{name}: {target}")
    assert not broken


def test_links_to_the_site_itself_lead_to_its_pages(pages, site):
    """nbdev links `names` in backticks to their reference entry, by the address of the published site."""
    root = yaml.safe_load((site / "nbdev.yml").read_text())["website"]["site-url"]
    pattern = re.compile(rf"{re.escape(root)}/([^)#\s\"]*)")
    linked = {target for page in pages.values() for target in pattern.findall(markdown(page))}
    assert linked <= set(addresses(pages)) | {""}


@pytest.mark.parametrize("name", LESSONS)
def test_pages_convert_to_html(name, pages):
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(pages[name])
    assert front_matter(pages[name])["title"] and len(body) > 1000
    assert "<h2" in body
