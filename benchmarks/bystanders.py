"""What taking adapters in costs those who stream meanwhile.

`deploy/with-server.sh .venv/bin/python -m benchmarks.bystanders` starts a server and runs it: four
streams on the base decode, once undisturbed and once with an upload a second (all its checks, the
form for the engine, the load and the proof), in turn. Printed are the times between tokens,
medians of the rounds.
"""

import asyncio
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from benchmarks import adapters, load
from benchmarks.metrics import Reply
from benchmarks.workload import Request
from server.config import Settings
from server.engine import base_model

STREAMS, TOKENS, PROMPT = 4, 400, 16
EVERY_S = 1.0
RANKS = (8, 64)
WEIGHTS = "adapter_model.safetensors"


def main(
    url: Annotated[str, typer.Option(help="A running server.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
) -> None:
    """Print the times between tokens, quiet and while adapters are uploaded."""
    base = base_model.fetch(Settings.read([]), print)
    cases: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {rank: Path(scratch) / str(rank) for rank in RANKS}
        for rank, folder in folders.items():
            adapters.write(folder, base, rank, rank, "float32")
        for turn in range(rounds):
            cases.setdefault("quiet", []).append(asyncio.run(_gaps(url, None, turn)))
            for rank, folder in folders.items():
                found = asyncio.run(_gaps(url, folder, turn))
                cases.setdefault(f"an upload of rank {rank} a second", []).append(found)
    Console().print(_table(cases))


async def _gaps(url: str, folder: Path | None, turn: int) -> list[float]:
    """Milliseconds between the tokens of all streams, while `folder` is uploaded again and again
    with other numbers in it."""
    chosen = random.Random(turn)
    prompts = [tuple(chosen.choices(range(1000, 20000), k=PROMPT)) for _ in range(STREAMS)]
    requests = [
        Request(stream=stream, adapter=None, prompt=prompt, output=TOKENS)
        for stream, prompt in enumerate(prompts)
    ]
    stop = asyncio.Event()
    uploading = asyncio.create_task(_upload(url, folder, stop)) if folder else None
    replies = await load.run(url, load.OpenAI(), requests)
    stop.set()
    if uploading is not None:
        await uploading
    return [gap for reply in replies for gap in _between(reply)]


def _between(reply: Reply) -> list[float]:
    return [1000 * (b - a) for a, b in zip(reply.times, reply.times[1:], strict=False)]


async def _upload(url: str, folder: Path, stop: asyncio.Event) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while not stop.is_set():
            began = time.monotonic()
            files = await asyncio.to_thread(_other, folder)
            reply = await client.post("/v1/adapters", data={"name": "passing"}, files=files)
            reply.raise_for_status()
            await asyncio.sleep(max(0.0, began + EVERY_S - time.monotonic()))
        await client.delete("/v1/adapters/passing")


def _other(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of an adapter with one number changed, so that it is another."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(folder, Path(scratch) / "copy")
        tensors = load_file(copy / WEIGHTS)
        next(iter(tensors.values()))[0, 0] = random.random()
        save_file(tensors, copy / WEIGHTS)
        names = ("adapter_config.json", WEIGHTS)
        return [("files", (name, (copy / name).read_bytes())) for name in names]


def _table(cases: dict[str, list[list[float]]]) -> Table:
    table = Table(title=f"{STREAMS} streams on the base, ms between tokens")
    for head in ("", "p50", "p99", "longest", "p50 / quiet", "p99 / quiet"):
        table.add_column(head, justify="left" if not head else "right")
    quiet = _figures(cases["quiet"])
    for name, rounds in cases.items():
        p50, p99, most = _figures(rounds)
        ratios = (f"{p50 / quiet[0]:.2f}", f"{p99 / quiet[1]:.2f}")
        table.add_row(name, *(f"{each:.0f}" for each in (p50, p99, most)), *ratios)
    return table


def _figures(rounds: list[list[float]]) -> tuple[float, float, float]:
    each = [(*np.percentile(gaps, (50, 99)), max(gaps)) for gaps in rounds]
    p50, p99, most = (median(column) for column in zip(*each, strict=True))
    return float(p50), float(p99), float(most)


if __name__ == "__main__":
    typer.run(main)
