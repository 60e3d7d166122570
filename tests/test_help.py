"""`--help`: in groups, readable at 80 columns, nothing left out and nothing twice."""

import re
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from diffusion_lessons.butterflies.config import PRESETS, TrainingConfig, parse_butterflies
from diffusion_lessons.dreambooth.config import (
    DREAMBOOTH_PRESETS,
    DreamBoothConfig,
    OtherModelOptions,
    parse_dreambooth,
)
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig, parse_generation
from diffusion_lessons.engine.command_line import LaunchOptions, describe_flag, field_groups, parse_command_line
from diffusion_lessons.engine.config import RunConfig, option
from diffusion_lessons.jax.config import DREAMBOOTH_JAX_PRESETS, DreamBoothJaxConfig, parse_dreambooth_jax


@dataclass
class Drawing:
    """How it is drawn."""

    strokes: int = option(4, "strokes of a drawing", aliases=["--lines"])
    pens: Literal["thin", "a pen that is thick", "a brush"] = option("thin", "what it is drawn with: " + "ink " * 30)


@dataclass
class Sketch(RunConfig, Drawing):
    """A run that draws.

    This line is no heading.
    """

    seed: int = option(7, "another seed")
    colour: bool = option(True, "in colour")


def parse_sketch(argv):
    return parse_command_line(argv, Sketch, {"tiny": {}}, "sketch")


def parse_stage(argv):
    from diffusion_lessons.miniature.autoencoder import AutoencoderConfig

    return parse_command_line(argv, AutoencoderConfig, {"autoencoder": {}}, "diffusion_lessons.miniature autoencoder")


def stage_config():
    from diffusion_lessons.miniature.autoencoder import AutoencoderConfig

    return AutoencoderConfig


COMMANDS = {
    "train-butterflies": (parse_butterflies, lambda: TrainingConfig, PRESETS),
    "train-dreambooth": (parse_dreambooth, lambda: DreamBoothConfig, DREAMBOOTH_PRESETS),
    "train-dreambooth-jax": (parse_dreambooth_jax, lambda: DreamBoothJaxConfig, DREAMBOOTH_JAX_PRESETS),
    "generate-images": (parse_generation, lambda: GenerationConfig, None),
    "diffusion_lessons.miniature autoencoder": (parse_stage, stage_config, {"autoencoder": {}}),
    "sketch": (parse_sketch, lambda: Sketch, {"tiny": {}}),
}


@pytest.fixture(params=COMMANDS)
def helped(request, capsys):
    """A command's name, its classes of fields, its presets, and what it answers to `--help`."""
    parse, config_class, presets = COMMANDS[request.param]
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert not stop.value.code
    classes = [config_class()] if presets is None else [LaunchOptions, config_class()]
    return request.param, classes, presets, capsys.readouterr().out


def listed(text: str) -> dict[str, list[str]]:
    """The names of the fields under each heading."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            heading = line
        elif match := re.match(r"  --(\w+)", line):
            found.setdefault(heading, []).append(match[1])
    return found


def described(text: str) -> dict[str, str]:
    """What is said of each field, in one line."""
    blocks = re.findall(r"^  --(\w+)(.*(?:\n    .*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(f"--{name}{block}".split()) for name, block in blocks}


def test_it_fits_in_80_columns_and_its_usage_in_a_line(helped):
    prog, _, _, text = helped
    lines = text.splitlines()
    assert lines[:2] == [f"usage: {prog} [--flag VALUE ...]", ""]
    assert not [line for line in lines if len(line) > 80 or line != line.rstrip()]
    assert text.isascii(), "a terminal that knows no more can print it"


def test_every_field_stands_under_a_heading_once(helped):
    _, classes, _, text = helped
    names = [name for group in listed(text).values() for name in group]
    assert sorted(names) == sorted(each.name for kind in classes for each in fields(kind))
    assert "" not in listed(text)


def test_its_order_is_the_one_of_the_dataclass(helped):
    _, classes, _, text = helped
    assert [name for group in listed(text).values() for name in group] == [
        each.name for kind in classes for each in fields(kind)]  # fmt: skip


def test_headings_are_the_first_lines_of_the_groups_docstrings(helped):
    _, classes, _, text = helped
    groups = {owner: members for kind in classes for owner, members in field_groups(kind).items()}
    wanted = {owner.__doc__.splitlines()[0].removesuffix("."): [each.name for each in members]
              for owner, members in groups.items()}  # fmt: skip
    found = {" ".join(heading.split()): names for heading, names in listed(text).items()}
    for heading, names in wanted.items():
        assert names == next(found[end] for end in found if heading.endswith(end)), heading
    assert max(len(members) for members in groups.values()) <= 10, "a group can be read at once"


def test_names_meaning_and_default_are_shown(helped):
    _, classes, _, text = helped
    said = described(text)
    for each in (each for kind in classes for each in fields(kind)):
        names = [f"--{each.name}", *each.metadata["aliases"], *([f"--no_{each.name}"] if each.default is True else [])]
        ending = each.metadata["help"] + ("" if each.default is None else f" (default: {each.default})")
        assert said[each.name].startswith(", ".join(names)) and said[each.name].endswith(" ".join(ending.split()))


def test_presets_are_named(helped):
    _, _, presets, text = helped
    if presets is not None:
        assert f"A preset ({', '.join(presets)})" in " ".join(text.split())


def test_what_is_refused_stands_at_the_end():
    for kind, refused in (
        (TrainingConfig, {"preserve_input_precision"}),
        (DreamBoothConfig, {each.name for each in fields(OtherModelOptions)}),
    ):
        *others, last = field_groups(kind).values()
        assert {each.name for each in last} == refused
        assert not [each for group in others for each in group if each.metadata["help"].startswith("refused")]


def test_a_field_with_another_default_stays_where_it_was_declared():
    groups = {owner.__name__: [each.name for each in members] for owner, members in field_groups(Sketch).items()}
    assert groups["Drawing"] == ["strokes", "pens"] and groups["Sketch"] == ["colour"]
    assert "seed" in groups["BatchOptions"] and next(iter(groups)) == "Drawing"
    seed = next(each for each in field_groups(Sketch)[owner_of("seed")] if each.name == "seed")
    assert describe_flag(seed, int) == ["  --seed INT", "        another seed (default: 7)"]


def owner_of(name: str) -> type:
    """The group of a field."""
    return next(owner for owner, members in field_groups(Sketch).items() if name in [each.name for each in members])


@pytest.mark.parametrize(
    "annotation, default, line",
    [
        (int | None, None, "  --it INT"),
        (float, 0.5, "  --it FLOAT"),
        (str, "x", "  --it TEXT"),
        (list[str] | None, None, "  --it TEXT [TEXT ...]"),
        (bool, False, "  --it"),
        (bool, True, "  --it, --no_it"),
        (Literal["a", "b"] | None, None, "  --it {a, b}"),
    ],
)
def test_what_follows_a_flag(annotation, default, line):
    @dataclass
    class One:
        it: annotation = option(default, "a thing")

    ending = "" if default is None else f" (default: {default})"
    assert describe_flag(fields(One)[0], annotation) == [line, f"        a thing{ending}"]
