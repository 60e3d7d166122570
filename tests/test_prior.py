"""What reminds the model of the class: the loss by hand, the folder of class images, the table of what became of it."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from dreambooth_runs import CLASS, SUBJECT, class_folder, eye_folder, subject_folder
from PIL import Image

from diffusion_lessons import miniature
from diffusion_lessons.diffusion.samplers import make_sampler
from diffusion_lessons.diffusion.targets import min_snr_weights
from diffusion_lessons.dreambooth import class_images, fidelity
from diffusion_lessons.dreambooth.class_images import (
    GENERATED_NAME,
    RECIPE_FILE,
    check_class_folder,
    ensure_class_images,
    generate_missing,
    generation_recipe,
    missing_numbers,
    pictures_of_subject,
    read_recipes,
    recipe_key,
    subject_notes,
)
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.fidelity import FidelityTable, encoder_key, make_table, score_of, without_words
from diffusion_lessons.dreambooth.prior import prior_preservation_loss
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import forget_accelerator
from diffusion_lessons.engine.precision import Phase, PrecisionPlan, generation_precision
from diffusion_lessons.metrics import CLIPEncoder, DINOEncoder
from diffusion_lessons.pictures import meadow, sets
from diffusion_lessons.stable_diffusion.drawing import training_scheduler
from diffusion_lessons.stable_diffusion.folder import network_fingerprints

IN_32_BITS = PrecisionPlan(torch.device("cpu"))
WEIGHTS = network_fingerprints(Path(miniature.path()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline():
    return miniature.load()


@pytest.fixture
def accelerator():
    made = Accelerator(cpu=True)
    yield made
    forget_accelerator(made)


@pytest.fixture
def quick(monkeypatch):
    """Pictures in one step of 32 px, from the same noise as ever; returns the seeds that were asked for."""
    asked: list[int] = []

    def draw(pipeline, prompts, *, seeds=None, seed=0, **settings):
        asked.extend(seeds if seeds is not None else [])
        settings |= {"num_inference_steps": 1, "size": 32}
        return real_draw(pipeline, prompts, seeds=seeds, seed=seed, **settings)

    real_draw = class_images.draw
    monkeypatch.setattr(class_images, "draw", draw)
    return asked


def ensure(chosen: DreamBoothConfig, pipeline, accelerator, weights: dict = WEIGHTS):
    """The class images of a run with this config, drawn by the pipeline, which passes for one with these weights."""
    return ensure_class_images(chosen, weights, accelerator, IN_32_BITS, lambda: pipeline)


def config(tmp_path: Path, **fields) -> DreamBoothConfig:
    chosen = {"pretrained_model_name_or_path": "miniature", "instance_data_dir": "meadow", "instance_prompt": SUBJECT,
              "class_prompt": CLASS, "class_data_dir": str(tmp_path / "class"), "with_prior_preservation": True,
              "num_class_images": 5, "sample_batch_size": 2, "resolution": 32, "report_to": "none"}  # fmt: skip
    return DreamBoothConfig(**chosen | fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


# --- the loss ---


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_equation_2(size, weighted):
    prediction, target = (torch.randn(2 * size, 4, 3, 3, generator=generator(seed)) for seed in (0, 1))
    weights = torch.rand(2 * size, generator=generator(2)) + 0.1 if weighted else None
    expected = 0.0
    for half, factor in ((range(size), 1.0), (range(size, 2 * size), 0.3)):
        for index in half:
            error = float((prediction[index] - target[index]).square().mean())
            expected += factor * error * (float(weights[index]) if weighted else 1.0) / size
    assert float(prior_preservation_loss(prediction, target, weights, 0.3)) == pytest.approx(expected, rel=1e-5)


def test_min_snr_weighs_each_half_by_its_own_timesteps(pipeline):
    """At batch size 1 a weight that strayed to the other half would still give a number."""
    alphas_cumprod = training_scheduler(pipeline).alphas_cumprod
    weights = min_snr_weights(torch.tensor([0, 900]), alphas_cumprod, 5.0, "epsilon")
    assert weights[0] < 0.01 and weights[1] == 1
    target = torch.zeros(2, 4, 3, 3)
    only_subject, only_class = target.clone(), target.clone()
    only_subject[0], only_class[1] = 1.0, 1.0
    assert float(prior_preservation_loss(only_subject, target, weights)) == pytest.approx(float(weights[0]))
    assert float(prior_preservation_loss(only_class, target, weights)) == pytest.approx(1.0)


def test_the_weight_of_the_prior_is_that_of_its_gradient():
    prediction = torch.ones(4, 4, 2, 2, requires_grad=True)
    prior_preservation_loss(prediction, torch.zeros(4, 4, 2, 2), prior_loss_weight=0.25).backward()
    subject, of_class = prediction.grad.chunk(2)
    torch.testing.assert_close(of_class, 0.25 * subject)
    assert subject.abs().min() > 0


# --- the folder ---


@pytest.mark.parametrize("name", ["thesis.docx", "notes.txt", "archive.zip"])
def test_a_folder_with_something_else_is_refused(tmp_path, name):
    folder = class_folder(tmp_path / "class", 1)
    (folder / name).write_text("mine")
    with pytest.raises(InputError, match=rf"--class_data_dir .*{name}") as caught:
        check_class_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_subfolder_or_a_file_is_refused(tmp_path):
    (tmp_path / "class" / "more").mkdir(parents=True)
    with pytest.raises(InputError, match=r"\(more\)"):
        check_class_folder(tmp_path / "class")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_class_folder(tmp_path / "file")


def test_hidden_files_and_those_of_file_managers_are_passed_over(tmp_path):
    folder = class_folder(tmp_path / "class", 2)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", RECIPE_FILE):
        (folder / name).touch()
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "copy.png").touch()
    check_class_folder(folder)
    assert missing_numbers(folder, "0" * 8, 3) == [0], "two pictures, and none of the hidden ones"
    check_class_folder(tmp_path / "not there yet")


def test_a_folder_that_cannot_be_written_is_input(tmp_path, pipeline, accelerator):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--class_data_dir .*cannot be written"):
        below_a_file = config(tmp_path, class_data_dir=str(tmp_path / "file" / "class"))
        ensure(below_a_file, pipeline, accelerator)


def test_the_folder_is_filled_with_different_pictures_and_their_recipe(tmp_path, pipeline, accelerator, quick, capsys):
    source = ensure(config(tmp_path), pipeline, accelerator)
    recipe = generation_recipe(config(tmp_path), WEIGHTS)
    names = [f"generated-{recipe_key(recipe)}-{number:05d}.png" for number in range(5)]
    assert [Path(name).name for name in source.names] == names and source.key == recipe_key(recipe)
    assert len(set(contents(tmp_path / "class").values())) == 5 and quick == [0, 1, 2, 3, 4]
    assert Image.open(source.open()(4)).mode == "RGB"
    (about,) = read_recipes(tmp_path / "class" / RECIPE_FILE).values()
    assert about == recipe
    assert about["prompt"] == CLASS and about["solver"] == "dpmsolver++"
    assert about["weights"] == " ".join(WEIGHTS.values())
    assert "generating 5 of 5 class images" in capsys.readouterr().out
    check_class_folder(tmp_path / "class")  # what it leaves, it accepts


def test_the_users_own_pictures_are_kept_used_first_and_counted(tmp_path, pipeline, accelerator, quick):
    own = contents(class_folder(tmp_path / "class", 3))
    source = ensure(config(tmp_path), pipeline, accelerator)
    assert [Path(name).name for name in source.names[:3]] == ["00.png", "01.png", "02.png"]
    assert all(GENERATED_NAME.fullmatch(Path(name).name) for name in source.names[3:]) and len(source.names) == 5
    assert quick == [0, 1]
    after = contents(tmp_path / "class")
    assert {name: after[name] for name in own} == own
    # More of one's own than are wanted: the first ones, and nothing is generated.
    again = ensure(config(tmp_path, num_class_images=2), pipeline, accelerator)
    assert [Path(name).name for name in again.names] == ["00.png", "01.png"] and quick == [0, 1]


def test_only_what_is_missing_is_drawn(tmp_path, pipeline, accelerator, quick):
    first = ensure(config(tmp_path), pipeline, accelerator)
    before = contents(tmp_path / "class")
    quick.clear()
    ensure(config(tmp_path), pipeline, accelerator)
    assert quick == [] and contents(tmp_path / "class") == before
    lost = {Path(first.names[number]).name for number in (1, 3)}
    for name in lost:
        (tmp_path / "class" / name).unlink()
    ensure(config(tmp_path, num_class_images=6), pipeline, accelerator)
    assert quick == [1, 3, 5]
    after = contents(tmp_path / "class")
    assert len(after) == 6 and all(after[name] == before[name] for name in before if name not in lost)


def test_another_prompt_or_other_weights_have_pictures_of_their_own(tmp_path, pipeline, accelerator, quick, capsys):
    own, folder = contents(class_folder(tmp_path / "class", 1)), tmp_path / "class"
    of_fish = config(tmp_path, class_prompt="a photo of a fish")
    first = ensure(config(tmp_path), pipeline, accelerator)
    butterflies = contents(folder)
    assert "another prompt" not in capsys.readouterr().out
    second = ensure(of_fish, pipeline, accelerator)
    assert f"4 class images in {folder} were made for another prompt or model: kept" in capsys.readouterr().out
    assert set(first.names) & set(second.names) == {str(folder / name) for name in own}
    assert Image.open(first.open()(4)).mode == "RGB", "the first run still finds what it is about to read"
    third = ensure(of_fish, pipeline, accelerator, WEIGHTS | {"vae": "another"})
    assert len(set(third.names) - set(first.names) - set(second.names)) == 4
    after = contents(folder)
    assert len(after) == 1 + 3 * 4 and all(after[name] == butterflies[name] for name in butterflies)
    prompts = [recipe["prompt"] for recipe in read_recipes(folder / RECIPE_FILE).values()]
    assert prompts == [CLASS, "a photo of a fish", "a photo of a fish"]
    quick.clear()
    assert ensure(config(tmp_path), pipeline, accelerator).names == first.names and quick == []


def test_a_recipe_file_of_the_earlier_format_is_read(tmp_path, pipeline, accelerator, quick):
    (tmp_path / "class").mkdir()
    before = generation_recipe(config(tmp_path, class_prompt="a photo of a fish"), WEIGHTS)
    (tmp_path / "class" / RECIPE_FILE).write_text(json.dumps(before))
    ensure(config(tmp_path), pipeline, accelerator)
    recipes = read_recipes(tmp_path / "class" / RECIPE_FILE)
    assert recipes[recipe_key(before)] == before and len(recipes) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "\xff"])
def test_a_damaged_recipe_file_says_nothing(tmp_path, content):
    (tmp_path / RECIPE_FILE).write_text(content, encoding="latin-1")
    assert read_recipes(tmp_path / RECIPE_FILE) == read_recipes(tmp_path / "none") == {}


def test_a_folder_with_everything_in_it_needs_no_lock(tmp_path, pipeline, accelerator, quick, monkeypatch):
    def none(*_):
        raise PermissionError(13, "Permission denied")

    class_folder(tmp_path / "class", 5)
    before = sorted(path.name for path in (tmp_path / "class").iterdir())
    monkeypatch.setattr(class_images, "held_lock", none)
    source = ensure(config(tmp_path), pipeline, accelerator)
    assert len(source.names) == 5 and sorted(path.name for path in (tmp_path / "class").iterdir()) == before
    with pytest.raises(InputError, match="--class_data_dir .*cannot be written.*name another folder"):
        ensure(config(tmp_path, num_class_images=6), pipeline, accelerator)


def test_a_second_run_says_what_it_waits_for_and_gives_up_in_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sets, "PATIENCE", 0.05)
    monkeypatch.setattr(sets, "LONGEST_WAIT", 0.05)
    second = class_images.held_folder(tmp_path)
    with class_images.held_folder(tmp_path), pytest.raises(InputError) as caught:
        second.__enter__()
    line, message = capsys.readouterr().out, str(caught.value)
    assert line == f"--class_data_dir {tmp_path}: another run draws class images there; waiting for it\n"
    assert message.startswith(f"--class_data_dir {tmp_path}: ") and "name another folder" in message
    with class_images.held_folder(tmp_path):
        assert capsys.readouterr().out == "", "nobody waits for a lock that was let go of"


def test_halves_that_somebody_may_be_writing_are_left_alone(tmp_path, pipeline, accelerator, quick):
    (tmp_path / "class").mkdir()
    key = recipe_key(generation_recipe(config(tmp_path), WEIGHTS))
    young, old = (tmp_path / "class" / f".generated-{key}-0000{number}.png.partial" for number in range(2))
    for half in (young, old):
        half.write_bytes(b"half a picture")
    os.utime(old, (0, 0))
    ensure(config(tmp_path), pipeline, accelerator)
    assert list((tmp_path / "class").glob(".*.partial")) == [young] and young.read_bytes() == b"half a picture"


def test_the_recipe_does_not_ask_where_a_model_lies_or_what_the_runs_seed_is(tmp_path, pipeline):
    key = recipe_key(generation_recipe(config(tmp_path), WEIGHTS))
    same = config(tmp_path, pretrained_model_name_or_path="elsewhere/the-same", seed=7)
    assert recipe_key(generation_recipe(same, WEIGHTS)) == key


def test_a_generation_that_was_killed_goes_on(tmp_path, pipeline, accelerator, quick, monkeypatch):
    whole = contents_of_whole(tmp_path, pipeline, accelerator)
    save, saved = class_images.save_picture, []

    def killed(pixels, path):
        if len(saved) == 3:
            half = path.with_name(f".{path.name}.partial")
            half.write_bytes(b"half a picture")
            os.utime(half, (0, 0))
            raise KeyboardInterrupt
        saved.append(path)
        save(pixels, path)

    monkeypatch.setattr(class_images, "save_picture", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure(config(tmp_path), pipeline, accelerator)
    monkeypatch.setattr(class_images, "save_picture", save)
    assert len(contents(tmp_path / "class")) == 3
    quick.clear()
    ensure(config(tmp_path), pipeline, accelerator)
    assert quick == [3, 4] and not list((tmp_path / "class").glob(".*.partial"))
    assert contents(tmp_path / "class").keys() == whole.keys()
    assert_near(contents(tmp_path / "class"), whole)


def contents_of_whole(tmp_path, pipeline, accelerator) -> dict[str, bytes]:
    """The class images of a run that nobody disturbed."""
    place = tmp_path / "undisturbed"
    ensure(config(tmp_path, class_data_dir=str(place)), pipeline, accelerator)
    return contents(place)


def assert_near(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    """Fail unless both hold the same pictures up to one grey level, which a batch of another size may cost."""
    for name in first:
        one, other = (Image.open(io.BytesIO(each[name])).convert("RGB") for each in (first, second))
        levels = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (one, other))
        assert (next(levels) - next(levels)).abs().max() <= 1, name


def test_two_processes_draw_the_pictures_of_one(tmp_path, pipeline, accelerator, quick):
    whole = contents_of_whole(tmp_path, pipeline, accelerator)
    recipe, shared = generation_recipe(config(tmp_path), WEIGHTS), tmp_path / "shared"
    shared.mkdir()
    numbers = missing_numbers(shared, recipe_key(recipe), 5)
    for rank in range(2):
        quick.clear()
        generate_missing(shared, recipe_key(recipe), numbers[rank::2], recipe, pipeline, batch_size=4, quiet=True)
        assert quick == [[0, 2, 4], [1, 3]][rank]
    assert contents(shared).keys() == whole.keys() and len(set(contents(shared).values())) == 5
    assert_near(contents(shared), whole)


def test_a_process_among_several_draws_its_share(tmp_path, pipeline, accelerator, quick, monkeypatch):
    # What the main process found missing, as broadcast to this one.
    monkeypatch.setattr(class_images, "on_main", lambda accelerator, function: [4, 5, 6, 7, 8])
    second = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2, device=accelerator.device,
                             wait_for_everyone=lambda: None)  # fmt: skip
    (tmp_path / "class").mkdir()
    ensure(config(tmp_path), pipeline, second)
    assert quick == [5, 7]


def test_class_images_have_their_solver_whatever_validates(tmp_path, pipeline, accelerator, quick, monkeypatch):
    """`--validation_scheduler DDPMScheduler` is not for these: 25 of its steps make bad pictures."""
    seen, draw = [], class_images.draw

    def watched(pipeline, prompts, **settings):
        seen.append(pipeline.scheduler)
        return draw(pipeline, prompts, **settings)

    monkeypatch.setattr(class_images, "draw", watched)
    before = pipeline.scheduler
    pipeline.scheduler = validating = make_sampler(training_scheduler(pipeline), "ddpm")
    try:
        ensure(config(tmp_path), pipeline, accelerator)
        assert pipeline.scheduler is validating and isinstance(validating, DDPMScheduler)
    finally:
        pipeline.scheduler = before
    assert {type(each).__name__ for each in seen} == {"DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("precision, on", [(None, None), ("no", None), ("fp32", None), ("bf16", torch.bfloat16)])
def test_the_precision_of_the_generation(precision, on):
    plan = PrecisionPlan(torch.device("cpu"), generation=generation_precision(precision, "cpu"))
    with plan.autocast(Phase.CLASS_IMAGES):
        assert torch.is_autocast_enabled("cpu") == (on is not None)
        assert on is None or torch.get_autocast_dtype("cpu") == on


# --- the subject in the folder of its class ---


def test_pictures_of_the_subject_among_the_class_are_found_by_their_pixels(tmp_path):
    mine, others = subject_folder(tmp_path / "mine"), class_folder(tmp_path / "class")
    found = [sets.folder_source(each) for each in (mine, others)]
    assert pictures_of_subject(*found) == subject_notes(*found) == []
    picture = Image.open(mine / "01.png")
    picture.save(others / "holiday.bmp")  # another format, the same pixels
    (others / "copy.png").write_bytes((mine / "02.png").read_bytes())
    near = picture.copy()
    near.putpixel((0, 0), (1, 2, 3))
    near.save(others / "near.png")
    picture.resize((32, 32)).save(others / "small.png")
    picture.save(others / f"generated-{'0' * 8}-00000.png")  # whatever it shows, a model has drawn it
    (others / "broken.png").write_bytes((mine / "00.png").read_bytes()[:200])
    found[1] = sets.folder_source(others)
    assert [Path(name).name for name in pictures_of_subject(*found)] == ["copy.png", "holiday.bmp"]
    (note,) = subject_notes(*found)
    assert note.startswith("the class folder holds 2 pictures of the subject (copy.png, holiday.bmp)")
    assert note.endswith("take them out of --class_data_dir")


def test_a_picture_on_its_side_is_found_too_and_a_single_one_is_singular(tmp_path):
    mine, others = subject_folder(tmp_path / "mine", 1), class_folder(tmp_path / "class", 1)
    upright = Image.open(mine / "00.png").crop((0, 0, 64, 40))
    upright.save(mine / "00.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, shown upright
    upright.transpose(Image.Transpose.ROTATE_90).save(others / "side.png", exif=exif)
    (note,) = subject_notes(*(sets.folder_source(each) for each in (mine, others)))
    assert "holds 1 picture of the subject (side.png)" in note


# --- the table ---


@pytest.fixture(scope="module")
def encoder():
    return CLIPEncoder("miniature")


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    drawn = (row["image"].convert("RGB").tobytes() for row in meadow.subject(3, 64))
    return torch.stack([torch.frombuffer(bytearray(each), dtype=torch.uint8).reshape(64, 64, 3).permute(2, 0, 1)
                        for each in drawn])  # fmt: skip


def row(step: int, score: float) -> dict:
    return {"step": step, "subject": 0.5, "class": 0.25, "prompt": 0.25, "score": score}


def make(path: Path, encoder, real, **fields) -> FidelityTable:
    chosen = {"class_prompt": CLASS, "prompts": [f"{SUBJECT} on snow"], "number": 2}
    return FidelityTable(path, encoder, real, SUBJECT, **chosen | fields)


def test_a_row_measures_what_its_columns_say(tmp_path, encoder, real, monkeypatch):
    """Subject, place and class by hand; a class that has become the subject costs score and diversity."""
    others = torch.roll(real, 1, dims=1)
    shown = {SUBJECT: real[:2], CLASS: others[:2], f"{SUBJECT} on snow": real[1:3]}
    monkeypatch.setattr(fidelity, "draw", lambda pipeline, prompts, **settings: shown[prompts[0]])
    good = make(tmp_path / "t.json", encoder, real).measure(None, 10)
    features = encoder(real)
    with torch.no_grad():
        named = features[[0, 1, 1, 2]]  # the instance prompt's, then those of the prompt that names the subject, too
        cosine = torch.nn.functional.cosine_similarity(named[:, None], features[None], dim=-1).mean()
        text = encoder.texts(["a photo of a butterfly on snow"])
        prompt = torch.nn.functional.cosine_similarity(features[1:3], text).mean()
    assert good["step"] == 10 and good["subject"] == pytest.approx(float(cosine), abs=1e-4)
    assert good["prompt"] == pytest.approx(float(prompt), abs=1e-4)
    assert good["score"] == pytest.approx(good["subject"] + good["prompt"] - good["class"] / 2, abs=2e-4)
    distance = float(encoder.distance(others[:1], others[1:2]))
    assert good["diversity"] == pytest.approx(distance, rel=1e-3)
    shown[CLASS] = real[:1].expand(2, -1, -1, -1)
    collapsed = make(tmp_path / "t.json", encoder, real).measure(None, 10)
    assert collapsed["class"] > good["class"] + 0.1 and collapsed["diversity"] == pytest.approx(0, abs=1e-3)
    assert collapsed["score"] < good["score"] - 0.05


def test_prompts_without_the_subjects_word_do_not_count_for_the_subject(tmp_path, encoder, real):
    prompts = [f"{SUBJECT} on snow", CLASS, "a photo of a fish", SUBJECT]
    assert make(tmp_path / "t.json", encoder, real, prompts=prompts).of_subject == [SUBJECT, f"{SUBJECT} on snow"]
    assert make(tmp_path / "t.json", encoder, real, prompts=[CLASS]).of_subject == [SUBJECT]


def test_a_row_is_as_fine_in_a_run_of_16_bits(tmp_path, encoder, real, monkeypatch):
    """The pictures may be drawn in bfloat16; cosines of features in bfloat16 would have three digits less."""
    monkeypatch.setattr(fidelity, "draw", lambda pipeline, prompts, **settings: real[:2])
    table = make(tmp_path / "t.json", encoder, real)
    exact = table.measure(None, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert table.measure(None, 0) == exact


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    return DINOEncoder(eye_folder(tmp_path_factory.mktemp("eye")))


def test_the_subject_encoder_measures_who_it_is_and_the_clip_what_the_prompt_says(
        tmp_path, encoder, eye, real, monkeypatch):  # fmt: skip
    others = torch.roll(real, 1, dims=1)
    shown = {SUBJECT: real[:2], CLASS: others[:2], f"{SUBJECT} on snow": real[1:3]}
    monkeypatch.setattr(fidelity, "draw", lambda pipeline, prompts, **settings: shown[prompts[0]])
    by_clip = make(tmp_path / "t.json", encoder, real).measure(None, 10)
    table = make(tmp_path / "t.json", encoder, real, subject_encoder=eye)
    by_both = table.measure(None, 10)
    mine, theirs = eye(real), eye(others[:2])
    cosine = torch.nn.functional.cosine_similarity
    assert by_both["subject"] == pytest.approx(
        float(cosine(mine[[0, 1, 1, 2], None], mine[None], dim=-1).mean()), abs=1e-4)
    assert by_both["class"] == pytest.approx(float(cosine(theirs[:, None], mine[None], dim=-1).mean()), abs=1e-4)
    assert by_both["diversity"] == pytest.approx(float(1 - cosine(theirs[0], theirs[1], dim=0)), abs=1e-4)
    assert by_both["prompt"] == by_clip["prompt"]
    assert all(by_both[name] != by_clip[name] for name in ("subject", "class", "diversity", "score"))
    with torch.autocast("cpu", torch.bfloat16):
        assert table.measure(None, 10) == by_both, "in 32 bits, whatever the run draws in"


def test_the_score_is_one_function_of_the_row(tmp_path, encoder, real, monkeypatch):
    assert score_of({"subject": 0.5, "class": 0.2, "prompt": 0.1, "diversity": 9}) == pytest.approx(0.5)
    assert score_of({"subject": 0.5, "prompt": 0.1}) == pytest.approx(0.6)
    monkeypatch.setattr(fidelity, "draw", lambda pipeline, prompts, **settings: real[:2])
    monkeypatch.setattr(fidelity, "score_of", lambda row: 7.0)
    assert make(tmp_path / "t.json", encoder, real).measure(None, 0)["score"] == 7


def test_one_picture_of_the_subject_is_enough(tmp_path, encoder, eye, real, monkeypatch):
    monkeypatch.setattr(fidelity, "draw", lambda pipeline, prompts, **settings: real[:2])
    for subject_encoder in (None, eye):
        sees = subject_encoder or encoder
        found = make(tmp_path / "t.json", encoder, real[:1], subject_encoder=subject_encoder).measure(None, 0)
        second = torch.nn.functional.cosine_similarity(sees(real[:1]), sees(real[1:2])).item()
        assert found["subject"] == pytest.approx((1 + second) / 2, abs=1e-4)


def test_encoders_are_told_apart_by_their_weights_and_not_by_their_names(tmp_path, encoder, eye):
    copy, other = (DINOEncoder(eye_folder(tmp_path / str(seed), seed)) for seed in (0, 1))
    assert encoder_key(copy) == encoder_key(eye) != encoder_key(other)
    assert encoder_key(encoder).startswith("CLIPEncoder ") and encoder_key(eye).startswith("DINOEncoder ")


def test_rows_of_another_encoder_are_never_mixed_in(tmp_path, encoder, eye, real):
    path, other = tmp_path / "t.json", DINOEncoder(eye_folder(tmp_path / "other", 1))
    by_eye = make(path, encoder, real, subject_encoder=eye)
    for step in (0, 2):
        by_eye.add(row(step, 0.5))
    assert "Encoder" not in str(by_eye) and "measured_by" not in str(by_eye), "remembered, and not printed"
    assert {each["measured_by"] for each in json.loads(path.read_text())} == {by_eye.measured_by}
    assert make(path, encoder, real, subject_encoder=eye).rows == by_eye.rows
    for subject_encoder in (None, other):
        foreign = make(path, encoder, real, subject_encoder=subject_encoder)
        assert foreign.rows == [] and foreign.foreign == by_eye.rows and not foreign.has(2)
    foreign.add(row(4, 0.25))
    assert [each["step"] for each in json.loads(path.read_text())] == [4]


def test_a_row_of_before_encoders_were_remembered_is_foreign(tmp_path, encoder, real):
    (tmp_path / "t.json").write_text(json.dumps([row(2, 0.5)]))
    table = make(tmp_path / "t.json", encoder, real)
    assert table.rows == [] and table.foreign == [row(2, 0.5)]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_resumed_run_says_that_it_forgets_rows_of_other_encoders(tmp_path, encoder, eye, real, capsys, resumed):
    chosen = config(tmp_path, output_dir=str(tmp_path / "run"), validation_prompt=[f"{SUBJECT} on snow"], seed=0,
                    resume_from_checkpoint="latest" if resumed else None)  # fmt: skip
    (tmp_path / "run").mkdir()
    first = make_table(chosen, encoder, real)
    first.add(row(0, 0.5))
    assert make_table(chosen, encoder, real).rows == first.rows and capsys.readouterr().out == ""
    assert make_table(chosen, encoder, real, eye).rows == []
    said = capsys.readouterr().out
    assert (said.startswith("note: 1 row of ") and "measured by other encoders" in said) if resumed else said == ""


def test_without_a_class_or_a_second_picture_columns_are_left_out(tmp_path, encoder, real, pipeline):
    bare = make(tmp_path / "t.json", encoder, real, class_prompt=None, prompts=(), number=1)
    measured = bare.measure(pipeline, 4, num_inference_steps=1, size=32)
    assert measured.keys() == {"step", "subject", "prompt", "score"}
    assert measured["score"] == pytest.approx(measured["subject"] + measured["prompt"], abs=2e-4)
    one = make(tmp_path / "t.json", encoder, real, number=1).measure(pipeline, 4, num_inference_steps=1, size=32)
    assert "diversity" not in one and "class" in one


@pytest.mark.parametrize(
    "prompt, rest",
    [("a photo of a sks butterfly on snow", "a photo of a butterfly on snow"), ("SKS butterfly", "butterfly"),
     ("a photo of sks, on snow", "a photo of, on snow"), ("asks for sks", "asks for"), ("a butterfly", "a butterfly")],
)  # fmt: skip
def test_the_encoder_is_not_asked_for_the_subjects_word(prompt, rest):
    assert without_words(prompt, ["sks"]) == rest
    assert without_words(prompt, []) == prompt


@pytest.mark.parametrize("taught, of_class, text", [(SUBJECT, CLASS, CLASS), (SUBJECT, None, CLASS),
                                                    ("a photo of my cat", None, "a photo of my cat")])  # fmt: skip
def test_what_the_encoder_is_asked_for_needs_no_class_prompt(tmp_path, encoder, real, taught, of_class, text):
    assert FidelityTable(tmp_path / "t.json", encoder, real, taught, of_class).texts == [text]


def test_the_best_is_the_highest_score_among_the_steps_that_are_left(tmp_path, encoder, real):
    table = make(tmp_path / "t.json", encoder, real)
    assert table.best([1, 2]) is None
    for step, score in ((0, 0.9), (2, 0.5), (4, 0.8), (6, 0.6)):
        table.add(row(step, score))
    assert table.best([2, 4, 6]) == 4 and table.best([2, 6]) == 6 and table.best([0, 2, 4, 6]) == 0
    assert table.best([]) is None and table.best([3]) is None
    assert table.has(4) and not table.has(3)


def test_rows_are_kept_and_a_run_that_goes_back_forgets_the_later_ones(tmp_path, encoder, real):
    table = make(tmp_path / "t.json", encoder, real)
    for step in (0, 2, 4, 6):
        table.add(row(step, step / 10))
    resumed = make(tmp_path / "t.json", encoder, real)
    assert resumed.rows == table.rows
    resumed.forget_after(4)
    assert resumed.has(4) and not resumed.has(6)
    resumed.add(row(5, 0.1))
    assert [each["step"] for each in make(tmp_path / "t.json", encoder, real).rows] == [0, 2, 4, 5]
    resumed.add(row(2, 0.7))  # measured again: what came after it is of another run
    assert [each["step"] for each in resumed.rows] == [0, 2] and resumed.rows[1]["score"] == 0.7


def test_the_table_is_text_with_a_line_for_each_step(tmp_path, encoder, real):
    table = make(tmp_path / "t.json", encoder, real)
    table.add(row(0, 0.5))
    table.add(row(300, 0.6543) | {"diversity": 1.25})
    lines = str(table).splitlines()
    assert lines[0].split() == ["step", "subject", "class", "diversity", "prompt", "score"]
    assert lines[1].split() == ["0", "0.500", "0.250", "-", "0.250", "0.500"]
    assert lines[2].split() == ["300", "0.500", "0.250", "1.250", "0.250", "0.654"]
    assert len({len(line) for line in lines}) == 1
    stored = json.loads((tmp_path / "t.json").read_text())
    assert stored == table.rows and len((tmp_path / "t.json").read_text().splitlines()) == 2


def test_measuring_leaves_the_generators_alone(tmp_path, encoder, real, pipeline):
    state = torch.get_rng_state()
    table = make(tmp_path / "t.json", encoder, real)
    first, second = (table.measure(pipeline, 1, num_inference_steps=1, size=32) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state)
