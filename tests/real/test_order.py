"""The order in which a real server serves a backlog is the one that the simulator says."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import httpx
import pytest

from benchmarks.simulator_model import Engine, Request, replay
from server.admission import Limits
from tests.conftest import with_base
from tests.real.conftest import Server

SLOTS, SEATS, STEP_TOKENS = 2, 4, 512
TOGETHER_S = 0.25  # first tokens of about one step, on a machine that others use as well
ADAPTERS = [None, "sql", "code", "poetry"]


@pytest.fixture(scope="module")
def narrow(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = with_base(tmp_path_factory.mktemp("order") / "home", base_folder)
    server = Server(
        home,
        *("--max-num-seqs", str(SEATS), "--max-loras", str(SLOTS)),
        *("--max-num-batched-tokens", str(STEP_TOKENS), "--max-model-len", "512"),
    )
    try:
        server.start()
        yield server
    finally:
        server.end()


# They take all seats until everybody else waits.
BEFORE = [Request(None, 20, 120)] * SEATS


def trace() -> list[Request]:
    """40 requests of different lengths, in a mixed order."""
    random = Random(7)
    asked = [
        Request(adapter, random.randint(20, 120), random.randint(6, 40))
        for adapter in ADAPTERS
        for _ in range(10)
    ]
    random.shuffle(asked)
    return asked


async def send(url: str, requests: list[Request]) -> list[float]:
    """When the first token of each came, in seconds; all of them wait behind `BEFORE`."""
    # One connection each, and as many as there are: none may wait for another here.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=280, limits=limits) as client:
        began = [asyncio.Event() for _ in BEFORE]
        before = [
            asyncio.create_task(_send(client, -1 - i, each, began[i]))
            for i, each in enumerate(BEFORE)
        ]
        for event in began:
            await event.wait()
        tasks = []
        for number, request in enumerate(requests):
            tasks.append(asyncio.create_task(_send(client, number, request, asyncio.Event())))
            await asyncio.sleep(0.02)  # so that they arrive in this order
        assert not any(task.done() for task in before), "not everybody waited"
        await asyncio.gather(*before)
        return await asyncio.gather(*tasks)


async def _send(
    client: httpx.AsyncClient, number: int, request: Request, began: asyncio.Event
) -> float:
    random = Random(number)
    body = {
        "model": request.adapter or "base",
        "prompt": [random.randrange(1000, 40000) for _ in range(request.prompt)],
        "max_tokens": request.output,
        "min_tokens": request.output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    first = None
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if first is None and line.startswith("data: {") and json.loads(line[6:])["choices"]:
                first = time.monotonic()
                began.set()
    assert first is not None
    return first


def tau(real: list[float], simulated: list[float], together: float) -> float:
    """Kendall's, of the pairs that are further apart than `together` in both."""
    same = other = 0
    for a, b in combinations(range(len(real)), 2):
        there, here = real[a] - real[b], simulated[a] - simulated[b]
        if min(abs(there), abs(here)) > together:
            same += there * here > 0
            other += there * here < 0
    return (same - other) / (same + other)


def first(times: list[float], count: int) -> set[int]:
    return set(sorted(range(len(times)), key=times.__getitem__)[:count])


@pytest.mark.timeout(600)  # a busy machine starts the server in five minutes
def test_the_order_is_the_simulators(narrow: Server) -> None:
    asked = trace()
    with httpx.Client(base_url=narrow.url, timeout=120) as client:
        for adapter in ADAPTERS:  # all of them loaded, whoever was last to be proven
            body = {"model": adapter or "base", "prompt": "On", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
    real = asyncio.run(send(narrow.url, asked))
    told = [replace(each, arrival=0.5 + 0.02 * i) for i, each in enumerate(asked)]
    limits = Limits(SLOTS, SEATS, STEP_TOKENS)
    order = replay([*map(replace, BEFORE), *told], limits, Engine(load=0, load_bytes_s=1e12))
    simulated = order.first_s[len(BEFORE) :]
    by_arrival = [each.arrival for each in told]
    found, stock = tau(real, simulated, TOGETHER_S), tau(real, by_arrival, 0)
    print(f"tau {found:.3f}, against arrival {stock:.3f}")
    print("real     ", sorted(range(len(real)), key=real.__getitem__))
    print("simulated", sorted(range(len(real)), key=simulated.__getitem__))
    assert first(real, 8) == first(simulated, 8)
    assert found >= 0.9
    assert stock < 0.8, "it is the order of arrival: the test says nothing"
