"""`loraplex top`: what runs on a server, as it goes."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from server.commands.remote import LOCAL, Json, Unreachable, Url, server
from server.commands.terminal import (
    WIDE,
    AsJson,
    interactive,
    number,
    out,
    show,
    show_json,
    table,
)

EVERY_S = 1.0
ANSWER_S = 5.0  # that a server has to answer in
EVENTS = 5  # shown at most
BARS = "▁▂▃▄▅▆▇█"
HISTORY = 30  # intervals shown
NAME = 16  # characters of an adapter's name, at least


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table, and leave.")] = False,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Watch adapters by traffic: queues, first tokens, rates, what is loaded. q leaves.

    Figures are of the last minute. Without a terminal, or with --json, it looks once.
    """
    live = _look(url)
    if as_json:
        show_json(live)
    elif once or not interactive():
        show(_screen(live))
    else:
        _watch(url, live)


def _look(url: str) -> Json:
    with server(url, timeout_s=ANSWER_S) as client:
        live: Json = client.get("/v1/live").json()
    return live


def _watch(url: str, live: Json) -> None:
    """Looks each second until q is pressed. A server that is away meanwhile is waited for."""
    with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as screen:
        trouble = ""
        while True:
            shown = _screen(live, out.height)
            screen.update(Group(f"[red]{escape(trouble)}[/red]", shown) if trouble else shown)
            screen.refresh()
            if pressed(EVERY_S) in ("q", "Q"):
                return
            try:
                live, trouble = _look(url), ""
            except Unreachable as error:
                trouble = (
                    f"{error} (as of {time.strftime('%H:%M:%S', time.localtime(live['now']))})"
                )


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed, not shown and without Enter; the terminal is then as it was."""
    before = termios.tcgetattr(sys.stdin)

    def pressed(within_s: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], within_s)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""

    tty.setcbreak(sys.stdin)
    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _screen(live: Json, height: int | None = None) -> RenderableType:
    """All of it, in `height` lines if given."""
    events = live["events"][-EVENTS:][::-1]
    room = None if height is None else max(1, height - len(events) - 6)
    adapters = live["adapters"][:room]
    hidden = len(live["adapters"]) - len(adapters)
    parts: list[RenderableType] = [_head(live), "", _adapters(live, adapters)]
    if hidden:
        parts.append(f"[dim]and {hidden} more[/dim]")
    if events:
        parts += ["", *(_event(each) for each in events)]
    return Group(*parts)


def _head(live: Json) -> RenderableType:
    resident = live["resident"]
    slots = sum(each["residency"] == "slot" for each in resident)
    loading = sum(each["residency"] == "loading" for each in resident)
    loaded = len(resident) - loading
    up = _duration(live["now"] - live["started"])
    state = "[green]ready[/green]" if live["ready"] else "[red]not ready[/red]"
    restarts = live["restarts"]
    said = [f"[bold]{escape(live['base'])}[/bold]", state, f"up {up}"]
    said += [f"[yellow]{restarts} restart{'s' * (restarts > 1)} of the engine[/yellow]"] * bool(
        restarts
    )
    said.append(f"slots {slots}/{live['slots']}")
    said.append(f"host cache {loaded}/{live['places']}")
    said += [f"{loading} loading"] * bool(loading)
    return " · ".join(said)


def _adapters(live: Json, adapters: list[Json]) -> Table:
    history = f"tokens, {live['interval_s']:g} s each"
    # With each, from how many characters on it is shown: what can be missed goes before a name or a
    # figure is cut.
    columns: dict[str, tuple[int, Callable[[Json], str]]] = {
        "adapter": (0, lambda each: escape(each["adapter"])),
        "loaded": (0, lambda each: each["residency"] or "–"),
        "waits": (0, lambda each: str(each["waiting"] or "–")),
        "runs": (0, lambda each: str(each["running"] or "–")),
        "requests": (76, lambda each: f"{each['requests']:,}"),
        "errors": (84, lambda each: f"[red]{each['errors']:,}[/red]" if each["errors"] else "–"),
        "tokens/s": (0, lambda each: number(each["tokens_per_s"], 1)),
        "first token\np50/p99 s": (66, lambda each: _percentiles(each["first_token_s"], 1, 2)),
        "gap\np50/p99 ms": (92, lambda each: _percentiles(each["token_gap_s"], 1000, 0)),
        history: (116, lambda each: _history(live, each["adapter"])),
    }
    room = out.width if out.is_terminal else WIDE
    shown = {title: cell for title, (least, cell) in columns.items() if room >= least}
    rows = table(*shown, right=shown.keys() - {"adapter", "loaded", history})
    rows.columns[0].min_width, rows.columns[0].overflow = NAME, "ellipsis"
    for column in rows.columns[1:]:
        column.no_wrap = True
    for each in adapters:
        rows.add_row(*(cell(each) for cell in shown.values()))
    if not adapters:
        rows.add_row("[dim]nobody asked lately[/dim]")
    return rows


def _percentiles(found: Json, times: float, digits: int) -> str:
    both = (found["p50"], found["p99"])
    if None in both:
        return "–"
    return "/".join(number(value * times, digits) for value in both)


def _history(live: Json, adapter: str) -> str:
    """A bar for each interval, against the busiest one of any adapter."""
    steps = live["history"][-HISTORY:]
    tokens = [step["adapters"].get(adapter, {}).get("tokens", 0) for step in steps]
    most = max((each["tokens"] for step in steps for each in step["adapters"].values()), default=0)
    return "".join(BARS[-(-count * len(BARS) // most) - 1] if count else " " for count in tokens)


def _event(event: Json) -> RenderableType:
    style = "red" if event["event"] == "load_failed" else "dim"
    when = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    took = f" in {event['seconds']:.2f} s" if event.get("seconds") else ""
    what = event["event"].replace("_", " ")
    return Text(f"{when}  {what}{took}  {', '.join(event['references'])}", style)


def _duration(seconds: float) -> str:
    """The largest two units of it."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
