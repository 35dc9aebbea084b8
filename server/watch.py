"""A watched folder: every PEFT folder dropped into it is served, for as long as it is there."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from watchfiles import awatch

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AliasInUse,
    InvalidAdapter,
    InvalidName,
    ReservedName,
    TooLarge,
    VersionNotFound,
)
from adapters.folder import CONFIG, PICKLE, WEIGHTS
from adapters.registry import Registry, Version
from adapters.store import Store
from server.errors import ServerError
from server.imports import Imports

SETTLE_S = 1.0  # a folder that has not changed for so long is taken to be complete
LOOK_S = 10.0  # file systems that report no changes, such as network ones, are looked at this often

_ITS_OWN_FAULT = (InvalidAdapter, InvalidName, ReservedName, TooLarge)

Mark = tuple[tuple[str, int, int], ...]


class Watch:
    """Keeps the registry in step with the folders in `root`; a folder's name is the adapter's.

    Other content is another version, which takes the place of the one before. What cannot be
    served is said once, by `say`, and tried again when it changes. Hidden folders are left alone,
    so that one can be written under another name and renamed.
    """

    def __init__(
        self,
        root: Path,
        store: Store,
        registry: Registry,
        imports: Imports,
        let_go: Callable[[list[str]], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self._root = root.expanduser().absolute()
        self._store = store
        self._registry = registry
        self._imports = imports
        self._let_go = let_go
        self._say = say
        self._settling: dict[str, Mark] = {}
        self._done: dict[str, Mark] = {}
        self._volume: int | None = None
        self._complaints: set[str] = set()

    async def run(self) -> None:
        """Follows the folder until it is cancelled."""
        while not self._root.is_dir():
            self._complain(f"{self._root} is not a folder: make it, or end --watch.")
            await asyncio.sleep(LOOK_S)
        await self._settle()
        changes = awatch(self._root, yield_on_timeout=True, rust_timeout=int(LOOK_S * 1000))
        async for _ in changes:
            await self._settle()

    async def _settle(self) -> None:
        while await self._look():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(SETTLE_S)

    async def _look(self) -> bool:
        """Brings in and removes what has changed; True if something is still changing.

        What fails for another reason than the adapter itself is tried again at the next look.
        """
        try:
            return await self._compare(await asyncio.to_thread(self._scan))
        except OSError as error:
            self._complain(f"{self._root} cannot be read, so nothing is changed: {error.strerror}")
        except (AdapterError, ServerError) as error:
            self._complain(f"{self._root} could not be followed: {error.message}")
        return False

    async def _compare(self, found: dict[str, Mark | None]) -> bool:
        settling = False
        for name, mark in found.items():
            if mark is None or mark == self._done.get(name):
                continue
            if mark == self._settling.get(name):
                await self._bring(name, mark)
            else:
                self._settling[name] = mark
                settling = True
        await self._remove_all_but(set(found))
        return settling

    def _scan(self) -> dict[str, Mark | None]:
        volume = self._root.stat().st_dev
        if self._volume not in (None, volume):
            raise OSError(0, "it lies on another volume than before (unmounted?)")
        self._volume = volume
        with os.scandir(self._root) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        return {name: self._mark(name) for name in names}

    def _mark(self, name: str) -> Mark | None:
        """What tells the folder from what it was; None if it cannot be looked into."""
        mark = []
        for file in (CONFIG, WEIGHTS, PICKLE):
            try:
                found = os.lstat(self._root / name / file)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._complain(f"{self._root / name} cannot be read: {error.strerror}")
                return None
            mark.append((file, found.st_size, found.st_mtime_ns))
        return tuple(mark)

    async def _bring(self, name: str, mark: Mark) -> None:
        source = self._source(name)
        try:
            with self._store.staging() as folder:
                await asyncio.to_thread(self._imports.copy, self._root / name, folder)
                if await asyncio.to_thread(self._mark, name) != mark:
                    return  # it is being written again: another look comes
                version, created = await self._imports.ingest(folder, name, source)
        except _ITS_OWN_FAULT as error:
            self._done[name] = mark
            self._say(f"{self._root / name} is not served: {_reasons(error)}")
            return
        except (AdapterError, ServerError) as error:
            self._complain(f"{self._root / name} is not served yet: {error.message}")
            return
        self._done[name] = mark
        if created:
            self._say(f"{version.reference} is served, from {self._root / name}")
        adapter = await asyncio.to_thread(self._registry.get, name)
        await self._remove([v for v in adapter.versions if v.source == source], version.number)

    async def _remove_all_but(self, names: set[str]) -> None:
        mine = await asyncio.to_thread(self._mine)
        gone = [version for version in mine if version.adapter not in names]
        if gone and not names and not self._done:
            # More likely a volume that is not mounted than a wish to serve nothing.
            self._complain(f"{self._root} is empty: what was served from it before still is.")
            return
        await self._remove(gone)
        for name in self._done.keys() - names:
            del self._done[name]

    async def _remove(self, versions: list[Version], but: int | None = None) -> None:
        for version in versions:
            if version.number == but:
                continue
            try:
                digests = await asyncio.to_thread(
                    self._registry.delete_version, version.adapter, version.number
                )
            except AliasInUse as error:
                self._complain(error.message)
                continue
            except (AdapterNotFound, VersionNotFound):  # somebody else was quicker
                continue
            await self._let_go(digests)
            if but is None:
                await asyncio.to_thread(self._registry.delete_if_empty, version.adapter)
                self._say(f"{version.reference} is not served any more: its folder is gone")

    def _mine(self) -> list[Version]:
        found = self._registry.from_source(self._source(""))
        return [each for each in found if each.source == self._source(each.adapter)]

    def _source(self, name: str) -> str:
        return f"watch:{self._root}/{name}"

    def _complain(self, text: str) -> None:
        if text not in self._complaints:
            self._complaints.add(text)
            self._say(text)


def _reasons(error: AdapterError) -> str:
    if not isinstance(error, InvalidAdapter):
        return error.message
    return "".join(f"\n  {p.code}: {p.message} {p.fix}" for p in error.problems)
