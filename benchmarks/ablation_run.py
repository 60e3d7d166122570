"""One run of the ablations: it is trained by the package's own rooms, looked at on its way, and measured."""
import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import measuring
import torch
from ablation_plan import Constants, Run, constants_fingerprint, prompt
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.adapters import AdapterFile
from diffusion_lessons.dreambooth.class_images import GENERATED_NAME
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.loop import dreambooth_loop
from diffusion_lessons.dreambooth.memory import networks_of
from diffusion_lessons.dreambooth.subject import pictures_fingerprint
from diffusion_lessons.dreambooth.training import choose_loss, gather
from diffusion_lessons.engine.commands import RunFailed, one_line
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.optimization import make_optimizer, trained_parameters
from diffusion_lessons.engine.run import Run as Training
from diffusion_lessons.engine.run import start_run
from diffusion_lessons.metrics import (
    CLIPEncoder,
    DINOEncoder,
    FeatureDistance,
    cosine_similarities,
    diversity,
    prior_preservation,
    prompt_fidelity,
    subject_fidelity,
)
from diffusion_lessons.miniature.judge import JudgeEncoder, judge_pictures
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.figures import make_grid
from diffusion_lessons.pictures.files import find_images
from diffusion_lessons.stable_diffusion.drawing import draw

EYES = ("miniature", "judge")  # the second stands in for the first where a test needs one at once
Distance = Callable[[Tensor, Tensor], Tensor]  # of two equally long batches of pictures, (P,)
Measured = dict[str, float]


class Eye(NamedTuple):
    """What tells individuals apart: features of pictures, uint8 (N, 3, H, W) -> (N, D), and a distance of pictures."""

    features: Any
    distance: Distance


def load_eye(name: str = "miniature") -> Eye:
    """The eye of this name; raises InputError where it is not there."""
    encoder = DINOEncoder("miniature") if name == "miniature" else JudgeEncoder()
    return Eye(encoder, FeatureDistance(encoder))


def fingerprint(*networks: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits of the names, shapes and values of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Subject:
    """The real pictures of a subject, encoded: those that a run may learn from, and new ones."""

    pictures: Tensor  # uint8 (N, 3, H, W): first those to learn from, then the new ones
    places: tuple[str, ...]
    by_eye: Tensor
    by_clip: Tensor
    fingerprint: str  # of those to learn from


class Bench:
    """What every run needs besides its own model: constants, encoders, a folder; and what results depend on."""

    def __init__(self, constants: Constants, folder: Path, eye: str = "miniature") -> None:
        self.constants, self.folder = constants, folder
        self.eye, self.clip, self.judge = load_eye(eye), CLIPEncoder("miniature"), JudgeEncoder().model
        networks = {"miniature": list(networks_of(miniature.load()).values()), "CLIP": [self.clip.model],
                    "judge": [self.judge], "eye": [self.eye.features.model]}  # fmt: skip
        self.kind = {"constants": constants_fingerprint(constants),
                     **{name: fingerprint(*each) for name, each in networks.items()}}  # fmt: skip
        facts = measuring.about_machine(card=False)
        self.machine = {name: value for name, value in facts.items() if name != "date"} | {"threads": "1"}
        self._subjects: dict[int, Subject] = {}

    def subject(self, seed: int) -> Subject:
        """The pictures of the subject with this seed."""
        if seed not in self._subjects:
            size, number = self.constants.resolution, self.constants.instances
            rows = meadow.subject(number + self.constants.new_pictures, size, seed)
            arrays = [torch.frombuffer(bytearray(row["image"].convert("RGB").tobytes()), dtype=torch.uint8)
                      .view(size, size, 3).permute(2, 0, 1).contiguous() for row in rows]  # fmt: skip
            pictures = torch.stack(arrays)
            known = pictures_fingerprint([[each.numpy() for each in pictures[:number]]])
            self._subjects[seed] = Subject(pictures, tuple(rows["place"]), self.eye.features(pictures),
                                           self.clip(pictures), known)  # fmt: skip
        return self._subjects[seed]

    def key(self, run: Run) -> str:
        """The key of a run's result, which no other weights, pictures or constants give."""
        return run.key(self.kind, self.subject(run.subject).fingerprint)

    def do(self, run: Run) -> dict[str, Any]:
        """Make a run and return its line; a model that diverges is a result, too, with what was measured before."""
        begin, worked = time.monotonic(), time.process_time()
        line = {"key": self.key(run), "condition": run.name, "subject": run.subject, "seed": run.seed, "steps": {},
                "seconds": {}}  # fmt: skip
        if run.condition is None:
            line["steps"] = self.measure_real(self.subject(run.subject))
        else:
            line |= {"fields": dict(run.condition.fields), "noun": run.condition.noun,
                     "instances": run.condition.instances}  # fmt: skip
            self.train(run, line)
        line["seconds"] |= {"all": time.monotonic() - begin, "core": time.process_time() - worked}
        line["seconds"] = {name: round(value, 2) for name, value in line["seconds"].items()}
        return line | {"pictures": self.subject(run.subject).fingerprint, "kind": self.kind, "machine": self.machine,
                       "finished": f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"}  # fmt: skip

    # --- training ---

    def config(self, run: Run) -> DreamBoothConfig:
        """The run as `train-dreambooth` would get it: the base, and what differs in its condition."""
        constants, condition = self.constants, run.condition
        of_class = prompt(condition.noun, identifier=False)
        base = {"pretrained_model_name_or_path": "miniature", "instance_prompt": prompt(condition.noun),
                "class_prompt": of_class, "with_prior_preservation": True, "num_class_images": constants.class_images,
                "class_data_dir": str(self.folder / "class-images" / of_class.replace(" ", "-")),
                "sample_batch_size": 16, "prior_generation_precision": "fp32", "resolution": constants.resolution,
                "train_batch_size": constants.batch, "learning_rate": constants.learning_rate,
                "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": constants.warmup, "use_ema": True,
                "ema_max_decay": constants.ema_decay, "mixed_precision": "no", "max_train_steps": condition.looks[-1],
                "seed": run.seed, "report_to": "none", "fidelity_model": "none", "checkpointing_steps": 10**6,
                "checkpoints_total_limit": 0}  # fmt: skip
        fields = base | dict(condition.fields) | {"instance_data_dir": str(self.instances(run)),
                                                  "output_dir": str(self.folder / "runs" / self.key(run))}  # fmt: skip
        if not fields["with_prior_preservation"]:
            fields = {name: value for name, value in fields.items() if name not in (
                "class_data_dir", "num_class_images", "sample_batch_size", "prior_generation_precision")}  # fmt: skip
        return DreamBoothConfig(**fields)

    def instances(self, run: Run) -> Path:
        """A folder with the pictures that a run learns from: the first so many of its subject's."""
        subject, number = self.subject(run.subject), run.condition.instances
        folder = self.folder / "instances" / f"{run.subject}-{subject.fingerprint}-{number}"
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
            partial.mkdir(parents=True)
            for index, picture in enumerate(subject.pictures[:number]):
                make_grid(picture[None], 1, 1).save(partial / f"{index}.png")
            with contextlib.suppress(OSError):  # another process was quicker, with the same pictures
                os.rename(partial, folder)
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def train(self, run: Run, line: dict[str, Any]) -> None:
        """Train as `train-dreambooth` does, and look at the chosen steps; what is found goes into the line."""
        config, looks = self.config(run), Looks(self, run, line)
        log = self.folder / "logs" / f"{line['key']}.log"
        shutil.rmtree(config.output_dir, ignore_errors=True)  # of a process that was killed
        with spoken_into(log):
            print(f"{run}: begun by process {os.getpid()}", flush=True)
            try:
                train(config, looks)
            except RunFailed as error:
                if "not finite" not in str(error):
                    raise
                line["failed"] = one_line(error, 200)
            finally:
                shutil.rmtree(config.output_dir, ignore_errors=True)

    # --- measuring ---

    def draw(self, run: Run, pipeline: StableDiffusionPipeline, device: torch.device) -> dict[str, Tensor]:
        """Pictures of the subject by place ("" for none), in the words of the condition; and of the class."""
        constants, noun = self.constants, run.condition.noun
        asked = {place: [prompt(noun, place)] * constants.pictures for place in ("", *constants.places)}
        asked["class"] = [prompt(identifier=False)] * constants.class_pictures
        words = [each for several in asked.values() for each in several]
        seeds = [constants.noise + number for several in asked.values() for number in range(len(several))]
        drawn = draw(pipeline, words, seeds=seeds, num_inference_steps=constants.solver_steps, device=device,
                     guidance_scale=constants.guidance, size=constants.resolution)  # fmt: skip
        return dict(zip(asked, drawn.split([len(several) for several in asked.values()]), strict=True))

    def measure(self, drawn: Mapping[str, Tensor], subject: Subject) -> Measured:
        """All columns of the tables, from pictures as `draw` gives them."""
        constants, real = self.constants, slice(self.constants.instances)
        by_place, of_class = {name: each for name, each in drawn.items() if name != "class"}, drawn["class"]
        of_subject, distances = torch.cat(list(by_place.values())), (self.eye.distance, self.clip.distance)
        by_eye, by_clip = self.eye.features(of_subject), self.clip(of_subject)
        texts = self.clip.texts([prompt(place=place, identifier=False) for place in by_place])
        found = {"DINO": subject_fidelity(by_eye, subject.by_eye[real]),
                 "CLIP-I": subject_fidelity(by_clip, subject.by_clip[real]),
                 "CLIP-T": prompt_fidelity(by_clip, texts.repeat_interleave(constants.pictures, dim=0)),
                 "place": self.place_share(torch.cat([by_place[place] for place in constants.places]),
                                           [place for place in constants.places for _ in range(constants.pictures)]),
                 "PRES": prior_preservation(self.eye.features(of_class), subject.by_eye[real])}  # fmt: skip
        for name, distance in zip(("", ", CLIP"), distances, strict=True):
            found[f"DIV{name}"] = mean(diversity(each, distance) for each in by_place.values())
            found[f"class DIV{name}"] = diversity(of_class, distance)
        return {name: round(value, 5) for name, value in found.items()}

    def measure_real(self, subject: Subject) -> dict[str, Measured]:
        """The subject's real pictures among themselves, none with itself; and new ones beside those."""
        number, total = self.constants.instances, len(subject.pictures)
        pairs = {"among": (slice(number), ~torch.eye(number, dtype=torch.bool)),
                 "new": (slice(number, total), torch.ones(total - number, number, dtype=torch.bool))}  # fmt: skip
        found = {}
        for name, (some, counted) in pairs.items():
            places = subject.places[some]
            texts = self.clip.texts([prompt(place=place, identifier=False) for place in places])
            values = {
                "DINO": cosine_similarities(subject.by_eye[some], subject.by_eye[:number])[counted].mean(),
                "CLIP-I": cosine_similarities(subject.by_clip[some], subject.by_clip[:number])[counted].mean(),
                "CLIP-T": prompt_fidelity(subject.by_clip[some], texts),
                "place": self.place_share(subject.pictures[some], places),
            }
            found[name] = {column: round(float(value), 5) for column, value in values.items()}
        return found

    def place_share(self, pictures: Tensor, places: list[str] | tuple[str, ...]) -> float:
        """The share of pictures in which the judge sees the place that it should."""
        seen = judge_pictures(self.judge, pictures).attributes[:, 2].tolist()
        return mean(float(meadow.PLACES[number] == place) for number, place in zip(seen, places, strict=True))

    def save_grid(self, key: str, step: int, drawn: Mapping[str, Tensor]) -> str:
        """Keep pictures of a look, a row for each prompt; returns the name of the file."""
        name, columns = f"{key}-{step}.png", min(8, self.constants.pictures, self.constants.class_pictures)
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        shown = torch.cat([each[:columns] for each in drawn.values()])
        make_grid(shown, len(drawn), columns).save(self.folder / "pictures" / name, optimize=True)
        return name


class Looks:
    """Called before the first step and after each: at some steps it draws with the averaged weights and measures."""

    def __init__(self, bench: Bench, run: Run, line: dict[str, Any]) -> None:
        self.bench, self.run, self.line = bench, run, line
        self.begin, self.ready, self.looked = time.monotonic(), None, 0.0
        self.pipeline: StableDiffusionPipeline | None = None

    def __call__(self, training: Training) -> None:
        if self.ready is None:
            self.ready = time.monotonic()
        step = training.global_step
        if step in self.run.looks and str(step) not in self.line["steps"]:
            self.look(training, step)
        self.line["seconds"] = {
            "start": self.ready - self.begin, "look": self.looked, "looks": len(self.line["steps"]),
            "step": time.monotonic() - self.ready - self.looked, "steps": step}  # fmt: skip

    def look(self, training: Training, step: int) -> None:
        """Draw, measure and keep what was drawn, as far as it is shown."""
        begin, bench = time.monotonic(), self.bench
        with training.looking(autocast=False):
            drawn = bench.draw(self.run, self.pipeline, training.device)
        self.line["steps"][str(step)] = bench.measure(drawn, bench.subject(self.run.subject))
        if step in (0, bench.constants.usual, self.run.looks[-1]):
            grids = self.line.setdefault("grids", {})
            grids[str(step)] = bench.save_grid(self.line["key"], step, drawn)
        self.looked += time.monotonic() - begin


def train(config: DreamBoothConfig, looks: Looks) -> None:
    """What `train-dreambooth` does, with looks of ours in the place of its own, and nothing left in the end."""
    config = config.resolve()
    check_class_images(config)
    accelerator = make_accelerator(config)
    try:
        looks.pipeline, noise_scheduler, data, models, _ = gather(config, accelerator)
        parameters = [each for model in models.values() for each in trained_parameters(model)]
        looks.line |= {"trained": sum(each.numel() for each in parameters), "data": data.dataset.fingerprint}
        loader = DataLoader(data.dataset, config.train_batch_size, shuffle=True)
        with start_run(config, models, make_optimizer(parameters, config), loader, command="ablations",
                       storage=AdapterFile() if config.lora else None, accelerator=accelerator) as run:  # fmt: skip
            dreambooth_loop(run, config, data, noise_scheduler, choose_loss(config), looks)
    finally:
        forget_accelerator(accelerator)


def check_class_images(config: DreamBoothConfig) -> None:
    """Raise InputError for a picture among the class images that the model did not draw: it would be learned from."""
    folder = Path(config.class_data_dir or "")
    others = [path for path in find_images(folder) if not GENERATED_NAME.fullmatch(path.name)] if (
        config.with_prior_preservation and folder.is_dir()) else []  # fmt: skip
    if others:
        raise InputError(f"--folder: {others[0]} is no class image that the model drew, and every run would learn from "
                         "it; move it away")  # fmt: skip


@contextlib.contextmanager
def spoken_into(log: Path) -> Iterator[None]:
    """Within the block everything that is said goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


