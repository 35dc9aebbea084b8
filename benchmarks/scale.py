"""What many registered adapters cost: `python -m benchmarks.scale`.

One server, over state folders in which 10, 1,000 and 10,000 adapters are registered. Nothing at
start or in a request may grow with their number, but for what goes through all of them by its
nature; the table says what does.

Folders are filled once, through `Ingest`, and kept under `.cache/scale`. What is measured is
interleaved: in a round every folder has its turn, and the order moves on by one a round. First come
parts of the server in fresh processes, then whole starts; the servers of the last starts stay up,
paused but for the one whose turn it is, and are asked over HTTP.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from adapters.base import BaseSpec
from adapters.database import Database
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry
from adapters.store import Store
from benchmarks import machine, metrics, targets
from benchmarks.workload import Target
from server.config import DEFAULT_MODEL, Settings
from server.engine import base_model, launch

CACHE = targets.ROOT / ".cache"
RESULTS = Path(__file__).parent / "results" / "scale"
RAW = "raw.json"
FILLED = "filled.json"  # what filling a folder took, kept in it

COUNTS = (10, 1_000, 10_000)
PAGE = 10  # adapters on a page: as many as the smallest folder has, so that all pages are full
TEAM = PAGE  # adapters whose names share a prefix
ALIAS = "prod"
THREADS = 4  # that fill a folder: they wait for the disk most of the time
LAYERS, WIDTH = 30, 576  # of the default base and its q_proj

RESOLVES = 1_000  # of each kind, in one turn
READS = 200  # of one adapter over HTTP, in one turn
LISTS = 5  # of each kind, in one turn; the median counts
TOKENS = 4  # of the reply of an adapter that is not loaded
WARM_UP = -1
IDLE = 5.0  # % of a core: a server that takes less has ended its audit
SETTLE_S = 120
TIMEOUT_S = 120

# A figure grows if it does in every round, and by more than this in the median: less is within what
# single rounds scatter by.
GROWS = 1.25

console = Console(stderr=True, highlight=False)
Figures = dict[str, float]
Write = Callable[[Path, int], None]


class Part(NamedTuple):
    """A part of the table: figures by key, and what they are called there."""

    title: str
    figures: Mapping[str, str]
    through_all: bool = False  # grows by its nature


PARTS = (
    Part(
        "Start and memory",
        {
            "open_ms": "open store and registry, sweep, ms",
            "build_s": "build everything but the engine, s",
            "start_s": "`loraplex serve` to /ready, s",
            "rss_ready_mib": "memory of the server's process when ready (RSS), MiB",
            "rss_resolved_mib": "memory after 1,000 resolves, MiB",
            "rss_peak_mib": "highest memory until then, MiB",
        },
    ),
    Part(
        "Resolve, in the process",
        {
            f"resolve_{kind}_us_p{p}": f"resolve {said}, p{p}, µs"
            for kind, said in (("name", "name"), ("alias", "name@alias"), ("digest", "name@digest"))
            for p in (50, 99)
        },
    ),
    Part(
        "One adapter, over HTTP",
        {
            "model_ms_p50": "GET /v1/models/{name}, p50, ms",
            "model_ms_p99": "GET /v1/models/{name}, p99, ms",
            "version_ms_p50": "GET /v1/adapters/{name}/versions/1, p50, ms",
            "version_ms_p99": "GET /v1/adapters/{name}/versions/1, p99, ms",
            "cold_ms": f"chat completion of {TOKENS} tokens, adapter not loaded, ms",
            "load_ms": "loading it, by the reply's header, ms",
        },
    ),
    Part(
        "Pages, over HTTP",
        {
            "first_ms": f"GET /v1/adapters?limit={PAGE}, first page, ms",
            "middle_ms": "a page in the middle, ms",
            "last_ms": "the last page, ms",
            "prefix_ms": f"a page by prefix, of the last {TEAM}, ms",
            "page_kb": "the last page, kB",
        },
    ),
    Part(
        "Through all adapters",
        {
            "models_ms": "GET /v1/models, ms",
            "models_kb": "GET /v1/models, kB",
            "rss_listed_mib": "memory of the server's process after it (RSS), MiB",
            "audit_s": "audit, in the background after a start, s",
            "verify_s": "`loraplex adapters verify`, which reads every byte, s",
        },
        through_all=True,
    ),
)


class ScaleError(Exception):
    """The server did not do the work that was to be measured."""


def main(
    count: Annotated[
        list[int] | None, typer.Option(min=PAGE, help="Adapters; repeatable. 10, 1,000, 10,000.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=PAGE - 1, help="Rounds, but for whole starts.")
    ] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Rounds of whole starts and verify.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Fill the folders that are not there, measure, write raw data and the table."""
    # An end from outside is as orderly as Ctrl-C: servers must not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(sorted(set(count or COUNTS)), rounds, starts, out)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ScaleError, targets.TargetError) as error:
        console.print(f"benchmarks: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def run(counts: Sequence[int], rounds: int, starts: int, out: Path) -> None:
    """Measures and leaves raw.json, machine.json and table.md in `out`.

    Raises:
        TargetError, ScaleError: a server did not start or did not do its work.
    """
    launch.prepare_environment(CACHE / "loraplex")  # before anything imports vLLM
    base = base_model.fetch(Settings.read(["--home", str(CACHE / "loraplex")]), console.print)
    folders = {count: fill(CACHE / "scale", count, base) for count in counts}
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(machine.describe(targets.ROOT), indent=1))
    filled = {n: json.loads((folder / FILLED).read_text()) for n, folder in folders.items()}
    lines: list[dict[str, Any]] = []
    for round_, number, figures in _measure(folders, base, rounds, starts):
        lines.append({"round": round_, "count": number, "figures": figures})
        # What was measured until a server fails is kept.
        (out / RAW).write_text(json.dumps({"filled": filled, "lines": lines}, indent=1))
    typer.echo(write(out))


# Filling -----------------------------------------------------------------------------------


def name(number: int) -> str:
    """Of the adapter with this number, from 0; names are in the order of numbers."""
    return f"{team(number)}adapter-{number % TEAM}"


def team(number: int) -> str:
    """The prefix that the adapter's name shares with those of its team."""
    return f"team-{number // TEAM:06d}."


def fill(
    cache: Path, count: int, base: Path, write: Write | None = None, dtype: str = "BF16"
) -> Path:
    """The folder in `cache` with a server's state of `count` adapters, filled if it is not there.

    `write` writes the adapter of a number into a folder; left out, it is `make`. `dtype` is what
    the server that is to load them computes with: BF16, F16 or F32.
    The state is in `home`; `filled.json` says how many adapters a second were taken in, over all,
    over the first tenth of them and over the last.
    """
    folder = cache / str(count)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete: what an interrupted run left is never used.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        filling = Path(scratch) / "filling"
        times = list(_ingest(filling / "home", count, base, write or make, dtype))
        tenth = max(1, count // 10)
        rates = {
            "adapters_s": count / (times[-1] - times[0]),
            "first_tenth_s": tenth / (times[tenth] - times[0]),
            "last_tenth_s": tenth / (times[-1] - times[-1 - tenth]),
        }
        (filling / FILLED).write_text(json.dumps(rates))
        filling.rename(folder)
    return folder


def _ingest(home: Path, count: int, base: Path, write: Write, dtype: str) -> Iterator[float]:
    """Takes adapters in; yields the time, in seconds, before the first and after each."""
    store, registry = Store(home / "store"), Registry(Database.of(home))
    rules = Rules(max_rank=64, dtype=dtype)
    ingest = Ingest(store, registry, BaseSpec.read(base, DEFAULT_MODEL), rules)

    def one(number: int) -> None:
        with store.staging() as folder:
            write(folder, number)
            ingest.ingest(folder, name(number), "benchmark", ALIAS)

    pool = ThreadPoolExecutor(THREADS)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield time.monotonic()
            done = pool.map(one, range(count))
            for _ in track(done, f"filling: {count:,} adapters", count, console=console):
                yield time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        registry.close()


def make(folder: Path, number: int) -> None:
    """Writes an adapter of rank 1 on one q_proj, as PEFT saves it; equal numbers, equal weights."""
    module = f"model.layers.{number % LAYERS}.self_attn.q_proj"
    rng = np.random.default_rng(number)
    shapes = {"A": (1, WIDTH), "B": (WIDTH, 1)}
    weights = {
        f"base_model.model.{module}.lora_{part}.weight": rng.standard_normal(shape, np.float32)
        for part, shape in shapes.items()
    }
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2},
        **{"target_modules": [module], "bias": "none"},
    }
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


# Measuring ---------------------------------------------------------------------------------


Turn = tuple[int, int, Figures]  # round, count of adapters, what was measured


def _measure(folders: Mapping[int, Path], base: Path, rounds: int, starts: int) -> Iterator[Turn]:
    with ExitStack() as running:
        servers = {count: Server(folder, base) for count, folder in folders.items()}
        for server in servers.values():
            running.callback(server.stop)
        yield from _parts(folders, base, rounds)
        yield from _verifies(folders, starts)
        yield from _starts(servers, starts)
        yield from _requests(servers, rounds)


def _parts(folders: Mapping[int, Path], base: Path, rounds: int) -> Iterator[Turn]:
    turns = list(_turns(folders, rounds))
    for round_, count in track(turns, "parts of the server", console=console):
        yield round_, count, _fresh(probe, folders[count] / "home", base)


def _verifies(folders: Mapping[int, Path], rounds: int) -> Iterator[Turn]:
    """Apart from the starts, which a disk that still writes would slow down."""
    turns = list(_turns(folders, rounds))
    for round_, count in track(turns, "verify", console=console):
        yield round_, count, verify(folders[count])


def _starts(servers: Mapping[int, "Server"], rounds: int) -> Iterator[Turn]:
    """Leaves every server up, and paused."""
    turns = list(_turns(servers, rounds))
    first = servers[turns[0][1]]
    first.start()  # not counted: what is read from disk is in memory from here on
    first.stop()
    for round_, count in track(turns, "whole starts", console=console):
        server = servers[count]
        server.stop()
        figures = start(server, count, round_)
        server.pause()
        yield round_, count, figures


def _requests(servers: Mapping[int, "Server"], rounds: int) -> Iterator[Turn]:
    turns = list(_turns(servers, rounds, WARM_UP))
    for round_, count in track(turns, "over HTTP", console=console):
        with servers[count].awake() as client:
            figures = ask(client, count, round_)
        figures["rss_listed_mib"] = servers[count].rss_mib
        if round_ != WARM_UP:
            yield round_, count, figures


def _turns(counts: Iterable[int], rounds: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """(round, count) of every turn."""
    listed = list(counts)
    for round_ in range(first, rounds):
        ahead = round_ % len(listed)
        for count in listed[ahead:] + listed[:ahead]:
            yield round_, count


def _fresh(work: Callable[..., Figures], *arguments: Any) -> Figures:
    """What `work` returns in a process that has imported the server and done nothing yet."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["server.app"])  # imports vLLM: once, not in every process
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def probe(home: Path, base: Path) -> Figures:
    """The parts of a server over the state in `home` that need no engine."""
    from server import app

    settings = Settings.read(["--home", str(home), "--no-demo-adapters"])
    figures = {"open_ms": 1000 * _seconds(lambda: _open(home))}
    began = time.perf_counter()
    serving = app.build(settings, base)
    figures["build_s"] = time.perf_counter() - began
    registry = serving.registry
    names = [each for each, _ in registry.names()]
    for kind, said in (
        ("name", lambda each: each),
        ("alias", lambda each: f"{each}@{ALIAS}"),
        ("digest", lambda each: f"{each}@{registry.resolve(each).digest}"),
    ):
        asked = [said(each) for each in random.Random(kind).choices(names, k=RESOLVES)]
        figures |= _percentiles(f"resolve_{kind}_us", registry.resolve, asked, 1e6)
    figures["audit_s"] = _seconds(serving.ingest.audit)
    registry.close()
    return figures


def _open(home: Path) -> None:
    Store(home / "store").sweep()
    Registry(Database.of(home)).close()


def verify(folder: Path) -> Figures:
    """Of the command that reads every byte of a folder's adapters again."""
    command = [str(Path(sys.executable).with_name("loraplex")), "adapters", "verify"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--home", str(folder / "home")], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ScaleError(f"loraplex adapters verify: {done.stderr.strip()}")
    return {"verify_s": time.perf_counter() - began}


class Server(targets.Server):
    """`loraplex serve` over a filled folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        material = targets.Material(base, {}, CACHE / "benchmarks" / "gguf")
        super().__init__(f"{folder.name} adapters", Target(kind="loraplex"), {}, material, folder)

    def client(self) -> httpx.Client:
        """A client of it, for one turn: no connection outlives a pause."""
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    @contextmanager
    def awake(self) -> Iterator[httpx.Client]:
        """Runs inside, and is paused after."""
        self.resume()
        try:
            with self.client() as client:
                yield client
        finally:
            self.pause()

    def settle(self) -> None:
        """Waits until it is idle: what it does after a start has been done."""
        deadline = time.monotonic() + SETTLE_S
        while self._main.cpu_percent(1) > IDLE:
            if time.monotonic() > deadline:
                raise ScaleError(f"{self.name}: the server is still busy after {SETTLE_S} s")

    @property
    def rss_mib(self) -> float:
        """Resident memory of its main process: HTTP, registry and residency, not the engine."""
        return float(self._main.memory_info().rss) / 2**20

    @property
    def peak_mib(self) -> float:
        """The most that `rss_mib` has been."""
        status = Path(f"/proc/{self._main.pid}/status").read_text()
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        return int(kib) / 2**10

    @property
    def _main(self) -> psutil.Process:
        return self.processes()[0]


def start(server: Server, count: int, seed: int) -> Figures:
    """Of a start and of what the first resolves leave in memory."""
    figures = {"start_s": server.start()}
    server.settle()
    figures["rss_ready_mib"] = server.rss_mib
    with server.client() as client:
        for number in random.Random(seed).choices(range(count), k=RESOLVES):
            _get(client, f"/v1/models/{name(number)}")
    figures["rss_resolved_mib"] = server.rss_mib
    figures["rss_peak_mib"] = server.peak_mib
    return figures


def ask(client: httpx.Client, count: int, turn: int) -> Figures:
    """Of requests; `turn` picks the adapters, and a cold one that no other turn has used."""
    figures = cold(client, count, turn)
    numbers = random.Random(turn).choices(range(count), k=READS)
    for kind, path in (("model", "/v1/models/{}"), ("version", "/v1/adapters/{}/versions/1")):
        urls = [path.format(name(number)) for number in numbers]
        figures |= _percentiles(f"{kind}_ms", lambda url: _get(client, url), urls, 1e3)
    return figures | pages(client, count) | models(client, count)


def cold(client: httpx.Client, count: int, turn: int) -> Figures:
    """Of one request to an adapter that the engine has not loaded."""
    order = random.Random(0).sample(range(count), min(count, 100))
    body = {
        **{"adapter": name(order[turn]), "temperature": 0, "ignore_eos": True},
        **{"max_tokens": TOKENS, "messages": [{"role": "user", "content": "Count to ten."}]},
    }
    began = time.perf_counter()
    reply = client.post("/v1/chat/completions", json=body)
    took = time.perf_counter() - began
    load_ms = float(reply.headers.get("x-loraplex-load-ms", 0))
    if reply.status_code != 200 or reply.json()["usage"]["completion_tokens"] != TOKENS:
        raise ScaleError(f"{body['adapter']}: {reply.status_code} {reply.text[:500]}")
    return {"cold_ms": 1000 * took, "load_ms": load_ms}


def pages(client: httpx.Client, count: int) -> Figures:
    """Of full pages, wherever they lie."""
    last = count - PAGE
    figures: Figures = {}
    for kind, query in (
        ("first", _after(0)),
        ("middle", _after(last // 2)),
        ("last", _after(last)),
        ("prefix", {"prefix": team(last)}),
    ):
        took, found = _median_ms(client, "/v1/adapters", {"limit": str(PAGE), **query})
        if len(found.json()["data"]) != PAGE:
            raise ScaleError(f"{kind} page: {len(found.json()['data'])} adapters")
        figures[f"{kind}_ms"] = took
        if kind == "last":
            figures["page_kb"] = len(found.content) / 1000
    return figures


def _after(number: int) -> dict[str, str]:
    """The query of the page that begins with this adapter."""
    return {"after": name(number - 1)} if number else {}


def models(client: httpx.Client, count: int) -> Figures:
    """Of the list that OpenAI's protocol has no pages for."""
    took, found = _median_ms(client, "/v1/models", {})
    if len(found.json()["data"]) != count + 1:
        raise ScaleError(f"/v1/models: {len(found.json()['data'])} models")
    return {"models_ms": took, "models_kb": len(found.content) / 1000}


def _median_ms(
    client: httpx.Client, path: str, query: dict[str, str]
) -> tuple[float, httpx.Response]:
    times = []
    for _ in range(LISTS):
        began = time.perf_counter()
        found = _get(client, path, query)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times)), found


def _get(client: httpx.Client, path: str, query: dict[str, str] | None = None) -> httpx.Response:
    reply = client.get(path, params=query)
    if reply.status_code != 200:
        raise ScaleError(f"{path}: {reply.status_code} {reply.text[:500]}")
    return reply


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _percentiles(
    key: str, work: Callable[[str], object], names: Iterable[str], scale: float
) -> Figures:
    """How long `work` takes for each of `names`, in seconds times `scale`."""
    times = []
    for each in names:
        began = time.perf_counter()
        work(each)
        times.append(time.perf_counter() - began)
    p50, p99 = np.percentile(times, (50, 99)) * scale
    return {f"{key}_p50": float(p50), f"{key}_p99": float(p99)}


# Telling -----------------------------------------------------------------------------------

Measured = dict[str, dict[int, dict[int, float]]]  # figure → count → round → value


def write(folder: Path) -> str:
    """Writes table.md from the raw data in `folder`; returns it."""
    raw = json.loads((folder / RAW).read_text())
    measured: Measured = {}
    for line in raw["lines"]:
        for key, value in line["figures"].items():
            measured.setdefault(key, {}).setdefault(line["count"], {})[line["round"]] = value
    counts = sorted({line["count"] for line in raw["lines"]})
    described = json.loads((folder / "machine.json").read_text())
    text = "\n\n".join(
        [
            "# Many adapters",
            "Adapters of rank 1 on one linear layer of the default base, registered in a server's "
            "state folder. A figure grows if it does in every round and by more than "
            f"{GROWS - 1:.0%} in the median:",
            _growth(measured, counts),
            _filling(raw["filled"]),
            f"{described['when']}: {described['cpu']}, {described['cores']} cores, "
            f"{described['memory_gib']} GiB, load before {described['load_before']}, "
            f"commit {described['commit'][:12]} with {described['changed_files']} files changed.",
            "Medians over rounds, in parentheses the lowest and highest round. The last column is "
            "the ratio of two medians of this run, with its lowest and highest single round.",
            *_sections(measured, counts),
        ]
    )
    (folder / "table.md").write_text(text + "\n")
    return text


def _growth(measured: Measured, counts: Sequence[int]) -> str:
    """What grows and what does not, in a line each."""
    lines = []
    for through_all, said in (
        (False, "Must not grow with the number of adapters"),
        (True, "Goes through all of them by its nature"),
    ):
        figures = {
            k: v for p in PARTS if p.through_all is through_all for k, v in p.figures.items()
        }
        ratios = {v: _ratio(measured[k], counts) for k, v in figures.items() if k in measured}
        grown = [v for v, ratio in ratios.items() if ratio.median > GROWS and ratio.low > 1]
        lines.append(f"- {said} ({len(ratios)} figures). Grows: {'; '.join(grown) or 'none'}.")
    return "\n".join(lines)


def _filling(filled: Mapping[str, Mapping[str, float]]) -> str:
    count, rates = max(filled.items(), key=lambda item: int(item[0]))
    return (
        f"{int(count):,} adapters were taken in at {rates['adapters_s']:.0f} a second by {THREADS} "
        "threads, every one checked and synced to disk; the last tenth of them at "
        f"{rates['last_tenth_s'] / rates['first_tenth_s']:.2f} times the rate of the first."
    )


def _sections(measured: Measured, counts: Sequence[int]) -> Iterator[str]:
    head = ["", *(f"{count:,}" for count in counts), f"{counts[-1]:,} against {counts[0]:,}"]
    for part in PARTS:
        lines = [head, ["---"] * len(head)]
        for key, said in part.figures.items():
            if of := measured.get(key):
                spreads = [metrics.Spread.of(of[count].values()) for count in counts]
                lines.append([said, *map(_said, [*spreads, _ratio(of, counts)])])
        yield f"## {part.title}"
        yield "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ratio(of: Mapping[int, Mapping[int, float]], counts: Sequence[int]) -> metrics.Spread:
    smallest, largest = of[counts[0]], of[counts[-1]]
    both = sorted(smallest.keys() & largest.keys())
    return metrics.ratio([largest[r] for r in both], [smallest[r] for r in both])


def _said(spread: metrics.Spread) -> str:
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2)) if spread.median >= limit), 3)
    median, low, high = (f"{v:,.{digits}f}" for v in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}-{high})"


if __name__ == "__main__":
    typer.run(main)
