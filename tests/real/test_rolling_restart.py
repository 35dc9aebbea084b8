"""Two servers behind a proxy: a restart of one after the other fails no request."""

import asyncio
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import THOROUGH, with_base
from tests.proxy import proxy
from tests.real.conftest import Server

CLIENTS = 3


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Iterator[list[Server]]:
    homes = [tmp_path_factory.mktemp("pair") / name for name in ("a", "b")]
    servers = [Server(with_base(home, base_folder), "--max-loras", "2") for home in homes]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.end()


@pytest.fixture
def front(pair: list[Server]) -> Iterator[str]:
    """Where the proxy listens, with both behind it."""
    with proxy(*(f"127.0.0.1:{server.port}" for server in pair)) as url:
        yield url


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


@pytest.mark.skipif(
    not THOROUGH or shutil.which("haproxy") is None,
    reason="takes minutes: THOROUGH=1, and haproxy (apt-get install haproxy)",
)
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
