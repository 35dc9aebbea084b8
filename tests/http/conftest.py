"""The HTTP app over the fake engine, on a real port."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from adapters.folder import CONFIG
from server import app
from server.config import Settings
from server.gateway import Gateway
from server.routes import Serving
from tests import fake_engine
from tests.conftest import MakeAdapter

SLOTS, HOST = 2, 3


@dataclass
class Running:
    """A server, and the inside of it that HTTP does not show."""

    url: str
    app: FastAPI
    serving: Serving
    engines: list[Any]
    said: list[str]

    @property
    def engine(self) -> Any:
        """The one of now: another takes the place of one that has ended."""
        return self.engines[-1]

    @property
    def gateway(self) -> Gateway:
        """The one of now, which there must be."""
        assert self.serving.gateway is not None
        return self.serving.gateway

    @property
    def core(self) -> fake_engine.FakeCore:
        return self.engine.engine_core


def settings(home: Path, *more: str) -> Settings:
    sizes = ("--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST), "--max-upload-mb", "30")
    return Settings.read(["--home", str(home), "--no-demo-adapters", *sizes, *more])


def serve(chosen: Settings, base_folder: Path) -> Iterator[Running]:
    """Runs a server in a thread until the generator is closed."""
    serving = app.build(chosen, base_folder)
    ready, engines, errors, said = threading.Event(), [], [], []

    def start() -> Any:
        engines.append(fake_engine.start(serving.args))
        return engines[-1]

    def done(error: Exception | None) -> None:
        errors.append(error)
        ready.set()

    http = app.create_app(serving, start, done, said.append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(http, log_level="error", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(60)
            assert errors == [None], errors
            port = listener.getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", http, serving, engines, said)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def running(session_home: Path, base_folder: Path) -> Iterator[Running]:
    yield from serve(settings(session_home), base_folder)


@pytest.fixture(scope="session")
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


def nothing_is_left(running: Running) -> None:
    """Fails if a request, lease, load or place in a queue stays for two seconds."""
    for _ in range(100):
        gateway = running.serving.gateway
        left = gateway.left_behind() if gateway else ["there is no gateway"]
        left += [f"{running.core.running} requests in the engine"] * bool(running.core.running)
        if not left:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"left behind: {left}")


@pytest.fixture(autouse=True)
def nothing_left(running: Running) -> Iterator[None]:
    """After each test: no request, lease or load is left, and nothing was loaded in a step."""
    yield
    nothing_is_left(running)
    assert running.core.cold == []
    assert list((running.serving.settings.home / "store" / "incoming").iterdir()) == []


def upload(client: httpx.Client, name: str, folder: Path, **fields: str) -> httpx.Response:
    files = [
        ("files", (file.name, file.read_bytes()))
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors")
    ]
    return client.post("/v1/adapters", data={"name": name, **fields}, files=files)


def reconfigure(folder: Path, **changes: Any) -> None:
    """Has an adapter's config say something else."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cool(client: httpx.Client) -> None:
    """Has nothing loaded: who is asked for next is loaded from disk."""
    listed = client.get("/v1/adapters", params={"limit": 1000}).json()["data"]
    for version in (version for adapter in listed for version in adapter["versions"]):
        if version["residency"] != "disk":
            reply = client.post(f"/v1/adapters/{version['reference']}/unload")
            assert reply.json()["residency"] == "disk", reply.text


@pytest.fixture(scope="session")
def four(http: httpx.Client, make_adapter: MakeAdapter) -> dict[str, str]:
    """Four adapters on the server, one more than its host cache holds: digests by name."""
    digests = {}
    for seed, name in enumerate(("one", "two", "three", "four"), start=1):
        reply = upload(http, name, make_adapter(seed))
        assert reply.status_code in (200, 201), reply.text
        digests[name] = reply.json()["digest"]
    return digests
