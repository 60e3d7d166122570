"""The sources of the site: processed as for Quarto, then read for what a reader would miss."""
import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter

CHECKOUT = Path(__file__).resolve().parent.parent
NBS = CHECKOUT / "nbs"
PARTS = ("butterflies", "miniature", "dreambooth", "jax", "workshop")  # in the order of the course
OPENING = ["index", *(path.stem for path in sorted(NBS.glob("[0-9]*.ipynb")))]
LESSONS = OPENING + [f"{part}/{path.stem}" for part in PARTS for path in sorted((NBS / part).glob("*.ipynb"))]
BESIDE = ["dreambooth/ablations.md", "glossary.md"]  # pages that are no lessons
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
    for name in ("nbs", "diffusion_lessons", ".ci"):
        shutil.copytree(CHECKOUT / name, copy / name, symlinks=True, ignore=generated)
    stub = programs / "quarto"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join([str(copy / ".ci"), *filter(None, [os.environ.get("PYTHONPATH")])])  # as `make docs` does
    done = subprocess.run(
        ["nbdev_proc_nbs", "--file_re", DOCUMENTS, "--n_workers", "2"],
        cwd=copy, env={**os.environ, "PATH": path, "PYTHONPATH": modules}, capture_output=True, text=True,
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


def options(cell) -> dict:
    """What a code cell tells Quarto; a key that is there twice is an error, to Quarto as well."""
    lines = [line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")]
    keys = [line.partition(":")[0] for line in lines]
    assert len(set(keys)) == len(keys), lines
    return yaml.safe_load("\n".join(lines)) or {}


def code_cells(page) -> list:
    return [cell for cell in page.cells if cell.cell_type == "code"]


def entry(page, name: str) -> str:
    """The reference entry of a name."""
    cell = next(cell for cell in code_cells(page) if f"show_doc({name})" in cell.source)
    return "".join(cell.outputs[0]["data"]["text/markdown"])


def test_pages_have_titles_descriptions_and_addresses_of_their_own(pages):
    heads = {name: front_matter(page) for name, page in pages.items()}
    assert all(head["title"] and head["description"] for head in heads.values())
    assert len(addresses(pages)) == len(heads)
    assert len({head["title"] for head in heads.values()}) == len(heads)


def test_the_sidebar_lists_the_lessons_in_order(site):
    contents = yaml.safe_load((site / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    sections = [part for part in contents if isinstance(part, dict)]
    assert [part["section"].lower() for part in sections] == list(PARTS)
    assert [*sections, *BESIDE] == contents[-len(PARTS) - len(BESIDE) :]
    assert all((site / name).is_file() for name in BESIDE)
    opening = [name for name in contents if isinstance(name, str)]
    assert [f"{name}.ipynb" for name in OPENING] == [name for name in opening if name.endswith(".ipynb")]
    listed = [path for part in sections for path in sorted(site.glob(part["contents"]))]
    assert [path.relative_to(site).with_suffix("").as_posix() for path in listed] == LESSONS[len(OPENING) :]


def test_titles_begin_with_the_numbers_of_the_lessons(pages):
    """Quarto takes the titles for the sidebar, the breadcrumbs, the search and the links to the next page."""
    for name, page in pages.items():
        number = Path(name).name[:2]
        assert name == "index" or front_matter(page)["title"].startswith(f"{number} · "), name


def test_files_of_the_site_are_there(site):
    """nbdev copies them beside the pages, and Quarto finds them by these names."""
    custom = yaml.safe_load((site / "_quarto.yml").read_text())
    for name in (custom["format"]["html"]["css"], custom["website"]["favicon"], "404.qmd"):
        assert (site / name).is_file(), name


def test_formulas_are_drawn_by_one_version_and_kept_as_text_in_markdown(site):
    formats = yaml.safe_load((site / "_quarto.yml").read_text())["format"]
    math = formats["html"]["html-math-method"]
    assert math["method"] == "katex" and re.search(r"/katex@\d+\.\d+\.\d+/dist/$", math["url"])
    assert "+tex_math_dollars" in formats["commonmark"]["variant"]


def test_no_page_needs_widgets(pages):
    """With an output of HTML, Quarto loads RequireJS, and a KaTeX whose address is named does not load beside it."""
    kinds = {kind for page in pages.values() for cell in code_cells(page) for output in cell.outputs
             for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "html" in kind or "widget" in kind or "javascript" in kind]


def test_llms_txt_lists_every_page_in_order(pages, site):
    target = site.parent / "llms.txt"
    subprocess.run([sys.executable, ".ci/llms.py", target], cwd=site.parent, check=True)
    text = target.read_text(encoding="utf-8")
    root = yaml.safe_load((site / "nbdev.yml").read_text())["website"]["site-url"]
    found = re.findall(rf"^- \[.+?\]\({re.escape(root)}/(.+?)\.md\): \S", text, re.MULTILINE)
    places = addresses(pages)
    assert found[-len(BESIDE) :] == [name.replace(".md", ".html") for name in BESIDE]
    assert [places[address] for address in found[: -len(BESIDE)]] == LESSONS
    assert text.startswith("# ") and "\n> " in text


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
    assert "rows: int" in entry(page, "make_grid") and "row by row" in entry(page, "make_grid")
    assert any("def make_grid(" in cell.source for cell in code_cells(page))


def test_arguments_are_lists(pages):
    text = entry(pages["workshop/72_figures"], "show_images")
    assert "**Arguments**\n\n- `images`: pictures as" in text and "\n- `cols`: images in a row, at most." in text
    for name, page in pages.items():
        assert not re.search(r"^(Args|Returns|Yields|Raises):$", markdown(page), re.MULTILINE), name


SIGNATURE = re.compile(r"^### (.+)\n\n```python\n((?:.*\n)+?)```\n((?:.*\n?)*)", re.MULTILINE)


def entries(pages: dict) -> list[tuple[str, str, str]]:
    """Of every reference entry, page and name, the signature, and the text below it."""
    texts = [("".join(output["data"]["text/markdown"]), f"{name}: ")
             for name, page in pages.items() for cell in code_cells(page) if "show_doc(" in cell.source
             for output in cell.outputs]  # fmt: skip
    return [(where + match[1], match[2], match[3]) for text, where in texts if (match := SIGNATURE.search(text))]


def test_arguments_of_one_paragraph_are_lists_too(pages):
    """`images: the pictures. size: in pixels.` is short in a docstring, and hard to read on a page."""
    known = entries(pages)
    assert len(known) > 700
    for name, signature, text in known:
        named = "|".join(re.findall(r"\b(\w+)(?=: |=|,|\)$)", signature)) or "-"
        said = "\n".join(line for line in text.splitlines() if not line.startswith(("- ", "|")))
        said = re.sub(r"\s+", " ", said)
        run_on = re.search(rf"(?:^ ?|[.;)] )(?:{named})(?:, (?:{named}))*: [^*]+", said)
        assert not run_on, f"{name}: {run_on[0]}"
    (source,) = [text for name, _, text in known if name == "workshop/77_sets: Source"]
    assert source.count("\n- ") == 4, "what stands beside the fields of a class"


def test_an_argument_is_no_link_to_a_function_of_its_name(pages):
    for name, _, text in entries(pages):
        assert not re.search(r"^- (?:`\w+`, )*\[`\w+`\]\([^)]*\)[,:]", text, re.MULTILINE), name


def test_signatures_say_what_one_passes_and_nothing_of_the_machine(pages):
    """A default may be the environment of whoever made the site, or a table: its name says more."""
    for name, signature, _ in entries(pages):
        assert "environ(" not in signature and not re.search(r"\bat 0x|<\w", signature), f"{name}: {signature[:200]}"
        assert "*args" not in signature, f"{name}: a NamedTuple, exception or protocol has a form of its own"
        assert all(len(line) <= 100 for line in signature.splitlines()), f"{name}: {signature[:400]}"
        assert name.rpartition(" ")[2][0].islower() or signature.startswith("class "), signature
    shown = {name: signature for name, signature, _ in entries(pages)}
    assert "= HELD_OUT" in shown["miniature/26_miniature: score"]
    assert shown["miniature/20_captions: Said"] == "class Said(attributes: Tensor, brief: Tensor)\n"
    assert shown["workshop/61_commands: Terminated"] == "class Terminated(SystemExit)\n"
    assert "environ(" not in "".join(map(markdown, pages.values()))


def test_alt_text_stands_where_quarto_reads_it(pages):
    """Quarto takes `#|` lines at the head of a cell, and none after `# @title Solution`."""
    for name, page in pages.items():
        for cell in code_cells(page):
            head = list(itertools.takewhile(lambda line: line.startswith("#|"), cell.source.splitlines()))
            late = [line for line in cell.source.splitlines()[len(head) :] if re.match(r"#\| *[\w-]+:", line)]
            assert not late, f"{name}: {late}"
            drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
            described = any(line.startswith("#| fig-alt:") for line in head)
            assert described or not drawn or name == "index", f"{name}: {cell.source[:200]}"


def test_printed_tables_keep_their_columns(pages, site):
    """The lines of a table do not wrap on a phone, those of a sentence do."""
    cell = next(cell for cell in code_cells(pages["miniature/24_latent_diffusion"]) if any(
        "down_blocks.1   (128, 128)" in "".join(output.get("text", "")) for output in cell.outputs))  # fmt: skip
    assert options(cell)["classes"] == "columns"
    marked = [cell for page in pages.values() for cell in code_cells(page) if "classes" in options(cell)]
    assert 20 < len(marked) < sum(len(code_cells(page)) for page in pages.values()) / 4
    css = re.sub(r"/\*.*?\*/", "", (site / "styles.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.search(r"\.columns \.cell-output-stdout > pre > code \{\s*white-space: pre;", css)


def test_classes_that_the_styles_know_are_on_the_pages(pages, site):
    text = "".join(map(markdown, pages.values())) + "".join((site / name).read_text("utf-8") for name in BESIDE)
    assert all(f"::: {{.{name}}}" in text for name in ("flags", "glossary", "not-run"))
    css = (site / "styles.css").read_text(encoding="utf-8")
    assert all(f".{name}" in css for name in ("flags", "glossary", "not-run"))


def visible(formula: str) -> int:
    """About how many signs of a formula one sees."""
    formula = re.sub(r"\\(?:left|right|[bB]ig|math\w+|text|operatorname|[lr]Vert|[!,;:])", "", formula)
    return len(re.sub(r"[{}\s^_\\&]", "", re.sub(r"\\[a-zA-Z]+", "x", formula)))


def test_two_formulas_stand_in_two_lines_unless_they_are_short(pages):
    """A phone has room for about thirty signs; the rest would have to be scrolled into view."""
    for name, page in pages.items():
        for formula in re.findall(r"\$\$(.+?)\$\$", markdown(page), re.DOTALL):
            assert "\\qquad" not in formula or visible(formula) <= 30, f"{name}: {formula}"


def test_a_config_shows_its_flags_with_their_help(pages):
    page = pages["workshop/87_dreambooth_config"]
    text = entry(page, "AdapterOptions")
    assert "| `--rank` | `4` | rank of the adapters, and their alpha |" in text and "(`diffusers`, `kohya`)" in text
    text = entry(page, "DreamBoothConfig")
    assert "| `--seed` |" in text and "--rank" not in text and "AdapterOptions" in text.rsplit(":::", 1)[1]
    assert not re.search(r"(?<![`\w-])--\w", text), "in prose, two hyphens become a dash"


def test_plumbing_is_folded(pages):
    for name, page in pages.items():
        for cell in code_cells(page):
            flags = options(cell)
            body = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))).body
            imports = bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
            defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)
            exported = flags.get("code-summary") == "Exported source"
            long = name.startswith("workshop/") and exported and defines and cell.source.count("\n") > 13
            assert flags.get("code-fold") is True or not (imports or long), f"{name}: {cell.source[:200]}"


def test_cells_that_were_not_run_say_so(pages):
    """Quarto is told not to run the cell; the reader is, too."""
    marks = 0
    for name, page in pages.items():
        for cell, following in zip(page.cells, [*page.cells[1:], None], strict=True):
            marked = following is not None and following.source.startswith("::: {.not-run}\n")
            if cell.cell_type == "code" and options(cell).get("eval") is False:
                assert marked and "not run here" in following.source.lower(), f"{name}: {cell.source[:200]}"
                marks += 1
            assert not marked or not cell.outputs, f"{name}: {cell.source[:200]}"
    assert marks >= 10
    train = pages["dreambooth/37_train"]
    assert any("Needs a GPU and the Hub; not run here." in cell.source for cell in train.cells)


def test_names_in_backticks_become_links(pages, site):
    declared = {point.value for point in entry_points(group="nbdev")}
    assert "diffusion_lessons._modidx:d" in declared, "install the package again: setup.py has changed"
    root = yaml.safe_load((site / "nbdev.yml").read_text())["website"]["site-url"]
    assert sum(markdown(page).count(f"`]({root}/") for page in pages.values()) > 100
    assert "[source](https://github.com/" in entry(pages["workshop/72_figures"], "show_images")


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
        for cell in code_cells(page):
            lines = [line for line in cell.source.splitlines() if line and not line.startswith("#")]
            assert not lines or not all(re.search(r"\.cleanup\(\)$|^os\.chdir\(", line) for line in lines), name
        assert name == "index" or re.search(r'^<a [^>]+><img src="\S+colab-badge.svg" alt="Open in Colab"></a>$',
                                            markdown(page), re.MULTILINE), name  # fmt: skip


def heading_ids(page) -> set[str]:
    """Anchors of a page's headings, as Quarto makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", markdown(page), re.MULTILINE)
    return {re.sub(r"[^\w\s.-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_relative_link_resolves(pages, site):
    broken, places = [], addresses(pages)
    for name, page in pages.items():
        here = Path(name).parent
        text = re.sub(r"```.*?```|`[^`\n]*`", "", markdown(page), flags=re.DOTALL)
        for target in re.findall(r"\]\(<?([^)\s>]+)", text):
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            path = os.path.normpath(here / place)
            other = name if not place else places.get(path, path.removesuffix(".ipynb"))
            if other in pages:
                if anchor and place.endswith(".ipynb") and anchor not in heading_ids(pages[other]):
                    broken.append(f"{name}: {target} (no such heading)")
            elif not (site / path).exists():
                broken.append(f"{name}: {target}")
    assert not broken


def test_links_to_the_site_itself_lead_to_its_pages(pages, site, checkout):
    """nbdev links `names` in backticks to their reference entry, by the address of the published site."""
    root = yaml.safe_load((site / "nbdev.yml").read_text())["website"]["site-url"]
    pattern = re.compile(rf"{re.escape(root)}/([^)#?\s\"]*)")
    linked = {target for page in pages.values() for target in pattern.findall(markdown(page))}
    assert linked <= set(addresses(pages)) | {"", "try/index.html"}  # what `make web` lays out is no notebook
    assert "try/index.html" in linked and (checkout / "web/page/index.html").is_file()


def test_links_to_entries_lead_to_headings(pages, site):
    """nbdev has an address for each method, too; but only functions and classes have an entry."""
    root = yaml.safe_load((site / "nbdev.yml").read_text())["website"]["site-url"]
    places = {address: heading_ids(pages[name]) for address, name in addresses(pages).items()}
    pattern = re.compile(rf"{re.escape(root)}/([^)#?\s\"]+)#([^)\s\"]+)")
    links = {(name, *found) for name, page in pages.items() for found in pattern.findall(markdown(page))}
    broken = [link for link in sorted(links) if link[1] in places and link[2] not in places[link[1]]]
    assert len(links) > 100 and not broken


def test_settings_and_places_in_links_to_the_page_that_draws_are_known_to_it(pages, checkout):
    text = (checkout / "web/page/index.html").read_text(encoding="utf-8")
    links = {link for page in pages.values() for link in re.findall(r"/try/index\.html([?#][^)\s\"]*)", markdown(page))}
    assert len(links) >= 3
    for link in links:
        query, _, place = link.removeprefix("?").partition("#")
        assert not place or f'id="{place}"' in text, link
        assert all(f'name="{setting.partition("=")[0]}"' in text for setting in query.split("&") if setting), link


@pytest.mark.parametrize("name", LESSONS)
def test_pages_convert_to_html(name, pages):
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(pages[name])
    assert front_matter(pages[name])["title"] and len(body) > 1000
    assert "<h2" in body
