"""Policies compared on the model of `simulator_model`: `python -m benchmarks.simulator`.

Who runs next: first come, first served, or fair with slots that turn over after a quantum. What is
evicted: the least recently used, or the one that costs least to be without.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import simulator_plots
from benchmarks.simulator_model import BASE, GPU, MB, Engine, Outcome, Request, Simulation
from server.admission import Limits
from server.residency import GreedyDual, Lru, Policy

RESULTS = Path(__file__).parent / "results" / "simulator"
QUANTA = (0, 128, 512, 2048, 8192)
EVICTION: dict[str, Callable[[], Policy]] = {"lru": Lru, "greedy-dual": GreedyDual}
FEW = 5  # an adapter of fewer requests is not called the worst served
ENGINES = {"gpu": GPU, "cpu": Engine()}
NO_LIMIT = 10**9
RANKS = (8, 16, 32, 64, 128)
BYTES_OF_RANK = {"gpu": 2.5 * MB, "cpu": 1.2 * MB}


@dataclass(frozen=True)
class Run:
    """One simulation: a load on an engine under a policy; `quantum` None: first come, first served.

    The load is `requests` that arrive at `rate`, or `seconds` of clients that always have one under
    way: `clients` for each of `adapters`. `victim` is requests a second of one adapter more.
    """

    load: str
    engine: str
    slots: int
    seats: int
    places: int
    adapters: int
    quantum: float | None = 512
    eviction: str = "lru"
    requests: int = 0
    rate: float = 0.0
    alpha: float = 1.0
    cv: float = 1.0
    clients: int = 0
    seconds: float = 0.0
    victim: float = 0.0
    mixed: bool = False
    seed: int = 0

    @property
    def policy(self) -> str:
        return "fcfs" if self.quantum is None else f"q {self.quantum:g}"


@dataclass(frozen=True)
class Figures:
    """What came of a run. Times are seconds; `jain` and `gap` (in service) are of the adapters that
    always have requests waiting, None where none does.
    """

    requests: int
    seconds: float
    tokens_s: float
    ttft_p50: float
    ttft_p99: float
    worst: float  # mean TTFT of the worst-served adapter; of the victim, where there is one
    hit_rate: float
    swaps: int
    loads: int
    load_s: float
    jain: float | None
    gap: float | None
    cpu_s: float  # that the simulation took


def open_load(
    adapters: int,
    requests: int,
    rate: float,
    alpha: float = 1.0,
    cv: float = 1.0,
    seed: int = 0,
    prompt: tuple[int, int] = (8, 512),
    output: tuple[int, int] = (8, 512),
) -> list[Request]:
    """S-LoRA's synthetic load, as in `benchmarks.workload.Open`; lengths are [low, high)."""
    random = np.random.default_rng(seed)
    chosen = (random.power(alpha, requests) * adapters).astype(int).tolist()
    prompts = random.integers(*prompt, requests).tolist()
    outputs = random.integers(*output, requests).tolist()
    shape = cv**-2
    due = np.cumsum(random.gamma(shape, 1 / (rate * shape), requests)).tolist()
    return [
        Request(f"a{adapter}", p, o, at)
        for adapter, p, o, at in zip(chosen, prompts, outputs, due, strict=True)
    ]


def client(adapter: str | None, seed: int, mean: int = 256) -> Iterator[Request]:
    """One after the other, without a pause: prompts and replies of up to twice `mean` tokens."""
    random = np.random.default_rng(seed)
    for _ in repeat(None):
        prompt, output = random.integers(8, 2 * mean, 2).tolist()
        yield Request(adapter, prompt, output)


def simulate(run: Run) -> Figures:
    """Does a run."""
    sizes = {
        f"a{i}": int(BYTES_OF_RANK[run.engine] * (RANKS[i % len(RANKS)] if run.mixed else 16))
        for i in range(run.adapters)
    }
    limits = Limits(
        run.slots,
        run.seats,
        2048 if run.engine == "gpu" else 512,
        waiting=NO_LIMIT,
        of_adapter=NO_LIMIT,
        of_key=NO_LIMIT,
        quantum=run.quantum or 0,
    )
    began = time.process_time()
    simulation = Simulation(
        limits,
        ENGINES[run.engine],
        places=run.places,
        policy=EVICTION[run.eviction](),
        fcfs=run.quantum is None,
        sizes=sizes,
    )
    if run.requests:
        load = open_load(run.adapters, run.requests, run.rate, run.alpha, run.cv, run.seed)
        outcome = simulation.run(load)
    else:
        count = int(run.victim * run.seconds)
        victims = [Request("victim", 32, 32, i / run.victim) for i in range(count)]
        clients = [
            client(f"a{i % run.adapters}", run.seed * 1000 + i)
            for i in range(run.clients * run.adapters)
        ]
        outcome = simulation.run(victims, clients, until=run.seconds)
    waiting = list(simulation.waiting())
    return figures(run, outcome, waiting, time.process_time() - began)


def figures(run: Run, outcome: Outcome, waiting: list[tuple[str, float]], cpu_s: float) -> Figures:
    """`waiting`: adapter and seconds of those that had no first token at the end."""
    ttft: dict[str, list[float]] = defaultdict(list)
    for served in outcome.served:
        ttft[served.request.adapter or BASE].append(served.ttft)
    for adapter, seconds in waiting:
        ttft[adapter].append(seconds)
    every = np.concatenate([np.array(times) for times in ttft.values()])
    means = [float(np.mean(times)) for times in ttft.values() if len(times) >= FEW]
    worst = float(np.mean(ttft["victim"] or [0])) if run.victim else max(means, default=0.0)
    jain = gap = None
    if run.clients:
        service = np.array([outcome.service[f"a{i}"] for i in range(run.adapters)], float)
        jain = float(service.sum() ** 2 / (len(service) * (service**2).sum()))
        gap = float(service.max() - service.min())
    return Figures(
        len(outcome.served),
        outcome.seconds,
        sum(served.request.output for served in outcome.served) / outcome.seconds,
        float(np.percentile(every, 50)),
        float(np.percentile(every, 99)),
        worst,
        outcome.hits / max(1, len(every)),
        outcome.swaps,
        outcome.loads,
        outcome.load_s,
        jain,
        gap,
        cpu_s,
    )


def runs(scale: float = 1.0) -> list[Run]:
    """All that are compared; `scale` makes them longer or shorter."""
    requests = int(8000 * scale)
    found: list[Run] = []
    for quantum in (None, *QUANTA):
        gpu = partial(Run, engine="gpu", quantum=quantum)
        cpu = partial(Run, engine="cpu", quantum=quantum)
        for adapters in (1, 16, 100, 1000, 10000):
            found.append(
                gpu(
                    "synthetic",
                    slots=32,
                    seats=48,
                    places=128,
                    adapters=adapters,
                    requests=requests,
                    rate=6.0,
                    alpha=0.3,
                )
            )
        found.append(
            gpu(
                "few slots",
                slots=8,
                seats=48,
                places=64,
                adapters=100,
                requests=requests,
                rate=2.0,
                alpha=0.3,
            )
        )
        found.append(
            gpu(
                "flood",
                slots=2,
                seats=32,
                places=8,
                adapters=2,
                clients=24,
                seconds=900 * scale,
                victim=0.2,
            )
        )
        found.append(
            cpu(
                "flood",
                slots=2,
                seats=8,
                places=8,
                adapters=2,
                clients=6,
                seconds=1800 * scale,
                victim=0.05,
            )
        )
        found.append(
            gpu(
                "shares", slots=4, seats=32, places=16, adapters=12, clients=8, seconds=1800 * scale
            )
        )
        found.append(
            cpu("shares", slots=2, seats=8, places=8, adapters=6, clients=4, seconds=3600 * scale)
        )
    for eviction in EVICTION:
        for alpha in (0.1, 0.3):
            for places in (64, 256):
                found.append(
                    Run(
                        "eviction",
                        "gpu",
                        32,
                        48,
                        places,
                        1000,
                        eviction=eviction,
                        requests=2 * requests,
                        rate=5.0,
                        alpha=alpha,
                        mixed=True,
                    )
                )
    return found


def table(done: list[tuple[Run, Figures]]) -> Table:
    """All runs, one a line."""
    shown = Table(title="Times in seconds; gap in units of service")
    for column in (
        *("load", "engine", "adapters", "slots/places", "policy", "tokens/s", "TTFT p50", "p99"),
        *("worst", "hits", "swaps", "loads", "loading", "Jain", "gap"),
    ):
        shown.add_column(
            column, justify="left" if column in ("load", "policy") else "right", no_wrap=True
        )
    before = None
    for run, got in done:
        if before not in (None, (run.load, run.engine, run.adapters)):
            shown.add_section()
        before = (run.load, run.engine, run.adapters)
        policy = f"{run.eviction}, α {run.alpha:g}" if run.load == "eviction" else run.policy
        shown.add_row(
            *(run.load, run.engine, str(run.adapters), f"{run.slots}/{run.places}", policy),
            *(f"{got.tokens_s:.0f}", f"{got.ttft_p50:.2f}", f"{got.ttft_p99:.2f}"),
            *(f"{got.worst:.2f}", f"{got.hit_rate:.3f}", str(got.swaps), str(got.loads)),
            f"{got.load_s:.0f}",
            "" if got.jain is None else f"{got.jain:.4f}",
            "" if got.gap is None else f"{got.gap:.0f}",
        )
    return shown


def _order(run: Run) -> tuple[object, ...]:
    quantum = -1.0 if run.quantum is None else run.quantum
    return run.load, run.engine, run.adapters, run.places, run.alpha, quantum, run.eviction


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    scale: Annotated[float, typer.Option(min=0.01, help="Length of the runs.")] = 1.0,
) -> None:
    """Simulate every policy under every load; write figures and plots."""
    console = Console()
    planned = runs(scale)
    began = time.perf_counter()
    done: list[tuple[Run, Figures]] = []
    with Progress(console=Console(stderr=True)) as progress, ProcessPoolExecutor() as pool:
        task = progress.add_task("runs", total=len(planned))
        futures = {pool.submit(simulate, run): run for run in planned}
        for future in as_completed(futures):
            done.append((futures[future], future.result()))
            progress.advance(task)
    done.sort(key=lambda pair: _order(pair[0]))
    Console(width=max(console.width, 190)).print(table(done))
    served, spent = sum(got.requests for _, got in done), sum(got.cpu_s for _, got in done)
    seconds = time.perf_counter() - began
    console.print(
        f"{served} requests in {seconds:.0f} s on {os.cpu_count()} cores: "
        f"{served / spent:.0f} a second of one core"
    )
    out.mkdir(parents=True, exist_ok=True)
    lines = [{"run": asdict(run), "figures": asdict(got)} for run, got in done]
    (out / "figures.json").write_text(json.dumps(lines, indent=1) + "\n")
    simulator_plots.draw(lines, out)


if __name__ == "__main__":
    typer.run(main)
