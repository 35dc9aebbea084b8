"""Adapters as people read them: tables, panels, and what was found when they were checked."""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from server.commands.remote import Json
from server.commands.terminal import bytes_text, printable, problem_lines, table


def newest(adapter: Json) -> Json | None:
    """The version that the bare name means."""
    latest = adapter["aliases"].get("latest")
    return next((each for each in adapter["versions"] if each["version"] == latest), None)


def _aliases(adapter: Json) -> str:
    """All but `latest`, which moves by itself."""
    own = {name: to for name, to in adapter["aliases"].items() if name != "latest"}
    return ", ".join(f"{name} → {to}" for name, to in own.items())


def place(version: Json) -> str:
    """Where a version is: on disk, in the host cache, or in a slot."""
    if version["state"] != "ready":
        return str(version["state"])
    return str(version["residency"]) + ", pinned" * bool(version["pinned"])


def listing(adapters: Iterable[Json]) -> Table:
    """A row an adapter."""
    rows = table("name", "newest", "aliases", "rank", "size", "loaded", right=("rank", "size"))
    for adapter in adapters:
        version = newest(adapter)
        if version is None:
            rows.add_row(adapter["name"], "[dim]none can be served[/dim]")
            continue
        rows.add_row(
            adapter["name"],
            f"@{version['version']}",
            _aliases(adapter),
            str(version["rank"]),
            bytes_text(version["bytes"]),
            place(version),
        )
    return rows


def of_check(seen: Json) -> Iterator[RenderableType]:
    """What was found in files that are not stored."""
    if "rank" in seen:
        yield _panel("adapter", _pairs(_said(seen)))
    if seen["algebra"]:
        yield _panel("algebra", _pairs(_algebra(seen["algebra"])))
    problems = seen["checks"]["problems"]
    yield from problem_lines(problems, "red")
    yield from remarks(seen["checks"])
    if seen["ok"]:
        yield "[green]It can be served.[/green]"
    else:
        many = "s" * (len(problems) > 1)
        yield f"[red]It cannot be served: {len(problems)} problem{many}.[/red]"


def of_adapter(adapter: Json) -> Iterator[RenderableType]:
    """An adapter and its versions, and all of the newest."""
    facts = {"aliases": ", ".join(f"{name} → {to}" for name, to in adapter["aliases"].items())}
    if adapter["metadata"]:
        facts["metadata"] = json.dumps(adapter["metadata"], ensure_ascii=False)
    running = [each for each in adapter["imports"] if each["state"] not in ("ready", "failed")]
    if running:
        facts["imports"] = "\n".join(f"{each['source']}: {each['state']}" for each in running)
    yield _panel(adapter["name"], _pairs(facts))
    if not adapter["versions"]:
        return
    right = ("version", "rank", "size", "running")
    rows = table("version", "state", "rank", "size", "loaded", "running", "made", right=right)
    for version in adapter["versions"]:
        rows.add_row(
            str(version["version"]),
            version["state"],
            str(version["rank"]),
            bytes_text(version["bytes"]),
            place(version),
            str(version["leases"]),
            _moment(version["created"]),
        )
    yield _panel("versions", rows)
    if (version := newest(adapter)) is not None:
        yield from of_version(version)


def of_version(version: Json) -> Iterator[RenderableType]:
    """All of one version."""
    facts = {
        "digest": version["digest"],
        "source": version["source"],
        "made": _moment(version["created"]),
        "state": version["state"] + (f": {version['reason']}" if version.get("reason") else ""),
        "loaded": f"{place(version)}, {version['leases']} running requests",
    }
    yield _panel(version["reference"], _pairs(facts | _said(version)))
    if config := version.get("config"):
        told = {key: value for key, value in config.items() if value not in (None, False, [], {})}
        shown = {key: _plain(value) for key, value in told.items()}
        yield _panel("config, but for what is off or empty", _pairs(shown))
    if version.get("algebra"):
        yield _panel("algebra", _pairs(_algebra(version["algebra"])))
    if checks := version.get("checks"):
        effect = checks.get("effect")
        moved = "asked without an engine"
        if effect:
            moved = f"logprobs move by up to {effect['difference']:.3g} nats"
            moved += f" (noise {effect['noise']:.2g})" if effect["noise"] else ""
        found = list(remarks(checks)) or ["nothing to remark"]
        yield _panel("checks", Group(f"effect: {moved}", *found))


def _said(adapter: Json) -> dict[str, str]:
    """What an adapter says of itself."""
    rslora = " (rsLoRA)" if adapter["rslora"] else ""
    targets = adapter["target_modules"]
    return {
        "rank, alpha": f"{adapter['rank']}, {adapter['alpha']:g}{rslora}",
        "on": targets if isinstance(targets, str) else ", ".join(targets),
        "trained on": adapter["base_model"] or "it does not say",
        "weights": f"{adapter['parameters']:,} in {adapter['dtype']}, "
        f"{bytes_text(adapter['bytes'])}",
    }


def _algebra(numbers: Json) -> dict[str, str]:
    """ΔW = (α/r)·B·A in numbers."""
    largest = max((layer["rank"] for layer in numbers["layers"]), default=0)
    return {
        "layers": f"{len(numbers['layers'])}",
        "parameters": f"{numbers['parameters']:,} for {numbers['delta_parameters']:,} of ΔW: "
        f"{numbers['reduction']:.2%} fewer",
        "bytes": f"{bytes_text(numbers['bytes'])}, {numbers['bytes_share']:.2%} of the base's "
        f"{bytes_text(numbers['base_bytes'])}",
        "rank_99": f"{numbers['rank_99']} of {largest} directions keep 99 % of ΔW's energy",
        "norm": f"‖ΔW‖ = {numbers['norm']:.4g}",
    }


def remarks(checks: Json) -> Iterator[RenderableType]:
    """What is worth knowing about an adapter that can be served."""
    yield from problem_lines(checks["warnings"], "yellow")
    yield from problem_lines(checks["advice"], "cyan")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pairs(facts: Mapping[str, str]) -> Table:
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for what, value in facts.items():
        rows.add_row(escape(printable(what)), escape(printable(value)))
    return rows


def _panel(title: str, inside: RenderableType) -> Panel:
    return Panel(inside, title=escape(title), title_align="left")


def _moment(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"
