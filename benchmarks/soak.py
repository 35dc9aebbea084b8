"""Hours in minutes: a server at 80 % of what it can do, while adapters come, move and go.

`python -m benchmarks.soak --minutes 120` starts a server, finds out what it can do, then sends it
four fifths of that, as a Poisson process, to the base and to adapters by popularity. All the time
adapters are uploaded, replaced under a moving alias, loaded, refused and deleted. What should fail
does, and nothing else may. Memory, files, threads, tasks, series and the store's size are noted
every few seconds. At the end memory, series and store have to be flat; and a server that has
nothing to do has to have no more files, threads and tasks than before.
"""

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from adapters.base import BaseSpec
from benchmarks import adapters, machine
from benchmarks.load import OpenAI, connect
from benchmarks.targets import ROOT, Material, Server
from benchmarks.workload import Request, Target
from server.config import DEFAULT_MODEL, Settings
from server.engine import base_model
from server.engine.launch import ENVIRONMENT
from server.logs import say

CACHE = ROOT / ".cache"
RESULTS = Path(__file__).parent / "results" / "soak"
SHARE = 0.8  # of what the server can do
WARM_S, FINDING_S = 15, 30  # that finding out takes: what is completed in the latter counts
STREAMS = 16  # while it does
PROMPT, OUTPUT = (8, 64), (8, 48)  # tokens, uniformly
VOCABULARY = 20_000
STOCK, LIVE = 48, 12  # adapters on disk, and those that are served at the start
CHURN_S = 2.0  # between two changes
REST_S = 120.0  # that one is no longer asked for before it is deleted
SAMPLE_S = 5.0
REST_AFTER_S = 10.0  # until a server without requests has let go of what they took
# What grows by what was ever served has to be flat under load: at most so many times as much in the
# last fifth as in the middle one. Series and store go up and down with the adapters that are there.
GROWING = {"rss_mib": 1.05, "series": 1.1, "store_mib": 1.1}
# What is held by what is served now has to be flat at rest: so many times as much after the load as
# before it, and what may be due at just that moment.
HELD = ("files", "threads", "tasks")
FLAT, DUE = 1.05, 2


@dataclass
class Live:
    """What is served now: adapters that may be asked for, and those that rest before they go."""

    names: list[str] = field(default_factory=list)
    resting: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Book:
    """What has happened."""

    samples: list[dict[str, float]] = field(default_factory=list)
    rest: list[dict[str, float]] = field(default_factory=list)  # before the load, and after it
    done: int = 0
    failed: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    intended: Counter[int] = field(default_factory=Counter)  # 4xx, by status


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="How long the load lasts.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
) -> None:
    """Run the load, write its data, a summary and a plot; exit code 1 if anything was not well."""
    described = machine.describe(ROOT)
    base = base_model.fetch(Settings.read(["--home", str(CACHE / "loraplex")]), print)
    (CACHE / "benchmarks").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=CACHE / "benchmarks") as scratch:
        folders = _stock(base, Path(scratch) / "stock")
        own = Path(scratch) / "server"
        # As a server does by itself: fp32 on a CPU that computes bf16 slowly.
        flags = ["--dtype", "auto", "--max-loras", "4"]
        flags += ["--max-cpu-loras", "8", "--max-lora-rank", "16"]
        server = Server(
            "loraplex",
            Target(kind="loraplex", flags=tuple(flags)),
            ENVIRONMENT,
            Material(base, {}, CACHE / "benchmarks" / "gguf"),
            own,
        )
        try:
            say(f"ready after {server.start():.0f} s")
            book, rate = asyncio.run(_soak(server, own, folders, minutes * 60, seed))
        finally:
            server.stop()
    summary = summarise(book, rate) | {"minutes": minutes, "machine": described}
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.json").write_text(json.dumps(book.samples, separators=(",", ":")) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(book.samples, out / "soak.png")
    print(json.dumps({k: v for k, v in summary.items() if k != "machine"}, indent=1))
    raise typer.Exit(0 if summary["well"] else 1)


def _stock(base: Path, into: Path) -> list[Path]:
    shapes = BaseSpec.read(base, DEFAULT_MODEL).linears
    few = {path: shapes[path] for path in shapes if path.endswith(("q_proj", "v_proj"))}
    folders = []
    for number in range(STOCK):
        folders.append(into / str(number))
        folders[-1].mkdir(parents=True)
        adapters.write_plain(folders[-1], few, number, 8 if number % 2 else 16)
    return folders


async def _soak(
    server: Server, own: Path, folders: list[Path], seconds: float, seed: int
) -> tuple[Book, float]:
    book, live, dice = Book(), Live(), random.Random(seed)
    async with aiohttp.ClientSession(server.url) as http:
        churn = Churn(http, folders, live, book, random.Random(seed + 1))
        for _ in range(LIVE):
            await churn.upload()
        rate = await _capacity(server, live, dice)
        say(f"it can do {rate:.2f} requests/s; sending {SHARE * rate:.2f} for {seconds:.0f} s")

        async def look() -> dict[str, float]:
            return await _look(server, own, http) | {"done": book.done}

        await asyncio.sleep(REST_AFTER_S)
        book.rest.append(await look())
        end = time.monotonic() + seconds
        async with _going(churn.go), _going(lambda: _sample(book, look)):
            await _send(server, live, book, dice, SHARE * rate, end)
        await asyncio.sleep(REST_AFTER_S)
        book.rest.append(await look())
    return book, SHARE * rate


@asynccontextmanager
async def _going(work: Callable[[], Any]) -> AsyncIterator[None]:
    """`work` goes on meanwhile; what it raises is raised here."""
    task = asyncio.create_task(work())
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()


def _request(live: Live, dice: random.Random) -> Request:
    """For the base, or for an adapter: the n-th as often as 1/n."""
    names = ["", *live.names]
    weights = [1 / place for place in range(1, len(names) + 1)]
    prompt = tuple(dice.randrange(1, VOCABULARY) for _ in range(dice.randint(*PROMPT)))
    name = dice.choices(names, weights)[0]
    adapter = f"{name}@prod" if name else None
    return Request(stream=0, prompt=prompt, output=dice.randint(*OUTPUT), adapter=adapter)


async def _capacity(server: Server, live: Live, dice: random.Random) -> float:
    """Requests a second that it completes when there are always enough of them."""
    done = 0
    async with connect(server.url, OpenAI()) as client:

        async def stream() -> None:
            nonlocal done
            while client.now() < WARM_S + FINDING_S:
                reply = await client.ask(_request(live, dice))
                if reply.error:
                    raise RuntimeError(reply.error)
                done += WARM_S <= client.now() < WARM_S + FINDING_S

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return done / FINDING_S


async def _send(
    server: Server, live: Live, book: Book, dice: random.Random, rate: float, end: float
) -> None:
    running: set[asyncio.Task[None]] = set()
    async with connect(server.url, OpenAI()) as client:

        async def ask(request: Request) -> None:
            reply = await client.ask(request)
            book.done += 1
            if reply.error:
                book.failed.append(f"{request.adapter}: {reply.error}")

        while time.monotonic() < end:
            task = asyncio.create_task(ask(_request(live, dice)))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(dice.expovariate(rate))
        await asyncio.gather(*running)


class Churn:
    """Adapters that come, move and go."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        folders: list[Path],
        live: Live,
        book: Book,
        dice: random.Random,
    ) -> None:
        self._http = http
        self._folders = itertools.cycle(folders)
        self._live = live
        self._book = book
        self._dice = dice
        self._numbers = itertools.count()
        self._served: dict[str, int] = {}  # the version that requests get, where it is not 1

    async def go(self) -> None:
        """A change every CHURN_S, for ever: as much comes as goes."""
        ways = (self.upload, self.load, self.replace, self.refused, self.retire, self.unknown)
        for way in itertools.cycle(ways):
            await asyncio.sleep(CHURN_S)
            await way()
            while self._live.resting and self._live.resting[0][0] < time.monotonic():
                _, name = self._live.resting.pop(0)
                await self._call("delete", "DELETE", f"/v1/adapters/{name}")

    async def upload(self) -> None:
        """Another adapter; where it comes in is how popular it is."""
        name = f"a{next(self._numbers)}"
        await self._send("upload", name)
        path = f"/v1/adapters/{name}/aliases/prod"
        await self._call("alias", "PUT", path, json={"version": 1})
        self._live.names.insert(self._dice.randrange(len(self._live.names) + 1), name)

    async def replace(self) -> None:
        """Another version under the alias, and the one before it goes."""
        name = self._dice.choice(self._live.names)
        new, old = (await self._send("replace", name))["version"], self._served.get(name, 1)
        if new == old:  # the bytes that it has
            return
        self._served[name] = new
        path = f"/v1/adapters/{name}"
        await self._call("alias", "PUT", f"{path}/aliases/prod", json={"version": new})
        await self._call("delete version", "DELETE", f"{path}/versions/{old}")

    async def retire(self) -> None:
        """One that nobody asks for any more, to be deleted when its last request is over."""
        name = self._live.names.pop(self._dice.randrange(len(self._live.names)))
        self._live.resting.append((time.monotonic() + REST_S, name))

    async def load(self) -> None:
        """A hint, which a server that is busy may refuse."""
        name = self._dice.choice(self._live.names)
        await self._call("load", "POST", f"/v1/adapters/{name}/load", may=429)

    async def refused(self) -> None:
        """An upload that is none."""
        form = aiohttp.FormData({"name": "bad"})
        form.add_field("files", b"{}", filename="adapter_config.json")
        form.add_field("files", b"nothing", filename="adapter_model.safetensors")
        await self._call("refused", "POST", "/v1/adapters", data=form, must=422)

    async def unknown(self) -> None:
        """A request for what there is not."""
        body = {"model": "nobody", "prompt": "x"}
        await self._call("unknown", "POST", "/v1/completions", json=body, must=404)

    async def _send(self, what: str, name: str) -> dict[str, Any]:
        folder = next(self._folders)
        form = aiohttp.FormData({"name": name})
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            form.add_field("files", (folder / file).read_bytes(), filename=file)
        return await self._call(what, "POST", "/v1/adapters", data=form)

    async def _call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        must: int | None = None,
        may: int | None = None,
        **body: Any,
    ) -> dict[str, Any]:
        async with self._http.request(method, path, **body) as response:
            answer: dict[str, Any] = await response.json()
        self._book.changes[what] += 1
        if response.status in (must, may):
            self._book.intended[response.status] += 1
        elif must is not None or response.status >= 400:
            self._book.failed.append(f"{what}: {response.status} {json.dumps(answer)[:300]}")
        return answer


async def _sample(book: Book, look: Callable[[], Awaitable[dict[str, float]]]) -> None:
    began = time.monotonic()
    while True:
        book.samples.append({"s": round(time.monotonic() - began, 1)} | await look())
        if len(book.samples) % 12 == 0:
            say(f"{book.done} requests, {len(book.failed)} failed, {book.samples[-1]}")
        await asyncio.sleep(SAMPLE_S)


async def _look(server: Server, own: Path, http: aiohttp.ClientSession) -> dict[str, float]:
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    series = [line for line in lines if not line.startswith("#")]
    tasks = next(line for line in series if line.startswith("loraplex_tasks "))
    tree = server.processes()
    return {
        "rss_mib": round(sum(each.memory_info().rss for each in tree) / 2**20, 1),
        "files": sum(each.num_fds() for each in tree),
        "threads": sum(each.num_threads() for each in tree),
        "tasks": float(tasks.split()[1]),
        "series": len(series),
        "store_mib": round(await asyncio.to_thread(_size, own / "home" / "store"), 2),
    }


def _size(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # deleted meanwhile
            continue
    return total / 2**20


def summarise(book: Book, rate: float) -> dict[str, Any]:
    """What came of it: failures, and for each quantity its slope and whether it is flat.

    `slope_per_hour` is of a line through the second half by least squares; `drift` is the median of
    the last fifth over that of the middle one, or for what is held, what is there at rest after
    the load over what was there before it.
    """
    count = len(book.samples)
    trends = {}
    for name in (*GROWING, *HELD):
        values = [sample[name] for sample in book.samples]
        middle = statistics.median(values[2 * count // 5 : 3 * count // 5])
        last = statistics.median(values[4 * count // 5 :])
        before, after = (sample[name] for sample in book.rest)
        if name in GROWING:
            drift, flat = last / middle, last / middle <= GROWING[name]
        else:
            drift, flat = after / before, after <= FLAT * before + DUE
        half = book.samples[count // 2 :]
        slope, _ = statistics.linear_regression(
            [sample["s"] for sample in half], [sample[name] for sample in half]
        )
        trends[name] = {
            "middle": middle,
            "last": last,
            "rest_before": before,
            "rest_after": after,
            "drift": round(drift, 4),
            "flat": flat,
            "slope_per_hour": round(slope * 3600, 3),
        }
    all_flat = all(trend["flat"] for trend in trends.values())
    return {
        "well": all_flat and not book.failed and book.done > 0,
        "requests": book.done,
        "requests_per_s": round(rate, 2),
        "failed": book.failed[:20],
        "changes": dict(book.changes),
        "intended_4xx": {str(status): n for status, n in book.intended.items()},
        "trends": trends,
    }


def plot(samples: list[dict[str, float]], to: Path) -> None:
    """Each quantity over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "rss_mib": "memory of all processes, MiB",
        "files": "open files",
        "threads": "threads",
        "tasks": "tasks of the event loop",
        "series": "series at /metrics",
        "store_mib": "size of the store, MiB",
    }
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 5), sharex=True, layout="constrained")
    for panel, (name, title) in zip(panels.flat, names.items(), strict=True):
        panel.plot([s["s"] / 60 for s in samples], [s[name] for s in samples], linewidth=1)
        panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("minutes")
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
