"""What nbdev's site lacks: it takes these processors and this renderer from settings.ini (`procs`, `renderer`).

The notebooks stay as they are; only the copies that Quarto renders are changed. `make docs` puts this folder on
PYTHONPATH, where nbdev looks for `pages`.
"""
import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from execnb.nbio import mk_cell
from fastcore.docments import get_name
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

OPEN_LINES = 10  # exported source of the workshop that is longer is closed
BADGE = re.compile(r"\[!\[([^\]]+)\]\(([^)]+)\)\]\(([^)]+)\)")
FOLD = '#| code-fold: {}\n#| code-summary: "{}"\n'
NBDEV_FOLD = FOLD.format("show", "Exported source")  # what nbdev writes before exported cells
HUB = re.compile(r"push_to_hub=True|snapshot_download\(|[\"'](?!outputs/)[\w-]+/[\w.-]+[\"']")
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)
HEADINGS = {"Args": "Arguments"}
LONGEST_DEFAULT = 40  # characters; of a longer one a signature names the constant
SIGNATURE_WIDTH = 100
SENTENCE_AFTER_ARGUMENTS = re.compile(r"(?<=[.;)]) (?=(?:Raises|Returns|Yields|Sources?:)\b)")
OPTION = re.compile(r"^#\| *[\w-]+:")  # what Quarto reads, and only at the head of a cell
LINKED = re.compile(r"\[(`\w+`)\]\([^)]*\)")
ITEM_NAMES = re.compile(rf"^- (?:(?:{LINKED.pattern}|`\w+`)(?:, )?)+:", re.MULTILINE)
METHOD_LINK = re.compile(r"(\]\([^)\s]*#\w+)\.\w+\)")


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


def lead_with_options(cell) -> None:
    """Move the `#|` lines of a cell before its comments: after `# @title Solution`, Quarto would not read them."""
    if cell.cell_type == "code" and cell.source:
        lines = cell.source.split("\n")
        code = next((index for index, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
        head = sorted(lines[:code], key=lambda line: not OPTION.match(line))  # a stable sort
        cell.source = "\n".join(head + lines[code:])


def keep_columns(cell) -> None:
    """Mark a cell that printed a table; on a phone its lines scroll, where sentences wrap."""
    printed = "\n".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
    if cell.get("source") and len(re.findall(r"^.*\S {2,}\S.*$", printed, re.MULTILINE)) >= 2:
        cell.source = f"#| classes: columns\n{cell.source}"


def mend_links(cell) -> None:
    """Of the links that nbdev makes: methods have no heading, so theirs lead to their class; arguments get none."""
    if cell.cell_type == "markdown" and cell.source:
        cell.source = METHOD_LINK.sub(r"\1)", cell.source)
    for output in cell.get("outputs", []):
        for line, text in enumerate(shown := output.get("data", {}).get("text/markdown", [])):
            text = ITEM_NAMES.sub(lambda names: LINKED.sub(r"\1", names[0]), text)
            shown[line] = METHOD_LINK.sub(r"\1)", text)


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


def item(names: str, text: str) -> str:
    """An item of a list of arguments; `names` may be several, with commas between them."""
    return f"- {', '.join(f'`{name}`' for name in names.replace('`', '').split(', '))}: {text}"


def as_list(section: re.Match) -> str:
    """A section of a docstring as a list: `images: the pictures` becomes an item that begins with the name in code."""
    items = []
    for entry in re.split(r"\n(?= {4}\S)", section[2].rstrip()):
        names, _, text = " ".join(entry.split()).partition(": ")
        items.append(item(names, text))
    return f"**{HEADINGS.get(section[1], section[1])}**\n\n" + "\n".join(items) + "\n\n"


def with_lists(text: str, parameters: list[str]) -> str:
    """A docstring in which `images: the pictures. size: in pixels.`, within a paragraph, has become a list."""
    if not parameters:
        return text
    known = rf"`?(?:{'|'.join(parameters)})`?"
    entry = re.compile(rf"(?:^|(?<=[.;)]) )({known}(?:, {known})*): ")
    paragraphs, inside = [], False
    for paragraph in text.split("\n\n"):
        lead, *entries = entry.split(" ".join(paragraph.split()))
        if not entries or paragraph.startswith(("- ", "|", "```", "**", "    ")):
            paragraphs.append(paragraph)
            inside = False
            continue
        items = list(zip(entries[::2], entries[1::2], strict=True))
        *_, (names, said) = items
        said, *after = SENTENCE_AFTER_ARGUMENTS.split(said, maxsplit=1)
        items[-1] = (names, said)
        lead = re.sub(r";$", ".", lead.strip())
        paragraphs += [lead] if lead else []
        paragraphs += [] if inside and not lead else ["**Arguments**"]
        paragraphs += ["\n".join(item(*each) for each in items), *after]
        inside = not after
    return "\n\n".join(paragraphs)


def source_of(name: str) -> tuple[str, ast.AST]:
    """The source of what the package exports under a full name, as text and parsed; empty where there is none."""
    _, path, _ = NbdevLookup()[name] or ("", "", "")
    if path:
        text = (get_config().lib_path.parent / path).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if getattr(node, "name", "") == name.rpartition(".")[2]:
                return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]), node
    return "", ast.Module([], [])


def commented_fields(source: str) -> str:
    """What the comments beside the fields of a class say of them, as a list."""
    fields = re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE)
    items = [item(name, comment) for name, comment in fields if not re.match(r"fmt:|noqa|type:", comment)]
    return "**Fields**\n\n" + "\n".join(items) if items else ""


def constants(tree: ast.AST) -> dict[str, str]:
    """The parameters of a function, or of a class, whose default is written as a name; and the name."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node is tree or node.name == "__init__"):
            plain = [*node.args.posonlyargs, *node.args.args]
            pairs += zip(plain[::-1], node.args.defaults[::-1], strict=False)
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {parameter.arg: ast.unparse(default) for parameter, default in pairs
            if isinstance(default, ast.Name | ast.Attribute)}  # fmt: skip


def shown_type(annotation) -> str:
    """A type, without the modules that its parts come from."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"ForwardRef\('([^']+)'\)|<class '([^']+)'>", lambda found: found[1] or found[2], text)
    return re.sub(r"(?<![\w'.])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text.replace("~", ""))


def shown_parameters(signature: inspect.Signature, names: dict[str, str]) -> list[str]:
    """Each parameter with type and default; a long default by the name of the constant, or as an ellipsis."""
    shown = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in shown):
            shown.append("*")
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + name
        typed = parameter.annotation is not parameter.empty
        text += f": {shown_type(parameter.annotation)}" if typed else ""
        if parameter.default is not parameter.empty:
            value = getattr(parameter.default, "__name__", "") or repr(parameter.default)
            if len(value) > LONGEST_DEFAULT or value.startswith("<"):
                value = names.get(name, "…")
            text += f" = {value}" if typed else f"={value}"
        shown.append(text)
    return shown


def in_lines(head: str, parts: list[str], tail: str) -> str:
    """A signature in one line if it is short, else with its parts between the brackets, in lines of one width."""
    if len(line := f"{head}({', '.join(parts)}){tail}") <= SIGNATURE_WIDTH:
        return line
    lines = textwrap.wrap(" ".join(f"{part},".replace(" ", "\0") for part in parts), SIGNATURE_WIDTH - 4,
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join([f"{head}(", *(f"    {line}".replace("\0", " ") for line in lines), f"){tail}"])


def shown_signature(sym, name: str, signature: inspect.Signature | None, names: dict[str, str]) -> str:
    """How one calls a function or class; of a class that does not say, the bases."""
    parameters = list(signature.parameters.values()) if signature else []
    if isinstance(sym, type):
        if all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
            return with_bases(sym, name)
        return in_lines(f"class {name}", shown_parameters(signature, names), "")
    returns = signature.return_annotation
    tail = "" if returns is signature.empty else f" -> {shown_type(returns)}"
    return in_lines(f"def {name}", shown_parameters(signature, names), tail)


def with_bases(sym: type, name: str) -> str:
    """The first line of a class."""
    bases = [get_name(base) for base in sym.__bases__ if base is not object]
    return in_lines(f"class {name}", bases, "") if bases else f"class {name}"


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
        source, tree = source_of(self.fn)
        self.dm = shown_signature(self.sym, self.nm, self.sig, constants(tree))
        self.text = with_lists(SECTION.sub(as_list, self.docs), list(self.sig.parameters) if self.sig else []).strip()
        self.docs = ""  # nbdev would set its first line in italics
        if dataclasses.is_dataclass(sym) and any("help" in field.metadata for field in dataclasses.fields(sym)):
            self.dm = with_bases(sym, self.nm)
            named = ", ".join(f"`{get_name(base)}`" for base in sym.__bases__ if base is not object)
            flags = flag_table(sym)
            self.text += f"\n\n{flags}" if flags else ""
            self.text += f"\n\n{'Besides, the' if flags else 'The'} flags of {named}." if named else ""
        elif isinstance(sym, type) and (fields := commented_fields(source)):
            self.text += f"\n\n{fields}"

    def _repr_markdown_(self) -> str:
        return f"{super()._repr_markdown_()}\n\n{self.text}"
