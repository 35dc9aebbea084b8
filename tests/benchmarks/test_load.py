"""The client against a small server that streams what the tests need."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from benchmarks import load
from benchmarks.workload import Request


class Small:
    """Streams `output` tokens, `step_s` apart; the first `together` come in one event."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.running = 0
        self.most = 0
        self.step_s = 0.01
        self.together = 1
        self.short = 0
        self.status = 200
        self.error: str | None = None
        self.headers: dict[str, str] = {}
        self.url = ""

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text="no such adapter")
        self.running += 1
        self.most = max(self.most, self.running)
        headers = {"content-type": "text/event-stream", **self.headers}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        left = body["max_tokens"] - self.short
        first = self.together
        while left > 0:
            await asyncio.sleep(self.step_s)
            tokens = [7] * min(first, left)
            first, left = 1, left - len(tokens)
            event: dict[str, Any] = {"choices": [{"text": "x", "token_ids": tokens}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if self.error:
            await response.write(f"data: {json.dumps({'error': self.error})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response


@pytest.fixture
async def small() -> AsyncIterator[Small]:
    server = Small()
    app = web.Application()
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def ask(stream: int = 0, adapter: str | None = None, **more: Any) -> Request:
    return Request(
        stream=stream,
        adapter=adapter,
        prompt=(300, 301),
        output=more.get("output", 4),
        due_s=more.get("due_s"),
    )


async def test_token_times(small: Small) -> None:
    (reply,) = await load.run(small.url, load.OpenAI(), [ask()])
    assert len(reply.times) == 4
    assert list(reply.times) == sorted(reply.times)
    assert reply.times[-1] - reply.times[0] >= 3 * 0.009
    assert small.seen == [
        {
            "model": "base",
            "prompt": [300, 301],
            "max_tokens": 4,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
    ]


async def test_tokens_in_one_event_have_one_time(small: Small) -> None:
    small.together = 3
    (reply,) = await load.run(small.url, load.OpenAI(), [ask()])
    assert len(reply.times) == 4
    assert len(set(reply.times)) == 2


async def test_a_stream_sends_its_next_when_the_last_ended(small: Small) -> None:
    work = [ask(stream, f"a-{stream}") for _ in range(3) for stream in (0, 1)]
    replies = await load.run(small.url, load.OpenAI(), work)
    assert len(replies) == 6
    assert small.most == 2
    mine = [r for r in replies if r.stream == 0]
    assert all(b.sent_s >= a.times[-1] for a, b in pairwise(mine))
    assert {body["model"] for body in small.seen} == {"a-0", "a-1"}


async def test_arrivals_do_not_wait_for_replies(small: Small) -> None:
    small.step_s = 0.1
    work = [ask(i, due_s=0.05 * i, output=2) for i in range(3)]
    replies = await load.run(small.url, load.OpenAI(), work)
    assert small.most == 3
    for reply, due in zip(replies, (0, 0.05, 0.1), strict=True):
        assert reply.due_s == due
        assert due <= reply.sent_s < due + 0.05


async def test_failures_are_said(small: Small) -> None:
    small.status = 404
    with pytest.raises(load.LoadError, match="1 of 1 requests failed: 404 no such adapter"):
        await load.run(small.url, load.OpenAI(), [ask()])


async def test_a_short_reply_is_a_failure(small: Small) -> None:
    small.short = 1
    with pytest.raises(load.LoadError, match="3 tokens came, 4 were asked for"):
        await load.run(small.url, load.OpenAI(), [ask()])


async def test_an_error_in_the_stream_is_a_failure(small: Small) -> None:
    small.error = "the engine is gone"
    with pytest.raises(load.LoadError, match="the engine is gone"):
        await load.run(small.url, load.OpenAI(), [ask()])


async def test_a_limit(small: Small) -> None:
    small.step_s = 0.5
    with pytest.raises(load.LoadError, match="TimeoutError"):
        await load.run(small.url, load.OpenAI(), [ask()], limit_s=0.2)


async def test_what_the_server_says_of_the_load_is_kept(small: Small) -> None:
    (silent,) = await load.run(small.url, load.OpenAI(), [ask()])
    small.headers = {"x-loraplex-load-ms": "12"}
    (loaded,) = await load.run(small.url, load.OpenAI(), [ask()])
    assert (silent.load_ms, loaded.load_ms) == (None, 12.0)


async def test_a_client_goes_on_after_a_failure(small: Small) -> None:
    async with load.connect(small.url, load.OpenAI()) as client:
        small.status = 503
        refused = await client.ask(ask())
        small.status = 200
        first, second = await client.in_turn([ask(), ask()])
    assert (refused.error, refused.times) == ("503 no such adapter", ())
    assert (first.error, second.error) == (None, None)
    assert refused.sent_s < first.sent_s < first.times[-1] <= second.sent_s


async def test_no_server() -> None:
    with pytest.raises(load.LoadError, match="ClientConnectorError"):
        await load.run("http://127.0.0.1:9", load.OpenAI(), [ask()])


def test_llama_names_adapters_by_number_and_switches_the_others_off() -> None:
    dialect = load.Llama(["a-0", "a-1"])
    body = dialect.body(ask(adapter="a-1"))
    assert body["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert {entry["scale"] for entry in dialect.body(ask())["lora"]} == {0.0}
    assert dialect.count({"content": "x", "timings": {"predicted_n": 3}}, 1) == 3
    assert dialect.count({"content": ""}, 3) == 3
