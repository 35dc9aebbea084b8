"""What is left of uploads, imports, alias moves and deletes when the server is killed in them.

    KILLS=1000 KILL_SEED=7 pytest -s tests/adapters/test_kill.py

One state folder lives through all kills. After each of them every change that was answered is
there, and each that was only asked for is there wholly or not at all.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pytest
import sqlalchemy as sa

from adapters.audit import audit
from adapters.database import Database
from adapters.errors import AdapterNotFound, AliasNotFound, VersionNotFound
from adapters.folder import FILES
from adapters.ingest import Ingest
from adapters.registry import READY, Adapter, Registry
from adapters.store import Store
from tests.adapters.conftest import make
from tests.adapters.killed import ALIASES, BASE, NAMES, RULES, SOURCES, Operation

KILLS = int(os.environ.get("KILLS", "100"))
SEED = int(os.environ.get("KILL_SEED", str(random.SystemRandom().randrange(10**6))))
MEMORY = Path("/dev/shm")  # where a copy costs no disk
ROOT = Path(__file__).parents[2]
LONGEST_S = 0.5  # from the end of a start to the kill
EARLY = 0.2  # the share of kills that may come into a start
EARLY_S = 0.08  # how long after its beginning these come at most
RECENT = 10  # versions of a name whose absence is looked at

_EVER = """SELECT name, number, digest FROM versions JOIN adapters
    ON adapters.id = versions.adapter_id ORDER BY name, number"""

Line = Mapping[str, Any]
Shown = tuple[Mapping[int, str], Mapping[str, int], Mapping[str, Any] | None]


# What should be ----------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What should be known of one name.

    `given[n - 1]` is the digest of version n, for ever. `metadata` is None if there is no adapter.
    """

    given: tuple[str, ...] = ()
    live: frozenset[int] = frozenset()
    aliases: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, Any] | None = None

    def after(self, what: Operation) -> State | None:
        """The state that `what` leads to; None if it must be refused."""
        if what.brings:
            return self._with(what)
        if what.expected not in ("any", self.aliases.get(what.alias)):
            return None
        if what.kind == "alias":
            return replace(self, aliases={**self.aliases, what.alias: what.number})
        if what.kind == "unalias":
            left = {alias: at for alias, at in self.aliases.items() if alias != what.alias}
            return replace(self, aliases=left)
        if what.kind == "delete_version":
            if what.number in self.aliases.values():
                return None
            return replace(self, live=self.live - {what.number})
        return State(self.given)

    def number(self, digest: str) -> int:
        """The number of the version with `digest`, or the next one."""
        same = (n for n in self.live if self.given[n - 1] == digest)
        return next(same, len(self.given) + 1)

    def shown(self) -> Shown:
        """What a registry tells of it."""
        versions = {number: self.given[number - 1] for number in self.live}
        latest = {"latest": max(self.live)} if self.live else {}
        return versions, {**self.aliases, **latest}, self.metadata

    def _with(self, what: Operation) -> State:
        number = self.number(what.digest)
        pointed = {what.alias: number} if what.alias else {}
        return State(
            self.given if number in self.live else (*self.given, what.digest),
            self.live | {number},
            {**self.aliases, **pointed},
            (self.metadata or {}) if what.metadata is None else what.metadata,
        )


class World:
    """What should be known of all names, as far as the lines of killed lives tell."""

    def __init__(self) -> None:
        self.states = {name: State() for names in NAMES for name in names}
        self.begun: dict[str, Operation] = {}

    def follow(self, lines: Iterable[Line]) -> None:
        """What one life did; `begun` is then what was not answered."""
        self.begun = {}
        for line in lines:
            if "begin" in line:
                operation = Operation(**line["begin"])
                self.begun[operation.name] = operation
            elif "end" in line:
                self._answered(self.begun.pop(line["end"]), line)

    def settle(self, name: str, shown: Shown) -> None:
        """Accepts what is there, if it is all that was answered and nothing half."""
        before = self.states[name]
        operation = self.begun.get(name)
        maybe = None if operation is None else before.after(operation)
        possible = [state for state in (before, maybe) if state is not None]
        found = [state for state in possible if state.shown() == shown]
        assert found, (operation, shown, [state.shown() for state in possible])
        self.states[name] = found[0]

    def _answered(self, operation: Operation, answer: Line) -> None:
        before = self.states[operation.name]
        after = before.after(operation)
        assert ("refused" in answer) == (after is None), (operation, answer, before)
        if operation.brings:
            number = before.number(operation.digest)
            told = (answer["digest"], answer["number"], answer["created"])
            assert told == (operation.digest, number, number not in before.live), before
        self.states[operation.name] = after or before


# What is -----------------------------------------------------------------------------------


class Home:
    """A state folder that nobody uses, opened as a start would."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self._folder = folder
        self._sources = sources
        self._store = Store(folder / "store")
        self._store.sweep()
        self._registry = Registry(Database.of(folder))
        self._ingest = Ingest(self._store, self._registry, BASE, RULES)

    def check(self, world: World) -> None:
        """Everything that must be true after a kill."""
        with closing(self._registry):
            given = self._check_database()
            for digest in self._store.sealed():
                self._check_bytes(digest)
            self._check_audit()
            listed = {adapter.name: adapter for adapter in self._registry.list().data}
            assert listed.keys() <= world.states.keys()
            for name in world.states:
                world.settle(name, _shown(listed.get(name)))
                assert given.get(name, ()) == world.states[name].given
                self._check_references(name, world.states[name])

    def _check_database(self) -> Mapping[str, tuple[str, ...]]:
        """Returns the digest of every version there ever was, by name and in order."""
        with closing(sqlite3.connect(self._folder / "registry.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            given: dict[str, tuple[str, ...]] = {}
            for name, number, digest in db.execute(_EVER):
                given[name] = (*given.get(name, ()), digest)
                assert len(given[name]) == number
        return given

    def _check_bytes(self, digest: str) -> None:
        """Also of what no version needs: a sealed name never has half an adapter."""
        place, source = self._store.path(digest), self._sources / digest
        form = self._ingest.form(digest)
        assert sorted(os.listdir(place)) == [*FILES, form.name]
        assert self._store.has_form(digest, form.name)
        for name in FILES:
            assert (place / name).read_bytes() == (source / name).read_bytes()

    def _check_audit(self) -> None:
        needed = self._registry.digests()
        found = audit(self._store, self._registry, full=True)
        assert (found.checked, found.damaged, found.mended) == (len(needed), {}, [])
        for digest in needed:  # a full audit takes away what it finds damaged of this
            assert self._ingest.form(digest).is_dir()
        for orphan in found.orphans:
            assert self._ingest.collect(orphan)
        assert set(self._store.sealed()) == needed
        for folder in ("incoming", "trash"):
            assert os.listdir(self._folder / "store" / folder) == []

    def _check_references(self, name: str, state: State) -> None:
        versions, aliases, _ = state.shown()
        for alias, number in aliases.items():
            assert self._registry.resolve(f"{name}@{alias}").number == number
        for alias in set(ALIASES) - aliases.keys():
            with pytest.raises((AliasNotFound, AdapterNotFound)):
                self._registry.resolve(f"{name}@{alias}")
        for number, digest in versions.items():
            assert self._registry.resolve(f"{name}@{number}").digest == digest
            assert self._registry.resolve(f"{name}@{digest}").number == number
        newest = len(state.given)
        for number in {*range(max(1, newest - RECENT), newest + 1)} - versions.keys():
            with pytest.raises((VersionNotFound, AdapterNotFound)):
                self._registry.resolve(f"{name}@{number}")


def _shown(adapter: Adapter | None) -> Shown:
    if adapter is None:
        return {}, {}, None
    assert {version.state for version in adapter.versions} <= {READY}
    versions = {version.number: version.digest for version in adapter.versions}
    return versions, dict(adapter.aliases), adapter.metadata


# Kills -------------------------------------------------------------------------------------


class Lives:
    """The program in `killed.py`: one life after the other, each ended by a kill."""

    def __init__(self, told: IO[bytes], said: IO[bytes], chance: random.Random) -> None:
        self._told = told
        self._said = said
        self._chance = chance
        self._until("ready")

    def one(self) -> list[Line]:
        """What one life said before it was killed at a random moment."""
        self._tell()
        early = self._chance.random() < EARLY
        lines = [] if early else self._until("started", "died")
        time.sleep(self._chance.uniform(0, EARLY_S if early else LONGEST_S))
        self._tell()
        lines += self._until("ended")
        assert lines.pop()["code"] == -signal.SIGKILL, "it died by itself: see stderr"
        return lines

    def _tell(self) -> None:
        self._told.write(b"\n")
        self._told.flush()

    def _until(self, *marks: str) -> list[Line]:
        lines: list[Line] = []
        while not lines or lines[-1].get("mark") not in marks:
            said = self._said.readline()
            assert said, "the program ended: see stderr"
            lines.append(json.loads(said))
        return lines


@contextmanager
def lives(home: Path) -> Iterator[Lives]:
    """Kills what is alive at the end."""
    command = [sys.executable, "-m", "tests.adapters.killed", str(home), str(SEED)]
    # A fork may have no threads, and BLAS would start some.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        # The pipe has room for all that a life says, so that none ever waits for its reader.
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, pipesize=2**20
    ) as program:  # fmt: skip
        assert program.stdin is not None and program.stdout is not None
        yield Lives(program.stdin, program.stdout, random.Random(SEED))


@contextmanager
def copied(home: Path) -> Iterator[Path]:
    """The state in `home`, to be checked: the next start shall find what the kill left."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield shutil.copytree(home, Path(folder, "home"), ignore=shutil.ignore_patterns(SOURCES))


def interrupted(world: World, lines: list[Line]) -> list[str]:
    """The kinds of what a kill came into."""
    marks = {line.get("mark") for line in lines}
    starting = ["start"] if "started" not in marks else ["audit"] if "audited" not in marks else []
    return starting + [operation.kind for operation in world.begun.values()]


@pytest.mark.timeout(60 + 3 * KILLS)
def test_a_kill_takes_nothing_that_was_answered_and_leaves_nothing_half(tmp_path: Path) -> None:
    print(f"\nKILL_SEED={SEED}")
    home = tmp_path / "home"
    home.mkdir()
    world, kinds, hits, answered = World(), Counter[str](), 0, 0
    began = time.monotonic()
    with lives(home) as program:
        for _ in range(KILLS):
            lines = program.one()
            world.follow(lines)
            kinds.update(interrupted(world, lines))
            hits += bool(world.begun)
            answered += sum("end" in line for line in lines)
            with copied(home) as copy:
                Home(copy, home / SOURCES).check(world)
    print(
        f"{KILLS} kills in {time.monotonic() - began:.0f} s, {hits} with a change under way; "
        f"{answered} changes answered; interrupted: {dict(kinds.most_common())}"
    )
    assert hits >= KILLS / 2


# Power loss --------------------------------------------------------------------------------

# A kill leaves what the kernel has in memory, so it cannot tell whether anything was synced. The
# order of the calls can.


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Path | None]]]:
    """Every fsync with its file, every rename with its new name, every commit; as they come."""
    seen: list[tuple[str, Path | None]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(handle: int) -> None:
        fsync(handle)
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}"))))

    def note_rename(old: Path, new: Path) -> None:
        rename(old, new)
        seen.append(("rename", Path(new)))

    def note_commit(_: sa.Connection) -> None:
        seen.append(("commit", None))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    sa.event.listen(sa.Engine, "commit", note_commit)
    yield seen
    sa.event.remove(sa.Engine, "commit", note_commit)


def test_bytes_are_on_disk_before_their_name_and_that_before_the_record(
    tmp_path: Path, events: list[tuple[str, Path | None]]
) -> None:
    store = Store(tmp_path / "store")
    registry = Registry(Database.of(tmp_path))
    ingest = Ingest(store, registry, BASE, RULES)

    def ascending(*wanted: tuple[str, Path | None]) -> None:
        places = [events.index(event) for event in wanted]
        assert places == sorted(places), [events[place] for place in places]

    with store.staging() as staged:
        make().write(staged)
        events.clear()
        version, _ = ingest.ingest(staged, "sql", "upload")
    place = store.path(version.digest)
    files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    assert len(files) == 5  # two of the adapter, three of its form
    for file in files:
        path = staged / file
        ascending(("fsync", path), ("fsync", path.parent), ("rename", place))
    for folder in (place.parent, place.parent.parent):
        ascending(("rename", place), ("fsync", folder), ("commit", None))

    events.clear()
    for digest in registry.delete_version("sql", version.number):
        ingest.collect(digest)
    assert [what for what, _ in events] == ["commit", "rename", "fsync"]
