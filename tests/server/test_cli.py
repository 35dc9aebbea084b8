"""What cannot be served is said in one line, with an exit code, before anything slow begins."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.base import BaseSpec
from adapters.demo import WEIGHTS
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry
from adapters.sources import directory
from adapters.sources.intake import Transfer
from adapters.store import Store


def serve(*flags: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("loraplex")
    return subprocess.run(
        [command, "serve", "--home", home, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"} | environment,
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("loraplex: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("/nowhere/at/all", "no such folder"),
        (".", "no config.json"),
        ("nobody/no-such-model", "cannot be reached"),
        ("just-a-name", "not a hub id"),
    ],
)
def test_a_model_that_cannot_be_had(
    home: Path, tmp_path: Path, free_port: str, model: str, reason: str
) -> None:
    if model == ".":
        model = str(tmp_path)
    assert reason in complaint(serve("--model", model, "--port", free_port, home=home))


def test_a_port_that_is_taken(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in complaint(serve("--port", port, home=home))


def test_a_flag_that_nobody_knows(home: Path, free_port: str) -> None:
    assert "--no-such-flag" in complaint(
        serve("--no-such-flag", "3", "--port", free_port, home=home)
    )


def test_a_variable_that_nobody_knows(home: Path, free_port: str) -> None:
    assert "--max-lorras" in complaint(
        serve("--port", free_port, home=home, LORAPLEX_MAX_LORRAS="3")
    )


def test_a_flag_of_vllms_server_that_would_do_nothing(home: Path, free_port: str) -> None:
    assert "--api-key" in complaint(serve("--api-key", "secret", "--port", free_port, home=home))


def test_help_lists_every_setting(home: Path) -> None:
    done = serve("--help", home=home)
    assert done.returncode == 0
    for flag in ("--max-loras", "--model", "--home", "--port", "--max-lora-rank"):
        assert flag in done.stdout


def verify(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "adapters", "verify", "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_verify_reads_every_byte(tmp_path: Path, base_folder: Path) -> None:
    assert "no state folder" in complaint(verify(tmp_path))
    store = Store(tmp_path / "store")
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    ingest = Ingest(store, registry, BaseSpec.read(base_folder, "tiny"), Rules(64))
    for name in ("sql", "code"):
        with store.staging() as folder:
            directory.copy(WEIGHTS / name, folder, Transfer(10**8))
            ingest.ingest(folder, name, "demo")
    done = verify(tmp_path)
    assert (done.returncode, "2 of 2 are as they were sealed" in done.stderr) == (0, True)

    weights = store.path(registry.resolve("sql").digest) / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    os.utime(weights, ns=(before, before))
    assert "sql@1: Its files are not what was sealed." in complaint(verify(tmp_path))
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = verify(tmp_path)
    assert done.returncode == 0 and "served again: sql@1" in done.stderr
