"""What nbdev's site lacks: it takes these processors and this renderer from settings.ini (`procs`, `renderer`).

The notebooks stay as they are; only the copies that Quarto renders are changed. `make docs` puts this folder on
PYTHONPATH, where nbdev looks for `pages`.
"""
import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from execnb.nbio import mk_cell
from fastcore.docments import get_name
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

OPEN_LINES = 10  # exported source of the workshop that is longer is closed
BADGE = re.compile(r"\[!\[([^\]]+)\]\(([^)]+)\)\]\(([^)]+)\)")
FOLD = '#| code-fold: {}\n#| code-summary: "{}"\n'
NBDEV_FOLD = FOLD.format("show", "Exported source")  # what nbdev writes before exported cells
HUB = re.compile(r"push_to_hub=True|snapshot_download\(|[\"'](?!outputs/)[\w-]+/[\w.-]+[\"']")
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)
HEADINGS = {"Args": "Arguments"}


def cell_body(source: str) -> list[ast.stmt]:
    """The statements of a cell; none where it is not Python, as with `%` and `!`."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def inline_badge(cell) -> None:
    """Leave a badge in its line: an image alone in a paragraph becomes a figure, and its alt text the caption."""
    if cell.cell_type == "markdown" and (match := BADGE.fullmatch(cell.source.strip())):
        alt, image, address = match.groups()
        cell.source = f'<a class="badge-link" href="{address}"><img src="{image}" alt="{alt}"></a>'


class number_title(Processor):
    """Write a lesson's number before its title: so it stands in the sidebar, in the search and in `Next`, too."""

    def begin(self) -> None:
        number = re.match(r"\d\d(?=_)", Path(self.nb.path_).name)
        head = self.nb.cells[0]
        if number and head.cell_type == "raw":
            fields = yaml.safe_load(head.source.strip().strip("-"))
            fields["title"] = f"{number[0]} · {fields['title']}"
            head.source = f"---\n{yaml.dump(fields, allow_unicode=True)}---\n"


class fold_plumbing(Processor):
    """Close imports, and long exported source in the workshop; what the author of a cell has said goes first."""

    def cell(self, cell) -> None:
        if cell.cell_type != "code" or not cell.source:
            return
        own = cell.source.removeprefix(NBDEV_FOLD)
        exported, body = own != cell.source, cell_body(own)
        long = "workshop" in Path(self.nb.path_).parts and own.count("\n") >= OPEN_LINES
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)  # constants have no entry
        if "code-fold:" in cell.directives_:
            cell.source = own  # the same key twice would be no YAML
        elif body and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
            cell.source = FOLD.format("true", "Imports") + own
        elif exported and long and defines:
            cell.source = FOLD.format("true", "Exported source") + own


def not_run(cell) -> str | None:
    """The mark of a code cell that a reader sees, and that has not run: why, as far as its text tells."""
    flags = cell.directives_
    skipped = flags.get("eval:") == ["false"] or {"cuda", "slow"} & set(flags)
    if cell.cell_type != "code" or not skipped or "hide" in flags or flags.get("echo:") == ["false"]:
        return None
    works = any(not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign) for node in cell_body(cell.source))
    if cell.outputs or not (works or "eval:" in flags):
        return None
    if "with_sliders(" in cell.source:
        return "To move the slider, open this lesson in Jupyter or Colab; not run here."
    hub = HUB.search(cell.source)
    gpu = "cuda" in cell.source or "cuda" in flags or (hub and "train" in cell.source)  # a training at full size
    needs = [what for what, needed in (("a GPU", gpu), ("the Hub", hub)) if needed]
    return f"Needs {' and '.join(needs)}; not run here." if needs else "Not run here."


class mark_not_run(Processor):
    """Write below each cell that was passed over that it was."""

    def begin(self) -> None:
        for index, cell in reversed(list(enumerate(self.nb.cells))):
            if mark := not_run(cell):
                self.nb.cells.insert(index + 1, mk_cell(f"::: {{.not-run}}\n{mark}\n:::", "markdown"))


def as_list(section: re.Match) -> str:
    """A section of a docstring as a list: `images: the pictures` becomes an item that begins with the name in code."""
    items = []
    for entry in re.split(r"\n(?= {4}\S)", section[2].rstrip()):
        names, _, text = " ".join(entry.split()).partition(": ")
        items.append(f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {text}")
    return f"**{HEADINGS.get(section[1], section[1])}**\n\n" + "\n".join(items) + "\n\n"


def flag_table(config: type) -> str:
    """The fields that a dataclass adds to its bases, with flag, default and help; empty where none has help."""
    rows = []
    for field in dataclasses.fields(config):
        if field.name in inspect.get_annotations(config) and "help" in field.metadata:
            flags = "<br>".join(f"`{flag}`" for flag in [f"--{field.name}", *field.metadata["aliases"]])
            kinds = [field.type, *get_args(field.type)]
            values = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
            choices = f" ({', '.join(f'`{value}`' for value in values)})" if values else ""
            default = "" if field.default is None else f"`{field.default}`"
            # in prose two hyphens would become a dash, and a bar would end the column
            help = re.sub(r"--\w+", r"`\g<0>`", field.metadata["help"]).replace("|", r"\|")
            rows.append(f"| {flags} | {default} | {help}{choices} |")
    head = ["::: {.flags}", "| flag | default | meaning |", "|-----------|-----|------------------|"]
    return "\n".join([*head, *rows, ":::"]) if rows else ""


class Entry(BasicMarkdownRenderer):
    """A reference entry: arguments as a list, and of a config its flags in the place of a call with sixty of them."""

    def __init__(self, sym, **options) -> None:
        if isinstance(sym, type) and type(sym).__call__ is not type.__call__:  # a metaclass calls it, as Flax's does
            own = inspect.signature(sym.__init__, eval_str=True)
            sym.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])
        super().__init__(sym, **options)
        self.text, self.docs = SECTION.sub(as_list, self.docs).strip(), ""  # nbdev would set its first line in italics
        if dataclasses.is_dataclass(sym) and (flags := flag_table(sym)):
            bases = [base for base in map(get_name, sym.__bases__) if base != "object"]
            inherited = f"\n\nBesides, the flags of {', '.join(f'`{base}`' for base in bases)}." if bases else ""
            self.dm = f"class {self.nm}({', '.join(bases)})".replace("()", "")
            self.text += f"\n\n{flags}{inherited}"

    def _repr_markdown_(self) -> str:
        return f"{super()._repr_markdown_()}\n\n{self.text}"
