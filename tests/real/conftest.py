"""One real server for the whole test run: the command, the engine, the demo adapters."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

START_S = 300  # the first start of all compiles the model: 90 on a quiet machine


class Server:
    """`loraplex serve` as a process, on a free port of loopback."""

    def __init__(self, home: Path, *flags: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(Path(sys.executable).with_name("loraplex")), "serve", *flags]
        self._command += ["--home", str(home), "--port", str(self.port)]
        self._environment = os.environ | environment
        self._log = home / "server.log"
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
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
        raise AssertionError(f"the server is not ready:\n{self.log}")

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(30)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For the references: threads that wait for each other crawl where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server(session_home: Path) -> Iterator[Server]:
    server = Server(session_home, "--compile")
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
