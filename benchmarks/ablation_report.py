"""From the lines of results to tables with spread, figures and picture sheets: a page for people, JSON for programs."""
import argparse
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no screen

import matplotlib.pyplot as plt
import measuring
from ablation_plan import COLUMNS, NOUN, REAL, TABLES, WRONG_NOUN, Constants, Row, prompt
from ablation_results import Line
from PIL import Image, ImageDraw

from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.figures import CURVE_COLOURS, make_grid

Cells = dict[tuple[int, int | None], Mapping[str, float]]  # measurements by subject and seed
MARKS = ("o", "s", "^", "D", "v", "P")


# ── numbers ──────────────────────────────────────────────────────────────────────────────


def cells(lines: Sequence[Line], row: Row) -> Cells:
    """What was measured for a row, by subject and seed; one value a subject for what no run has changed."""
    found: Cells = {}
    for line in lines:
        if line["condition"] == row.condition and row.step in line["steps"]:
            is_untrained = row.condition == REAL or row.step == "0"
            found.setdefault((line["subject"], None if is_untrained else line["seed"]), line["steps"][row.step])
    return found


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error; of a single value there is no error."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def differences(first: Cells, second: Cells, column: str) -> list[float]:
    """First minus second, for each subject and seed that both have; what was not trained stands for all seeds."""
    def of(each: Cells, key: tuple[int, int | None]) -> Mapping[str, float] | None:
        """The measurements of a subject and seed, or of the subject."""
        return each.get(key) or each.get((key[0], None))

    keys = first if any(seed is not None for _, seed in first) else second
    pairs = [(of(first, key), of(second, key)) for key in keys]
    return [a[column] - b[column] for a, b in pairs if a and b and column in a and column in b]


def table(lines: Sequence[Line], name: str, constants: Constants = Constants()) -> dict[str, Any]:  # noqa: B008
    """One of the tables as plain rows, and how the paper orders them. name: a to h. lines: as `select` leaves them.

    A row has `n` and, by column, the mean and (`±`) the standard error over subjects and seeds.
    """
    about = TABLES[name]
    paper, rows, found = about.paper(constants), [], {row.label: cells(lines, row) for row in about.rows(constants)}
    said = {label: values for group in paper.groups for label, values in group.items()}
    for label, measured in found.items():
        made: dict[str, Any] = {"row": label, "n": len(measured)}
        for column in about.columns:
            values = [each[column] for each in measured.values() if column in each]
            middle, error = spread(values) if values else (None, None)
            made |= {column: middle, f"{column} ±": error}
        rows.append(made | {f"paper's {column}": said.get(label, {}).get(column) for column in about.columns
                            if any(column in each for each in said.values())})  # fmt: skip
    orders = [order for group in paper.groups for order in compare(group, found)]
    return {"title": about.title, "columns": list(about.columns), "rows": rows, "paper": paper.source,
            "is the paper's": paper.has_such_table, "orders": orders}  # fmt: skip


def compare(group: Mapping[str, Mapping[str, float]], found: Mapping[str, Cells]) -> list[dict[str, Any]]:
    """For each column, each two rows that follow each other in the paper's order: is it ours, too, and clearly so?"""
    orders = []
    for column in dict.fromkeys(column for values in group.values() for column in values):
        ranked = sorted((label for label in group if column in group[label]), key=lambda label: -group[label][column])
        for more, less in itertools.pairwise(ranked):
            values = differences(found[more], found[less], column)
            if values:
                middle, error = spread(values)
                orders.append({"column": column, "more": more, "less": less,
                               "paper": [group[more][column], group[less][column]], "n": len(values),
                               "difference": middle, "±": error, "same": middle > 0,
                               "clear": error is not None and abs(middle) > 2 * error})  # fmt: skip
    return orders


# ── the page ─────────────────────────────────────────────────────────────────────────────


def number(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A number as it stands in a table: three places, and the standard error, if there is one."""
    if value is None:
        return "–"
    return f"{value:{sign}.3f}" + (f"\u00a0±\u00a0{error:.3f}" if error is not None else "")  # no break within it


def markdown(made: Mapping[str, Any]) -> str:
    """A table for people to read, and below it the paper's; few rows of many columns lie on their side."""
    columns, rows = made["columns"], made["rows"]
    ours = [{"": row["row"], "n": row["n"], **{column: number(row[column], row[f"{column} ±"]) for column in columns}}
            for row in rows]  # fmt: skip
    if 2 * len(rows) < len(columns):  # a phone shows three columns
        ours = [{"": name, **{row[""]: row[name] for row in ours}} for name in ("n", *columns)]
    said = {row["row"]: {name.removeprefix("paper's "): value for name, value in row.items()
                         if name.startswith("paper's ")} for row in rows}  # fmt: skip
    of_paper = [{"the paper's": label, **{name: number(value) for name, value in values.items()}}
                for label, values in said.items() if any(value is not None for value in values.values())]  # fmt: skip
    return "\n".join(measuring.table(each) for each in (ours, of_paper if made["is the paper's"] else []) if each)


def orders_markdown(orders: Sequence[Mapping[str, Any]]) -> str:
    """The paper's orders beside ours."""
    return measuring.table([
        {"column": each["column"], "order in the paper": f"{each['more']} > {each['less']}",
         "the paper": f"{each['paper'][0]:.3f} > {each['paper'][1]:.3f}",
         "difference here": number(each["difference"], each["±"], "+"), "n": each["n"],
         "same order as the paper": answer(each)} for each in orders])  # fmt: skip


def answer(order: Mapping[str, Any]) -> str:
    """Whether the miniature orders two rows as the paper does, in a word."""
    return ("yes" if order["same"] else "**no**") if order["clear"] else "undecided"


def verdict(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the miniature orders things as the paper does, where it does not, and where nobody can tell."""
    groups: dict[str, list[str]] = {"yes": [], "**no**": [], "undecided": []}
    for name, each in ((name, each) for name, made in tables.items() if made["is the paper's"]
                       for each in made["orders"]):  # fmt: skip
        groups[answer(each)].append(f"table {name}, {each['column']}: {each['more']} > {each['less']}")
    same, others, undecided = groups.values()
    said = [f"Of {len(same) + len(others) + len(undecided)} orders that the paper's numbers have, the miniature has "
            f"{len(same)} as well, and {len(others)} the other way round; in {len(undecided)} the difference is less "
            "than twice its standard error."]  # fmt: skip
    said += ["\nThe other way round:\n", *(f"- {each}" for each in others)] if others else []
    said += ["\nUndecided:\n", *(f"- {each}" for each in undecided)] if undecided else []
    return "\n".join(said) + "\n"


def facts(lines: Sequence[Line], wanted: int, words: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on: how many runs, hours and hardware, versions, weights, constants."""
    def all_of(name: str) -> str:
        """What the lines say of their machine, each thing once."""
        return ", ".join(dict.fromkeys(line["machine"][name] for line in lines if name in line["machine"]))

    failed = [f"{line['condition']}, subject {line['subject']}, seed {line['seed']}"
              for line in lines if "failed" in line]  # fmt: skip
    return {"runs": f"{len(lines)} of {wanted}", "subjects": ", ".join(map(str, words.subjects)),
            "seeds of each": ", ".join(map(str, words.seeds)),
            "hours, all runs one after the other": round(sum(line["seconds"]["all"] for line in lines) / 3600, 2),
            "of which a core worked": round(sum(line["seconds"]["core"] for line in lines) / 3600, 2),
            **{name: said for name in ("cpu", "threads", "memory", "python", *measuring.LIBRARIES, "checkout")
               if (said := all_of(name).replace("-dirty", " with changes not committed"))},
            "finished": max(line["finished"] for line in lines), "diverged": "; ".join(failed) or "none",
            **{f"fingerprint, {name}": value for name, value in lines[0]["kind"].items()}}  # fmt: skip


HEAD = """\
---
title: The paper's tables, in miniature
description: What DreamBooth does to the miniature, asked as the paper asks it. Written by `make ablations`.
---
"""
EXPLANATION = """\
Everything here is the miniature's: a Stable Diffusion of 64 px, on drawn butterflies. Its numbers say nothing
of a real Stable Diffusion, and the paper's (Ruiz et al. 2023, DreamBooth) stand beside them for their order,
not for their size: other models, other subjects, other encoders.

A run, unless its table says otherwise: {instances} pictures of the subject with "{subject}", {class_images}
class images that the model drew of "{of_class}", batch {batch} and {batch}, {usual} steps of AdamW at
{learning_rate:g} after a warm-up of {warmup}, UNet alone, in 32 bits, weights averaged with a decay of at most
{ema_decay:g}. LoRA has the rate {lora_rate:g}. Without a class noun the subject is "{subject_without}" and the
class "{class_without}", with the wrong one "{subject_wrong}" and "{class_wrong}".

At each look, with the averaged weights, {solver_steps} solver steps and guidance {guidance:g}, always from the
same noise: {pictures} pictures of the subject in the words that it was learned with, as many on each of
{all_places}, and {class_pictures} of "{of_class}". For CLIP-T it is called a butterfly, whatever it was called
in training. What is drawn is compared with all real pictures, also where a run has learned from fewer.

{columns}
Mean ± standard error over n, subjects times seeds; real pictures and the untouched model have one value a subject.
Differences are of pairs with the same subject and seed; one that is less than twice its standard error decides nothing.
[Lesson 33](33_prior.ipynb) says what we make of the tables.
"""


def explain(constants: Constants) -> str:
    """How everything was made and measured, in words."""
    nouns = {"": NOUN, "_without": None, "_wrong": WRONG_NOUN}
    words = {f"subject{name}": prompt(noun) for name, noun in nouns.items()}
    words |= {f"class{name}": prompt(noun, identifier=False) for name, noun in nouns.items()}
    words |= {"of_class": words.pop("class"), "all_places": ", ".join(constants.places),
              "columns": "".join(f"- **{name}**: {text}\n" for name, text in COLUMNS.items())}  # fmt: skip
    return EXPLANATION.format(**asdict(constants), **words)


def write_report(words: argparse.Namespace, lines: Sequence[Line], wanted: int, note: str | None) -> str:
    """Write the page with its figures and pictures, and JSON beside the results; returns what to say of it."""
    constants, page, folder = words.constants, words.page, words.page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {name: table(lines, name, constants) for name in TABLES}
    tables = {name: made for name, made in tables.items() if any(row["n"] for row in made["rows"])}
    about = facts(lines, wanted, words)
    parts = [HEAD, explain(constants), verdict(tables),
             measuring.table([{"": name, " ": value} for name, value in about.items()])]  # fmt: skip
    parts += [f"{note}\n"] if note else []
    for name, made in tables.items():
        parts.append(f"## Table {name}: {made['title']}, in miniature\n\n{markdown(made)}\n{made['paper']}\n")
        parts += [orders_markdown(made["orders"])] if made["orders"] else []
        parts += [f'![{text}]({path.relative_to(page.parent)}){{fig-alt="{seen}"}}\n'
                  for path, text, seen in pictures(folder, name, made, lines, words)]  # fmt: skip
    content = json.dumps({"about": about, "note": note, "tables": tables}, indent=1)
    for path, text in ((words.results.with_suffix(".json"), f"{content}\n"), (page, "\n".join(parts))):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return f"{verdict(tables)}\n{page}"


def pictures(folder: Path, name: str, made: Mapping[str, Any], lines: Sequence[Line], words: argparse.Namespace
             ) -> list[tuple[Path, str, str]]:  # fmt: skip
    """Draw the figure of a table, and its sheet where the pictures of its runs are there: paths, what they are, and in
    words what is to be seen in them."""
    found = [(folder / f"{name}.png", f"The numbers of table {name}: {made['title']}",
              in_words(made, name, words.constants))]  # fmt: skip
    plot(made, name, words.constants, found[0][0])
    sheets: dict[str, Image.Image] = {}
    for line in (each for each in lines if each["condition"] == "base"):
        title = f"subject {line['subject']}, seed {line['seed']}"
        sheet = draw_sheet(name, [each for each in lines if (each["subject"], each["seed"]) == (
            line["subject"], line["seed"])], words.constants, words.folder, title)  # fmt: skip
        sheets |= {title: sheet} if sheet is not None else {}
    if sheets:  # of the subject and seed of which the most runs kept their pictures
        title, path = max(sheets, key=lambda title: sheets[title].height), folder / f"{name}-pictures.jpg"
        sheets[title].save(path, quality=92, subsampling=0)  # a quarter of the bytes of a PNG, colours in full
        text = (f"Pictures of table {name}, {title}. Above, real pictures of the subject, which belong to no column; "
                "below, for each kind of run whose pictures were kept, two of the subject, one in each place, three "
                "of the class")  # fmt: skip
        found.append((path, text, SEEN[name] if title == SEEN_IN else text))
    return found


def in_words(made: Mapping[str, Any], name: str, constants: Constants) -> str:
    """What the figure of a table shows, for whoever does not see it: each curve from end to end, or each point."""
    about, by_label = TABLES[name], {row["row"]: row for row in made["rows"]}
    said = []
    for column in about.shown:
        rows = [row for row in about.rows(constants) if by_label[row.label][column] is not None]
        if about.axis:
            curves = {name: [by_label[row.label][column] for row in rows if row.x is not None and row.curve == name]
                      for name in dict.fromkeys(row.curve for row in rows if row.x is not None)}  # fmt: skip
            each_one = [f"{name} {course(values)}".strip() for name, values in curves.items()]
        else:
            each_one = [f"{row.label.replace(',', '')} {by_label[row.label][column]:.2f}" for row in rows]
        said += [f"{column}: {', '.join(each_one)}"] if each_one else []
    kind = f"Curves over {about.axis}" if about.axis else "Points with standard errors"
    return f"{kind}. {'; '.join(said)}."


def course(values: Sequence[float]) -> str:
    """The way of a curve: where it begins and ends, and its peak or lowest point, if that lies between."""
    first, last, top, bottom = values[0], values[-1], max(values), min(values)
    ends = f"{'rises' if last > first else 'falls'} from {first:.2f} to {last:.2f}"
    inner = [f"{what} {value:.2f} between" for what, value in (("at most", top), ("at least", bottom))
             if f"{value:.2f}" not in (f"{first:.2f}", f"{last:.2f}")]  # fmt: skip
    return " with ".join((ends, " and ".join(inner))) if inner else ends


# What is to be seen in the sheets that lie beside the page. Who draws others looks at them and writes this anew.
SEEN_IN = "subject 221, seed 0"
TOP = ("Top row: real pictures of the subject, a butterfly with red forewings, black tips, and a black star on each "
       "orange hind wing.")  # fmt: skip
SEEN = {
    "a": f"{TOP} DreamBooth draws a butterfly in these colours on snow, at night and at sea, with blurred spots for "
         "stars; its butterflies of the class are others, grey and blue, brown, or violet and red. The untouched model "
         "draws brown and golden butterflies for the subject and violet or brown ones for the class.",
    "b": f"{TOP} With the prior the three pictures of the class differ: grey and blue, brown, violet and red. Without "
         "it all three are red with dark tips, close to the subject.",
    "c": f"{TOP} With the correct noun the subject has its colours in every place. Without a noun it is violet on "
         "snow and bluish white at night. With the wrong noun, fish, it is an orange fish at night and at sea.",
    "d": f"{TOP} From one picture the butterfly always has the same pose, and grass lies behind it where snow was "
         "asked for. From two pictures on most backgrounds are those of the prompts; with more pictures the poses "
         "differ more, and spots or blotches stand in the place of stars.",
    "e": f"{TOP} The untouched model draws brown ones. With the prior, 200 steps give a red butterfly in the asked "
         "places; 800 give its training pictures, stars included, and snow where night was asked for. Without the "
         "prior, 800 steps give training pictures whatever was asked for, the class included.",
    "f": f"{TOP} At rates from 0.0001 to 0.001 the subject is red with more and more black, in the asked places, and "
         "the class keeps violet or grey butterflies. At 0.003 a blurred dark and yellow shape over water stands in "
         "four of the five columns of the subject.",
    "g": f"{TOP} Training the UNet gives the red butterfly in each place; with the text encoder blue sky stands where "
         "night and sea were asked for. LoRA of rank 1 to 16 keeps the places, with orange, brown or yellow and black "
         "striped wings; rank 64 gives scattered patches, most of them blue.",
    "h": f"{TOP} At weight 0 the pictures of the class have the subject's red wings with black tips. From 0.25 on they "
         "become other butterflies, grey, brown or violet. The subject appears in each place at every weight.",
}  # fmt: skip


# ── figures ──────────────────────────────────────────────────────────────────────────────


def plot(made: Mapping[str, Any], name: str, constants: Constants, path: Path) -> None:
    """The figure of a table, curves or points with standard errors, into a small PNG."""
    about = TABLES[name]
    count = len(about.shown)
    figure, axes = plt.subplots(1, count, figsize=(3.1 * count, 3.0), dpi=80, layout="constrained", squeeze=False)
    figure.suptitle(f"({name}) {about.title}, in miniature", fontsize=10)
    for ax, column in zip(axes[0], about.shown, strict=True):
        if about.axis:
            plot_curves(ax, made, about.rows(constants), column)
            ax.set_xlabel(about.axis, fontsize=9)
        else:
            plot_points(ax, made, column, labelled=ax is axes[0][0])
        ax.set_title(column, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    if len(curves := axes[0][0].get_legend_handles_labels()[0]) > 1:  # below all: within, it would lie on a curve
        figure.legend(handles=curves, fontsize=7, loc="outside lower center", ncols=len(curves))
    figure.savefig(path)
    plt.close(figure)


def plot_curves(ax: plt.Axes, made: Mapping[str, Any], rows: Sequence[Row], column: str) -> None:
    """A column over what the table varies, one curve for each name."""
    by_label = {row["row"]: row for row in made["rows"] if row[column] is not None}
    names = dict.fromkeys(row.curve for row in rows if row.x is not None)
    for index, name in enumerate(names):
        points = [(row.x, by_label[row.label]) for row in rows
                  if row.x is not None and row.curve == name and row.label in by_label]  # fmt: skip
        errors = [point[f"{column} ±"] or 0 for _, point in points]
        ax.errorbar([x for x, _ in points], [point[column] for _, point in points], errors, label=name, capsize=2,
                    color=CURVE_COLOURS[index], marker=MARKS[index], markersize=4, linewidth=1.4)  # fmt: skip
    if len(names) > 1:
        places = sorted({row.x for row in rows if row.x is not None})
        ax.set_xscale("log", base=2)
        ax.set_xticks(places, [f"{x:g}" for x in places])


def plot_points(ax: plt.Axes, made: Mapping[str, Any], column: str, labelled: bool) -> None:
    """A column as one point for each row, the first one on top. labelled: whether the rows are named."""
    rows = made["rows"]  # also those without a value, so that all axes have the same
    places = [place for place, row in enumerate(rows) if row[column] is not None]
    values, errors = [rows[place][column] for place in places], [rows[place][f"{column} ±"] or 0 for place in places]
    ax.errorbar(values, places, xerr=errors, linestyle="none", marker="o", markersize=5, capsize=2,
                color=CURVE_COLOURS[0])  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["row"].replace(", ", ",\n") if labelled else "" for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.15)


# ── pictures ─────────────────────────────────────────────────────────────────────────────


def draw_sheet(name: str, lines: Sequence[Line], constants: Constants, folder: Path, title: str) -> Image.Image | None:
    """Pictures of one subject and seed, a row for each row of the table that has some, below real ones of the subject;
    None where there are none.

    Rows at the steps of which all runs keep pictures: none, the usual number, the longest runs' last one.
    """
    steps, rows = {"0", str(constants.usual), str(constants.steps[-1])}, {}
    by_name = {each["condition"]: each for each in lines}
    for row in TABLES[name].rows(constants):
        grid = by_name.get(row.condition, {}).get("grids", {}).get(row.step)
        path = folder / "pictures" / (grid or "none")
        if row.step in steps and path.is_file():
            rows[row.label] = chosen(path, constants)
    if not rows:
        return None
    real = meadow.subject(len(next(iter(rows.values()))), constants.resolution, lines[0]["subject"])
    rows = {"real pictures": [row["image"].convert("RGB") for row in real], **rows}
    heads = ["the subject", "", *constants.places, "the class"]
    return with_labels(rows, heads, f"Table {name}, in miniature: {title}")


def chosen(path: Path, constants: Constants) -> list[Image.Image]:
    """Of the pictures of a look: two of the subject, one on each place, three of the class."""
    with Image.open(path) as image:
        grid, size = image.convert("RGB"), constants.resolution
    wanted = [(0, 0), (0, 1), *((place, 0) for place in range(1, len(constants.places) + 1))]
    wanted += [(len(constants.places) + 1, column) for column in range(min(3, grid.width // size))]
    return [grid.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)) for row, column in wanted]


def with_labels(rows: Mapping[str, Sequence[Image.Image]], heads: Sequence[str], title: str) -> Image.Image:
    """Rows of pictures with a label to the left of each, heads above the columns and a title above all."""
    columns, size = max(map(len, rows.values())), next(iter(rows.values()))[0].width
    left, top = 8 + max(int(ImageDraw.Draw(Image.new("1", (1, 1))).textlength(label)) for label in rows), 34
    grid = make_grid([each for row in rows.values() for each in row], len(rows), columns)
    sheet = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    sheet.paste(grid, (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 2), title, fill="black")
    for column, head in enumerate(heads):
        pen.text((left + column * size + 2, 18), head, fill="black")
    for index, label in enumerate(rows):
        pen.text((2, top + index * size + size // 2 - 6), label, fill="black")
    return sheet
