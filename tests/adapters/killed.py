"""A server without HTTP and engine that lives to be killed: a start, then changes without end.

    python -m tests.adapters.killed HOME SEED

Every line on stdin begins a life, and the next one ends it with SIGKILL. A life is a fork of this
process, so that imports are paid for once. Before and after everything it does it writes a line to
stdout, as a server's client would know it: what was asked, and what was answered.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters import sources
from adapters.base import BaseSpec
from adapters.database import Database
from adapters.effect import Effect
from adapters.errors import AdapterNotFound, AliasConflict, AliasInUse
from adapters.folder import FILES
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry
from adapters.sources import archive
from adapters.sources.address import Address, Allowed
from adapters.sources.intake import Transfer
from adapters.store import Store, digest
from tests.adapters.conftest import LINEARS, make

BASE = BaseSpec("tiny", LINEARS, 4096, 8192)
RULES = Rules(max_rank=8)
SOURCES = "sources"  # in HOME: what can be uploaded, each under its digest
# Each thread has adapters of its own, so what an adapter should look like is known at all times.
# Their bytes are from one pool, so the threads do meet in the store.
NAMES = tuple(tuple(f"team-{thread}.{i}" for i in range(2)) for thread in range(4))
ALIASES = ("prod", "beta")

_POOL = 48
_MOST = 3  # versions of an adapter before no more are added
_MAX_BYTES = 10**6
_ANY = "any"
_BRINGS = ("upload", "unpack", "import")


@dataclass(frozen=True)
class Operation:
    """One change of the adapter `name`.

    `kind` is `upload`, `unpack` or `import`, which bring `digest`, or `alias`, `unalias`,
    `delete_version` or `delete_adapter`. `expected` is what `alias` must point to before: a
    number, None for no such alias, or `any`.
    """

    kind: str
    name: str
    digest: str = ""
    number: int = 0
    alias: str = ""
    metadata: Mapping[str, Any] | None = None
    expected: int | str | None = _ANY

    @property
    def brings(self) -> bool:
        """Whether it makes `digest` a version."""
        return self.kind in _BRINGS


class Life:
    """What a server has at its start, as `server.app.build` makes it."""

    def __init__(self, home: Path) -> None:
        self._sources = home / SOURCES
        self._allowed = Allowed([f"file://{self._sources}"])
        self._pool = sorted(each.name for each in self._sources.iterdir() if each.is_dir())
        self._store = Store(home / "store")
        self._store.sweep()
        self._registry = Registry(Database.of(home))
        self._ingest = Ingest(self._store, self._registry, BASE, RULES, _prove)

    def audit(self) -> None:
        """What a server does once it answers."""
        for orphan in self._ingest.audit().orphans:
            self._ingest.collect(orphan)

    def work(self, names: tuple[str, ...], chance: random.Random) -> None:
        """Changes the adapters `names` until the process is killed."""
        while True:
            operation = self._choose(chance.choice(names), chance)
            say(begin=asdict(operation))
            say(end=operation.name, **self._do(operation))

    def _choose(self, name: str, chance: random.Random) -> Operation:
        versions, aliases = self._look(name)
        kind = chance.choice(_kinds(len(versions), len(aliases)))
        alias = chance.choice(ALIASES)
        if kind in _BRINGS:
            # Some are chosen often, by several threads at once.
            some = self._pool[int(len(self._pool) * chance.random() ** 2)]
            metadata = chance.choice([None, {"note": chance.random()}])
            alias = chance.choice(["", alias])
            return Operation(kind, name, digest=some, alias=alias, metadata=metadata)
        if kind == "again":
            same = chance.choice(list(versions.values()))
            return Operation(chance.choice(_BRINGS), name, digest=same, alias=alias)
        if kind == "delete_adapter":
            return Operation(kind, name)
        number = chance.choice(list(versions))
        if kind == "delete_version":
            return Operation(kind, name, number=number)
        if kind == "unalias":
            alias = chance.choice(list(aliases))
        expected = chance.choice([_ANY, _ANY, aliases.get(alias), None, number])
        return Operation(kind, name, number=number, alias=alias, expected=expected)

    def _look(self, name: str) -> tuple[Mapping[int, str], Mapping[str, int]]:
        """The digests of its versions and what its aliases point to."""
        try:
            adapter = self._registry.get(name)
        except AdapterNotFound:
            return {}, {}
        versions = {version.number: version.digest for version in adapter.versions}
        return versions, {a: adapter.aliases[a] for a in ALIASES if a in adapter.aliases}

    def _do(self, operation: Operation) -> Mapping[str, Any]:
        try:
            if operation.brings:
                return self._bring(operation)
            self._change(operation)
        except (AliasConflict, AliasInUse) as error:
            return {"refused": type(error).__name__}
        return {}

    def _bring(self, what: Operation) -> Mapping[str, Any]:
        with self._store.staging() as folder:
            source = self._fetch(what, folder)
            version, created = self._ingest.ingest(
                folder, what.name, source, what.alias or None, what.metadata
            )
        return {"number": version.number, "digest": version.digest, "created": created}

    def _fetch(self, what: Operation, into: Path) -> str:
        place = self._sources / what.digest
        if what.kind == "import":
            address = Address.parse(f"file://{place}")
            return sources.fetch(address, into, Transfer(_MAX_BYTES), self._allowed)
        if what.kind == "unpack":
            archive.unpack(place.with_suffix(".tar.gz"), into, _MAX_BYTES)
        else:
            for name in FILES:
                shutil.copyfile(place / name, into / name)
        return "upload"

    def _change(self, what: Operation) -> None:
        name, registry = what.name, self._registry
        expected: Any = ... if what.expected == _ANY else what.expected
        if what.kind == "alias":
            registry.set_alias(name, what.alias, what.number, expected)
        elif what.kind == "unalias":
            registry.delete_alias(name, what.alias, expected)
        elif what.kind == "delete_version":
            self._collect(registry.delete_version(name, what.number))
        else:
            self._collect(registry.delete_adapter(name))

    def _collect(self, digests: list[str]) -> None:
        for each in digests:
            self._ingest.collect(each)


def _kinds(versions: int, aliases: int) -> list[str]:
    """What can be done with an adapter that has so many; twice what should be done often."""
    kinds = [*_BRINGS, *_BRINGS] if versions < _MOST else []
    if versions:
        kinds += ["again", "alias", "alias", "delete_version", "delete_version", "delete_adapter"]
    return kinds + ["unalias"] * aliases


def _prove(digest: str, folder: Path) -> Effect:
    time.sleep(0.003)
    return Effect(1.0, 0.0, True)


def say(**line: Any) -> None:
    """Writes a line to stdout, all of it or, if killed before, nothing."""
    os.write(1, json.dumps(line).encode() + b"\n")


def live(home: Path, seed: str) -> None:
    """A start and changes, until the process is killed."""
    one = Life(home)
    say(mark="started")
    for number, names in enumerate(NAMES):
        chance = random.Random(f"{seed} {number}")
        threading.Thread(target=_or_die, args=(one.work, names, chance)).start()
    one.audit()
    say(mark="audited")
    signal.pause()


def _or_die(work: Callable[..., None], *arguments: Any) -> None:
    """No error may pass for a kill."""
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        say(mark="died")
        os._exit(1)


def make_sources(folder: Path, seed: int) -> None:
    """Fills the pool: folders and archives of small adapters."""
    for number in range(_POOL):
        made = make(rank=1 + number % 8, seed=seed + number).write(folder / "new")
        place = made.rename(folder / digest(made))
        shutil.make_archive(str(place), "gztar", place)


def main(home: Path, seed: int) -> None:
    """Lives one life after the other, as stdin says."""
    make_sources(home / SOURCES, seed)
    say(mark="ready")
    for number in itertools.count():
        if not sys.stdin.readline():
            return
        child = os.fork()
        if not child:
            _or_die(live, home, f"{seed} {number}")
        sys.stdin.readline()  # or its end: then nobody is there any more
        os.kill(child, signal.SIGKILL)
        say(mark="ended", code=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
