"""What r, α, dropout and the adapted layers do: `python -m benchmarks.choosing --base DIR`.

Trains the demo tasks' adapters over and over on a small recipe, one choice apart each time: first
all of them, with the loss on held-out items, then what each solves of these. What is done is in
`choosing.json` and is not done again; the table and the plot are made from that file alone
(`--report` makes only those).

Held-out loss tells finer than solved items: it moves with every token of every answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine

if TYPE_CHECKING:
    import torch

    from adapters.demo.task import Task
    from adapters.demo.train import Recipe

ROOT = Path(__file__).parent.parent
FIGURES = "choosing.json"
BASE = "base"
QUERY_VALUE = ("q_proj", "v_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED, HELD_OUT = 80, 32
HELD_OUT_SEED = 0
# Each choice as often: other items, another order, other first weights. What differs among them is
# chance.
DRAWS = 2
ROW_TOKENS = 240  # a step is one row: with few items, many small steps learn more than few large

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One choice; its name is what tells it from the guide's."""

    name: str
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = SEVEN

    @property
    def by_rank(self) -> bool:
        """Whether it is of the guide's α and dropout, at some rank."""
        return self.name.startswith("r ")


# The most telling first: who has little time has those.
CASES = (
    Case("r 8"),
    Case("r 8, q and v", targets=QUERY_VALUE),
    Case("r 2", 2, 4),
    Case("r 64", 64, 128),
    Case("r 4", 4, 8),
    Case("r 16", 16, 32),
    Case("r 16, q and v", 16, 32, targets=QUERY_VALUE),
    Case("α = r", alpha=8),
    Case("α = 4r", alpha=32),
    Case("dropout 0", dropout=0.0),
    Case("dropout 0.1", dropout=0.1),
)


class OtherRun(Exception):
    """The file holds figures of another recipe."""


class Figures:
    """What has been measured, in a file that is written anew after each step."""

    def __init__(self, path: Path, recipe: Json) -> None:
        self._path = path
        self._data: Json = {"recipe": recipe, "machine": machine.describe(ROOT), "runs": []}
        if path.is_file():
            self._data = json.loads(path.read_text())
            if self._data["recipe"] != recipe:
                raise OtherRun(f"{path} was measured with {self._data['recipe']}, not {recipe}")

    def of(self, task: str, name: str, draw: int = 0) -> Json:
        """A draw's figures so far; none if it has not begun."""
        for run in self._data["runs"]:
            if _key(run) == (task, name, draw):
                return dict(run)
        return {}

    def keep(self, run: Json) -> None:
        """Keeps a draw's figures; whoever stops the run later loses none of them."""
        others = [each for each in self._data["runs"] if _key(each) != _key(run)]
        self._data["runs"] = [*others, run]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._data, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self._path)


def _key(run: Json) -> tuple[str, str, int]:
    return run["task"], run["name"], run["draw"]


class Bench:
    """One base on which adapters are trained and held against held-out items."""

    def __init__(self, base: Path, work: Path, recipe: Recipe, dtype: str) -> None:
        import torch

        self._base = base
        self._work = work
        self._recipe = recipe
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)

    def bare(self, task: Task) -> Json:
        """The base without an adapter."""
        from adapters.demo.train import Shape, lora_model

        # A fresh adapter has B = 0: it is the base.
        model = lora_model(self._base, 0, "cpu", Shape(r=1, dropout=0.0), self._dtype)
        loss = self._loss(model, task)
        return {"task": task.name, "name": BASE, "draw": 0, "held_out_loss": loss}

    def trained(self, task: Task, case: Case, draw: int) -> Json:
        """An adapter that is trained as the case says, and looked at; it stays in `work`."""
        from adapters.demo.train import Shape, save, train

        shape = Shape(case.r, case.alpha, case.dropout, case.targets)
        losses: list[float] = []
        wall, cpu = time.monotonic(), time.process_time()
        model = train(
            task, self._recipe, self._base, draw, "cpu", shape, self._dtype, losses.append
        )
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        last = losses[-max(1, len(losses) // 4) :]
        save(model, self._folder(task, case, draw))
        return {
            "task": task.name,
            **asdict(case),
            "draw": draw,
            "steps": len(losses),
            "seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "train_loss": sum(last) / len(last),
            "held_out_loss": self._loss(model, task),
            **self._algebra(self._folder(task, case, draw)),
        }

    def solved(self, task: Task, case: Case, draw: int) -> Json:
        """How many held-out items an adapter solves."""
        from adapters.demo import score

        folder = self._folder(task, case, draw)
        answers = score.local_answers(self._base, folder.parent, HELD_OUT, self._dtype_name)
        items = task.items("test", HELD_OUT, HELD_OUT_SEED)

        async def asked() -> list[str]:
            return await answers(folder.name, items, task.max_tokens, lambda done: None)

        replies = asyncio.run(asked())
        found = score.scored(task, folder.name, "test", HELD_OUT_SEED, items, replies, 0.0)
        return {"solved": found.solved, "items": found.items, "by_kind": found.by_kind}

    def _folder(self, task: Task, case: Case, draw: int) -> Path:
        return self._work / task.name / f"{case.name} {draw}".replace(" ", "-")

    def _loss(self, model: Any, task: Task) -> float:
        import torch
        from transformers import AutoTokenizer

        from adapters.demo.train import encoded, loss_of, rows_of

        tokenizer = AutoTokenizer.from_pretrained(self._base)
        items = task.items("test", HELD_OUT, HELD_OUT_SEED)
        rows = rows_of([encoded(tokenizer, item) for item in items], self._recipe.row_tokens)
        model.eval()
        with torch.inference_mode():
            sums: list[float] = [
                loss_of(model, [row], "cpu", self._dtype).item() * len(row.target) for row in rows
            ]
        return sum(sums) / sum(len(row.target) for row in rows)

    def _algebra(self, folder: Path) -> Json:
        from adapters import peft
        from adapters.algebra import algebra
        from adapters.base import BaseSpec
        from adapters.spectrum import spectra

        spec = peft.read(folder)
        found = algebra(spec, BaseSpec.read(self._base, "base"), spectra(folder, spec))
        return {
            "parameters": found.parameters,
            "bytes": found.bytes,
            "norm": found.norm,
            "rank_99": found.rank_99,
        }


def table(data: Json, task: str) -> str:
    """The figures of one task as Markdown: by rank, then what else was chosen; losses by draw."""
    lines = [
        "| | r | α | dropout | layers | parameters | MB | held-out loss | train loss "
        "| solved | rank for 99 % | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for base in _runs(data, task, BASE):
        lines.append(f"| no adapter | | | | | | | {base['held_out_loss']:.3f} | | | | |")
    for case in sorted(CASES, key=_place):
        if runs := _runs(data, task, case.name):
            first = runs[0]
            scored = [run for run in runs if "solved" in run]
            solved = f"{sum(r['solved'] for r in scored)} of {sum(r['items'] for r in scored)}"
            lines.append(
                f"| {case.name} | {first['r']} | {first['alpha']} | {first['dropout']:g} "
                f"| {'q, v' if len(first['targets']) == 2 else 'all seven'} "
                f"| {first['parameters']:,} | {first['bytes'] / 1e6:.1f} "
                f"| {_each(runs, 'held_out_loss')} | {_each(runs, 'train_loss')} "
                f"| {solved if scored else 'not run'} "
                f"| {_mean(runs, 'rank_99'):.0f} | {min(r['cpu_seconds'] for r in runs):.0f} |"
            )
    return "\n".join(lines) + "\n"


def _place(case: Case) -> tuple[bool, bool, int]:
    return not case.by_rank, case.targets != SEVEN, case.r if case.by_rank else 0


def _runs(data: Json, task: str, name: str) -> list[Json]:
    """A case's draws."""
    return sorted(
        (run for run in data["runs"] if (run["task"], run["name"]) == (task, name)),
        key=lambda run: int(run["draw"]),
    )


def _mean(runs: Sequence[Json], key: str) -> float:
    return float(statistics.fmean(run[key] for run in runs))


def _each(runs: Sequence[Json], key: str) -> str:
    return ", ".join(f"{run[key]:.3f}" for run in runs)


def plot(data: Json, path: Path) -> None:
    """Held-out loss of each task, and bytes, by rank, for all seven layers and for q and v."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
    tasks = list(dict.fromkeys(run["task"] for run in data["runs"]))
    figure, (*losses, sizes) = pyplot.subplots(1, len(tasks) + 1, figsize=(3 * len(tasks) + 3, 3))
    for task, panel in zip(tasks, losses, strict=True):
        panel.set_title(f"{task}: held-out loss, nats a token")
        for layers, drawn in _by_rank(data, task):
            ranks = list(drawn)
            means = [_mean(runs, "held_out_loss") for runs in drawn.values()]
            (line,) = panel.plot(ranks, means, "o-", label=layers)
            for r, runs in drawn.items():
                each = [run["held_out_loss"] for run in runs]
                panel.plot([r] * len(each), each, ".", color=line.get_color(), alpha=0.5)
    for layers, drawn in _by_rank(data, tasks[0]):
        megabytes = [runs[0]["bytes"] / 1e6 for runs in drawn.values()]
        sizes.plot(list(drawn), megabytes, "o-", label=layers)
    sizes.set_title("MB")
    for panel in (*losses, sizes):
        panel.set_xlabel("r (α = 2r)")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_rank(data: Json, task: str) -> Iterator[tuple[str, dict[int, list[Json]]]]:
    """The runs of a task by rank, for all seven layers and then for q and v."""
    for layers, targets in (("all seven", SEVEN), ("q, v", QUERY_VALUE)):
        cases = [case for case in CASES if case.targets == targets and case.by_rank]
        cases.sort(key=lambda case: case.r)
        yield layers, {case.r: runs for case in cases if (runs := _runs(data, task, case.name))}


def report(out: Path) -> None:
    """Writes table.md and ranks.png beside the figures."""
    data = json.loads((out / FIGURES).read_text())
    tasks = dict.fromkeys(run["task"] for run in data["runs"])
    parts = [f"## {task}\n\n{table(data, task)}" for task in tasks]
    (out / "table.md").write_text("\n".join(parts))
    plot(data, out / "ranks.png")


def measure(tasks: Sequence[str], base: Path, work: Path, out: Path, dtype: str) -> None:
    """Does what is not done yet. Raises OtherRun."""
    from adapters.demo import TASKS
    from adapters.demo.train import Recipe

    recipe = Recipe(items=TRAINED, row_tokens=ROW_TOKENS, batch_tokens=ROW_TOKENS)
    stated = asdict(recipe) | {"held_out": HELD_OUT, "dtype": dtype}
    figures = Figures(out / FIGURES, stated)
    bench = Bench(base, work, recipe, dtype)
    for task in (TASKS[name] for name in tasks):
        if not figures.of(task.name, BASE):
            figures.keep(bench.bare(task))
        for draw, case in itertools.product(range(DRAWS), CASES):
            if not figures.of(task.name, case.name, draw):
                figures.keep(bench.trained(task, case, draw))
                print(figures.of(task.name, case.name, draw), flush=True)
    for task in (TASKS[name] for name in tasks):
        for draw, case in itertools.product(range(DRAWS), CASES):
            run = figures.of(task.name, case.name, draw)
            if "solved" not in run:
                figures.keep(run | bench.solved(task, case, draw))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__)
    parser.add_argument("--base", type=Path, help="the base model as a folder")
    parser.add_argument("--tasks", default="sql,code,poetry", help="with commas between")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/choosing")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache/choosing", help="where the adapters are kept"
    )
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    args = parser.parse_args(argv)
    if not args.report:
        if args.base is None or not (args.base / "config.json").is_file():
            parser.error(f"--base {args.base}: no config.json there, so no model")
        # Where the CPU has no products of bfloat16, they take several times as long.
        flags = machine.describe(ROOT)["flags"]
        dtype = "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"
        try:
            measure(args.tasks.split(","), args.base, args.work, args.out, dtype)
        except OtherRun as error:
            print(f"error: {error}; choose another --out", file=sys.stderr)
            return 1
    report(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
