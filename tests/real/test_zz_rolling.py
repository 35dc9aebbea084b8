"""Two servers behind a proxy are restarted one after the other, and no request fails."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import with_base
from tests.real.conftest import Server

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
CLIENTS = 3

pytestmark = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="needs haproxy (apt-get install haproxy)"
)


@pytest.fixture
def pair(tmp_path: Path, base_folder: Path) -> Iterator[list[Server]]:
    servers = [
        Server(with_base(tmp_path / name / "home", base_folder), "--max-loras", "2")
        for name in ("a", "b")
    ]
    starts = [threading.Thread(target=server.start) for server in servers]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def front(pair: list[Server], tmp_path: Path) -> Iterator[str]:
    """Where the proxy listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    names = {
        "FRONT": address,
        "SERVER_A": f"127.0.0.1:{pair[0].port}",
        "SERVER_B": f"127.0.0.1:{pair[1].port}",
    }
    process = subprocess.Popen(["haproxy", "-db", "-f", CONFIG], env=os.environ | names)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"http://{address}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(10)


async def load(front: str, stop: asyncio.Event) -> tuple[Counter[str], list[str]]:
    """Streams until `stop`: how many of each adapter went well, and what did not."""
    well, failed = Counter[str](), []

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=front, timeout=120) as http:
            turn = number
            while not stop.is_set():
                name = ("base", "sql", "code", "poetry")[turn % 4]
                turn += 1
                body = {"model": name, "prompt": "On", "max_tokens": 24, "ignore_eos": True}
                try:
                    async with http.stream(
                        "POST", "/v1/completions", json=body | {"stream": True}
                    ) as reply:
                        lines = [line async for line in reply.aiter_lines() if line]
                        if reply.status_code == 200 and lines[-1] == "data: [DONE]":
                            well[name] += 1
                        else:
                            failed.append(f"{reply.status_code} {lines[-1:]}")
                except httpx.HTTPError as error:
                    failed.append(repr(error))

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return well, failed


@pytest.mark.timeout(900)  # four starts, two of them beside load
def test_a_rolling_restart_fails_no_request(pair: list[Server], front: str) -> None:
    async def restart() -> None:
        for server in pair:
            await asyncio.sleep(3)
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, 60) == 0, server.log
            await asyncio.to_thread(server.start)

    async def both() -> tuple[Counter[str], list[str]]:
        stop = asyncio.Event()
        sending = asyncio.create_task(load(front, stop))
        try:
            await restart()
            await asyncio.sleep(3)
        finally:
            stop.set()
        return await sending

    well, failed = asyncio.run(both())
    assert failed == []
    assert set(well) == {"base", "sql", "code", "poetry"} and well.total() > 40
