"""Probes, and errors outside of any call."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import app
from server.routes import Serving
from tests import fake_engine
from tests.http.conftest import settings


def test_probes_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json()["status"] == "ready"
    assert "python_info" in http.get("/metrics").text


def test_models(http: httpx.Client, four: dict[str, str]) -> None:
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert models["smollm2-135m-instruct"]["parent"] is None
    for name in four:
        assert models[name]["parent"] == "smollm2-135m-instruct"
    assert http.get("/v1/models/one@1").json()["id"] == "one@1"
    assert http.get("/v1/models/base").status_code == 200
    assert http.get("/v1/models/nobody").status_code == 404
    assert http.get("/v1/models/No/body").status_code == 404


def test_nothing_there(http: httpx.Client) -> None:
    for reply in (http.get("/v1/nothing"), http.put("/v1/models"), http.get("/v1/adapters/x/y")):
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["message"]


@pytest.fixture
def serving(home: Path, base_folder: Path) -> Serving:
    return app.build(settings(home), base_folder)


async def test_before_the_engine_can_answer(serving: Serving) -> None:
    gate, outcome = threading.Event(), asyncio.Queue()

    engines = []

    def start() -> Any:
        gate.wait(30)
        engines.append(fake_engine.start(serving.args))
        return engines[-1]

    http = app.create_app(serving, start, outcome.put_nowait)
    transport = httpx.ASGITransport(app=http)
    async with (
        http.router.lifespan_context(http),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/adapters")).status_code == 200
        for reply in (
            await client.get("/ready"),
            await client.post("/v1/completions", json={"prompt": "x"}),
        ):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "engine_not_ready"
            assert reply.headers["retry-after"]
        gate.set()
        assert await outcome.get() is None
        assert (await client.get("/ready")).status_code == 200
        engines[0].engine_core.die()
        while serving.handlers is not None:
            await asyncio.sleep(0.02)
        assert (await client.get("/ready")).status_code == 503
        gone = await client.post("/v1/completions", json={"prompt": "x"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "engine_not_ready")
        assert (await client.get("/health")).status_code == 200


async def test_an_engine_that_does_not_start_is_reported(serving: Serving) -> None:
    outcome: asyncio.Queue[Exception | None] = asyncio.Queue()

    def start() -> Any:
        raise RuntimeError("no memory")

    http = app.create_app(serving, start, outcome.put_nowait)
    async with http.router.lifespan_context(http):
        assert str(await outcome.get()) == "no memory"


async def test_workers_that_apply_adapters_by_another_op_are_not_served(serving: Serving) -> None:
    outcome: asyncio.Queue[Exception | None] = asyncio.Queue()

    def start() -> Any:
        engine = fake_engine.start(serving.args)

        async def stock(*_: Any) -> list[dict[str, Any]]:
            wrapper = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
            return [{"wrapper": wrapper, "replaced": True}]

        engine.engine_core.collective_rpc_async = stock
        return engine

    http = app.create_app(serving, start, outcome.put_nowait)
    async with http.router.lifespan_context(http):
        assert "applies adapters by" in str(await outcome.get())
        assert serving.gateway is None
