"""One real server for the whole test run: the command, the engine, the demo adapters."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.conftest import with_base
from tests.real.collector import Collector, collecting

ENGINES_OF_THEIR_OWN = {
    "test_engine",
    "test_every_max_loras",
    "test_faults",
    "test_order",
    "test_rolling_restart",
    "test_soak",
    "test_staging",
    "test_variants",
}
# What takes longest, so that no process has it left at the end; then something short, since who has
# the first, which is a single test, is given the third at once, to wait behind it.
FIRST = ("test_soak", "test_faults", "test_order")
START_S = 300  # the first start of all compiles the model: 90 on a quiet machine
ADMIN_KEY = "the-operators-own-key"
LEFT_S = 20  # until what a test has left under way must be done
COMPARED_S = 2  # until the server has compared what the engine has with what it should have


class Server:
    """`loraplex serve` as a process, on a free port of loopback."""

    def __init__(self, home: Path, *flags: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(Path(sys.executable).with_name("loraplex")), "serve", *flags]
        self._command += ["--home", str(home), "--port", str(self.port)]
        self._environment = os.environ | environment
        key = environment.get("LORAPLEX_ADMIN_KEY")
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self._log = home / "server.log"
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, process_group=0
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.end()
        raise AssertionError(f"the server is not ready:\n{self.log}")

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(30)


def nothing_under_way(client: httpx.Client) -> None:
    """No request, load or lease is left behind."""
    deadline = time.monotonic() + LEFT_S
    while (left := _under_way(client)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, left


def nothing_left(client: httpx.Client) -> None:
    """Nothing is, and the engine has what it should have."""
    nothing_under_way(client)
    time.sleep(COMPARED_S)
    drift = [line for line in _metrics(client) if re.match("loraplex_engine_drift ", line)]
    assert drift == ["loraplex_engine_drift 0.0"]
    assert not _under_way(client)


def _under_way(client: httpx.Client) -> list[str]:
    """Series that say that somebody waits or runs; all but those by adapter must be there."""
    lines = _metrics(client)
    totals = [line for line in lines if re.match("loraplex_(under_way|leases) ", line)]
    assert len(totals) == 2, lines
    some = [line for line in lines if re.match(r"loraplex_requests_(waiting|running)\{", line)]
    return [line for line in totals if not line.endswith(" 0.0")] + some


def _metrics(client: httpx.Client) -> list[str]:
    return client.get("/metrics").text.splitlines()


class Dealing(LoadScopeScheduling):  # type: ignore[misc]
    """Where there are several processes, one has all that use the session's server."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).stem
        return module if module in ENGINES_OF_THEIR_OWN else "the server"


def pytest_configure(config: pytest.Config) -> None:
    """Each process, and the servers that it starts, has a core of its own: threads of two engines
    that wait for each other on the same cores take several times as long."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what is to come first there; everything else keeps its order."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealing:
    """xdist asks for it."""
    return Dealing(config, log)


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test with the session's server, unless the test has ended it."""
    yield from _then(nothing_under_way, request, _uses_server(request.fixturenames))


@pytest.fixture(scope="module", autouse=True)
def leaves_no_drift(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each module with the session's server; the look takes longer than most tests."""
    items = [item for item in request.session.items if item.path == request.path]
    uses = any(_uses_server(getattr(item, "fixturenames", ())) for item in items)
    yield from _then(nothing_left, request, uses)


def _uses_server(fixtures: Iterable[str]) -> bool:
    return not {"http", "server"}.isdisjoint(fixtures)


def _then(
    look: Callable[[httpx.Client], None], request: pytest.FixtureRequest, uses_server: bool
) -> Iterator[None]:
    if not uses_server:
        yield
        return
    server: Server = request.getfixturevalue("server")
    yield
    if server.process is not None and server.process.poll() is None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            look(client)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For the references: threads that wait for each other crawl where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Whom the server sends its traces."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(session_home: Path, collector: Collector) -> Iterator[Server]:
    server = Server(session_home, "--compile", "--otlp-traces-endpoint", collector.url)
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Iterator[Server]:
    """A server that wants keys. It runs as on a machine without a compiler: adapters go by the op
    in torch, and vLLM's sampling has to do without as well."""
    home = with_base(tmp_path_factory.mktemp("guarded"), base_folder)
    environment = {"LORAPLEX_ADMIN_KEY": ADMIN_KEY, "_LORAPLEX_CPU_LORA_OP": "torch"}
    server = Server(home, CXX="no-compiler", **environment)
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
