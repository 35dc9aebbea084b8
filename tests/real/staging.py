"""Run as a program: an engine with two slots and three places on the host; writes what came of it.

`python -m tests.real.staging OUT BASE WORKERS BROKEN ADAPTER…`: ADAPTERs and the folders in BROKEN
are forms for the engine. Adapters are staged, put into slots, asked and dropped in random order,
broken ones among them, and where they are is held against where they should be. OUT, a file, gets
the replies, the first of each adapter, and the messages: workers print on our standard output.
"""

import asyncio
import itertools
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from server import lifeline
from server.engine import plugin
from tests.conftest import SEVEN

SLOTS, HOST = 2, 3
TURNS = 60  # of all workers together
TOKENS = 6
PROMPT = [504, 3575, 7574, 281, 260, 1346, 3050, 5230, 19, 86, 911, 327]


class Engine:
    """vLLM's synchronous engine, as the loader asks one."""

    def __init__(self, base: str, workers: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            base,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_lora=True,
            enable_prefix_caching=False,
            max_loras=SLOTS,
            max_cpu_loras=HOST,
            max_lora_rank=64,
            lora_target_modules=list(SEVEN),
            max_model_len=512,
            tensor_parallel_size=workers,
            worker_extension_cls=f"{plugin.__name__}.{plugin.WorkerExtension.__name__}",
            disable_log_stats=True,
        )

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        return self.llm.collective_rpc(method, args=args)

    def reply(self, adapter: Any) -> dict[str, Any]:
        from vllm import SamplingParams

        (output,) = self.llm.generate(
            [{"prompt_token_ids": PROMPT}],
            SamplingParams(
                temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
            ),
            lora_request=adapter,
            use_tqdm=False,
        )
        completion = output.outputs[0]
        logprobs = [[(t, p.logprob) for t, p in each.items()] for each in completion.logprobs]
        return {"tokens": list(completion.token_ids), "logprobs": logprobs}


async def main(base: str, workers: int, broken: str, adapters: list[str]) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    from server.engine.loading import Loader, LoadFailed

    engine = Engine(base, workers)
    loader, chosen = Loader(engine), random.Random(1)
    requests = {i: LoRARequest(f"a{i}", i, path) for i, path in enumerate(adapters, 1)}
    folders = sorted(Path(broken).iterdir())
    wrong = [LoRARequest(f"b{i}", i, str(each)) for i, each in enumerate(folders, 100)]
    messages: dict[str, str] = {}

    async def refused(bad: LoRARequest) -> None:
        try:
            await loader.stage(bad)
        except LoadFailed as failed:
            messages[Path(bad.lora_path).name] = str(failed)
        await asyncio.sleep(0)  # the loader drops it then

    for each in wrong:
        await refused(each)
    replies: dict[str, Any] = {"base": engine.reply(None)}
    host: set[int] = set()
    slots: list[int | None] = [None] * SLOTS
    for turn in range(TURNS // workers):
        kind = chosen.choice(("stage", "stage", "slot", "slot", "drop", "broken"))
        which = chosen.choice(sorted(requests))
        if kind == "broken":
            await refused(chosen.choice(wrong))
        elif kind == "stage":
            drop = [chosen.choice(sorted(host))] if len(host) == HOST and which not in host else []
            await loader.drop(drop)
            await loader.stage(requests[which])
            host = host - set(drop) | {which}
            slots = [None if each in drop else each for each in slots]
        elif kind == "drop":
            await loader.drop([which])
            host -= {which}
            slots = [None if each == which else each for each in slots]
        elif host:
            which = chosen.choice(sorted(host))
            out = None if None in slots or which in slots else chosen.choice(slots)
            if which not in slots:
                slots[slots.index(out)] = which
            await loader.slot(which, out)
            got = engine.reply(requests[which])
            assert got == replies.setdefault(str(which), got), (
                f"turn {turn}: {which} says otherwise"
            )
        found = await loader.resident()
        want = {"host": sorted(host), "slots": slots, "reading": [], "unasked": 0}
        assert found == want, f"turn {turn}: {found}, not {want}"
    assert engine.reply(None) == replies["base"]
    try:  # what the server never asks for
        engine.llm.llm_engine.add_lora(next(r for i, r in requests.items() if i not in host))
    except Exception as error:
        messages["unasked"] = str(error)
    if workers == 1:  # vLLM takes one worker's error for all, and the others' for the next answer
        assert (await loader.resident())["unasked"] == workers
        assert engine.reply(None) == replies["base"]
    return {"replies": replies, "messages": messages}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; each engine zeroes all of it
    out, base, count, broken, *adapters = sys.argv[1:]
    if int(count) > 1:  # workers may share a core, which vLLM does not choose by itself
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        bound = [str(core) for core in itertools.islice(cores, int(count))]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    lifeline.hold()
    found = asyncio.run(main(base, int(count), broken, adapters))
    Path(out).write_text(json.dumps(found))
