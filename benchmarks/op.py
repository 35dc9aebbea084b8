"""What the CPU LoRA op costs by itself: `python -m benchmarks.op`.

One step of SmolLM2-135M's 120 linear layers with nothing in between, so that weights come from the
caches where they fit; beside it the op's form in torch and, where one adapter has all rows, the CPU
library's own bf16 GEMM. The last column is the time that reading the adapters once would take at
the bandwidth measured here: what no op can beat when weights come from memory, as in a server.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

LAYERS = 30
LINEARS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))  # in, out
BYTES = 2  # bf16
ROUNDS = 9
PROBE = 2**28  # bytes read to measure bandwidth: more than any cache here


class Case(NamedTuple):
    """Rows in the step, how many adapters they take turns with (0: none), and their rank."""

    rows: int
    adapters: int
    rank: int


CASES = [Case(8, 0, 8), Case(1, 1, 8), Case(8, 1, 8), Case(8, 4, 8), Case(8, 8, 8), Case(1, 1, 64)]
CASES += [Case(8, 1, 64), Case(128, 1, 8), Case(1500, 1, 8), Case(128, 1, 64), Case(1500, 1, 64)]


def main() -> None:
    """Print the table."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))  # as vLLM binds its threads
    os.environ.setdefault("GOMP_CPU_AFFINITY", " ".join(map(str, cores)))
    from server.engine.cpu import op

    installed, reference = op.install(), op.Reference()
    speed = bandwidth()
    title = f"the op ({op.form()}), {len(cores)} threads, memory read at {speed / 1e9:.0f} GB/s"
    table = Table(
        "rows", "adapters", "rank", "op, ms a step", "in torch", "GEMM", "memory", title=title
    )
    for case in CASES:
        times: list[float | None] = [step(form, case) for form in (installed, reference)]
        times.append(gemm(case) if case.adapters == 1 else None)
        times.append(1000 * case.adapters * weights(case.rank) * BYTES / speed)
        shown = ["" if each is None else f"{each:.2f}" for each in times]
        table.add_row(*map(str, case), *shown)
    Console().print(table)


def weights(rank: int) -> int:
    """Numbers in A and B of one adapter."""
    return LAYERS * rank * sum(d_in * len(outs) + sum(outs) for d_in, outs in LINEARS)


def bandwidth() -> float:
    """Bytes a second at which all threads together read memory."""
    import torch

    block = torch.ones(PROBE // 8, dtype=torch.int64)
    return PROBE / (median(block.sum) / 1000)


def step(form: Any, case: Case) -> float:
    """Milliseconds of one step by a form of the op."""
    import torch

    from server.engine.cpu.punica import group_rows

    batch = form.new_batch()
    numbers = [
        (form.new_layer(max(case.adapters, 1), batch), linear)
        for _ in range(LAYERS)
        for linear in LINEARS
    ]
    for number, (d_in, outs) in numbers:
        starts = [sum(outs[:i]) for i in range(len(outs))]
        for slot in range(case.adapters):
            a = [random(case.rank, d_in) for _ in outs]
            b = [random(case.rank, out) for out in outs]
            form.set_slot(number, slot, form.pack(a, b, starts))
    slots = [row % case.adapters if case.adapters else -1 for row in range(case.rows)]
    form.set_rows(batch, *group_rows(torch.tensor(slots)))
    x, y = buffers(case.rows)
    return median(
        lambda: [form.add_lora(y[sum(outs)], x[d_in], number) for number, (d_in, outs) in numbers]
    )


def gemm(case: Case) -> float:
    """Milliseconds of the same for one adapter by torch's bf16 matrix products."""
    import torch

    x, y = buffers(case.rows)
    layers = [
        (d_in, outs, random(case.rank * len(outs), d_in).T, [random(case.rank, o) for o in outs])
        for _ in range(LAYERS)
        for d_in, outs in LINEARS
    ]

    def run() -> None:
        for d_in, outs, a, b in layers:
            columns = y[sum(outs)].split(list(outs), 1)
            slices = torch.mm(x[d_in], a).split(case.rank, 1)
            for out, h, weight in zip(columns, slices, b, strict=True):
                out.addmm_(h, weight)

    return median(run)


def random(*shape: int) -> "torch.Tensor":
    """bf16, small enough that sums of many steps stay finite."""
    import torch

    return (torch.randn(shape) / 100).bfloat16()


def buffers(rows: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Inputs and outputs by their width."""
    import torch

    x = {d_in: random(rows, d_in) for d_in, _ in LINEARS}
    return x, {sum(outs): torch.zeros(rows, sum(outs)).bfloat16() for _, outs in LINEARS}


def median(run: Callable[[], object]) -> float:
    """Milliseconds, of ROUNDS runs after a first that does not count."""
    run()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
