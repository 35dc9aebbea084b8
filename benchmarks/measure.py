"""One run: every target started once, rounds interleaved, raw data written as it comes.

In a round every case is done by every target before the next case comes, and the order of targets
moves on by one each round. Only the target whose turn it is runs; the others are stopped
(SIGSTOP), so that they take no CPU. The first round is the warm-up and is not counted.
"""

import asyncio
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from benchmarks import adapters, load, machine
from benchmarks.targets import ROOT, Material, Server
from benchmarks.workload import Case, Start, Workload, requests
from server.config import Settings
from server.engine import base_model

CACHE = ROOT / ".cache"
WARM_UP = -1
RAW = "raw.jsonl.gz"

Say = Callable[[str], None]


def run(workload: Workload, out: Path, rounds: int, say: Say) -> None:
    """Measures `workload` and leaves workload.json, machine.json and the raw data in `out`.

    Raises:
        TargetError, LoadError, GgufError, ConfigError: a server did not start or did not do its
        work. What was measured until then is in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe(ROOT)
    (out / "workload.json").write_text(workload.model_dump_json(indent=1))
    (out / "machine.json").write_text(json.dumps(described, indent=1))
    material = _material(workload, say)
    scratch_root = CACHE / "benchmarks"
    with (
        gzip.open(out / RAW, "wt") as raw,
        tempfile.TemporaryDirectory(prefix="run-", dir=scratch_root) as scratch,
    ):
        for number, names in enumerate(workload.side_by_side):
            group = _Group(workload, names, material, Path(scratch) / str(number), raw, number, say)
            group.measure(rounds)


def _material(workload: Workload, say: Say) -> Material:
    cache = CACHE / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    base = base_model.fetch(Settings.read(["--home", str(CACHE / "loraplex")]), say)
    used = {name for target in workload.targets.values() for name in target.adapters}
    made: dict[str, Path] = {}
    for name in sorted(used):
        say(f"adapters: {workload.adapters[name].count} of rank {workload.adapters[name].rank}")
        made |= adapters.make(base, name, workload.adapters[name], cache / "adapters")
    return Material(base, made, cache / "gguf")


class _Group:
    """Targets that run side by side."""

    def __init__(
        self,
        workload: Workload,
        names: tuple[str, ...],
        material: Material,
        scratch: Path,
        raw: TextIO,
        number: int,
        say: Say,
    ) -> None:
        self._workload = workload
        self._names = names
        self._material = material
        self._scratch = scratch
        self._raw = raw
        self._number = number
        self._say = say
        self._servers: dict[str, Server] = {}

    def measure(self, rounds: int) -> None:
        cases = [case for case in self._workload.cases if set(case.targets) & set(self._names)]
        with ExitStack() as running:
            for name in self._names:
                if any(name in case.targets and case.load.kind != "start" for case in cases):
                    self._servers[name] = running.enter_context(self._paused(name))
            for round_ in range(WARM_UP, rounds):
                for case in cases:
                    for name in _order(case, self._names, max(round_, 0)):
                        self._once(case, name, round_, rounds)

    @contextmanager
    def _paused(self, name: str) -> Iterator[Server]:
        """The target, started and paused; ended at the end, whatever happens."""
        server = self._server(name, "")
        self._say(f"starting {name}")
        try:
            took = server.start()
            self._say(f"{name} is ready after {took:.0f} s, {server.memory_gib():.1f} GiB")
            server.pause()
            yield server
        finally:
            server.stop()

    def _server(self, name: str, case: str) -> Server:
        target, own = self._workload.targets[name], self._scratch / f"{name}{case}"
        return Server(name, target, self._workload.environment, self._material, own)

    def _once(self, case: Case, name: str, round_: int, rounds: int) -> None:
        done = self._start(name) if isinstance(case.load, Start) else self._load(case, name, round_)
        line = {"group": self._number, "case": case.name, "target": name, "round": round_}
        self._raw.write(json.dumps(line | done) + "\n")
        self._raw.flush()
        turn = "warm-up" if round_ == WARM_UP else f"round {round_ + 1}/{rounds}"
        self._say(f"{turn}: {case.name}: {name}")

    def _load(self, case: Case, name: str, round_: int) -> dict[str, Any]:
        server = self._servers[name]
        work = requests(self._workload, case, round_)
        if not self._workload.targets[name].adapters:  # the same work on the bare base
            work = [request.model_copy(update={"adapter": None}) for request in work]
        server.resume()
        try:
            replies = asyncio.run(load.run(server.url, server.dialect, work))
        except load.LoadError as error:
            raise load.LoadError(f"{case.name}: {name}: {error}") from None
        finally:
            server.pause()
        return {"replies": [_compact(asdict(reply)) for reply in replies]}

    def _start(self, name: str) -> dict[str, Any]:
        server = self._server(name, "-starts")
        try:
            return {"start_s": server.start()}
        finally:
            server.stop()


def _order(case: Case, names: tuple[str, ...], round_: int) -> list[str]:
    mine = [name for name in names if name in case.targets]
    first = round_ % len(mine) if mine else 0
    return mine[first:] + mine[:first]


def _compact(reply: dict[str, Any]) -> dict[str, Any]:
    """Times to a tenth of a millisecond: finer than a client can tell, and small on disk."""
    reply["times"] = [round(time, 4) for time in reply["times"]]
    return reply | {key: round(reply[key], 4) for key in ("due_s", "sent_s")}
