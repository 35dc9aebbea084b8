"""Two servers: their traces, and a restart of one after the other that fails no request."""

import asyncio
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import THOROUGH, with_base
from tests.proxy import proxy
from tests.real.collector import Collector, collecting
from tests.real.conftest import Server

CLIENTS = 3
SENT_S = 30  # spans are sent every 5
SPANS = ["POST /v1/completions", "admission", "engine", "llm_request", "load"]  # vLLM's among them


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, collector: Collector
) -> Iterator[list[Server]]:
    """Two servers, of which the first has been started."""
    flags = ("--max-loras", "2", "--otlp-traces-endpoint", collector.url)
    homes = [tmp_path_factory.mktemp("pair") / name for name in ("a", "b")]
    servers = [Server(with_base(home, base_folder), *flags) for home in homes]
    try:
        servers[0].start()
        yield servers
    finally:
        for server in servers:
            server.end()


@pytest.fixture
def front(pair: list[Server]) -> Iterator[str]:
    """Where the proxy listens, with both behind it."""
    pair[1].start()
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


@pytest.mark.timeout(600)
def test_a_collector_is_sent_the_trace_of_a_request(
    pair: list[Server], collector: Collector
) -> None:
    """One span each for the request, its load, its wait and the engine, in the client's trace."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"model": "sql", "prompt": "A prompt that nobody sees.", "max_tokens": 4}
    sent = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "traced"}
    httpx.post(f"{pair[0].url}/v1/adapters/sql/unload").raise_for_status()  # so that it is loaded
    reply = httpx.post(f"{pair[0].url}/v1/completions", json=body, headers=sent, timeout=60)
    assert reply.status_code == 200, reply.text

    deadline = time.monotonic() + SENT_S
    while len(ours := _of_trace(collector, trace)) < len(SPANS) and time.monotonic() < deadline:
        time.sleep(0.5)
    named = {span.name: span for span in ours}
    assert sorted(named) == SPANS
    request = named.pop("POST /v1/completions")
    assert request.parent_span_id.hex() == parent
    for span in named.values():
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    about = {each.key: each.value for each in request.attributes}
    assert about["loraplex.request_id"].string_value == "traced"
    assert about["loraplex.adapter"].string_value == "sql"
    assert about["loraplex.output_tokens"].int_value == 4
    assert b"nobody sees" not in b"".join(span.SerializeToString() for span in ours)


def _of_trace(collector: Collector, trace: str) -> list[Any]:
    return [span for span in list(collector.spans) if span.trace_id.hex() == trace]


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
