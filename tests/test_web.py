"""The page on which the miniature draws in the browser: what is laid out, and that it does what the package does."""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.adapters import load_adapter
from diffusion_lessons.dreambooth.subject import instance_source, read_pictures
from diffusion_lessons.metrics import DINOEncoder, likeness
from diffusion_lessons.miniature.captions import encode_attributes
from diffusion_lessons.miniature.judge import judge_pictures, load_judge
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import shipped

TRIPLES = [("red", "butterfly", "snow"), ("blue", "fish", "sea"), ("purple", "beetle", "sand"),
           ("white", "flower", "night")]  # of the prompts in web/tests-browser  # fmt: skip


def node(checkout: Path, *arguments: str | Path, **environment: str | Path) -> str:
    """Run Node.js in `web`; return what it printed."""
    variables = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(["node", *arguments], cwd=checkout / "web", capture_output=True, text=True,
                          env=os.environ | variables, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> tuple[Path, str]:
    """The page as `make web` lays it out, and what it printed: its modules were compared with the package."""
    if not shutil.which("npm"):
        pytest.skip("no Node.js here")
    folder = tmp_path_factory.mktemp("web") / "try"
    command = [sys.executable, checkout / "web/build.py", folder, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def manifest(built) -> dict:
    return json.loads((built[0] / "manifest.json").read_text(encoding="utf-8"))


def test_what_the_modules_do_was_compared_with_the_package(built):
    passed, failed, skipped = (int(re.search(rf"^# {word} (\d+)$", built[1], re.M)[1])
                               for word in ("pass", "fail", "skipped"))  # fmt: skip
    assert passed >= 54 and failed == skipped == 0


def test_every_file_is_there_with_its_size_and_fingerprint(built, manifest):
    for name, file in manifest["files"].items():
        packed = (built[0] / file["path"]).read_bytes()
        content = gzip.decompress(packed) if file["path"].endswith(".gz") else packed
        assert (len(packed), len(content)) == (file["bytes"], file["size"]), name
        assert hashlib.sha256(content).hexdigest() == file["sha256"], name
    assert sum(file["bytes"] for file in manifest["files"].values()) < 19e6


def test_the_weights_are_those_of_the_package_and_the_graphs_hold_none(built, manifest):
    shipped = {entry["sha256"] for entry in json.loads((miniature.path() / "manifest.json").read_text()).values()}
    for part in ("text_encoder", "unet", "vae_decoder"):
        assert manifest["files"][f"{part}.safetensors"]["sha256"] in shipped
        assert manifest["files"][f"{part}.onnx"]["size"] < 300_000
        graph = gzip.decompress((built[0] / manifest["files"][f"{part}.onnx"]["path"]).read_bytes())
        assert f"{part}.f32".encode() in graph
        assert b".py" not in graph and str(Path.home()).encode() not in graph, "the exporter's traces are still there"


def test_nothing_is_fetched_from_elsewhere_and_every_address_is_relative(built):
    own = [*built[0].glob("*.js"), built[0] / "index.html", built[0] / "page.css"]
    assert len(own) > 15
    for file in own:
        text = file.read_text(encoding="utf-8")
        for address in re.findall(r"""(?:src|href)="([^"#]+)"|url\(([^)]+)\)|(?:from|import\(|fetch\() ?["']([^"']+)""",
                                  text):  # fmt: skip
            assert not re.match(r"\w+:|//|/", "".join(address)), f"{file.name}: {address}"
        # these two stand in comments and sentences
        assert not re.search(r"https?://(?!huggingface\.co/docs|localhost)", text), file.name


def test_links_of_the_page_lead_to_what_is_there(built, checkout):
    """Pages of the site are called as their notebooks, without the number."""
    text = (built[0] / "index.html").read_text(encoding="utf-8")
    for address in set(re.findall(r'(?:href|src|data-source)="([^"#?]+)', text)):
        if address.startswith("../"):
            part, name = Path(address[3:]).parent, Path(address).stem
            pages = [page for page in (checkout / "nbs" / part).iterdir() if re.sub(r"^\d\d_", "", page.stem) == name]
            assert pages, address
        else:
            assert (built[0] / address).is_file(), address


def test_lessons_that_the_page_names_are_those_that_it_links(checkout):
    text = (checkout / "web/page/index.html").read_text(encoding="utf-8")
    named = re.findall(r'<a href="\.\./(\w+)/(\w+)\.html">lesson (\d\d)</a>', text)
    assert len(named) >= 8
    for part, name, number in named:
        assert (checkout / "nbs" / part / f"{number}_{name}.ipynb").is_file(), (part, name, number)


def test_the_runtime_comes_with_its_licence_and_is_pinned(built, checkout):
    assert "MIT License" in (built[0] / "runtime/onnxruntime-LICENSE.txt").read_text(encoding="utf-8")
    assert (built[0] / "runtime/onnxruntime-ThirdPartyNotices.txt").stat().st_size > 100_000
    lock = json.loads((checkout / "web/package-lock.json").read_text())["packages"]
    assert lock["node_modules/onnxruntime-web"]["version"] == "1.30.0"
    assert all("integrity" in entry for name, entry in lock.items() if name)
    assert not any("resolved" in entry for entry in lock.values()), "an address of one machine's registry"


def test_the_words_that_were_shown_are_those_of_the_package(manifest):
    assert set(manifest["words"]) == miniature.KNOWN_WORDS
    assert [len(words) for words in manifest["attributes"].values()] == [10, 4, 6]


def test_modules_are_small(checkout):
    for module in (checkout / "web/page").glob("*.js"):
        lines = module.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 170 and lines[0].startswith("// "), module.name
        assert max(map(len, lines)) <= 120, module.name


@pytest.mark.slow
def test_a_real_browser_draws_what_the_judge_reads(built, checkout, tmp_path):
    """Also: an adapter shows its subject, a second visit asks for no weights, bad input; pictures lie in _web/seen."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=checkout / "web", check=True)
    run = tmp_path / "run"
    command = ["-m", "diffusion_lessons.dreambooth.training", "--preset", "quick", "--lora", "--output_dir", run]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    seen = checkout / "_web/seen"
    tests = sorted((checkout / "web/tests-browser").glob("*.test.mjs"))
    options = ("--test", "--test-concurrency=1", "--test-reporter=tap")
    said = node(checkout, *options, *tests, WEB=built[0], OUT=seen, CHROMIUM=browser,
                ADAPTER=run / "pytorch_lora_weights.safetensors", FOREIGN=miniature.path() / "unet"
                / "diffusion_pytorch_model.safetensors")  # fmt: skip
    assert int(re.search(r"^# pass (\d+)$", said, re.M)[1]) >= 40 and "# skipped 0" in said

    drawn = json.loads((seen / "drawn.json").read_text())
    pictures = torch.stack([pixels(each) for each in drawn])
    shares = judge_pictures(load_judge(shipped("judge")), pictures).agrees_with(encode_attributes(TRIPLES))
    assert shares == {"colour": 1.0, "kind": 1.0, "place": 1.0}

    (adapted,) = json.loads((seen / "adapted.json").read_text())
    pipeline, settings = miniature.load(), {"seed": adapted["seed"], "num_inference_steps": 20, "guidance_scale": 5.0}
    plain = draw(pipeline, [adapted["prompt"]], **settings)
    load_adapter(pipeline, run)
    wanted = draw(pipeline, [adapted["prompt"]], **settings)
    assert (pixels(adapted).int() - wanted[0].int()).abs().max() <= 1, "Python draws another picture with it"
    photos = torch.stack([torch.from_numpy(each) for each in read_pictures(instance_source("meadow", 64), 64)])
    eye = DINOEncoder("miniature")
    before, after = (likeness(each, photos, eye) for each in (plain, pixels(adapted)[None]))
    assert after > before + 0.1, (before, after)


def pixels(drawn: dict) -> torch.Tensor:
    """A picture of a canvas: uint8 (3, 64, 64)."""
    return torch.tensor(drawn["pixels"], dtype=torch.uint8).reshape(64, 64, 4)[..., :3].permute(2, 0, 1)


def test_the_command_that_the_page_names_draws_the_picture_that_the_page_begins_with(checkout, tmp_path):
    text = (checkout / "web/page/index.html").read_text(encoding="utf-8")
    program, *arguments = shlex.split(re.search(r'<code id="command">(.+?)</code>', text, re.S)[1])
    assert program == "generate-images"
    fields = dict(re.findall(r'<input id="(\w+)" name="\w+"[^>]* value="([^"]+)"', text))
    start = "from diffusion_lessons.dreambooth.drawing_config import generate_images; generate_images()"
    command = [sys.executable, "-c", start, *arguments, "--output_dir", tmp_path]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (file,) = tmp_path.rglob("*.png")
    wanted = draw(miniature.load(), [fields["prompt"]], seed=int(fields["seed"]),
                  num_inference_steps=int(fields["steps"]), guidance_scale=float(fields["guidance"]))  # fmt: skip
    assert torch.equal(pil_to_tensor(Image.open(file)), wanted[0])


def test_a_folder_with_something_else_is_not_replaced(checkout, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    command = [sys.executable, checkout / "web/build.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "holds something else" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "thesis.txt").is_file()


def test_a_runtime_of_another_version_is_not_taken(checkout, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("web_build", checkout / "web/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(build, "RUNTIME", tmp_path)
    assert not build.runtime_is_there()
    for version, there in (("1.0.0", False), ("1.30.0", True)):
        (tmp_path / "package.json").write_text(json.dumps({"version": version}))
        assert build.runtime_is_there() is there


def test_without_node_make_web_says_what_is_missing(checkout, tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    code = ("import sys; sys.path.insert(0, 'web'); import build; build.run('npm', 'ci')")
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 1 and "install Node.js" in done.stderr and "Traceback" not in done.stderr
