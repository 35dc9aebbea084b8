"""The way into the engine's workers, in the server's process: asks all of them, answers for all.

Each worker stages adapters by itself (`server/engine/staging.py`); with tensor parallelism an
adapter is there when the last worker has it. The engine's death is vLLM's EngineDeadError in all of
these.
"""

import asyncio
import contextlib
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

# Asking costs every running request some milliseconds: the engine answers between two steps.
FIRST_POLL_S, POLL_GROWS, LAST_POLL_S = 0.01, 4, 0.16


class LoadFailed(Exception):
    """An adapter could not be loaded; the message is for people."""


class Loader:
    """Puts adapters where the caller says; it alone decides, and never more than there is room."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._dropping: set[asyncio.Task[None]] = set()

    async def stage(self, lora: LoRARequest) -> None:
        """Returns when every worker has the adapter in its host cache.

        When it is cancelled the workers are told to drop the adapter.

        Raises:
            LoadFailed: a worker could not read it; it is dropped by all of them then.
        """
        try:
            await self._all("loraplex_stage", lora.lora_int_id, lora.lora_path)
            await self._taken(lora.lora_int_id)
        except BaseException:
            self._drop_soon(lora.lora_int_id)
            raise

    async def _taken(self, lora_id: int) -> None:
        wait = FIRST_POLL_S
        while True:
            states = await self._all("loraplex_take", lora_id)
            _raise_failed(states)
            if all(each["state"] == "there" for each in states):
                return
            await asyncio.sleep(wait)
            wait = min(LAST_POLL_S, wait * POLL_GROWS)

    async def slot(self, lora_id: int, out: int | None) -> None:
        """Takes `out` out of its slot; returns when every worker has `lora_id` in one.

        When it is cancelled the workers may have done so, or not.

        Raises:
            LoadFailed: a worker could not; it is in no worker's slot then.
        """
        states = await self._all("loraplex_slot", lora_id, out)
        try:
            _raise_failed(states)
        except LoadFailed:
            await self._all("loraplex_slot", None, lora_id)
            raise

    async def drop(self, ids: list[int]) -> None:
        """Takes adapters out of slots and host caches. Unknown ids are no error."""
        await self._all("loraplex_drop", ids)

    async def resident(self) -> dict[str, Any]:
        """What the workers have: `host` (ids, ascending), `slots` (id or None of each), `reading`
        (ids that not all have in their host cache yet) and `unasked` (of all together; 0 unless
        vLLM did by itself what only the caller may).

        Raises:
            LoadFailed: they disagree.
        """
        states = await self._all("loraplex_resident")
        known = [(sorted(each["host"] + each["reading"]), each["slots"]) for each in states]
        if any(each != known[0] for each in known):
            raise LoadFailed(f"the engine's workers have not the same adapters: {states}")
        host = sorted(set.intersection(*(set(each["host"]) for each in states)))
        return {
            "host": host,
            "slots": states[0]["slots"],
            "reading": sorted(set(known[0][0]) - set(host)),
            "unasked": sum(each["unasked"] for each in states),
        }

    async def _all(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    def _drop_soon(self, lora_id: int) -> None:
        # Not awaited: who cancels, or has waited too long, does not wait for an engine as well.
        # What is asked of the workers after this comes after it.
        task = asyncio.ensure_future(self._drop_unless_dead(lora_id))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop_unless_dead(self, lora_id: int) -> None:
        with contextlib.suppress(EngineDeadError):
            await self.drop([lora_id])


def _raise_failed(states: list[dict[str, str]]) -> None:
    for each in states:
        if each["state"] == "failed":
            raise LoadFailed(each["error"])
