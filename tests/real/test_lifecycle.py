"""The real engine's say about a new adapter, and versions that move under its load."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters.demo
from tests.conftest import MakeAdapter
from tests.http.conftest import upload
from tests.real.conftest import Server

WEIGHTS = "adapter_model.safetensors"
QUESTION = (
    "Write one SQLite query that answers the question. Reply with the query only.\n\n"
    "CREATE TABLE readers (id INTEGER, name TEXT, city TEXT, loans INTEGER)\n\n"
    "Question: How many readers live in Oslo?"
)


def bent(folder: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an adapter with other numbers in it."""
    shutil.copytree(folder, to)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(name, values) for name, values in tensors.items()}, to / WEIGHTS)
    return to


def scaled(factor: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, values: values * factor if "lora_B" in name else values


def refused(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 422, reply.text[:500]
    return [problem["code"] for problem in reply.json()["error"]["problems"]]


def test_an_effect_too_small_for_the_engine_is_none(
    http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Its ΔW is not zero, but adding it to what the base computes changes no bit."""
    faint = bent(make_adapter(301), tmp_path / "faint", scaled(1e-20))
    assert refused(upload(http, "faint", faint)) == ["no_effect"]


def test_numbers_that_make_the_engine_compute_nan_are_refused(
    http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Each is finite, also in the engine's type."""
    wild = bent(make_adapter(302), tmp_path / "wild", scaled(1e36))
    assert refused(upload(http, "wild", wild)) == ["nonfinite_output"]
    said = http.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 4})
    assert said.status_code == 200


def test_an_adapter_is_proven_while_others_stream(
    server: Server, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    """Beside running rows the engine rounds otherwise; the effect still stands out."""

    async def stream(client: httpx.AsyncClient, model: str) -> int:
        asked = {"model": model, "prompt": "On", "max_tokens": 150, "ignore_eos": True}
        asked |= {"stream": True, "return_token_ids": True}  # tokens can share an event
        async with client.stream("POST", "/v1/completions", json=asked) as got:
            events = [line[6:] async for line in got.aiter_lines() if line.startswith("data: {")]
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return sum(len(choice.get("token_ids") or ()) for choice in choices)

    async def both() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            streams = [asyncio.create_task(stream(client, m)) for m in ("base", "sql", "code")]
            await asyncio.sleep(1)
            reply = await asyncio.to_thread(upload, http, "amid", make_adapter(303))
            assert reply.status_code == 201, reply.text[:500]
            effect = reply.json()["checks"]["effect"]
            assert effect["difference"] > 10 * effect["noise"] and effect["difference"] > 0.1
            return await asyncio.gather(*streams)

    assert asyncio.run(both()) == [150] * 3


def test_the_demo_adapters_are_proven(http: httpx.Client) -> None:
    for name in ("sql", "code", "poetry"):
        checks = http.get(f"/v1/adapters/{name}").json()["versions"][0]["checks"]
        assert checks["effect"]["difference"] > 0.5
        assert checks["problems"] == checks["warnings"] == checks["advice"] == []


@pytest.fixture
def prod(http: httpx.Client) -> str:
    """URL of an alias of an adapter whose version 1 knows SQL and version 2 does not."""
    for name in ("sql", "poetry"):
        reply = upload(http, "shifting", adapters.demo.WEIGHTS / name, alias="prod")
        assert reply.status_code in (200, 201), reply.text[:500]
    return "/v1/adapters/shifting/aliases/prod"


def test_prod_moves_under_load_with_no_failed_request_and_no_mixed_reply(
    server: Server, http: httpx.Client, prod: str
) -> None:
    asked = {
        "model": "shifting@prod",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answered = []

    async def ask(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/chat/completions", json=asked)
        assert reply.status_code == 200, reply.text
        version = int(reply.headers["x-loraplex-version"])
        text = reply.json()["choices"][0]["message"]["content"]
        right = "COUNT(*) FROM readers WHERE city = 'Oslo'" in text
        assert right == (version == 1), (version, text)
        answered.append(version)

    async def load() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asking = []
            for turn in range(8):
                asking += [asyncio.create_task(ask(client)) for _ in range(3)]
                moved = await client.put(prod, json={"version": 1 + turn % 2})
                assert moved.status_code == 200
                asking += [asyncio.create_task(ask(client)) for _ in range(3)]
                await asyncio.sleep(0.4)
            await asyncio.gather(*asking)

    asyncio.run(load())
    assert set(answered) == {1, 2} and len(answered) == 48
