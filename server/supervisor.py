"""Keeps an engine running: starts one, notices its end, starts the next.

What may be served comes from the registry, so an engine can be replaced by another at any time:
what it had loaded is loaded again when it is asked for, and what is pinned at once.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from adapters.errors import AdapterError
from server.admission import Admission, Limits
from server.engine import launch
from server.engine.handlers import Handlers
from server.errors import ServerError
from server.gateway import Gateway, Times
from server.lifeline import Processes
from server.residency import Residency
from server.routes import Serving

Start = Callable[[], Any]
Say = Callable[[str], None]

PAUSES_S = (1, 2, 5, 10, 30, 60)  # before the next start, by how many have failed in a row
HEALTHY_S = 300  # an engine that lived so long did not fail in a row
DEATHS, WITHIN_S = 3, 1800  # that an adapter must have been in all of to be the reason
END_S = 30  # that ending an engine may take
GRACE_S = 1.0  # until an engine that does not end by itself is killed


class Deaths:
    """What was in the engine each time that it ended."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, frozenset[str]]] = deque(maxlen=DEATHS)

    def add(self, digests: frozenset[str], now: float) -> str | None:
        """The one digest that was there at the end of each of the last engines, if there is one.

        One that several have in common is not told from the others: then it is nobody yet.
        """
        self._last.append((now, digests))
        if len(self._last) < DEATHS or now - self._last[0][0] > WITHIN_S:
            return None
        common = frozenset.intersection(*(there for _, there in self._last))
        if len(common) != 1:
            return None
        self._last.clear()
        (digest,) = common
        return digest


class Supervisor:
    """The life of the engines of one server; sets `gateway` and `handlers` of `serving`."""

    def __init__(self, serving: Serving, start: Start, say: Say) -> None:
        """`start` gives a running engine and is called in a thread; `say` tells an operator."""
        self._serving = serving
        self._start = start
        self._say = say
        self._numbers = itertools.count(1)
        self._deaths = Deaths()
        self._engine: Any = None
        self._processes = Processes([])
        self._began = 0.0

    async def begin(self) -> Handlers:
        """Starts an engine, so that adapters can be proven; returns what answers requests by it."""
        serving = self._serving
        self._engine = await asyncio.to_thread(self._start)
        self._began = time.monotonic()
        self._processes = launch.processes(self._engine)
        serving.remarks = await launch.verify(self._engine)
        serving.gateway = self._new_gateway()
        handlers = await Handlers.build(serving.gateway, serving.args)
        serving.proving.begin(serving.gateway)
        return handlers

    async def keep(self) -> None:
        """Has another engine take the place of each that ends, for ever."""
        failed = 0
        while True:
            reason = await self._gateway.ended()
            failed = 0 if time.monotonic() - self._began > HEALTHY_S else failed
            self._say(f"{reason}; starting another")
            try:
                await self._bury()
            except Exception as error:
                self._say(f"the engine's end was not in order: {error}")
            failed = await self._again(failed)

    async def stop(self) -> None:
        """Ends the engine, if there is one."""
        if self._serving.gateway is not None:
            self._serving.gateway.close()
            await asyncio.to_thread(self._serving.gateway.shutdown, timeout=GRACE_S)

    async def _again(self, failed: int) -> int:
        """Starts until an engine runs; returns how often that failed in a row before."""
        while True:
            await asyncio.sleep(PAUSES_S[min(failed, len(PAUSES_S) - 1)])
            failed += 1
            try:
                handlers = await self.begin()
                await self.pin()
            except Exception as error:
                self._say(f"the engine did not start: {error}")
                await self._end()  # what there is of it by now
                continue
            self._serving.handlers = handlers
            self._serving.restarts += 1
            self._say("the engine runs again")
            return failed

    async def _bury(self) -> None:
        serving = self._serving
        serving.handlers = None
        serving.proving.pause()
        await self._accuse(self._gateway.close())
        await self._end()

    async def _end(self) -> None:
        if self._engine is None:
            return
        ending = asyncio.to_thread(launch.end, self._engine, self._processes)
        self._engine, self._processes = None, Processes([])
        try:
            await asyncio.wait_for(ending, END_S)
        except TimeoutError:
            self._say(f"the engine's end takes more than {END_S} s; going on without it")

    async def _accuse(self, suspects: frozenset[str]) -> None:
        """Takes the adapter out of service that every one of the last engines ended with."""
        digest = self._deaths.add(suspects, time.monotonic())
        if digest is None:
            return
        serving = self._serving
        serving.proving.refused.add(digest)
        reason = f"The engine has ended {DEATHS} times in a row with this adapter in it."
        try:
            names = await asyncio.to_thread(serving.registry.references_to, digest)
            await asyncio.to_thread(serving.registry.quarantine, digest, reason, lasting=True)
        except AdapterError as error:
            self._say(f"{digest} could not be taken out of service: {error.message}")
        else:
            self._say(f"not served any more: {', '.join(names) or digest}: {reason}")

    async def pin(self) -> None:
        """Loads and keeps what the registry has pinned."""
        for version in await asyncio.to_thread(self._serving.registry.pinned):
            try:
                await self._gateway.pin(version)
            except (AdapterError, ServerError) as error:
                self._say(f"{version.reference} is not kept loaded: {error.message}")

    @property
    def _gateway(self) -> Gateway:
        assert self._serving.gateway is not None  # noqa: S101 (`begin` has set it)
        return self._serving.gateway

    def _new_gateway(self) -> Gateway:
        serving, settings = self._serving, self._serving.settings
        residency = Residency(settings.host_capacity, settings.max_loras)
        requests, prefill = launch.limits(self._engine)
        names = (settings.base_name, "base")
        weights = {names[0] if name in names else name: w for name, w in settings.weights.items()}
        limits = Limits(
            settings.max_loras,
            requests,
            prefill,
            settings.max_waiting,
            settings.max_waiting_per_adapter,
            settings.max_waiting_per_key,
        )
        key_weights: dict[str, float] = {}
        admission = Admission(limits, residency.standing, weights, key_weights)
        residency.changed = admission.changed
        times = Times(settings.queue_timeout, settings.load_timeout, settings.engine_timeout)
        return Gateway(
            self._engine,
            serving.registry,
            serving.ingest,
            names,
            admission,
            residency,
            times,
            self._numbers,
            key_weights,
            serving.recent,
        )
