"""Which adapter answers, what the reply says about it, and what happens when it cannot."""

import asyncio
import concurrent.futures
import json
import time
from typing import Any

import httpx
import pytest

from tests.conftest import MakeAdapter
from tests.fake_engine import speaker
from tests.http.conftest import HOST, Running, cool, upload

CHAT = "/v1/chat/completions"
BASE = "smollm2-135m-instruct"


def body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **more}


def said(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def streamed(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("fields", [{}, {"model": BASE}, {"model": "base"}, {"adapter": "base"}])
def test_the_base_answers_when_no_adapter_is_named(http: httpx.Client, fields: Any) -> None:
    reply = http.post(CHAT, json=body(**fields))
    assert said(reply).startswith("base")
    assert reply.json()["model"] == (fields.get("adapter") or fields.get("model") or BASE)
    assert "x-loraplex-adapter" not in reply.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "one"},
        {"model": "one"},
        {"model": BASE, "adapter": "one"},
        {"model": "base", "adapter": "one"},
        {"model": "one", "adapter": "one"},
        {"model": "one@1"},
        {"adapter": "one@latest"},
    ],
)
def test_an_adapter_answers_by_either_field(
    http: httpx.Client, four: dict[str, str], fields: Any
) -> None:
    reply = http.post(CHAT, json=body(**fields))
    assert said(reply).startswith(speaker(four["one"]))
    assert reply.json()["model"] == fields.get("adapter", fields.get("model"))
    assert reply.headers["x-loraplex-adapter"] == "one"
    assert reply.headers["x-loraplex-version"] == "1"
    assert reply.headers["x-loraplex-digest"] == four["one"]
    assert float(reply.headers["x-loraplex-load-ms"]) >= 0


def test_a_reference_by_digest(http: httpx.Client, four: dict[str, str]) -> None:
    reply = http.post(CHAT, json=body(model=f"two@{four['two']}"))
    assert said(reply).startswith(speaker(four["two"]))


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
        ({"model": "nobody"}, 404, "adapter_not_found", "model"),
        ({"model": "gpt-4o/latest"}, 404, "adapter_not_found", "model"),
        ({"model": "One"}, 404, "adapter_not_found", "model"),
        ({"adapter": "../etc"}, 400, "invalid_reference", "adapter"),
        ({"adapter": "one@7"}, 404, "version_not_found", None),
        ({"adapter": "one@prod"}, 404, "alias_not_found", None),
        ({"adapter": "one", "model": "two"}, 400, "adapter_conflict", "adapter"),
        ({"adapter": 7}, 400, "invalid_request", "adapter"),
        ({"messages": "hi"}, 400, "invalid_request", None),
        ({"max_tokens": -1}, 400, None, "max_tokens"),
    ],
)
def test_what_cannot_be_served_says_why(
    http: httpx.Client, four: dict[str, str], fields: Any, status: int, code: str, param: str
) -> None:
    reply = http.post(CHAT, json=body(**fields))
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert param is None or error["param"] == param
    assert error["message"]


def test_every_protocol_takes_an_adapter(http: httpx.Client, four: dict[str, str]) -> None:
    who = speaker(four["one"])
    text = http.post("/v1/completions", json={"prompt": "Hi", "adapter": "one", "max_tokens": 8})
    assert text.json()["choices"][0]["text"].startswith(who)
    assert text.json()["model"] == "one"
    response = http.post(
        "/v1/responses", json={"input": "Hi", "adapter": "one", "max_output_tokens": 8}
    )
    assert response.json()["output"][0]["content"][0]["text"].startswith(who)
    message = http.post("/v1/messages", json=body(adapter="one"))
    assert message.json()["content"][0]["text"].startswith(who)
    assert message.json()["model"] == "one"
    for reply in (text, response, message):
        assert reply.headers["x-loraplex-adapter"] == "one"
    count = http.post("/v1/messages/count_tokens", json=body(model="one"))
    assert count.json()["input_tokens"] > 0


def test_tokenize_and_back(http: httpx.Client, four: dict[str, str]) -> None:
    tokens = http.post("/tokenize", json={"prompt": "Hello world", "adapter": "one"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    chat = http.post("/tokenize", json=body()).json()
    assert chat["count"] > tokens["count"]
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == "Hello world"
    assert http.post("/tokenize", json={"prompt": "x", "adapter": "no"}).status_code == 404


def test_messages_fail_in_anthropics_shape(http: httpx.Client) -> None:
    reply = http.post("/v1/messages", json=body(model="nobody"))
    assert reply.status_code == 404
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("adapter", ["base", "three"])
def test_a_stream_says_the_same(http: httpx.Client, four: dict[str, str], adapter: str) -> None:
    whole = said(http.post(CHAT, json=body(adapter=adapter)))
    reply = http.post(CHAT, json=body(adapter=adapter, stream=True))
    events = streamed(reply)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == whole
    assert {event["model"] for event in events} == {adapter}
    assert reply.headers.get("x-loraplex-adapter", "base") == adapter


def test_responses_stream_typed_events(http: httpx.Client, four: dict[str, str]) -> None:
    asked = {"input": "Hi", "model": "one", "max_output_tokens": 8, "stream": True}
    lines = http.post("/v1/responses", json=asked).text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_more_adapters_at_once_than_the_host_cache_holds(
    running: Running, four: dict[str, str]
) -> None:
    assert len(four) > HOST

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as client:
            names = [*four, "base"] * 6
            return await asyncio.gather(
                *(client.post(CHAT, json=body(model=name)) for name in names)
            )

    for reply in asyncio.run(all_at_once()):
        who = reply.json()["model"]
        assert said(reply).startswith("base" if who == "base" else speaker(four[who]))


def test_a_cold_adapter_is_loaded_once_for_all_who_wait(
    running: Running, http: httpx.Client, four: dict[str, str], make_adapter: MakeAdapter
) -> None:
    digest = upload(http, "cold", make_adapter(50)).json()["digest"]
    cool(http)
    running.core.loads.clear()

    async def slow(_: Any) -> None:
        await asyncio.sleep(0.3)

    running.core.on_load = slow
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: http.post(CHAT, json=body(model="cold")), range(4)))
    finally:
        running.core.on_load = None
    assert all(said(reply).startswith(speaker(digest)) for reply in replies)
    assert running.core.loads.count(digest) == 1
    assert max(float(reply.headers["x-loraplex-load-ms"]) for reply in replies) >= 250


@pytest.mark.parametrize("stream", [False, True])
def test_a_load_that_fails_is_an_error_of_its_request_alone(
    running: Running,
    http: httpx.Client,
    four: dict[str, str],
    make_adapter: MakeAdapter,
    stream: bool,
) -> None:
    upload(http, "broken", make_adapter(51 + stream))
    cool(http)

    async def fail(_: Any) -> None:
        raise OSError("the disk is gone")

    running.core.on_load = fail
    try:
        reply = http.post(CHAT, json=body(model="broken", stream=stream))
    finally:
        running.core.on_load = None
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "adapter_load_failed"
    assert reply.headers["retry-after"]
    assert said(http.post(CHAT, json=body())).startswith("base")
    assert said(http.post(CHAT, json=body(model="broken")))  # and it can be tried again


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(
    running: Running, four: dict[str, str], stream: bool
) -> None:
    asked = body(adapter="one", max_tokens=2000, ignore_eos=True, stream=stream)
    with httpx.Client(base_url=running.url) as client:
        if stream:
            with client.stream("POST", CHAT, json=asked) as reply:
                lines = reply.iter_lines()  # held: dropping it would close the connection
                assert next(lines).startswith("data: {")
                assert running.core.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=asked, timeout=0.5)
    started = time.monotonic()
    while running.core.running and time.monotonic() - started < 5:
        time.sleep(0.01)
    assert running.core.running == 0


def test_a_deleted_adapter_finishes_its_streams_and_then_its_bytes_go(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    digest = upload(http, "leaving", make_adapter(60)).json()["digest"]
    asked = body(model="leaving", max_tokens=150, ignore_eos=True, stream=True)
    with http.stream("POST", CHAT, json=asked) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert http.get("/v1/adapters/leaving").json()["versions"][0]["leases"] == 1
        assert http.delete("/v1/adapters/leaving").json()["deleted"] is True
        assert http.post(CHAT, json=body(model="leaving")).status_code == 404
        assert running.serving.store.has(digest)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    for _ in range(100):
        if not running.serving.store.has(digest):
            break
        time.sleep(0.02)
    assert not running.serving.store.has(digest)
    assert running.serving.gateway.residency.tier(digest) == "disk"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": []}),
        ("/v1/completions", {"prompt": None}),
        (
            "/tokenize",
            {"messages": [], "add_generation_prompt": True, "continue_final_message": True},
        ),
    ],
)
def test_what_vllms_bodies_refuse_past_pydantic_is_a_400(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request"
    assert reply.json()["error"]["message"]
