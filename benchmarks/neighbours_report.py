"""Raw data of `benchmarks.neighbours` → table.md, summary.json and plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot

from benchmarks import metrics, neighbours_figures
from benchmarks import neighbours_loads as loads
from benchmarks.metrics import Spread
from benchmarks.neighbours_figures import Figures
from benchmarks.neighbours_loads import Part, Parts
from benchmarks.workload import adapter_names

LORAPLEX, STOCK = "loraplex", "stock"
COLOURS = {LORAPLEX: "tab:blue", STOCK: "tab:orange"}
DPI = 110

Raw = Mapping[str, Mapping[str, Any]]
Turns = dict[str, dict[str, list[Parts]]]  # case → target → one a round
Measured = dict[str, dict[str, list[Figures]]]


@dataclass(frozen=True)
class Row:
    """A figure of the table. A bar is on Loraplex' figure, or on its ratio to stock's.

    `worst`: the bar has to be cleared in every round, not in the median.
    """

    case: str  # of the table
    said: str
    of: str  # the case that was measured
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    ratio: bool = False
    worst: bool = False
    target: str = LORAPLEX

    @property
    def bar(self) -> str:
        """The bar in words."""
        if self.at_least is None and self.at_most is None:
            return ""
        bar = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return bar + (" × stock" if self.ratio else "") + (", every round" if self.worst else "")


def _bound(of: str, drain: str) -> str:
    return f"p99 TTFT of {of} / (1.5 × p99 alone + {drain})"


def _victims(case: str, of: str, said: str) -> tuple[Row, ...]:
    return (
        Row(case, _bound(said, "drain"), of, "of_bound", at_most=1),
        Row(case, _bound(said, "drain without prefill"), of, "of_pace_bound", at_most=1),
        Row(case, f"p99 TTFT of {said}, s", of, "p99_s"),
        Row(case, "the same alone, s", of, "alone_p99_s"),
        Row(case, "a slot's drain, s", of, "drain_s"),
        Row(case, "a slot's drain without prefill, s", of, "pace_drain_s"),
    )


def _shares(said: str) -> tuple[Row, ...]:
    case, target = f"shares {said}", f"{LORAPLEX} {said}"
    return (
        Row(
            *(case, "greatest gap of weighted service over its bound", "shares"),
            *(f"of_bound_{said}", None, 1),
            worst=True,
            target=target,
        ),
        Row(case, "greatest gap of weighted service", "shares", f"gap_{said}", target=target),
        Row(case, "Jain's index", "shares", f"jain_{said}", at_least=0.98, target=target),
        Row(case, "service a second", "shares", "service_s", ratio=True, target=target),
        _failed(case, "shares", target),
    )


def _thousand(alpha: float) -> tuple[Row, ...]:
    case, key = f"thousand, α {alpha:g}", f"alpha {alpha:g}"
    waits = [
        Row(case, f"TTFT {said} p{p}, s", "thousand", f"{key} {said}_p{p}_s")
        for said in ("cold", "warm")
        for p in (50, 99)
    ]
    return (
        Row(case, "output, tokens/s", "thousand", f"{key} tokens_s", ratio=True),
        *waits,
        Row(case, "hit rate", "thousand", f"{key} hits"),
    )


def _failed(case: str, of: str, target: str = LORAPLEX) -> Row:
    return Row(case, "failed requests", of, "failed", at_most=0, worst=True, target=target)


ROWS: tuple[Row, ...] = (
    Row("flood", "TTFT of one request for a third adapter, s", "flood", "third_s", at_most=3),
    Row("flood", "flood, tokens/s", "flood", "tokens_s", at_least=0.97, ratio=True),
    _failed("flood", "flood"),
    *_victims("flood, base victim", "flood", "base"),
    *_victims("flood, 6 victims", "six", "six adapters"),
    Row("flood, 6 victims", "flood, tokens/s", "six", "tokens_s", ratio=True),
    _failed("flood, 6 victims", "six"),
    *_shares("1:1"),
    *_shares("1:3"),
    Row("bystanders", "p99 ITL over quiet p99", "bystanders", "of_quiet", at_most=1.25),
    Row("bystanders", "longest gap over quiet median", "bystanders", "of_median", at_most=3),
    Row("bystanders", "p99 ITL, ms", "bystanders", "p99_ms"),
    Row("bystanders", "p99 ITL quiet, ms", "bystanders", "quiet_p99_ms"),
    Row("bystanders", "longest gap, ms", "bystanders", "longest_ms"),
    Row("bystanders", "longest gap quiet, ms", "bystanders", "quiet_longest_ms"),
    Row("bystanders", "TTFT of what loads, p50, s", "bystanders", "load_p50_s"),
    Row("bystanders", "loads", "bystanders", "loads"),
    Row("bystanders", "of them cold, by the server's word", "bystanders", "loaded"),
    _failed("bystanders", "bystanders"),
    Row("fifty", "tokens/s over those on one adapter", "fifty", "of_one", at_least=0.9),
    Row("fifty", "output, tokens/s", "fifty", "tokens_s", ratio=True),
    Row("fifty", "output on one adapter, tokens/s", "fifty", "one_tokens_s", ratio=True),
    Row("fifty", "TTFT p50, s", "fifty", "p50_s"),
    Row("fifty", "TTFT p99, s", "fifty", "p99_s"),
    _failed("fifty", "fifty"),
    *(row for alpha in loads.ALPHAS for row in _thousand(alpha)),
    _failed("thousand", "thousand"),
    Row("overhead", "1 stream, tokens/s", "overhead", "one_tokens_s", at_least=0.97, ratio=True),
    Row("overhead", "1 stream, TTFT p50, ms", "overhead", "one_p50_ms", at_most=1.05, ratio=True),
    Row("overhead", "32 streams, tokens/s", "overhead", "many_tokens_s", at_least=0.97, ratio=True),
    Row(
        *("overhead", "32 streams, TTFT p50, ms", "overhead", "many_p50_ms"),
        at_most=1.05,
        ratio=True,
    ),
    _failed("overhead", "overhead"),
)


@dataclass(frozen=True)
class Outcome:
    """A row with what was measured; None where it was not."""

    row: Row
    mine: Spread | None
    stock: Spread | None
    ratio: Spread | None

    @property
    def held_to(self) -> Spread | None:
        """What the bar is on."""
        return self.ratio if self.row.ratio else self.mine

    @property
    def holds(self) -> bool | None:
        """Whether the bar is cleared; None without a bar or a measurement."""
        row, spread = self.row, self.held_to
        if spread is None or not row.bar:
            return None
        if row.at_least is not None:
            return (spread.low if row.worst else spread.median) >= row.at_least
        return (spread.high if row.worst else spread.median) <= (row.at_most or 0)


def write(out: Path, raw: Raw) -> str:
    """Writes table.md, summary.json and the plots of `raw` into `out`; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    turns = unpacked(raw)
    outcomes = judged(figures(turns))
    summary = [
        asdict(outcome) | {"bar": outcome.row.bar, "holds": outcome.holds} for outcome in outcomes
    ]
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    text = table(raw, outcomes)
    (out / "table.md").write_text(text)
    _plot_bars(out / "bars.png", outcomes)
    for case, plot in (
        ("flood", _plot_flood),
        ("shares", _plot_shares),
        ("bystanders", _plot_bystanders),
        ("thousand", _plot_thousand),
    ):
        if case in turns:
            plot(out / f"{case}.png", turns[case])
    return text


def unpacked(raw: Raw) -> Turns:
    """The replies of every turn, by case and server, in the order of rounds."""
    found: Turns = {}
    for case, record in raw.items():
        for turn in sorted(record["turns"], key=lambda turn: turn["round"]):
            parts = {name: Part.unpacked(packed) for name, packed in turn["parts"].items()}
            found.setdefault(case, {}).setdefault(turn["target"], []).append(parts)
    return found


def figures(turns: Turns) -> Measured:
    """The figures of every turn."""
    return {
        case: {
            target: neighbours_figures.of(case, mine, tells_loads=target != STOCK)
            for target, mine in targets.items()
        }
        for case, targets in turns.items()
    }


def judged(measured: Measured) -> list[Outcome]:
    """Every row of a case that was measured."""
    return [_judged(row, measured[row.of]) for row in ROWS if row.of in measured]


def _judged(row: Row, targets: Mapping[str, Sequence[Figures]]) -> Outcome:
    mine, stock = targets.get(row.target, []), targets.get(STOCK, [])
    ratio = None
    if row.ratio:
        pairs = [
            (one[row.figure], other[row.figure])
            for one, other in zip(mine, stock, strict=False)
            if one.get(row.figure) is not None and other.get(row.figure)
        ]
        ratio = metrics.ratio(*zip(*pairs, strict=True)) if pairs else None
    return Outcome(row, _spread(mine, row.figure), _spread(stock, row.figure), ratio)


def _spread(rounds: Sequence[Figures], figure: str) -> Spread | None:
    values = [each[figure] for each in rounds if figure in each]
    return Spread.of(values) if values else None


# Table -------------------------------------------------------------------------------------

NOTES = f"""\
Medians over rounds, in parentheses the lowest and highest round; a ratio is of two medians, its
lowest and highest are of single rounds. `stock` is vLLM's own server with Loraplex' CPU op and
torch.compile, and the same limits; only what serves the adapters differs.

- TTFT counts from when a request was sent or due. A flood is {loads.HOT} adapters ×
  {loads.CLIENTS} closed-loop clients for {loads.FLOOD_S:g} s, with {loads.HOT} slots; with 6
  victims it ends when they are answered. Its tokens/s are those that came in that time. Victims
  are cold: the host cache is smaller than the adapters that go round. Base requests are sent one
  at a time, {len(loads.BASE_AT_S)} in a flood.
- A slot's drain is the longest that a request of the flood took from its first token to its last,
  in that round on that server; without prefill, it is the flood's longest output × its median
  ITL, as if no prompt of another request came between.
- Service W is {neighbours_figures.OF_PROMPT} × prompt tokens, at the first token, +
  {neighbours_figures.OF_OUTPUT} × output tokens. The gap is the most by which W/weight of the two
  adapters differs in any interval of the {loads.SHARES_S:g} s; both always wait, with
  {loads.BACKLOG} clients each for {loads.SEATS} seats. Its bound is 2·max(wp·L_in, wq·M) =
  {neighbours_figures.bound():,g}: L_in is the longest prompt, M is {loads.SEATS} seats × (longest
  prompt + longest output). Jain's index is of W/weight. Stock has no weights: its one run is held
  to both.
- Bystanders' gaps count since the first load was due, 1 s after they began, and quiet ones too: by
  then no gap is the prefill of another of the four. The longest is over the quiet run's median.
- Cold and warm, with {loads.THOUSAND:,} adapters, is what Loraplex says (`x-loraplex-load-ms`).
  Stock does not say: there it is inferred from an LRU of {neighbours_figures.HOST_CACHE}, followed
  in the order in which requests were sent.
"""


def table(raw: Raw, outcomes: Sequence[Outcome]) -> str:
    """Everything measured, as Markdown."""
    head = ["case", "", "Loraplex", "stock", "ratio", "bar", "cleared"]
    lines = [head, ["---"] * len(head), *(_cells(outcome) for outcome in outcomes)]
    missing = [case for case in loads.LOADS if case not in raw]
    parts = [
        "# Neighbours",
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines),
        *([f"Not measured: {', '.join(missing)}."] if missing else []),
        NOTES.strip(),
        "## Runs",
        "\n".join(_runs(raw)),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(outcome: Outcome) -> list[str]:
    row = outcome.row
    cleared = {True: "yes", False: "**no**", None: ""}[outcome.holds]
    if row.bar and outcome.held_to is None:
        cleared = "**not measured**"
    spreads = (outcome.mine, outcome.stock, outcome.ratio)
    return [row.case, row.said, *map(said, spreads), row.bar, cleared]


def said(spread: Spread | None) -> str:
    """A median, and the lowest and highest if they are others."""
    if spread is None:
        return ""
    digits = next((d for limit, d in ((100, 0), (10, 1), (0.1, 2)) if spread.median >= limit), 3)
    if spread.low == spread.median == spread.high:
        return f"{spread.median:,.{digits}f}" if spread.median % 1 else f"{spread.median:,.0f}"
    middle, low, high = (f"{v:,.{digits}f}" for v in (spread.median, spread.low, spread.high))
    return f"{middle} ({low}-{high})"


def _runs(raw: Raw) -> Iterator[str]:
    for case in loads.LOADS:
        if case not in raw:
            continue
        record = raw[case]
        on = record["machine"]
        changed = f" with {on['changed_files']} files changed" if on["changed_files"] else ""
        yield (
            f"- {case}: {record['rounds']} rounds, {on['when']}, commit {on['commit'][:12]}"
            f"{changed}; {record['dtype']} on {on['cpu']} ({', '.join(on['flags'])}), "
            f"{on['cores']} cores, {on['memory_gib']} GiB, no GPU used, "
            f"load before {on['load_before']}."
        )


# Plots -------------------------------------------------------------------------------------


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def against_bar(row: Row, value: float) -> float:
    """1 at the bar, less where it is cleared."""
    if row.at_least is not None:
        return row.at_least / value if value else float("inf")
    return value / row.at_most if row.at_most else float("inf")


def _plot_bars(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A row a bar: where the median lies to it, the band of single rounds, and where stock lies."""
    shown = [o for o in outcomes if (o.row.at_least or o.row.at_most) and o.held_to is not None]
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.42 * len(shown)))
    for at, outcome in enumerate(reversed(shown)):
        row, spread = outcome.row, outcome.held_to
        assert spread is not None
        colour = "tab:green" if outcome.holds else "tab:red"
        ends = [against_bar(row, spread.low), against_bar(row, spread.high)]
        axes.plot(ends, [at, at], color=colour, alpha=0.4, linewidth=4)
        axes.plot([against_bar(row, spread.median)], [at], "o", color=colour)
        if not row.ratio and outcome.stock is not None:
            axes.plot([against_bar(row, outcome.stock.median)], [at], "x", color="grey")
    labels = [f"{o.row.case}: {o.row.said}\n{o.row.bar}" for o in reversed(shown)]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("of the bar: cleared left of 1 (dot: median, band: rounds, cross: stock)")
    _save(figure, path)


def _plot_flood(path: Path, targets: Mapping[str, Sequence[Parts]]) -> None:
    """The last round: the flood's tokens a second, and how long each victim waited."""
    figure, panels = pyplot.subplots(len(targets), 1, figsize=(9, 2.6 * len(targets)), sharex=True)
    for panel, (target, turns) in zip(np.atleast_1d(panels), targets.items(), strict=True):
        parts = turns[-1]
        begin = parts["flood"].begin_s
        for name in sorted({str(reply.adapter) for reply in parts["flood"].replies}):
            times = [
                time - begin
                for reply in parts["flood"].replies
                if reply.adapter == name
                for time in reply.times
            ]
            counts, edges = np.histogram(times, bins=np.arange(0, max(times, default=0) + 2))
            panel.step(edges[:-1], counts, where="post", label=f"flood, {name}", linewidth=0.8)
        for part, colour, level in (("base", "tab:green", -4), ("third", "tab:red", -10)):
            for number, reply in enumerate(parts[part].good):
                ends = [reply.due_s - begin, reply.times[0] - begin]
                label = f"{part} waits" if number == 0 else None
                panel.plot(ends, [level, level], color=colour, linewidth=4, label=label)
        panel.set_title(target, fontsize=9)
        panel.set_ylabel("tokens/s")
        panel.legend(fontsize=7, loc="upper right")
    np.atleast_1d(panels)[-1].set_xlabel("s since the flood began")
    _save(figure, path)


def _plot_shares(path: Path, targets: Mapping[str, Sequence[Parts]]) -> None:
    """The difference of weighted service over time, a line a round."""
    weights = neighbours_figures.WEIGHTS
    figure, panels = pyplot.subplots(1, len(weights), figsize=(10, 3.4), squeeze=False)
    for panel, (name, (long, short)) in zip(panels.flat, weights.items(), strict=True):
        for target, colour in ((f"{LORAPLEX} {name}", "tab:blue"), (STOCK, "tab:orange")):
            for number, parts in enumerate(targets.get(target, [])):
                part = parts["all"]
                one, other = (
                    neighbours_figures.service(part, each)
                    for each in adapter_names(loads.RANK_8, 2)
                )
                line = neighbours_figures.difference(one, other, long, short)
                times = [time - part.begin_s for time, _ in line]
                label = target if number == 0 else None
                levels = [level for _, level in line]
                panel.plot(times, levels, color=colour, linewidth=0.8, alpha=0.7, label=label)
        for side in (-1, 1):
            panel.axhline(side * neighbours_figures.bound(), color="black", linestyle="--")
        panel.set_title(f"weights {name}; dashed: the bound", fontsize=9)
        panel.set_xlabel("s")
        panel.set_ylabel("W/w of long less W/w of short")
        panel.legend(fontsize=7)
    _save(figure, path)


def _plot_bystanders(path: Path, targets: Mapping[str, Sequence[Parts]]) -> None:
    """The share of gaps between tokens that are longer than a time, of all rounds."""
    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for target, turns in targets.items():
        for part, style in (("quiet", ":"), ("disturbed", "-")):
            gaps = sorted(
                gap for parts in turns for gap in neighbours_figures.bystanders_gaps(parts[part])
            )
            share = 1 - np.arange(len(gaps)) / max(1, len(gaps))
            ms = [1e3 * gap for gap in gaps]
            colour = COLOURS[target]
            axes.plot(ms, share, style, color=colour, label=f"{target}, {part}", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ms between tokens")
    axes.set_ylabel("share that is longer")
    axes.legend(fontsize=7)
    _save(figure, path)


def _plot_thousand(path: Path, targets: Mapping[str, Sequence[Parts]]) -> None:
    """The share of requests that had their first token within a time, of all rounds."""
    figure, panels = pyplot.subplots(1, len(loads.ALPHAS), figsize=(10, 3.4), squeeze=False)
    for panel, alpha in zip(panels.flat, loads.ALPHAS, strict=True):
        for target, turns in targets.items():
            waits = neighbours_figures.thousand_waits(turns, tells_loads=target != STOCK)
            for said_, style in (("cold", "-"), ("warm", ":")):
                values = sorted(waits.get(f"alpha {alpha:g}, {said_}", []))
                if values:
                    share = (np.arange(len(values)) + 1) / len(values)
                    label = f"{target}, {said_}: p50 {median(values):.2f} s"
                    panel.plot(values, share, style, color=COLOURS[target], label=label)
        panel.set_title(f"{loads.THOUSAND:,} adapters, α {alpha:g}", fontsize=9)
        panel.set_xscale("log")
        panel.set_xlabel("time to first token, s")
        panel.set_ylabel("share of requests")
        panel.legend(fontsize=7)
    _save(figure, path)
