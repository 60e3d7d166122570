"""What the ablations compare: subjects, constants, conditions, tables, and the paper's own numbers.

Only the standard library, so that a table can be made where nothing else is installed.
"""
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

SUBJECTS = (221, 121, 28, 258)  # seeds of `meadow.subject`
SEEDS = (0, 1)  # of the runs, for each subject
NOUN, WRONG_NOUN, IDENTIFIER = "butterfly", "fish", "sks"
REAL = "real pictures"  # what is measured without any model


@dataclass(frozen=True)
class Constants:
    """All that is the same in every run. Results of other constants are kept apart."""

    steps: tuple[int, ...] = (50, 100, 200, 400, 800)  # when the longest runs are looked at
    usual: int = 200  # steps of a run, where they are not what is compared
    warmup: int = 20  # steps until the learning rate, constant from there on, is reached
    learning_rate: float = 1e-3
    other_rates: tuple[float, ...] = (1e-4, 3e-4, 3e-3)
    lora_rate: float = 5e-3  # adapters take a larger one than weights
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    prior_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 2.0)  # besides 1
    instances: int = 5  # pictures of the subject
    batch: int = 2
    resolution: int = 64
    class_images: int = 48
    ema_decay: float = 0.99
    places: tuple[str, ...] = ("snow", "night", "sea")  # where the subject is drawn, besides nowhere in particular
    pictures: int = 8  # of each of these prompts
    class_pictures: int = 16  # of the class's prompt
    new_pictures: int = 24  # real ones of the subject that no run has seen
    solver_steps: int = 12
    guidance: float = 5.0
    noise: int = 1000  # seed of the first picture's noise, the same for every model and prompt


TINY = Constants(steps=(1, 2, 3, 4, 5), usual=3, warmup=1, class_images=2, pictures=2, class_pictures=2, new_pictures=2,
                 places=("snow",), solver_steps=1)  # fmt: skip


def prompt(noun: str | None = NOUN, place: str | None = None, identifier: bool = True) -> str:
    """A sentence as the miniature knows them, with or without identifier, noun and place."""
    words = ["a photo of a", IDENTIFIER if identifier else None, noun, f"on {place}" if place else None]
    return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Condition:
    """A kind of run: in which fields of `DreamBoothConfig` it differs from the base, and when it is looked at."""

    name: str
    looks: tuple[int, ...]  # optimizer steps, rising; at 0 it is the untouched model
    fields: Mapping[str, Any] = field(default_factory=dict)
    noun: str | None = NOUN  # what the subject is called in the prompts that it learns and that draw it
    instances: int = 5  # how many of the subject's pictures it learns from


def conditions(constants: Constants) -> dict[str, Condition]:
    """All conditions by name, the longest first; each is run once for a subject and a seed, and serves all tables."""
    usual, all_looks = (constants.usual,), constants.steps
    without = {"with_prior_preservation": False}
    made = [Condition("base", (0, *all_looks)), Condition("without prior", all_looks, without)]
    made += [Condition(f"rate {rate:g}", all_looks[:4], {"learning_rate": rate}) for rate in constants.other_rates]
    made += [Condition("no class noun", usual, noun=None), Condition("wrong class noun", usual, noun=WRONG_NOUN)]
    made += [Condition(f"{number} of {constants.instances} pictures", usual, instances=number)
             for number in range(1, constants.instances)]  # fmt: skip
    made.append(Condition("text encoder", usual, {"train_text_encoder": True}))
    adapters = {"lora": True, "learning_rate": constants.lora_rate}
    made += [Condition(f"LoRA, rank {rank}", usual, adapters | {"rank": rank}) for rank in constants.ranks]
    made += [Condition(f"prior weight {weight:g}", usual, {"prior_loss_weight": weight})
             for weight in constants.prior_weights]  # fmt: skip
    return {each.name: each for each in made}


@dataclass(frozen=True)
class Run:
    """One training: a condition with a subject and a seed; or, without a condition, the subject's real pictures."""

    condition: Condition | None
    subject: int
    seed: int | None

    @property
    def name(self) -> str:
        """The name of the condition."""
        return self.condition.name if self.condition else REAL

    @property
    def looks(self) -> tuple[int, ...]:
        """When the model is looked at; never, where there is none."""
        return self.condition.looks if self.condition else ()

    def __str__(self) -> str:
        return f"{self.name}, subject {self.subject}" + (f", seed {self.seed}" if self.seed is not None else "")

    def key(self, kind: Mapping[str, str], pictures: str) -> str:
        """Twelve hexadecimal digits that change with all that decides the result.

        kind: fingerprints of constants and weights. pictures: the fingerprint of the subject's pictures.
        """
        about = asdict(self.condition) if self.condition else None
        text = json.dumps([dict(kind), pictures, about, self.subject, self.seed], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def constants_fingerprint(constants: Constants) -> str:
    """Twelve hexadecimal digits that change with any of the constants."""
    return hashlib.blake2b(json.dumps(asdict(constants), sort_keys=True).encode(), digest_size=6).hexdigest()


def all_runs(constants: Constants, subjects: Sequence[int], seeds: Sequence[int], names: Sequence[str]
             ) -> Iterator[Run]:  # fmt: skip
    """The runs that these tables need: what is quick first, then seed by seed, so that tables fill evenly."""
    needed = {row.condition for name in names for row in TABLES[name].rows(constants)}
    if REAL in needed:
        yield from (Run(None, subject, None) for subject in subjects)
    chosen = [each for each in conditions(constants).values() if each.name in needed]
    yield from (Run(condition, subject, seed) for seed, condition, subject in product(seeds, chosen, subjects))


# ── the tables ───────────────────────────────────────────────────────────────────────────

COLUMNS = {
    "DINO": "subject fidelity by the eye: mean cosine between drawn and real pictures of the subject; more is better",
    "CLIP-I": "the same by the miniature's CLIP",
    "CLIP-T": "prompt fidelity: mean cosine between a picture and its prompt without the identifier, by that CLIP; "
              "more is better",
    "place": "share of the pictures with a place in the prompt in which the judge sees that place",
    "PRES": "the eye's mean cosine between drawn pictures of the class and real ones of the subject; less is better",
    "DIV": "mean distance, by the eye, between pictures of the subject from one prompt; more is better",
    "DIV, CLIP": "the same by the CLIP's layers",
    "class DIV": "mean distance, by the eye, between pictures of the class; more is better",
    "class DIV, CLIP": "the same by the CLIP's layers",
}  # fmt: skip
Values = Mapping[str, Mapping[str, float]]  # by row's label and column


@dataclass(frozen=True)
class Row:
    """A row of a table: whose results, when they were looked at, and where it stands in a curve."""

    label: str
    condition: str
    step: str
    x: float | None = None
    curve: str = ""


Rows = Sequence[Row]


@dataclass(frozen=True)
class Paper:
    """What the paper says to a table: its numbers by row, in groups of rows that are compared with each other."""

    source: str
    groups: Sequence[Values] = ()
    has_such_table: bool = True


@dataclass(frozen=True)
class Table:
    """One of the tables: its rows, its columns, and how its figure is drawn."""

    title: str
    columns: tuple[str, ...]
    rows: Any  # of Constants, to Rows
    paper: Any  # of Constants, to Paper
    shown: tuple[str, ...]  # the columns in the figure
    axis: str | None = None  # what the curves run over; None: a point for each row


NO_TABLE = Paper("The paper has no such table.", has_such_table=False)
# Ruiz et al. 2023, DreamBooth, arXiv:2208.12242v2.
TABLE_1 = Paper("Table 1: DreamBooth on Stable Diffusion, 30 subjects of 4 to 6 photographs. (On Imagen: DINO 0.696, "
                "CLIP-I 0.812, CLIP-T 0.306.) It has no row for the untouched model.",
                [{"real pictures, among themselves": {"DINO": 0.774, "CLIP-I": 0.885},
                  "DreamBooth": {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305}}])  # fmt: skip
WITH, WITHOUT = "with prior", "without prior"
OF_TABLE_3 = {WITH: {"PRES": 0.493, "DIV": 0.391, "DINO": 0.684, "CLIP-I": 0.815, "CLIP-T": 0.308},
              WITHOUT: {"PRES": 0.664, "DIV": 0.371, "DINO": 0.712, "CLIP-I": 0.828, "CLIP-T": 0.306}}  # fmt: skip
TABLE_3 = Paper("Table 3: Imagen, 15 subjects. Its DIV is LPIPS between pictures of the subject from one prompt.",
                [OF_TABLE_3])  # fmt: skip
TABLE_4 = Paper("Table 4: Imagen, 5 subjects; the wrong noun was drawn at random.",
                [{"correct class noun": {"DINO": 0.744, "CLIP-I": 0.853},
                  "no class noun": {"DINO": 0.303, "CLIP-I": 0.607},
                  "wrong class noun": {"DINO": 0.454, "CLIP-I": 0.728}}])  # fmt: skip


def table_5(constants: Constants) -> Paper:
    """The means of the two rows of the supplement's table, backpack and dog, for one to five pictures."""
    backpack, dog = (0.494, 0.515, 0.596, 0.604, 0.597), (0.798, 0.851, 0.871, 0.876, 0.864)
    means = {_pictures(number): {"DINO": round((a + b) / 2, 4)}
             for number, (a, b) in enumerate(zip(backpack, dog, strict=True), 1)}  # fmt: skip
    return Paper("Table 5, in the supplement: the mean of its two subjects, a backpack and a dog. (Its Table 6, for "
                 "prompt fidelity, repeats numbers of Table 5 and their means, and is not used.)", [means])  # fmt: skip


def table_3_at_each_step(constants: Constants) -> Paper:
    """Its numbers, at whatever step ours are measured: the paper has one number of steps only, about 1000."""
    groups = [{f"{label}, {step} steps": {name: values[name] for name in ("DINO", "PRES", "DIV")}
               for label, values in OF_TABLE_3.items()} for step in constants.steps]  # fmt: skip
    return Paper("The paper has no such table: each number of steps is compared with its Table 3, from about 1000 "
                 "steps of Imagen.", groups, has_such_table=False)  # fmt: skip


def _pictures(number: int) -> str:
    return f"{number} picture" + "s" * (number != 1)


def _of_real(constants: Constants) -> Rows:
    usual = str(constants.usual)
    return [Row("real pictures, among themselves", REAL, "among"), Row("real pictures, new ones", REAL, "new"),
            Row("DreamBooth", "base", usual), Row("untouched model", "base", "0")]  # fmt: skip


def _of_prior(constants: Constants) -> Rows:
    return [Row(WITH, "base", str(constants.usual)), Row(WITHOUT, "without prior", str(constants.usual))]


def _of_nouns(constants: Constants) -> Rows:
    names = {"correct class noun": "base", "no class noun": "no class noun", "wrong class noun": "wrong class noun"}
    return [Row(label, name, str(constants.usual)) for label, name in names.items()]


def _of_numbers(constants: Constants) -> Rows:
    total = constants.instances
    return [Row(_pictures(number), f"{number} of {total} pictures" if number < total else "base", str(constants.usual),
                number) for number in range(1, total + 1)]  # fmt: skip


def _of_steps(constants: Constants) -> Rows:
    curves = product({WITH: "base", WITHOUT: "without prior"}.items(), constants.steps)
    return [Row("untouched model", "base", "0"),
            *(Row(f"{label}, {step} steps", name, str(step), step, label)
              for (label, name), step in curves)]  # fmt: skip


def _of_rates(constants: Constants) -> Rows:
    rates = sorted([*constants.other_rates, constants.learning_rate])
    return [Row(f"rate {rate:g}, {step} steps", "base" if rate == constants.learning_rate else f"rate {rate:g}",
                str(step), step, f"rate {rate:g}") for rate, step in product(rates, constants.steps[:4])]  # fmt: skip


def _of_parts(constants: Constants) -> Rows:
    names = {"UNet": "base", "UNet and text encoder": "text encoder"}
    names |= {f"LoRA, rank {rank}": f"LoRA, rank {rank}" for rank in constants.ranks}
    return [Row(label, name, str(constants.usual)) for label, name in names.items()]


def _of_weights(constants: Constants) -> Rows:
    return [Row(f"weight {weight:g}", "base" if weight == 1 else f"prior weight {weight:g}", str(constants.usual),
                weight) for weight in sorted([*constants.prior_weights, 1.0])]  # fmt: skip


TABLES = {
    "a": Table("Real pictures, DreamBooth, untouched model", ("DINO", "CLIP-I", "CLIP-T", "place"), _of_real,
               lambda constants: TABLE_1, ("DINO", "CLIP-I", "CLIP-T")),
    "b": Table("With and without the prior-preservation loss",
               ("PRES", "DIV", "DINO", "CLIP-I", "CLIP-T", "DIV, CLIP", "class DIV", "class DIV, CLIP"),
               _of_prior, lambda constants: TABLE_3, ("PRES", "DINO", "DIV", "class DIV")),
    "c": Table("The class noun", ("DINO", "CLIP-I", "CLIP-T", "place", "PRES"), _of_nouns,
               lambda constants: TABLE_4, ("DINO", "CLIP-I", "PRES")),
    "d": Table("How many pictures of the subject", ("DINO", "CLIP-I", "CLIP-T", "place", "PRES", "DIV"), _of_numbers,
               table_5, ("DINO", "CLIP-T", "DIV"), "pictures of the subject"),
    "e": Table("Fidelity and drift against steps", ("DINO", "CLIP-T", "place", "PRES", "DIV", "class DIV"), _of_steps,
               table_3_at_each_step, ("DINO", "CLIP-T", "PRES", "DIV"), "optimizer steps"),
    "f": Table("Learning rate and steps", ("DINO", "CLIP-T", "place", "PRES", "DIV"), _of_rates,
               lambda constants: NO_TABLE, ("DINO", "PRES"), "optimizer steps"),
    "g": Table("What is trained", ("DINO", "CLIP-I", "CLIP-T", "place", "PRES", "DIV"), _of_parts,
               lambda constants: NO_TABLE, ("DINO", "CLIP-T", "PRES")),
    "h": Table("The weight of the prior-preservation loss", ("DINO", "CLIP-T", "PRES", "DIV", "class DIV"), _of_weights,
               lambda constants: NO_TABLE, ("DINO", "PRES", "class DIV"), "weight of the prior"),
}  # fmt: skip
