"""What an adapter's users notice of the others: `python -m benchmarks.neighbours`.

Every case is done by Loraplex and by stock vLLM's server on the same machine, with the same base,
adapters, limits, CPU LoRA op and torch.compile, so only what serves them differs. Servers of a
group are started once and stay up; only the one whose turn it is runs. In a round every case is
done by every server of its group, whose order moves on by one a round. The first round is the
warm-up and is not counted.

What was measured replaces what the same case has in the raw file; the others stay. So cases can be
measured one after the other, and the report is of all of them.
"""

import asyncio
import gzip
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.console import Console

from adapters.base import BaseSpec
from adapters.database import Database
from adapters.registry import Registry
from adapters.store import Store
from benchmarks import adapters, load, machine, neighbours_report, scale
from benchmarks import neighbours_loads as loads
from benchmarks.neighbours_loads import RANK_8, RANK_64, THOUSAND, WARM_UP, Turn
from benchmarks.targets import ROOT, Material, Server, TargetError
from benchmarks.workload import AdapterSet, Target, adapter_names
from server.config import DEFAULT_MODEL, ConfigError, Settings
from server.engine import base_model

CACHE = ROOT / ".cache"
RESULTS = Path(__file__).parent / "results" / "neighbours"
RAW = "raw.json.gz"
LORAPLEX, STOCK = "loraplex", "stock"

LIMIT_S = 300  # of one request
REGISTER_S = 60

ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "{cores}", "VLLM_CPU_KVCACHE_SPACE": "1"}
COMMON = ("--max-model-len", "2048", "--max-num-batched-tokens", "2048")
# Stock vLLM's server with our op: its plugin applies it, and the flag is what the op asks for
# (embeddings and logits are not wrapped).
WITH_OUR_OP = {"VLLM_PLUGINS": "loraplex", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
LINEARS_ONLY = ("--lora-target-modules", *adapters.LINEARS)

console = Console(stderr=True, highlight=False)
Raw = dict[str, dict[str, Any]]  # case → its record
Dtype = Literal["bfloat16", "float32"]
STORED: Mapping[Dtype, str] = {"bfloat16": "BF16", "float32": "F32"}  # in safetensors' words


@dataclass(frozen=True)
class Group:
    """Servers with the same limits, and the cases that they do.

    `servers` has the name of each with its own flags; all but stock are Loraplex.
    """

    cases: tuple[str, ...]
    slots: int
    host: int
    rank: int
    seats: int
    sets: Mapping[str, AdapterSet] = field(default_factory=dict)
    servers: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {LORAPLEX: (), STOCK: ()}
    )
    thousand: bool = False

    def target(self, name: str, dtype: Dtype) -> Target:
        """How the server of that name is started."""
        flags = (
            *COMMON,
            *("--dtype", dtype),
            *("--max-loras", str(self.slots), "--max-cpu-loras", str(self.host)),
            *("--max-lora-rank", str(self.rank), "--max-num-seqs", str(self.seats)),
            *self.servers[name],
        )
        sets = tuple(self.sets)
        if name != STOCK:
            return Target(kind="loraplex", adapters=sets, flags=(*flags, "--compile"))
        flags = ("--enable-lora", *flags, *LINEARS_ONLY)
        return Target(kind="vllm", adapters=sets, flags=flags, environment=WITH_OUR_OP)


def _weights(*weights: int) -> tuple[str, ...]:
    pairs = zip(adapter_names(RANK_8, 2), weights, strict=True)
    return ("--weights", ",".join(f"{name}={weight}" for name, weight in pairs))


def _of_rank(rank: int, count: int) -> AdapterSet:
    return AdapterSet(count=count, rank=rank)


# The host caches of the first group are smaller than the adapters that go round: a victim, and what
# loads beside bystanders, is loaded from disk each time.
GROUPS = (
    Group(
        cases=("flood", "six", "bystanders"),
        sets={
            RANK_8: _of_rank(8, loads.HOT + 1 + loads.VICTIMS),
            RANK_64: _of_rank(64, loads.LOADED),
        },
        slots=2,
        host=4,
        rank=64,
        seats=64,
    ),
    Group(
        cases=("shares",),
        sets={RANK_8: _of_rank(8, 2)},
        servers={
            f"{LORAPLEX} 1:1": _weights(1, 1),
            f"{LORAPLEX} 1:3": _weights(1, 3),
            STOCK: (),
        },
        slots=2,
        host=2,
        rank=8,
        seats=loads.SEATS,
    ),
    Group(
        cases=("fifty", "overhead"),
        sets={RANK_8: _of_rank(8, loads.FIFTY)},
        slots=8,
        host=loads.FIFTY,
        rank=8,
        seats=64,
    ),
    Group(
        cases=("thousand",),
        thousand=True,
        slots=8,
        host=32,
        rank=8,
        seats=64,
    ),
)
CASES = tuple(case for group in GROUPS for case in group.cases)

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


@cli.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    case: Annotated[
        list[str] | None, typer.Option(help=f"Only this case; repeatable. {', '.join(CASES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after a warm-up.")] = 5,
    dtype: Annotated[
        Dtype,
        typer.Option(help="What the engines compute with; float32 where the CPU has no bf16."),
    ] = "bfloat16",
    out: Out = RESULTS,
) -> None:
    """Measure, add to the raw data, write table and plots."""
    if context.invoked_subcommand is not None:
        return
    if unknown := set(case or ()) - set(CASES):
        raise typer.BadParameter(f"no case {', '.join(sorted(unknown))}: {', '.join(CASES)}")
    # An end from outside is as orderly as Ctrl-C: servers must not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(case or CASES, rounds, dtype, out)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (TargetError, load.LoadError, ConfigError) as error:
        console.print(f"benchmarks: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    _show(out)


@cli.command()
def report(out: Out = RESULTS) -> None:
    """Write table and plots anew from the raw data."""
    _show(out)


def _show(out: Path) -> None:
    typer.echo(neighbours_report.write(out, read(out)))
    _say(f"written: {out}")


def _say(line: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]", end=" ")
    console.print(line, markup=False, soft_wrap=True)


# Raw data ----------------------------------------------------------------------------------


def read(out: Path) -> Raw:
    """What was measured so far, of every case."""
    try:
        with gzip.open(out / RAW, "rt") as file:
            return json.load(file)  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


def merge(out: Path, measured: Raw) -> None:
    """Adds cases to the raw data; each replaces what was there of it."""
    out.mkdir(parents=True, exist_ok=True)
    merged = read(out) | measured
    # Renamed into place: whoever is interrupted leaves what was there before.
    with tempfile.NamedTemporaryFile(dir=out, suffix=".part", delete=False) as file:
        with gzip.open(file, "wt") as text:
            json.dump(merged, text, separators=(",", ":"))
        os.chmod(file.name, 0o644)
    os.replace(file.name, out / RAW)


# Measuring ---------------------------------------------------------------------------------


def run(cases: Sequence[str], rounds: int, dtype: Dtype, out: Path) -> None:
    """Measures `cases`; what is there after each round is in the raw data of `out`.

    Raises:
        TargetError, LoadError, ConfigError: a server did not start or answered nothing.
    """
    described = machine.describe(ROOT)
    cache = CACHE / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    base = base_model.fetch(Settings.read(["--home", str(CACHE / "loraplex")]), _say)
    with tempfile.TemporaryDirectory(prefix="neighbours-", dir=cache) as scratch:
        for number, group in enumerate(GROUPS):
            wanted = [case for case in group.cases if case in cases]
            if wanted:
                servers = _Running(group, dtype, wanted, base, Path(scratch) / str(number))
                servers.measure(rounds, described, out)


class _Running:
    """The servers of a group."""

    def __init__(
        self, group: Group, dtype: Dtype, cases: Sequence[str], base: Path, scratch: Path
    ) -> None:
        self._group = group
        self._dtype = dtype
        self._cases = cases
        self._base = base
        self._scratch = scratch
        self._servers: dict[str, Server] = {}

    def measure(self, rounds: int, described: Mapping[str, Any], out: Path) -> None:
        turns: dict[str, list[dict[str, Any]]] = {case: [] for case in self._cases}
        with ExitStack() as running:
            self._start(running)
            for round_ in range(WARM_UP, rounds):
                for case in self._cases:
                    done = [self._turn(case, name, round_) for name in self._order(round_)]
                    turns[case] += done if round_ != WARM_UP else []
                if round_ != WARM_UP:
                    record = {"machine": described, "dtype": self._dtype, "rounds": round_ + 1}
                    merge(out, {case: record | {"turns": turns[case]} for case in self._cases})

    def _order(self, round_: int) -> list[str]:
        names = list(self._servers)
        first = max(round_, 0) % len(names)
        return names[first:] + names[:first]

    def _turn(self, case: str, name: str, round_: int) -> dict[str, Any]:
        server = self._servers[name]
        began = time.monotonic()
        server.resume()
        try:
            parts = asyncio.run(_asked(server, case, round_))
        finally:
            server.pause()
        replies = list(loads.everything(parts))
        failed = [reply.error for reply in replies if reply.error is not None]
        if len(failed) == len(replies):
            raise load.LoadError(f"{case}: {name}: every request failed: {failed[:1]}")
        said = "warm-up" if round_ == WARM_UP else f"round {round_ + 1}"
        took = f"{len(replies)} requests, {time.monotonic() - began:.0f} s"
        _say(f"{said}: {case}: {name}: {took}{f', {len(failed)} failed' if failed else ''}")
        packed = {part: each.packed() for part, each in parts.items()}
        return {"target": name, "round": round_, "parts": packed}

    def _start(self, running: ExitStack) -> None:
        cache = CACHE / "benchmarks"
        made: dict[str, Path] = {}
        for of_set, wanted in self._group.sets.items():
            made |= adapters.make(self._base, of_set, wanted, cache / "adapters")
        material = Material(self._base, made, cache / "gguf")
        filled = self._filled() if self._group.thousand else None
        for name in self._group.servers:
            own = self._scratch / name.replace(":", "-").replace(" ", "-")
            late: dict[str, Path] = {}
            if filled is not None and name == STOCK:
                late = _sealed(filled)
            elif filled is not None:
                own = filled
            server = Server(name, self._group.target(name, self._dtype), ENVIRONMENT, material, own)
            self._servers[name] = running.enter_context(_paused(server, late))

    def _filled(self) -> Path:
        shapes = {
            path: shape
            for path, shape in BaseSpec.read(self._base, DEFAULT_MODEL).linears.items()
            if path.endswith((".q_proj", ".v_proj"))
        }

        def write(folder: Path, number: int) -> None:
            adapters.write_plain(folder, shapes, number, self._group.rank)

        stored = STORED[self._dtype]
        cache = CACHE / "neighbours" / stored.lower()
        return scale.fill(cache, THOUSAND, self._base, write, stored)


async def _asked(server: Server, case: str, round_: int) -> loads.Parts:
    async with load.connect(server.url, server.dialect, LIMIT_S) as client:
        return await loads.LOADS[case](Turn(client, case, round_))


@contextmanager
def _paused(server: Server, late: Mapping[str, Path]) -> Iterator[Server]:
    """The server, started and paused; ended at the end, whatever happens.

    `late` are adapters that stock vLLM is told of when it runs.
    """
    _say(f"starting {server.name}")
    try:
        took = server.start()
        with httpx.Client(base_url=server.url, timeout=REGISTER_S) as http:
            for name, folder in late.items():
                body = {"lora_name": name, "lora_path": str(folder)}
                reply = http.post("/v1/load_lora_adapter", json=body)
                if reply.status_code != 200:
                    raise TargetError(f"{server.name} refused {name}: {reply.text[:500]}")
        _say(f"{server.name} is ready after {took:.0f} s, {server.memory_gib():.1f} GiB")
        server.pause()
        yield server
    finally:
        server.stop()


def _sealed(filled: Path) -> dict[str, Path]:
    """Where the store of a filled folder has each adapter, as it was taken in."""
    store = Store(filled / "home" / "store")
    registry = Registry(Database.of(filled / "home"))
    try:
        names = [name for name, _ in registry.names()]
        return {name: store.path(registry.resolve(name).digest) for name in names}
    finally:
        registry.close()


if __name__ == "__main__":
    cli()
