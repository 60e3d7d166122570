"""What every test shares: no network, few threads, a cache of its own, the optional photographs."""
import os
import sys
import tempfile
from pathlib import Path

# These must stand before anything imports numpy, torch or a Hugging Face package.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # the models here are tiny: more threads wait for each other longer than they work
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_CACHE=str(Path(tempfile.gettempdir()) / f"diffusion-lessons-tests-{os.getuid()}" / "datasets"),
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    CUDA_VISIBLE_DEVICES="",  # the expected numbers are those of a CPU
)

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Pass over what is marked slow, unless it was asked for."""
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run `make test-slow`"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the repository."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Photographs that are not part of the product; tests that need them skip where they are absent."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    return folder


@pytest.fixture(scope="session")
def shipped_eye():
    """The eye that comes with the package, as an encoder."""
    from diffusion_lessons.metrics import DINOEncoder

    if not (CHECKOUT / "diffusion_lessons" / "miniature" / "weights" / "eye").is_dir():
        pytest.skip("no eye is shipped yet")
    return DINOEncoder("miniature")


@pytest.fixture(autouse=True)
def closed_figures():
    """Close what a test has drawn, so that figures do not pile up in memory."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
