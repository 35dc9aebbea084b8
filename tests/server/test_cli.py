"""What cannot be served is said in one line, with an exit code, before anything slow begins."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.base import BaseSpec
from adapters.database import Database
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


def complaint(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stderr
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


def test_nobody_else_comes_in_without_a_key(home: Path, free_port: str) -> None:
    open_to_all = ("--host", "0.0.0.0", "--port", free_port, "--model", "/nowhere")
    assert "without API keys" in complaint(serve(*open_to_all, home=home))
    assert not (home / "registry.db").exists()
    for more in (["--insecure"], ["--admin-key", "0123456789abcdef"]):
        assert "no such folder" in complaint(serve(*open_to_all, *more, home=home))
    done = keys(home, "create", "ci", "--scope", "infer")
    assert done.stdout.startswith("lpx_")
    assert "no such folder" in complaint(serve(*open_to_all, home=home))


def test_two_servers_cannot_share_a_state_folder(home: Path, free_port: str) -> None:
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('77'); "
    holder += "f.flush(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, home / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        assert "another server (process 77)" in complaint(serve("--port", free_port, home=home))
        other.stdin.write("\n")


def keys(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    """A new state folder is made for the first one; the token is all there is on stdout."""
    home = tmp_path / "new"
    made = keys(
        *(home, "create", "team a", "--scope", "infer", "--scope", "adapters:read"),
        *("--adapters", "a.*", "--adapters", "base", "--tokens-per-minute", "5000"),
        *("--expires-days", "30", "--stored-mb", "10"),
    )
    token = made.stdout.strip()
    id = token.split("_")[1]
    assert made.returncode == 0 and token.startswith("lpx_") and id in made.stderr
    listed = keys(home, "list").stdout
    assert id in listed and "team a" in listed and token not in listed
    rotated = keys(home, "rotate", id, "--grace-s", "60")
    assert rotated.returncode == 0 and rotated.stdout.strip() not in ("", token)
    assert keys(home, "revoke", id).returncode == 0
    assert "revoked" in keys(home, "list").stdout
    assert "nobody" in complaint(keys(home, "revoke", "nobody"))
    assert "is revoked" in complaint(keys(home, "rotate", id), 2)
    assert "root" in complaint(keys(home, "create", "x", "--scope", "root"), 2)


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--no-such", "3"], {"LORAPLEX_MAX_LORRAS": "3"}, "--max-lorras --no-such"),
        (["--api-key", "secret"], {}, "--api-key"),  # of vLLM's server, which would do nothing
    ],
)
def test_a_flag_that_is_none_is_told_before_anything_is_made(
    tmp_path: Path, free_port: str, flags: list[str], environment: dict[str, str], said: str
) -> None:
    home = tmp_path / "none-yet"
    assert said in complaint(serve(*flags, "--port", free_port, home=home, **environment), 2)
    assert not home.exists()


def test_help_lists_every_setting(home: Path) -> None:
    done = serve("--help", home=home)
    assert done.returncode == 0
    for flag in ("--max-loras", "--model", "--home", "--port", "--max-lora-rank"):
        assert flag in done.stdout
    assert "Any other flag goes to vLLM" in " ".join(done.stdout.split())
    for python in ("tuple[", "dict[", "SecretStr", "None", " int"):
        assert python not in done.stdout


def verify(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "adapters", "verify", "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_verify_reads_every_byte(tmp_path: Path, base_folder: Path) -> None:
    assert "no state folder" in complaint(verify(tmp_path), 2)
    store = Store(tmp_path / "store")
    registry = Registry(Database.of(tmp_path))
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
