"""Turns and slots over HTTP: nobody waits for ever, too many are told so, and an engine that ends
is followed by another.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import supervisor
from tests.conftest import MakeAdapter
from tests.http.conftest import Running, nothing_is_left, serve, settings, upload

TEXT = "/v1/completions"
NAMES = ("one", "two", "three", "four")


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """Each test here has a server of its own, and looks itself."""


@asynccontextmanager
async def served(
    home: Path, base: Path, make_adapter: MakeAdapter, *flags: str
) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """A server with four adapters, two slots and three places on the host; nothing may be left."""
    running = serve(settings(home, *flags), base)
    with closing(running):
        server = await asyncio.to_thread(next, running)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            with httpx.Client(base_url=server.url, timeout=30) as sync:
                for seed, name in enumerate(NAMES, start=1):
                    reply = await asyncio.to_thread(upload, sync, name, make_adapter(seed))
                    assert reply.status_code == 201, reply.text
            yield server, client
        await asyncio.to_thread(nothing_is_left, server)
        assert server.core.cold == []


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSES_S", (0.05,))


async def ask(client: httpx.AsyncClient, model: str, tokens: int = 4, **more: Any) -> Any:
    asked = {"model": model, "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True, **more}
    return await client.post(TEXT, json=asked)


async def events(client: httpx.AsyncClient, model: str, tokens: int) -> list[str]:
    asked = {"model": model, "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True}
    async with client.stream("POST", TEXT, json=asked | {"stream": True}) as reply:
        return [line async for line in reply.aiter_lines() if line]


async def until(holds: Callable[[], Any]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came true")


async def ready(client: httpx.AsyncClient) -> None:
    while (await client.get("/ready")).status_code != 200:
        await asyncio.sleep(0.02)


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


# Turns -------------------------------------------------------------------------------------


async def test_a_flood_of_two_adapters_does_not_keep_out_a_third(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    """vLLM's own rule lets the flood overtake for as long as it lasts: this would time out."""
    async with served(home, base_folder, make_adapter) as (_, client):
        done = asyncio.Event()

        async def flood(name: str, turn: int) -> None:
            while not done.is_set():
                assert (await ask(client, name, 20 + 7 * turn)).status_code == 200

        flooding = [asyncio.create_task(flood(n, k)) for n in ("one", "two") for k in range(4)]
        await asyncio.sleep(0.5)
        for victim in ("three", "four", "base", "three"):
            reply = await asyncio.wait_for(ask(client, victim), 20)
            assert reply.status_code == 200
            assert victim == "base" or float(reply.headers["x-loraplex-queue-ms"]) >= 0
        done.set()
        await asyncio.gather(*flooding)


async def test_more_adapters_than_slots_all_get_their_share(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter) as (_, client):
        replies = await asyncio.gather(*(ask(client, NAMES[k % 4], 10) for k in range(40)))
        assert {reply.status_code for reply in replies} == {200}


@pytest.mark.parametrize("stream", [False, True])
async def test_too_many_are_told_so_before_anything_is_streamed(
    home: Path, base_folder: Path, make_adapter: MakeAdapter, stream: bool
) -> None:
    flags = ("--max-num-seqs", "1", "--max-waiting", "2")
    async with served(home, base_folder, make_adapter, *flags) as (server, client):
        sent = [asyncio.create_task(ask(client, "base", 60)) for _ in range(3)]
        gateway = server.gateway
        await until(lambda: len(gateway.admission) == 2)
        refused = await ask(client, "one", stream=stream)
        assert code(refused) == (429, "overloaded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) > 0
        assert {(await reply).status_code for reply in sent} == {200}
        assert (await ask(client, "one")).status_code == 200


async def test_who_waits_too_long_is_told_so(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    flags = ("--max-num-seqs", "1", "--queue-timeout", "0.3")
    async with served(home, base_folder, make_adapter, *flags) as (_, client):
        long = asyncio.create_task(ask(client, "base", 200))
        await asyncio.sleep(0.1)
        assert code(await ask(client, "one")) == (429, "overloaded")
        assert (await long).status_code == 200


async def test_who_waits_and_hangs_up_leaves_the_queue(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter, "--max-num-seqs", "1") as (server, client):
        gateway = server.gateway
        long = asyncio.create_task(ask(client, "base", 300))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(ask(client, name, stream=True)) for name in NAMES]
        await until(lambda: len(gateway.admission) == 4)
        for each in waiting:
            each.cancel()
        await until(lambda: len(gateway.admission) == 0)
        assert not long.done()
        assert (await long).status_code == 200


async def test_an_api_key_cannot_take_all_of_a_queue(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    flags = ("--max-num-seqs", "1", "--max-waiting-per-key", "2")
    async with served(home, base_folder, make_adapter, *flags) as (server, client):
        gateway, keys = server.gateway, server.serving.keys
        made = {name: keys.create(name, ("infer",))[1] for name in ("greedy", "modest")}

        async def with_key(key: str, tokens: int) -> httpx.Response:
            asked = {"prompt": "Hi", "max_tokens": tokens, "ignore_eos": True}
            headers = {"authorization": f"Bearer {made[key]}"}
            return await client.post(TEXT, json=asked, headers=headers)

        greedy = [asyncio.create_task(with_key("greedy", 60)) for _ in range(3)]
        await until(lambda: len(gateway.admission) == 2)
        assert code(await with_key("greedy", 1)) == (429, "overloaded")
        # And who has another key need not wait for all that came before.
        assert (await with_key("modest", 1)).status_code == 200
        assert not all(each.done() for each in greedy)
        assert {(await each).status_code for each in greedy} == {200}


async def test_several_replies_to_one_prompt_take_as_many_seats(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter, "--max-num-seqs", "4") as (server, client):
        gateway = server.gateway
        asked = [asyncio.create_task(ask(client, "one", 40, n=3)) for _ in range(2)]
        await until(lambda: len(gateway.admission) == 1)
        assert {len((await each).json()["choices"]) for each in asked} == {3}


# Loads -------------------------------------------------------------------------------------


async def test_a_load_that_takes_too_long_is_an_error_of_its_requests(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter, "--load-timeout", "0.3") as (server, client):
        stuck = asyncio.Event()

        async def wait(_: Any) -> None:
            while not stuck.is_set():
                await asyncio.sleep(0.01)

        assert (await ask(client, "one")).headers["x-loraplex-load-ms"] != "0"  # evicted by four
        server.core.on_load = wait
        both = asyncio.gather(ask(client, "two"), ask(client, "two"))
        assert (await ask(client, "base")).status_code == 200
        assert (await ask(client, "one")).headers["x-loraplex-load-ms"] == "0"
        assert [code(each) for each in await both] == [(503, "adapter_load_timeout")] * 2
        stuck.set()
        server.core.on_load = None
        assert (await ask(client, "two")).status_code == 200


async def test_what_does_not_go_into_a_slot_is_an_error_of_its_requests(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter) as (server, client):
        await ask(client, "three")
        await ask(client, "four")

        def fail(digest: str) -> None:
            raise RuntimeError("no memory")

        server.core.on_slot = fail
        assert code(await ask(client, "one")) == (503, "adapter_load_failed")
        server.core.on_slot = None
        assert (await ask(client, "one")).status_code == 200


async def test_a_pin_is_of_the_version_and_not_of_others_with_its_bytes(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter) as (_, client):

        async def call(what: str, name: str) -> httpx.Response:
            return await client.post(f"/v1/adapters/{name}/{what}")

        async def pinned() -> bool:
            live = (await client.get("/v1/live")).json()["resident"]
            return any(each["pinned"] for each in live)

        async def same_again() -> None:
            folder = make_adapter(1)
            files = [("files", (p.name, p.read_bytes())) for p in sorted(folder.iterdir())]
            reply = await client.post("/v1/adapters", data={"name": "twin"}, files=files)
            assert reply.json()["digest"] == digest

        digest = (await client.get("/v1/adapters/one/versions/1")).json()["digest"]
        await same_again()
        assert (await call("pin", "one")).status_code == 200
        assert (await call("unpin", "twin")).status_code == 200
        assert await pinned()
        reply = await call("unload", "twin")
        assert code(reply) == (409, "adapter_in_use")
        assert "same bytes" in reply.json()["error"]["message"]
        assert (await call("pin", "twin")).status_code == 200
        await client.delete("/v1/adapters/one")
        assert await pinned()
        await client.delete("/v1/adapters/twin")
        await same_again()
        assert (await call("load", "twin")).status_code == 200
        assert not await pinned()


async def test_residency_by_hand(home: Path, base_folder: Path, make_adapter: MakeAdapter) -> None:
    async with served(home, base_folder, make_adapter) as (server, client):

        async def call(what: str, name: str) -> httpx.Response:
            return await client.post(f"/v1/adapters/{name}/{what}")

        assert (await call("load", "one@1")).json()["residency"] == "host"
        assert (await call("load", "none")).status_code == 404
        pinned = (await call("pin", "two")).json()
        assert pinned["pinned"] is True and pinned["resident_bytes"] > 0
        assert code(await call("pin", "three")) == (409, "too_many_pinned")
        for name in ("one", "three", "four"):
            await ask(client, name)
        loads = server.core.loads.count(pinned["digest"])
        assert (await ask(client, "two")).headers["x-loraplex-load-ms"] == "0"
        assert server.core.loads.count(pinned["digest"]) == loads
        assert code(await call("unload", "two")) == (409, "adapter_in_use")
        assert (await call("unpin", "two")).json()["pinned"] is False
        assert (await call("unload", "two")).json()["residency"] == "disk"
        long = asyncio.create_task(ask(client, "four", 100))
        await until(lambda: server.core.running)
        assert code(await call("unload", "four")) == (409, "adapter_in_use")
        await long


async def test_the_calls_of_vllm(home: Path, base_folder: Path, make_adapter: MakeAdapter) -> None:
    folder = make_adapter(9)
    flags = ("--import-from", f"file://{folder.parent}")
    async with served(home, base_folder, make_adapter, *flags) as (_, client):
        asked = {"lora_name": "nine", "lora_path": str(folder), "load_inplace": False}
        loaded = await client.post("/v1/load_lora_adapter", json=asked)
        assert (loaded.status_code, "'nine' added" in loaded.text) == (200, True)
        assert (await ask(client, "nine")).status_code == 200
        elsewhere = asked | {"lora_path": "/etc"}
        refused = await client.post("/v1/load_lora_adapter", json=elsewhere)
        assert refused.status_code == 403
        removed = await client.post("/v1/unload_lora_adapter", json={"lora_name": "nine"})
        assert removed.status_code == 200
        assert code(await ask(client, "nine"))[0] == 404
        again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "nine"})
        assert code(again) == (404, "adapter_not_found")


async def test_metrics_say_who_waits(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    async with served(home, base_folder, make_adapter, "--max-num-seqs", "1") as (server, client):
        sent = [asyncio.create_task(ask(client, "one", 300)) for _ in range(3)]
        gateway = server.gateway
        await until(lambda: len(gateway.admission) == 2)
        text = (await client.get("/metrics")).text
        assert 'loraplex_requests_waiting{adapter="one"} 2.0' in text
        assert 'loraplex_requests_running{adapter="one"} 1.0' in text
        assert "loraplex_slots 2.0" in text and "loraplex_leases 1.0" in text
        await asyncio.gather(*sent)
        after = (await client.get("/metrics")).text
        assert "loraplex_requests_waiting{" not in after
        assert "loraplex_leases 0.0" in after


# Engines that end --------------------------------------------------------------------------


async def test_an_engine_that_ends_is_followed_by_another(
    home: Path, base_folder: Path, make_adapter: MakeAdapter, short_pauses: None
) -> None:
    async with served(home, base_folder, make_adapter) as (server, client):
        assert (await client.post("/v1/adapters/two/pin")).status_code == 200
        streams = [asyncio.create_task(events(client, name, 1900)) for name in ("base", "one")]
        await until(lambda: server.core.running == 2)
        waits = asyncio.create_task(ask(client, "three", 1900))
        await asyncio.sleep(0.1)
        server.core.die()
        for stream in streams:
            *_, error, end = await stream
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_not_ready"
            assert end == "data: [DONE]"
        assert code(await waits) == (503, "engine_not_ready")
        assert (await waits).headers["retry-after"]
        await ready(client)
        assert len(server.engines) == 2
        assert len(server.core.loads) == 1  # what is pinned, before anybody asks
        for name in (*NAMES, "base"):
            assert (await ask(client, name)).status_code == 200
        assert "loraplex_engine_restarts_total 1.0" in (await client.get("/metrics")).text


async def test_uploads_wait_for_the_next_engine(
    home: Path, base_folder: Path, make_adapter: MakeAdapter, short_pauses: None
) -> None:
    async with served(home, base_folder, make_adapter) as (server, client):
        server.core.die()
        await until(lambda: server.serving.handlers is None)
        with httpx.Client(base_url=server.url, timeout=30) as sync:
            reply = await asyncio.to_thread(upload, sync, "five", make_adapter(5))
        assert reply.status_code == 201
        assert (await ask(client, "five")).status_code == 200


async def test_an_engine_that_hangs_is_replaced(
    home: Path, base_folder: Path, make_adapter: MakeAdapter, short_pauses: None
) -> None:
    async with served(home, base_folder, make_adapter, "--engine-timeout", "1") as (server, client):
        stream = asyncio.create_task(events(client, "one", 1900))
        await until(lambda: server.engine.output_processor.request_states)
        await asyncio.sleep(0.2)  # tokens have come
        server.core.hangs = True
        *_, error, _ = await stream
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_not_ready"
        await ready(client)
        assert any("no step for" in line for line in server.said)
        assert (await ask(client, "one")).status_code == 200


async def test_an_adapter_that_engines_end_with_is_taken_out_of_service(
    home: Path, base_folder: Path, make_adapter: MakeAdapter, short_pauses: None
) -> None:
    async with served(home, base_folder, make_adapter) as (server, client):
        for other in ("two", "three", "base"):
            both = [asyncio.create_task(events(client, n, 1900)) for n in ("one", other)]
            await until(lambda: server.core.running == 2)
            server.core.die()
            await asyncio.gather(*both)
            await ready(client)
        assert code(await ask(client, "one")) == (409, "version_quarantined")
        (version,) = (await client.get("/v1/adapters/one")).json()["versions"]
        assert version["state"] == "quarantined" and "3 times" in version["reason"]
        assert any("one@1" in line for line in server.said)
        for name in ("two", "three", "base"):
            assert (await ask(client, name)).status_code == 200


def test_one_that_several_have_in_common_is_not_guessed() -> None:
    deaths = supervisor.Deaths()
    assert [deaths.add(frozenset("ab"), now) for now in range(4)] == [None] * 4
    assert deaths.add(frozenset("ac"), 5.0) == "a"
    assert deaths.add(frozenset("a"), 6.0) is None  # it is out of service: counted anew
    late = supervisor.Deaths()
    times = (0.0, 1.0, 2.0 + supervisor.WITHIN_S)
    assert [late.add(frozenset("a"), now) for now in times] == [None] * 3
