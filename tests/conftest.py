"""What every test can use: the base model's folder, and PEFT adapters made for it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A developer's own settings are not the tests'.
for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
    del os.environ[name]

from server.engine import launch  # noqa: E402

CACHE = Path(__file__).parent.parent / ".cache" / "loraplex"
launch.prepare_environment(CACHE)  # before any test module imports vLLM

from benchmarks.adapters import LINEARS, write  # noqa: E402
from server.config import DEFAULT_MODEL, Settings  # noqa: E402
from server.engine import base_model  # noqa: E402

SEVEN = LINEARS
# `make test THOROUGH=1`: all cases of what takes long, not only some that tell.
THOROUGH = bool(os.environ.get("THOROUGH"))

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The default base model, converted once for all test runs, by one of their processes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return base_model.fetch(Settings.read(["--home", str(CACHE)]), print)


@pytest.fixture
def home(tmp_path: Path, base_folder: Path) -> Path:
    """An empty state folder that has the base model."""
    return with_base(tmp_path / "home", base_folder)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """The same for servers that live as long as the test run."""
    return with_base(tmp_path_factory.mktemp("session") / "home", base_folder)


def with_base(home: Path, base_folder: Path) -> Path:
    """A state folder with nothing but the base model in it."""
    (home / "base").mkdir(parents=True)
    (home / "base" / DEFAULT_MODEL).symlink_to(base_folder)
    return home


@pytest.fixture(scope="session")
def make_adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(seed, rank=8)`: a PEFT folder for the base, as save_pretrained writes one.

    More keywords go to `benchmarks.adapters.write`.
    Its B is random and large enough to change what the base says; equal arguments, equal weights.
    """

    def make(seed: int, rank: int = 8, std: float = 0.03, **more: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"adapter-{seed}-{rank}")
        write(folder, base_folder, seed, rank, "float32", std, **more)
        return folder

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser of tests/browser.py, which whoever needs none does not load."""
    from tests.browser import chromium

    with chromium() as started:
        yield started
