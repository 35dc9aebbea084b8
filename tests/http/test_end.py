"""The end of a server: what runs ends well, and nothing new begins. The command, a fake engine."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.database import Database
from server.usage import Usage

FAKE = """
from server.engine import launch
from tests import fake_engine

launch.start = lambda args, compile, say: fake_engine.start(args)
from server import cli

cli.main()
"""
ROOT = Path(__file__).parents[2]
START_S, END_S = 90, 15
Start = Callable[..., "Ending"]


class Ending:
    """A server that is to end."""

    def __init__(self, home: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        self.home = home
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.process = subprocess.Popen(
            [sys.executable, "-c", FAKE, "serve", "--home", home, "--port", port, *flags], cwd=ROOT
        )
        deadline = time.monotonic() + START_S
        while not self.ready():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ends(self) -> int:
        return self.process.wait(END_S)


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    servers = []

    def make(*flags: str) -> Ending:
        servers.append(Ending(home, "--no-demo-adapters", *flags))
        return servers[-1]

    yield make
    for server in servers:
        server.client.close()
        server.process.kill()
        server.process.wait()


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """In place of the look at the session's server, which these tests do not use."""


def asked(tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": [1] * 10, "max_tokens": tokens, "ignore_eos": True, **more}


def test_what_runs_goes_on_and_nothing_new_begins(start: Start) -> None:
    server = start()
    body = asked(400, stream=True, return_token_ids=True)
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        events = [next(lines)]
        server.signal()
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.01)
        assert server.client.get("/health").status_code == 200
        for refused in (
            server.client.post("/v1/completions", json=asked(1)),
            server.client.get("/v1/models"),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                503,
                "engine_not_ready",
            )
            assert refused.headers["retry-after"]
        events += [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    parts = [json.loads(event[6:]) for event in events[:-1]]
    assert sum(len(part["choices"][0]["token_ids"]) for part in parts) == 400
    assert server.ends() == 0
    database = Database.of(server.home)
    now = datetime.now(UTC)
    (used,) = Usage(database).read(now - timedelta(hours=2), now)
    assert (used.adapter, used.output_tokens) == ("base", 400)
    database.close()


def test_what_outlasts_the_grace_is_told(start: Start) -> None:
    server = start("--shutdown-grace", "0.5")
    whole: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=30) as client:
            whole.append(client.post("/v1/completions", json=asked(1900)))

    other = threading.Thread(target=ask)
    other.start()
    with server.client.stream("POST", "/v1/completions", json=asked(1900, stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal()
        last = [line for line in lines if line.startswith("data: {")][-1]
    other.join()
    error = json.loads(last[6:])["error"]
    assert error["code"] == "engine_not_ready" and "ending" in error["message"]
    assert whole[0].status_code == 503
    assert server.ends() == 0


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    server = start()
    with server.client.stream("POST", "/v1/completions", json=asked(1900, stream=True)) as stream:
        next(stream.iter_lines())
        server.signal()
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.01)
        began = time.monotonic()
        server.signal()
        assert server.ends() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5


def test_one_that_does_nothing_ends(start: Start) -> None:
    server = start()
    server.signal()
    assert server.ends() == 0
