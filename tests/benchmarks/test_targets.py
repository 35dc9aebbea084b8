"""Starting, pausing and ending servers, with a small one that has a child of its own."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks import targets
from benchmarks.load import OpenAI
from benchmarks.targets import Material, Server, TargetError
from benchmarks.workload import Target
from tests.processes import gone

PROGRAM = """
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: time.sleep(0.01)
'''])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{os.environ['THREADS']} {os.environ.get('VLLM_X')}".encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def small(target: Target, material: Material, port: int, own: Path) -> targets._Kind:
    return targets._Kind([sys.executable, "-c", PROGRAM, str(port)], "/", OpenAI(), {})


def broken(target: Target, material: Material, port: int, own: Path) -> targets._Kind:
    return targets._Kind([sys.executable, "-c", "exit('no such base')"], "/", OpenAI(), {})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setitem(targets._KINDS, "vllm", small)
    monkeypatch.setenv("VLLM_X", "a developer's own")
    monkeypatch.setattr(targets, "STOP_S", 0.3)
    material = Material(tmp_path, {}, tmp_path)
    server = Server("small", Target(kind="vllm"), {"THREADS": "{cores}"}, material, tmp_path / "s")
    yield server
    server.stop()


def states(server: Server) -> set[str]:
    return {process.status() for process in server.processes()}


def test_its_whole_life(server: Server) -> None:
    assert server.start() > 0
    pids = {process.pid for process in server.processes()}
    assert len(pids) == 2
    cores = f"0-{psutil.cpu_count() - 1}"
    assert httpx.get(server.url).text == f"{cores} None"
    assert server.memory_gib() > 0

    server.pause()
    time.sleep(0.1)
    assert states(server) == {psutil.STATUS_STOPPED}
    with pytest.raises(httpx.TimeoutException):
        httpx.get(server.url, timeout=0.3)
    server.resume()
    assert httpx.get(server.url).status_code == 200

    server.pause()
    server.stop()  # paused, and the child ignores SIGTERM
    assert gone(pids, within_s=5)
    server.stop()  # twice does no harm


def test_it_starts_again(server: Server) -> None:
    server.start()
    server.stop()
    server.start()
    assert httpx.get(server.url).status_code == 200


def test_one_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets._KINDS, "vllm", broken)
    server = Server("bad", Target(kind="vllm"), {}, Material(tmp_path, {}, tmp_path), tmp_path)
    with pytest.raises(TargetError, match="bad ended while it started:\nno such base"):
        server.start()
