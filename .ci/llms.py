"""Write llms.txt of the site: what it is about, and every page as Markdown, in the order of the sidebar.

    python .ci/llms.py _docs/llms.txt
"""
import re
import sys
from pathlib import Path

import nbformat
import yaml
from links import ROOT, settings

HEAD = re.compile(r"^# (.+?)\s*\n+> (.+?)\s*$", re.MULTILINE)


def head(page: Path) -> tuple[str, str]:
    """Title and description of a notebook, or of a page in Markdown."""
    if page.suffix == ".md":
        matter = yaml.safe_load(page.read_text(encoding="utf-8").split("---")[1])
        return matter["title"], matter["description"]
    prose = (cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "markdown")
    return HEAD.search("\n\n".join(prose)).groups()


def entry(page: Path, folder: Path, site: str) -> str:
    """One line: number and title, the address of the page as Markdown, the description."""
    title, description = head(page)
    number, name = re.fullmatch(r"(?:(\d\d)_)?(\w+)", page.stem).groups()
    address = f"{site}/{page.parent.relative_to(folder).as_posix()}/{name}.html.md".replace("/./", "/")
    return f"- [{number} · {title}]({address}): {description}".replace("[None · ", "[")


def index() -> str:
    """The text of llms.txt."""
    project = settings()
    folder, site = ROOT / project["nbs_path"], project["doc_host"] + project["doc_baseurl"]
    blocks = [f"# {project['title']}", f"> {project['description']}"]
    for part in yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]:
        heading, pattern = (part["section"], part["contents"]) if isinstance(part, dict) else (None, part)
        entries = "\n".join(entry(path, folder, site) for path in sorted(folder.glob(pattern)))
        blocks.append(f"## {heading}\n\n{entries}" if heading else entries)
    return "\n\n".join(block for block in blocks if block) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(index(), encoding="utf-8")
