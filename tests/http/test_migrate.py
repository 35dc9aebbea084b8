"""docs/migrate.md: its commands over the fake engine, and what it says of flags and calls."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.config import ConfigError, Settings
from server.engine import launch
from tests.conftest import MakeAdapter
from tests.docs.pages import follow
from tests.http.conftest import Running, serve, settings

NAMES = ("code", "poetry", "sql")


@pytest.fixture(scope="module")
def folders(make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is /srv/adapters in the page."""
    root = tmp_path_factory.mktemp("srv")
    for seed, name in enumerate((*NAMES, "another"), start=200):
        shutil.copytree(make_adapter(seed), root / name)
    return root


@pytest.fixture
def moved(home: Path, base_folder: Path, folders: Path) -> Iterator[Running]:
    yield from serve(settings(home, "--import-from", f"file://{folders}"), base_folder)


def test_the_steps_of_the_page(moved: Running, folders: Path, tmp_path: Path) -> None:
    instead = {"http://127.0.0.1:8001": moved.url, "/srv/adapters/": f"{folders}/"}
    assert follow("migrate.md", instead, tmp_path) == 5


def test_the_same_name_again_is_another_version(moved: Running, folders: Path) -> None:
    with httpx.Client(base_url=moved.url, timeout=30) as client:
        for folder, inplace in (("sql", False), ("another", False), ("another", True)):
            asked = {
                "lora_name": "sql",
                "lora_path": f"{folders / folder}",
                "load_inplace": inplace,
            }
            reply = client.post("/v1/load_lora_adapter", json=asked)
            assert reply.status_code == 200, reply.text
        shown = client.get("/v1/adapters/sql").json()
        assert [each["version"] for each in shown["versions"]] == [1, 2]
        reply = client.post("/v1/completions", json={"model": "sql@1", "prompt": "a"})
        assert reply.headers["x-loraplex-version"] == "1"
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 200
        assert client.get("/v1/adapters/sql").status_code == 404


@pytest.mark.parametrize("name", ["SQL", "org/sql", "-sql"])
def test_names_that_vllm_takes_and_we_do_not(moved: Running, folders: Path, name: str) -> None:
    asked = {"lora_name": name, "lora_path": str(folders / "sql")}
    with httpx.Client(base_url=moved.url, timeout=30) as client:
        reply = client.post("/v1/load_lora_adapter", json=asked)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_name")


@pytest.mark.parametrize(
    "flags",
    [
        ("--enable-lora",),
        ("--max-loras", "4", "--max-lora-rank", "16", "--max-cpu-loras", "8"),
        ("--tensor-parallel-size", "2", "--quantization", "fp8"),
    ],
)
def test_flags_of_vllm_that_are_taken(base_folder: Path, flags: tuple[str, ...]) -> None:
    assert launch.parse(Settings.read([*flags]), base_folder, ["q_proj"]).enable_lora


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora-modules", "sql=/srv/adapters/sql"),
        ("--lora-dtype", "float16"),
        ("--quantization", "fp8", "other/base"),
        ("--lora-target-modules", "v_proj"),
        ("--fully-sharded-loras",),
        ("--default-mm-loras", '{"image": "x"}'),
        ("--api-key", "secret"),
        ("--ssl-keyfile", "key.pem"),
        ("--root-path", "/x"),
    ],
)
def test_flags_of_vllm_that_are_refused(base_folder: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        launch.parse(Settings.read([*flags]), base_folder, ["q_proj"])
