"""A Hub on this machine: what is asked for when a model is named by its id, and what is made of it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from diffusion_lessons.stable_diffusion.folder import shipped

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that a download needs, from folders `OWNER/NAME` below `server.root`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            self.answer_about(self.server.root / path[2] / path[3], path[4:])
        elif len(path) > 4 and path[2] == "resolve" and (self.server.root.joinpath(*path[:2], *path[4:])).is_file():
            self.server.asked.append("/".join(path[4:]))
            self.answer(self.server.root.joinpath(*path[:2], *path[4:]).read_bytes())
        else:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def answer_about(self, folder: Path, more: list[str]) -> None:
        if not folder.is_dir():
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if more and more[0] == "tree":
            about = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path.read_bytes())}
                     for name, path in zip(names, files, strict=True)]  # fmt: skip
        else:
            about = {"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        self.answer(json.dumps(about).encode(), kind="application/json")

    def answer(self, body: bytes, code: int = 200, headers: dict | None = None, kind: str = "text/plain") -> None:
        self.send_response(code)
        about = {"ETag": f'"{digest(body)}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body)),
                 "Content-Type": kind, "Accept-Ranges": "bytes"}  # fmt: skip
        for name, value in (about | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Say nothing."""


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """A server whose `root` may be filled with models; `asked` lists the files that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.asked = tmp_path / "hub", []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def with_the_hub(hub, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process whose Hub is this one, with an empty cache."""
    place = hub.root.parent / "home"
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(place),
            "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | here, timeout=240)


def upload(hub, name: str, checker: str | None = "model.safetensors") -> Path:
    """A model as Stable Diffusion 1.5 lies on the Hub: with a safety checker, pickles, variants and single files."""
    folder = hub.root / "somebody" / name
    shutil.copytree(shipped("miniature"), folder, ignore=shutil.ignore_patterns("clip", "manifest.json"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True,
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    others = ["safety_checker/config.json", "feature_extractor/preprocessor_config.json", "v1-5-pruned.ckpt",
              "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin",
              "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
              "unet/diffusion_pytorch_model.non_ema.safetensors", "README.md"]  # fmt: skip
    for file in [*others, *([f"safety_checker/{checker}"] if checker else [])]:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("{}")
    return folder


OPEN = """
import sys
from pathlib import Path
from diffusers import StableDiffusionPipeline
from diffusion_lessons.stable_diffusion.folder import find_model, load_pipeline, write_model
folder, written = find_model("somebody/sd"), Path(sys.argv[1])
load_pipeline(folder)
write_model(written, folder, {})
plain = StableDiffusionPipeline.from_pretrained(written)
assert plain.safety_checker is None and plain.feature_extractor is not None
find_model("somebody/pickled-checker")
"""


def test_only_what_is_loaded_is_downloaded(hub, tmp_path):
    upload(hub, "sd")
    upload(hub, "pickled-checker", "pytorch_model.bin")
    done = with_the_hub(hub, OPEN, str(tmp_path / "written"))
    assert done.returncode == 0, done.stderr
    networks = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors"}  # fmt: skip
    assert {name for name in hub.asked if not name.endswith((".json", ".txt"))} == networks
    assert not [name for name in hub.asked if name.startswith("safety_checker")]
    assert {"model_index.json", "feature_extractor/preprocessor_config.json"} <= set(hub.asked)


def test_a_network_that_is_a_pickle_is_refused_by_that_reason(hub):
    for file in (upload(hub, "sd") / "unet").glob("*.safetensors"):
        file.unlink()
    code = "from diffusion_lessons.stable_diffusion.folder import find_model; find_model('somebody/sd')"
    done = with_the_hub(hub, code)
    last = done.stderr.strip().splitlines()[-1]
    assert "somebody/sd: " in last and "safetensors" in last and "cannot be reached" not in last, done.stderr
    assert not [name for name in hub.asked if name.endswith((".bin", ".ckpt"))]
