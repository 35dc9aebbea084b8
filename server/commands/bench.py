"""`loraplex bench`: a small load on a running server, and what became of it."""

import math
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import httpx2
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from server.commands.remote import (
    BASE,
    LOCAL,
    Json,
    Refused,
    Reply,
    Unreachable,
    Url,
    complete_names,
    must_exist,
    names,
    server,
    stream,
)
from server.commands.terminal import AsJson, number, show, show_json, table
from server.logs import complain, console

# Every vocabulary has these, and their text is all there is to say about them. At random, so that
# no prompt's beginning is known from another.
TOKENS = range(1000, 10000)
ALL = "all"


@dataclass
class Asked:
    """One request: who was asked, and the reply, or why there is none."""

    adapter: str
    reply: Reply = field(default_factory=Reply)
    failure: str | None = None


def bench(
    adapters: Annotated[
        str,
        typer.Option(help="Who is asked, in turn, after commas.", autocompletion=complete_names),
    ] = BASE,
    requests: Annotated[int, typer.Option(min=1, help="In all.")] = 20,
    concurrency: Annotated[int, typer.Option(min=1, help="At once.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each, at random.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each reply, exactly.")] = 64,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Ask a running server many times, and say how fast it was. Exit code 1 if any failed."""
    who = names(adapters)
    work = [Asked(who[number % len(who)]) for number in range(requests)]
    with server(url) as client:
        for name in dict.fromkeys(who):  # said before anything is measured
            must_exist(client, name)
    began = time.perf_counter()
    _run(work, url, concurrency, prompt_tokens, output_tokens)
    took = time.perf_counter() - began
    figures = {
        name: _figures([each for each in work if each.adapter == name], took) for name in who
    }
    whole = _figures(work, took)
    if as_json:
        rows = [{"adapter": name} | row for name, row in figures.items()]
        show_json({"object": "bench", "seconds": took, ALL: whole, "adapters": rows})
    else:
        _show(figures | ({ALL: whole} if len(figures) > 1 else {}))
    if whole["failed"]:
        for reason, count in Counter(each.failure for each in work if each.failure).most_common():
            complain(f"{count} × {reason}")
        raise typer.Exit(1)


def _run(
    work: list[Asked], url: str, concurrency: int, prompt_tokens: int, output_tokens: int
) -> None:
    with (
        Progress(
            TextColumn("asking"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
        server(url) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        task = bar.add_task("", total=len(work), rate="")

        def ask(one: Asked) -> None:
            body = {
                "model": one.adapter,
                "prompt": random.choices(TOKENS, k=prompt_tokens),  # noqa: S311
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "return_token_ids": True,
            }
            try:
                for _ in stream(client, "/v1/completions", body, one.reply):
                    pass
            except (Refused, Unreachable, httpx2.TransportError) as error:
                one.failure = str(error)

        began = time.perf_counter()
        try:
            for _ in as_completed([pool.submit(ask, one) for one in work]):
                tokens = sum(one.reply.tokens for one in work)
                rate = f"{tokens / (time.perf_counter() - began):,.0f} tokens/s"
                bar.update(task, advance=1, rate=rate)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()  # which ends what runs, here and on the server
            raise


def _figures(asked: list[Asked], took_s: float) -> Json:
    """Requests that failed count as such and as nothing else."""
    replies = [each.reply for each in asked if each.failure is None]
    first = [reply.times[0] for reply in replies if reply.times]
    gaps = [b - a for reply in replies for a, b in pairwise(reply.times)]
    return {
        "requests": len(asked),
        "failed": len(asked) - len(replies),
        "tokens_per_s": sum(reply.tokens for reply in replies) / took_s,
        "first_token_s": {"p50": percentile(first, 50), "p99": percentile(first, 99)},
        "token_gap_s": {"p50": percentile(gaps, 50), "p99": percentile(gaps, 99)},
    }


def percentile(values: list[float], percent: int) -> float | None:
    """The smallest of `values` that at least `percent` of 100 do not exceed."""
    if not values:
        return None
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def _show(figures: dict[str, Json]) -> None:
    right = ["requests", "failed", "tokens/s"]
    right += ["first token\np50 s", "p99 s", "gap\np50 ms", "p99 ms"]
    rows = table("adapter", *right, right=right)
    for name, row in figures.items():
        first, gap = row["first_token_s"], row["token_gap_s"]
        rows.add_row(
            name,
            f"{row['requests']:,}",
            f"[red]{row['failed']:,}[/red]" if row["failed"] else "–",
            number(row["tokens_per_s"], 1),
            *(number(first[p], 2) for p in ("p50", "p99")),
            *(number(gap[p] and gap[p] * 1000, 1) for p in ("p50", "p99")),
            style="bold" if name == ALL else "",
        )
    show(rows)
