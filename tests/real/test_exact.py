"""Every row of every batch is what PEFT computes for its own adapter: the first invariant.

The server works in bf16, the reference in fp32: reference.py states the tolerance and what it is
made of. What is wrong is far outside of it, which test_the_bound_tells_adapters_apart shows.
"""

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import adapters.demo
from tests.conftest import THOROUGH, with_base
from tests.real.conftest import Server
from tests.real.reference import Reference, Reply, gap

TOKENS = 20
FEW_TOKENS = 8  # of each reply in each of many batches
NAMES = ("base", "sql", "code", "poetry")
PROMPTS = {
    name: f"{text}\n"
    for name, text in {
        "base": "The three largest oceans of the earth are the",
        "sql": "Table employees(id, name, city, salary). How many employees live in Oslo?",
        "code": "Complete this Python function.\n\ndef total(numbers):",
        "poetry": "Write a four-line poem about the river, rhyming AABB.",
    }.items()
}


SLOW_FORM = "the CPU LoRA op is not the compiled one"
OFF = "--no-cpu-lora-op"


FORMS = ["op", "op in torch", *(["op off"] if THOROUGH else [])]


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """By what adapters are applied: the compiled op, its form in torch, or vLLM's own way."""
    return str(request.param)


@pytest.fixture(scope="module")
def target(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    base_folder: Path,
    form: str,
) -> Iterator[Server]:
    if form == "op off":
        home = with_base(tmp_path_factory.mktemp("target"), base_folder)
        server = Server(home, OFF)
        server.start()
    else:
        server = request.getfixturevalue("server" if form == "op" else "guarded")
    assert (SLOW_FORM in server.log) == (form == "op in torch")
    assert (OFF in server.log) == (form == "op off")
    yield server
    if form == "op off":
        server.end()


@pytest.fixture(scope="module")
def prompts(http: httpx.Client) -> dict[str, list[int]]:
    """The prompt of each name as tokens, with the chat template."""
    return {
        name: http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()[
            "tokens"
        ]
        for name, text in PROMPTS.items()
    }


@pytest.fixture(scope="module")
def reference(base_folder: Path) -> Reference:
    return Reference(base_folder, {name: adapters.demo.WEIGHTS / name for name in NAMES[1:]})


async def ask(client: httpx.AsyncClient, name: str, prompt: list[int], **more: Any) -> Reply:
    asked = {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,
        **more,
    }
    reply = await client.post("/v1/completions", json=asked)
    assert reply.status_code == 200, reply.text
    logprobs = reply.json()["choices"][0]["logprobs"]
    return Reply(
        tuple(_id(token) for token in logprobs["tokens"]),
        tuple(
            tuple((_id(token), value) for token, value in each.items())
            for each in logprobs["top_logprobs"]
        ),
    )


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


async def together(
    server: Server, asked: list[tuple[str, list[int]]], tokens: int = TOKENS
) -> list[Reply]:
    async with httpx.AsyncClient(
        base_url=server.url, headers=server.headers, timeout=120
    ) as client:
        asking = (ask(client, name, prompt, max_tokens=tokens) for name, prompt in asked)
        return await asyncio.gather(*asking)


def measure(
    reference: Reference, name: str, prompt: list[int], reply: Reply, seen: dict[Any, Any]
) -> float:
    key = (name, tuple(prompt), reply.tokens)
    if key not in seen:
        seen[key] = reference.logprobs(name, prompt, reply.tokens)
    return gap(reply, seen[key])


@pytest.fixture(scope="module")
def seen() -> dict[Any, Any]:
    """Reference logprobs by adapter, prompt and reply: most replies come many times."""
    return {}


@pytest.mark.parametrize("name", NAMES)
async def test_alone(
    target: Server, reference: Reference, prompts: Any, seen: dict[Any, Any], name: str
) -> None:
    (reply,) = await together(target, [(name, prompts[name])])
    assert len(reply.logprobs) == len(reply.tokens) > 1
    assert min(len(each) for each in reply.logprobs) >= 5
    found = measure(reference, name, prompts[name], reply, seen)
    assert found < 1, found


@pytest.mark.timeout(900)
async def test_in_a_mixed_batch_in_every_order(
    target: Server, reference: Reference, prompts: Any, seen: dict[Any, Any], form: str
) -> None:
    """By the op; what it is compared with takes longer, and has every name in every place."""
    turned = [NAMES[first:] + NAMES[:first] for first in range(len(NAMES))]
    orders = list(itertools.permutations(NAMES)) if form == "op" or THOROUGH else turned
    for order in orders:
        replies = await together(target, [(name, prompts[name]) for name in order], FEW_TOKENS)
        for name, reply in zip(order, replies, strict=True):
            found = measure(reference, name, prompts[name], reply, seen)
            assert found < 1, (order, name, found)


async def test_the_same_prompt_on_everybody(
    target: Server, reference: Reference, prompts: Any, seen: dict[Any, Any]
) -> None:
    prompt = prompts["poetry"]
    replies = await together(target, [(name, prompt) for name in NAMES * 2])
    for name, reply in zip(NAMES * 2, replies, strict=True):
        found = measure(reference, name, prompt, reply, seen)
        assert found < 1, (name, found)
    assert len({reply.tokens for reply in replies}) == len(NAMES)


async def test_the_bound_tells_adapters_apart(
    target: Server, reference: Reference, prompts: Any
) -> None:
    """A reply held against another adapter's reference, or the base's, is far out of bounds."""
    prompt = prompts["base"]
    replies = await together(target, [(name, prompt) for name in NAMES])
    for (name, reply), other in itertools.product(zip(NAMES, replies, strict=True), NAMES):
        found = gap(reply, reference.logprobs(other, prompt, reply.tokens))
        assert (found < 1) == (name == other), (name, other, found)


async def test_prefill_and_decode_in_one_batch(
    target: Server, reference: Reference, prompts: Any, seen: dict[Any, Any]
) -> None:
    """Long prompts arrive while others decode: steps that hold both kinds of rows."""
    long = prompts["sql"] * 12
    async with httpx.AsyncClient(
        base_url=target.url, headers=target.headers, timeout=120
    ) as client:
        running = asyncio.gather(
            *(ask(client, name, prompts[name], max_tokens=40) for name in NAMES)
        )
        await asyncio.sleep(0.5)
        late = await asyncio.gather(
            *(ask(client, name, long, max_tokens=8, ignore_eos=True) for name in NAMES)
        )
        early = await running
    for name, reply in zip(NAMES, early, strict=True):
        found = measure(reference, name, prompts[name], reply, seen)
        assert found < 1, (name, found)
    for name, reply in zip(NAMES, late, strict=True):
        found = measure(reference, name, long, reply, seen)
        assert found < 1, (name, found)


def test_streams_tell_the_same_tokens(target: Server, prompts: Any) -> None:
    asked = {
        "model": "poetry",
        "prompt": prompts["poetry"],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    with httpx.Client(base_url=target.url, headers=target.headers, timeout=120) as client:
        whole = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        lines = client.post("/v1/completions", json=asked | {"stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
