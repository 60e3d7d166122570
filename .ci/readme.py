"""Make README.md from nbs/index.ipynb, with links and images that work at the top of the repository."""
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NBS = "nbs"
IMAGES = "index_files"  # the figures of the index, beside README.md
NOTE = f"<!-- made by `make readme` from {NBS}/index.ipynb; edit that -->\n"
RELATIVE = re.compile(rf"(\]\(|<img[^>]*\ssrc=\")(?![a-z]+:|#|/|{IMAGES}/)([^)\"\s]+)")
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*?)[ \t]*$", re.MULTILINE)


def visible(cell) -> bool:
    """Whether the cell is for readers, not for nbdev alone."""
    flags = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
    return not ({"hide", "default_exp"} & set(flags) or flags.get("include") == "false")


def prepared(notebook):
    """The notebook without hidden cells, hidden sources and directives."""
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if visible(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            flags = dict(DIRECTIVE.findall(cell.source))
            cell.metadata["alt"] = flags.get("fig-alt", flags.get("fig-cap", "figure")).strip("\"'")
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            cell.metadata["transient"] = {"remove_source": flags.get("echo") == "false" or "hide_input" in flags}
    return notebook


def from_the_top(match: re.Match) -> str:
    """A link relative to the folder of notebooks, as seen from the top of the repository."""
    target = match[2]
    return match[1] + (target.removeprefix("../") if target.startswith("../") else f"{NBS}/{target}")


def main() -> None:
    notebook = prepared(nbformat.read(ROOT / NBS / "index.ipynb", as_version=4))
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": "index", "output_files_dir": IMAGES}
    )
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            body = re.sub(rf"!\[\w+\]\(({IMAGES}/index_{index}_\d+\.)", rf"![{cell.metadata.alt}](\1", body)
    body = re.sub(r"^[ ]+$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n{3,}", "\n\n", RELATIVE.sub(from_the_top, body)).strip() + "\n"
    (ROOT / "README.md").write_text(NOTE + "\n" + body, encoding="utf-8")
    shutil.rmtree(ROOT / IMAGES, ignore_errors=True)
    for name, content in resources.get("outputs", {}).items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
