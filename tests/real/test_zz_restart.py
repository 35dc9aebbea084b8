"""Last of all: the server is killed, nothing of it stays, and it comes back as it was."""

import contextlib
import json
import os
import signal
import threading
import time

import httpx

from tests.conftest import CACHE, MakeAdapter
from tests.http.conftest import upload
from tests.processes import alive, descendants, gone
from tests.real.conftest import Server

ENGINE_CACHE = CACHE / "engine"


def stream(server: Server, model: str) -> None:
    asked = {"model": model, "prompt": "On", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with contextlib.suppress(httpx.TransportError):  # it is killed in the middle of it
        httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)


def test_killed_and_started_again(
    server: Server, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    upload(http, "survivor", make_adapter(9), alias="prod")
    asked = {"model": "survivor@prod", "prompt": "The sea", "max_tokens": 12, "temperature": 0}
    before = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    listed = http.get("/v1/adapters").json()["data"]
    busy = [threading.Thread(target=stream, args=(server, m)) for m in ("base", "sql", "survivor")]
    for thread in busy:
        thread.start()
    time.sleep(2)

    assert server.process is not None
    processes = descendants(server.process.pid)
    assert len(processes) >= 2
    server.kill(signal.SIGKILL)
    assert gone(processes, within_s=5), alive(processes)
    for thread in busy:
        thread.join()

    restarted = time.time()
    server.start()
    compiled = [file.stat().st_mtime for file in ENGINE_CACHE.rglob("torch_aot_compile/*/*/model")]
    assert compiled and max(compiled) < restarted, "the model was compiled anew"
    assert server.log.count("compiling the model") <= 1
    after = http.get("/v1/adapters").json()["data"]
    names = [adapter["name"] for adapter in after]
    assert {"sql", "code", "poetry", "survivor"} <= set(names)
    keep = ("name", "aliases", "created", "metadata")
    assert [{k: a[k] for k in keep} for a in after] == [{k: a[k] for k in keep} for a in listed]
    assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"] == before


def test_ctrl_c_ends_the_server_and_all_of_it_when_what_runs_has_ended(server: Server) -> None:
    """A terminal sends it to all of the server's group, of which the engine is not."""
    asked = {"prompt": "On", "max_tokens": 60, "ignore_eos": True, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    assert server.process is not None
    processes = descendants(server.process.pid)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as running:
        lines = running.iter_lines()
        next(lines)
        os.killpg(server.process.pid, signal.SIGINT)
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 60
    assert server.process.wait(30) == 0, server.log
    assert gone(processes, within_s=5), alive(processes)
    assert os.path.exists(server.home / "registry.db")
