"""Does the eye know an individual again? A table on many triples, and on pictures that tuned models drew.

    python benchmarks/eye.py                 # about five minutes on one core

A triple asks: is the second picture the one of the first, or the third? The second shows the same individual
elsewhere, the third a stranger in the same place. On renders the strangers are lookalikes. For pictures that models
drew, models are tuned to three subjects as the preset `quick` does it: the first picture is drawn by one of them, the
second is a render of its subject in another place, and the third is what another model drew for the same prompt from
the same noise. One pair of subjects is different, one shares its marks and a colour.

Writes benchmarks/results/eye.json: for the eye, the CLIP and the judge the share of triples that are right.
"""
import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import measuring
import subject
import torch
from torch import Tensor

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.config import DREAMBOOTH_PRESETS
from diffusion_lessons.engine.checkpoints import write_json
from diffusion_lessons.engine.tracking import say
from diffusion_lessons.metrics import CLIPEncoder
from diffusion_lessons.miniature.eye import EyeEncoder, Triples, examine, recognised
from diffusion_lessons.miniature.judge import JudgeEncoder
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.figures import make_grid
from diffusion_lessons.pictures.meadow import PLACES

RESULTS = Path(__file__).parent / "results"
PAIRS = {"drawn, two different subjects": (221, 258), "drawn, two lookalikes": (221, 121)}
QUICK = {name: DREAMBOOTH_PRESETS["quick"][name] for name in ("learning_rate", "lr_scheduler", "lr_warmup_steps")}


def draw_subjects(seeds: Iterable[int], steps: int, number: int) -> dict[int, Tensor]:
    """What models draw that were tuned to these subjects, so many pictures in each place: uint8 (N, 3, 64, 64)."""
    of_class = subject.class_source(miniature.load())
    with tempfile.TemporaryDirectory() as folder:
        return {seed: subject.taught(seed, steps, of_class, folder, PLACES, number, **QUICK) for seed in seeds}


def drawn_triples(drawn: dict[int, Tensor], pair: tuple[int, int], number: int) -> Triples:
    """Each picture that one of two models drew, with renders of its subject elsewhere, and the other model's picture.

    drawn: of each model, uint8 (places · number, 3, 64, 64), place by place.
    """
    rows = []
    for one, other in (pair, pair[::-1]):
        renders = subject.pixels_of(meadow.subject(5 * len(PLACES), 64, one))
        for index, picture in enumerate(drawn[one]):
            elsewhere = [each for at, each in enumerate(renders) if at % len(PLACES) != index // number]
            rows += [(picture, each, drawn[other][index]) for each in elsewhere]
    return Triples(*(torch.stack(column) for column in zip(*rows, strict=True)))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=1000, help="how many triples of renders")
    parser.add_argument("--steps", type=int, default=300, help="of each model")
    parser.add_argument("--number", type=int, default=4, help="pictures of each model in each of six places")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Tune three models, ask three encoders, write what they said."""
    given, start = options(), time.monotonic()
    torch.set_num_threads(1)
    drawn, vae = draw_subjects({*sum(PAIRS.values(), ())}, given.steps, given.number), miniature.load().vae
    asked = {name: drawn_triples(drawn, pair, given.number) for name, pair in PAIRS.items()}
    table = {}
    for name, encode in (("eye", EyeEncoder()), ("CLIP", CLIPEncoder("miniature")), ("judge", JudgeEncoder())):
        table[name] = examine(encode, vae, given.triples)
        table[name] |= {kind: float(recognised(encode, each).float().mean()) for kind, each in asked.items()}
        say(f"{name}: {table[name]}")
    write_json(given.output_dir / "eye.json", {
        "triples": {"renders": given.triples} | {kind: len(each.asked) for kind, each in asked.items()}, "pairs": PAIRS,
        "steps": given.steps, "right": table, "seconds": round(time.monotonic() - start),
        "machine": measuring.about_machine(card=False)})
    make_grid(torch.cat(list(drawn.values())), len(drawn), len(PLACES) * given.number).quantize(128).save(
        given.output_dir / "eye.png", optimize=True)


if __name__ == "__main__":
    main()
