"""What the gateway relies on in an engine, as tests that the fake and the real one both pass.

A module that defines fixtures `engine` and `lora` and imports these tests runs them.
"""

import asyncio
import itertools
from contextlib import aclosing
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.engine.loading import Loader, LoadFailed
from server.engine.meter import produced

_ids = itertools.count()
PROMPT = {"prompt": "The capital of France is"}


def ask(engine: Any, lora: LoRARequest | None = None, **params: Any) -> Any:
    """The stream of a greedy reply; by default of 8 tokens, in deltas."""
    wanted = {"max_tokens": 8, "temperature": 0.0, "output_kind": RequestOutputKind.DELTA}
    return engine.generate(
        PROMPT, SamplingParams(**(wanted | params)), f"contract-{next(_ids)}", lora_request=lora
    )


async def text(stream: Any) -> str:
    return "".join([output.outputs[0].text async for output in stream])


async def idle(engine: Any) -> None:
    """Returns when the engine has no request left; fails after five seconds."""
    for _ in range(100):
        if engine.get_num_unfinished_requests() == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the engine still works on a request")


async def test_deltas_add_up_to_the_final_text(engine: Any) -> None:
    (final,) = [o async for o in ask(engine, output_kind=RequestOutputKind.FINAL_ONLY)]
    assert final.finished
    assert len(final.outputs[0].token_ids) <= 8
    assert await text(ask(engine)) == final.outputs[0].text != ""


async def test_length_is_exact_when_the_end_is_ignored(engine: Any) -> None:
    outputs = [output async for output in ask(engine, max_tokens=40, ignore_eos=True)]
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 40
    assert outputs[-1].outputs[0].finish_reason == "length"


async def test_a_closed_stream_frees_its_request(engine: Any) -> None:
    async with aclosing(ask(engine, max_tokens=500, ignore_eos=True)) as stream:
        await anext(stream)
        assert engine.get_num_unfinished_requests() == 1
    await idle(engine)


async def test_a_cancelled_task_frees_its_request(engine: Any) -> None:
    task = asyncio.create_task(text(ask(engine, max_tokens=500, ignore_eos=True)))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(engine)


async def test_an_adapter_is_loaded_used_and_unloaded(engine: Any, lora: LoRARequest) -> None:
    loader = Loader(engine)
    await loader.stage(lora)
    assert (await loader.resident())["host"] == [lora.lora_int_id]
    await loader.slot(lora.lora_int_id, None)
    assert lora.lora_int_id in (await loader.resident())["slots"]
    assert await text(ask(engine, lora)) != await text(ask(engine))
    await loader.drop([lora.lora_int_id])
    found = await loader.resident()
    assert found["host"] == found["reading"] == [] and set(found["slots"]) == {None}
    assert found["unasked"] == 0


async def test_a_load_that_fails_is_an_error_of_the_load_alone(engine: Any) -> None:
    with pytest.raises(LoadFailed, match=r"(?i)not there|no adapter"):
        await Loader(engine).stage(LoRARequest("gone", 99, "/nonexistent/adapter"))
    assert 99 not in (await Loader(engine).resident())["host"]
    assert not engine.errored
    assert await text(ask(engine))


async def test_many_at_once_are_all_answered(engine: Any, lora: LoRARequest) -> None:
    loader = Loader(engine)
    await loader.stage(lora)
    await loader.slot(lora.lora_int_id, None)
    alone = await text(ask(engine))
    adapted = await text(ask(engine, lora))
    both = await asyncio.gather(*(text(ask(engine, [None, lora][i % 2])) for i in range(6)))
    assert adapted != alone
    assert set(both[1::2]).isdisjoint(both[0::2])
    await loader.drop([lora.lora_int_id])


async def test_tokens_of_a_reply_that_is_not_streamed_can_be_counted(engine: Any) -> None:
    seen = []
    params = SamplingParams(
        max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    name = f"contract-{next(_ids)}"
    reply = asyncio.create_task(text(engine.generate(PROMPT, params, name)))
    while not reply.done():
        seen.append(produced(engine, name))
        await asyncio.sleep(0.005)
    assert seen == sorted(seen[:-1]) + seen[-1:] and len({*seen}) > 5
    assert produced(engine, name) == 0 and not any(
        engine.output_processor.external_req_ids.values()
    )
