"""Adapters on their way in: where their checks run, and imports that the server fetches itself."""

import asyncio
import itertools
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from threadpoolctl import threadpool_limits

from adapters import sources
from adapters.effect import Effect
from adapters.errors import AdapterError
from adapters.ingest import Ingest, Rules
from adapters.names import check_alias
from adapters.registry import Owner, Version
from adapters.sources import directory
from adapters.sources.address import Address, Allowed
from adapters.sources.intake import Transfer
from adapters.store import Store
from server.config import Settings
from server.errors import ServerError, TooManyImports

RUNNING = 4  # imports that fetch at once
WAITING = 60  # more that may wait for one of them to end
REMEMBERED = 100  # ended imports that can still be asked about
CHECKING = 2  # adapters that are checked at once
NICE = 10

T = TypeVar("T")


@dataclass(eq=False)
class Import:
    """One import: `state` is `waiting`, `fetching`, `checking`, `ready` or `failed`.

    `transfer` counts bytes; `version` is there once it is ready (`created`: it was not one
    before), `error` once it has failed. `begun` and `ended` are seconds since the epoch.
    """

    id: str
    name: str
    source: str
    transfer: Transfer
    state: str = "waiting"
    begun: float = field(default_factory=time.time)
    ended: float | None = None
    version: Version | None = None
    created: bool = False
    error: AdapterError | ServerError | None = None


def rules(settings: Settings, dtype: str) -> Rules:
    """Which adapters are taken under these settings, by an engine that computes in `dtype`."""
    return Rules(
        settings.max_lora_rank,
        dtype,
        frozenset({"base", settings.base_name}),
        settings.allow_pickle,
        settings.allow_noop,
    )


class Imports:
    """Every way in, for one event loop: uploads, imports and watched folders end in `ingest`.

    `prove(digest, folder)` asks the engine what the adapter in `folder` does.
    """

    def __init__(
        self,
        store: Store,
        ingest: Ingest,
        allowed: Allowed,
        prove: Callable[[str, Path], Awaitable[Effect]],
        *,
        max_bytes: int,
        timeout_s: float,
        allow_pickle: bool = False,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._allowed = allowed
        self._prove = prove
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._allow_pickle = allow_pickle
        # Of lower priority than the engine's threads: checking an adapter takes seconds of a core.
        self._checkers = ThreadPoolExecutor(CHECKING, "check", initializer=_yield_to_others)
        self._fetchers = ThreadPoolExecutor(RUNNING, "fetch")
        self._one_at_a_time = WeakValueDictionary[str, asyncio.Lock]()
        self._numbers = itertools.count(1)
        self._running: dict[str, tuple[Import, asyncio.Task[None]]] = {}
        self._ended: list[Import] = []

    async def check(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs `work`, which reads and checks an adapter, where it delays nobody's tokens."""
        return await _to_the_end(self._checkers, work, *arguments)

    async def ingest(
        self,
        folder: Path,
        name: str,
        source: str,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: Owner | None = None,
    ) -> tuple[Version, bool]:
        """What `Ingest.ingest` does, with the engine asked on the event loop.

        The same bytes from several sides at once are proven once.
        """
        made = await self.check(self._ingest.prepare, folder, name, alias)
        async with self._one_at_a_time.setdefault(made.digest, asyncio.Lock()):
            effect = await self.check(self._ingest.known_effect, made.digest)
            effect = effect or await self._prove(made.digest, made.form)
            return await self.check(
                self._ingest.commit, made, effect, name, source, alias, metadata, owner
            )

    def copy(self, folder: Path, into: Path) -> None:
        """Brings an adapter on this machine into a staging folder; blocks."""
        directory.copy(folder, into, Transfer(self._max_bytes), self._allow_pickle)

    def begin(
        self,
        name: str,
        source: str,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: Owner | None = None,
    ) -> Import:
        """Starts an import, or joins one that does the same already; it goes on by itself.

        Raises InvalidName, ReservedName, InvalidSource, SourceForbidden, TooManyImports.
        """
        self._ingest.check_name(name)
        if alias is not None:
            check_alias(alias)
        address = Address.parse(source)
        self._allowed.check(address)
        key = json.dumps(
            [name, source, alias, metadata, owner.key if owner else None], sort_keys=True
        )
        if key in self._running:
            return self._running[key][0]
        if len(self._running) >= RUNNING + WAITING:
            raise TooManyImports(f"{len(self._running)} imports are under way. Ask again later.")
        begun = Import(
            str(next(self._numbers)), name, source, Transfer(self._max_bytes, self._timeout_s)
        )
        task = asyncio.create_task(self._run(key, begun, address, alias, metadata, owner))
        self._running[key] = (begun, task)
        return begun

    async def end(self, one: Import) -> tuple[Version, bool]:
        """Waits for an import's end: the version, and whether it is new. Raises its error."""
        for running, task in list(self._running.values()):
            if running is one:
                await asyncio.shield(task)
        if one.error is not None:
            raise one.error
        assert one.version is not None  # noqa: S101 (an import ends with one or the other)
        return one.version, one.created

    def of(self, name: str) -> list[Import]:
        """The imports of adapter `name` that run or have ended lately, oldest first."""
        running = [one for one, _ in self._running.values()]
        return [one for one in (*self._ended, *running) if one.name == name]

    def stop(self) -> None:
        """Gives up what is under way: fetching ends within seconds, and what waits never begins."""
        for one, _ in self._running.values():
            one.transfer.stop()
        self._checkers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self,
        key: str,
        one: Import,
        address: Address,
        alias: str | None,
        metadata: Mapping[str, Any] | None,
        owner: Owner | None,
    ) -> None:
        try:
            with self._store.staging() as folder:
                pinned = await _to_the_end(self._fetchers, self._fetch, one, address, folder)
                one.state = "checking"
                one.version, one.created = await self.ingest(
                    folder, one.name, pinned, alias, metadata, owner
                )
        except (AdapterError, ServerError) as error:
            one.error = error
        except BaseException as error:
            one.error = ServerError("The import failed; the server's log says why.")
            if isinstance(error, Exception):
                raise
        finally:
            one.state = "ready" if one.error is None else "failed"
            one.ended = time.time()
            del self._running[key]
            self._ended = [*self._ended, one][-REMEMBERED:]

    def _fetch(self, one: Import, address: Address, into: Path) -> str:
        one.state = "fetching"
        one.transfer.begin()
        return sources.fetch(address, into, one.transfer, self._allowed, self._allow_pickle)


async def _to_the_end(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work` in a thread of `pool`; returns when it has ended, also if it is cancelled.

    The folder that a thread works in must not be removed under it.
    """
    running = asyncio.get_running_loop().run_in_executor(pool, lambda: work(*arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _yield_to_others() -> None:
    # Several threads of BLAS that wait for each other on busy cores are ten times as slow as one.
    threadpool_limits(1, user_api="blas")
    thread = threading.get_native_id()
    # Only root may ask for more than a thread has: a server that is nicer itself leaves it so.
    os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
