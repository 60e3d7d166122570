"""Write the links of the lessons and the site: badges, install cells, addresses of the repository, from settings.ini.

    python .ci/links.py            update the files
    python .ci/links.py --check    change nothing; exit 1 and name the files that are out of date

A notebook may begin with the line `{{badge}}`, or with the badge that this became. It gets a cell of its own, because
nbdev turns the cell that holds the title into the head of the page and drops the rest of it. A lesson that defines a
module gets a cell before its first code cell that installs the package where it is missing, as in Colab. Anywhere,
`{{git_url}}` and `{{doc_url}}` become addresses, and commands that clone or install from GitHub are brought up to date.
So is the address of the repository in `_quarto.yml`.
"""
import argparse
import configparser
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE_LINE = re.compile(rf"\A(\{{\{{badge\}}\}}|\[!\[[^\]]*\]\({re.escape(BADGE_IMAGE)}\)\]\([^)]*\))[ ]*(\n\s*|\Z)")
NAVBAR = re.compile(r"(- icon: github\n +href: )\S+")
INSTALL_MARK = "# In Colab, run this cell first."
BADGE_ID, INSTALL_ID = "colab-badge", "colab-install"


def settings() -> dict[str, str]:
    """The project's settings, with `%(name)s` filled in."""
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def badge(project: dict[str, str], relative: str) -> str:
    """The Colab badge of the notebook at `relative` below the folder of notebooks."""
    place = f"{project['user']}/{project['repo']}/blob/{project['branch']}/{project['nbs_path']}/{relative}"
    return f"[![Open in Colab]({BADGE_IMAGE})](https://colab.research.google.com/github/{place})"


EXTRAS = {"jax": "jax"}  # what the lessons of a part need besides: folder, and module to look for


def install_source(project: dict[str, str], part: str = "") -> str:
    """The cell that installs the package in Colab, with the extra of a part; it leaves an installed one alone."""
    extra = f"[{part}]" if part in EXTRAS else ""
    wanted = [project["lib_name"], *([EXTRAS[part]] if extra else [])]
    missing = " or ".join(f'importlib.util.find_spec("{name}") is None' for name in wanted)
    return "\n".join(
        [
            "#| hide",
            "#| eval: false",
            f"{INSTALL_MARK} Where the package is installed already, it does nothing.",
            "import importlib.util",
            "",
            f"if {missing}:",
            f'    %pip install -q "{project["lib_name"]}{extra} @ git+{project["git_url"]}"',
        ]
    )


def with_addresses(source: str, project: dict[str, str]) -> str:
    """Text in which the addresses are those of settings.ini."""
    source = source.replace("{{git_url}}", project["git_url"])
    source = source.replace("{{doc_url}}", project["doc_host"] + project["doc_baseurl"])
    return re.sub(r"(git\+|git clone )https://github\.com/[\w.-]+/[\w-]+", rf"\g<1>{project['git_url']}", source)


def update(notebook, relative: str, project: dict[str, str]) -> None:
    """Bring one notebook's links up to date, in place."""
    for cell in notebook.cells:
        cell.source = with_addresses(cell.source, project)
    first = notebook.cells[0]
    if match := BADGE_LINE.match(first.source):
        if rest := first.source[match.end() :]:
            first.source = rest
            notebook.cells.insert(0, nbformat.v4.new_markdown_cell(id=BADGE_ID))
        notebook.cells[0].source = badge(project, relative)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.source.startswith("#| default_exp") for cell in code):
        return
    present = next((cell for cell in code if INSTALL_MARK in cell.source), None)
    if present is None:
        present = nbformat.v4.new_code_cell(id=INSTALL_ID)
        notebook.cells.insert(notebook.cells.index(code[0]), present)
    present.source = install_source(project, Path(relative).parts[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    options = parser.parse_args()
    project, stale = settings(), []
    folder = ROOT / project["nbs_path"]
    for path in sorted(folder.glob("**/*.ipynb")):
        relative = path.relative_to(folder)
        if any(part.startswith((".", "_")) for part in relative.parts):
            continue
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        update(notebook, relative.as_posix(), project)
        if nbformat.writes(notebook) != before:
            stale.append(relative.as_posix())
            if not options.check:
                nbformat.write(notebook, path)
    site = ROOT / "_quarto.yml"
    before = site.read_text(encoding="utf-8")
    after = NAVBAR.sub(rf"\g<1>{project['git_url']}", before)
    if after != before:
        stale.append(site.name)
        if not options.check:
            site.write_text(after, encoding="utf-8")
    if options.check and stale:
        print(f"links out of date in {', '.join(stale)}: run `make links`")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
