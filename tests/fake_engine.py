"""vLLM's own frontend over a made-up engine process: real prompts, tokens, streams and aborts,
but no model. A reply says who gives it: `base` or the first letters of an adapter's digest. Asked
for logprobs, each speaker has some of its own.
"""

import asyncio
import itertools
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.outputs import LogprobsLists

from server.engine.plugin import OP_WRAPPER

STEP_S = 0.005  # what a token takes


def speaker(digest: str | None) -> str:
    """What the fake calls the adapter with this digest, and the base."""
    return "base" if digest is None else digest.removeprefix("sha256:")[:8]


class FakeCore:
    """In place of vLLM's client of its engine process.

    `cold` collects adapters that a request came with and that were in no slot: vLLM would read or
    copy them inside a step. `on_load`, when set, is awaited by each load; `on_slot` is called with
    each digest that is to go into a slot. `hangs`, when set, has nothing answer any more.
    """

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.cold: list[str] = []
        self.loads: list[str] = []
        self.on_load: Any = None
        self.waiting_loads = 0
        self.speaks_as: dict[str, str] = {}  # digest → who it speaks as instead: base, nan, …
        self._tokenizer = renderer.tokenizer
        self.on_slot: Any = None
        self.hangs = False
        self._capacity = vllm_config.lora_config.max_cpu_loras
        self._slots: list[int | None] = [None] * vllm_config.lora_config.max_loras
        self._loaded: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._staged: dict[int, asyncio.Task[None]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._outputs: asyncio.Queue[EngineCoreOutput | Exception] = asyncio.Queue()

    @property
    def running(self) -> int:
        """Requests that the engine works on."""
        return len(self._running)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        lora = request.lora_request
        if lora is not None and lora.lora_int_id not in self._slots:
            self.cold.append(lora.lora_name)
        self._running[request.request_id] = asyncio.create_task(self._reply(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if task := self._running.pop(request_id, None):
                task.cancel()

    async def get_output_async(self) -> EngineCoreOutputs:
        output = await self._outputs.get()
        if isinstance(output, Exception):
            raise output
        return EngineCoreOutputs(outputs=[output])

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def collective_rpc_async(
        self, method: str, timeout: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        if self.resources.engine_dead:
            raise EngineDeadError
        while self.hangs:
            await asyncio.sleep(0.01)
        return [getattr(self, f"_{method}")(*args)]

    def die(self) -> None:
        """What happens when vLLM's engine process ends."""
        self.resources.engine_dead = True
        self._outputs.put_nowait(EngineDeadError())

    # What a worker of the engine does: see server/engine/staging.py.

    def _loraplex_state(self) -> dict[str, Any]:
        state = {"wrapper": OP_WRAPPER, "replaced": True, "form": "torch", "why": "it is a fake"}
        return state | {"compiled": False, "stages": ""}

    def _loraplex_stage(self, lora_id: int, path: str) -> None:
        if lora_id not in self._loaded:
            self._staged[lora_id] = asyncio.create_task(self._read(lora_id, path))

    def _loraplex_take(self, lora_id: int) -> dict[str, str]:
        if lora_id in self._loaded:
            return {"state": "there", "error": ""}
        if lora_id not in self._staged:
            return {"state": "failed", "error": "it is not being read"}
        if not self._staged[lora_id].done():
            return {"state": "reading", "error": ""}
        if error := self._staged.pop(lora_id).exception():
            return {"state": "failed", "error": str(error)}
        if len(self._loaded) >= self._capacity:
            raise AssertionError("more adapters than the host cache holds")
        self._loaded[lora_id] = self._names[lora_id]
        self.loads.append(self._names[lora_id])
        return {"state": "there", "error": ""}

    def _loraplex_slot(self, lora_id: int | None, out: int | None) -> dict[str, str]:
        if out in self._slots:
            self._slots[self._slots.index(out)] = None
        if lora_id is None or lora_id in self._slots:
            return {"state": "there", "error": ""}
        try:
            if self.on_slot is not None:
                self.on_slot(self._loaded[lora_id])
            self._slots[self._slots.index(None)] = lora_id
        except (ValueError, RuntimeError) as error:
            return {"state": "failed", "error": str(error)}
        return {"state": "there", "error": ""}

    def _loraplex_drop(self, ids: list[int]) -> None:
        for lora_id in ids:
            self._loaded.pop(lora_id, None)
            if task := self._staged.pop(lora_id, None):
                task.cancel()
            if lora_id in self._slots:
                self._slots[self._slots.index(lora_id)] = None

    def _loraplex_resident(self) -> dict[str, Any]:
        reading = sorted(self._staged)
        return {
            "host": sorted(self._loaded),
            "slots": self._slots,
            "reading": reading,
            "unasked": 0,
        }

    async def _read(self, lora_id: int, path: str) -> None:
        digest = self._names[lora_id] = _digest(path)
        if self.on_load is not None:
            self.waiting_loads += 1
            try:
                await self.on_load(SimpleNamespace(lora_name=digest, lora_path=path))
            finally:
                self.waiting_loads -= 1
        if not Path(path, "adapter_model.safetensors").is_file():
            raise RuntimeError(f"no adapter in {path}")

    async def reset_mm_cache_async(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None: ...

    async def _reply(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        lora = request.lora_request
        name = speaker(lora.lora_name if lora else None)
        name = self.speaks_as.get(lora.lora_name, name) if lora else name
        said = f"{name} has read your words and says hello"
        tokens = self._tokenizer.encode(said, add_special_tokens=False)
        if params.ignore_eos:
            tokens = itertools.cycle(tokens)
        else:
            tokens = [*tokens, self._tokenizer.eos_token_id]
        for count, token in enumerate(tokens, start=1):
            await asyncio.sleep(STEP_S)
            while self.hangs:
                await asyncio.sleep(0.01)
            stop = token == self._tokenizer.eos_token_id and not params.ignore_eos
            finish = FinishReason.STOP if stop else None
            if finish is None and count >= params.max_tokens:
                finish = FinishReason.LENGTH
            top = None if params.logprobs is None else _logprobs(name, token, params.logprobs)
            self._outputs.put_nowait(
                EngineCoreOutput(
                    request.request_id, [token], new_logprobs=top, finish_reason=finish
                )
            )
            if finish is not None:
                self._running.pop(request.request_id, None)
                return


def _digest(path: str) -> str:
    """Of a sealed adapter, from where its form is; of others their folder."""
    found = re.search(r"[0-9a-f]{64}", path)
    return f"sha256:{found[0]}" if found else path


def _logprobs(name: str, token: int, count: int) -> LogprobsLists:
    """Of the token said and `count` others: the same whenever `name` says it."""
    top = np.full(count + 1, np.nan)
    if name != "nan":
        seed = int.from_bytes(name.encode()[:8])
        top = -np.sort(np.random.default_rng(seed).exponential(size=count + 1))
    ids = np.array([[token, *range(1000, 1000 + count)]])
    return LogprobsLists(ids, top[None].astype("f4"), np.array([0]))


def start(args: Namespace) -> AsyncLLM:
    """An engine as `server.engine.launch.start` gives one, with a FakeCore in it."""

    def make(vllm_config: Any, *_: Any, renderer: Any = None, **__: Any) -> FakeCore:
        return FakeCore(vllm_config, renderer)

    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    with patch.object(EngineCoreClient, "make_async_mp_client", make):
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
