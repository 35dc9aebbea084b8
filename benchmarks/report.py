"""Raw data of a run → summary.json, table.md and plots."""

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks import metrics
from benchmarks.measure import RAW, WARM_UP
from benchmarks.metrics import Reply, Spread
from benchmarks.workload import Case, Ratio, Workload, WorkloadError

# Text stays text and ids stay the same: small files that diff.
pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "loraplex", "font.size": 9}

UNITS = {
    "decode_tokens_s": "decode, tokens/s",
    "output_tokens_s": "output, tokens/s",
    "prefill_tokens_s": "prefill, tokens/s",
    "requests_s": "requests/s",
    "start_s": "start, s",
    **{
        f"{part}_ms_p{p}": f"{said} p{p}, ms"
        for part, said in (("ttft", "TTFT"), ("itl", "ITL"), ("latency", "latency"))
        for p in (50, 90, 99)
    },
}
WAITS = [name for name in UNITS if "_ms_" in name and name != "itl_ms_p90"]

Key = tuple[int, str, str]  # group, case, target
Measured = dict[Key, dict[int, dict[str, float]]]  # → round → metric → value


@dataclass(frozen=True)
class Outcome:
    """A ratio of the workload with what was measured; `spread` is None where it was not run."""

    ratio: Ratio
    spread: Spread | None
    rounds: int

    @property
    def holds(self) -> bool | None:
        """Whether the bar is cleared; None without a bar or without a measurement."""
        if self.spread is None or (self.ratio.at_least is None and self.ratio.at_most is None):
            return None
        value = self.spread.median
        low, high = self.ratio.at_least, self.ratio.at_most
        return (low is None or value >= low) and (high is None or value <= high)

    @property
    def bar(self) -> str:
        low, high = self.ratio.at_least, self.ratio.at_most
        return " ".join(
            [f"≥ {low:g}" if low is not None else "", f"≤ {high:g}" if high is not None else ""]
        ).strip()


def write(folder: Path) -> str:
    """Writes summary.json, table.md and the plots of the run in `folder`; returns the table.

    Raises:
        WorkloadError: the folder has no run.
    """
    try:
        workload = Workload.model_validate_json((folder / "workload.json").read_text())
        machine = json.loads((folder / "machine.json").read_text())
        with gzip.open(folder / RAW, "rt") as raw:
            lines = [json.loads(line) for line in raw]
    except OSError as error:
        raise WorkloadError(f"{folder}: no run there: {error}") from None
    measured = figures(lines)
    outcomes = [outcome(ratio, measured) for ratio in workload.ratios]
    (folder / "summary.json").write_text(json.dumps(_summary(measured, outcomes), indent=1))
    text = table(workload, machine, measured, outcomes)
    (folder / "table.md").write_text(text)
    _plot_ratios(folder / "ratios.svg", workload, measured, outcomes)
    _plot_cases(folder / "cases.svg", workload, measured)
    _plot_waits(folder / "ttft.svg", workload, lines)
    return text


def figures(lines: Sequence[dict[str, Any]]) -> Measured:
    """The metrics of every counted round; the warm-up is left out."""
    found: Measured = defaultdict(dict)
    for line in lines:
        if line["round"] == WARM_UP:
            continue
        key = (line["group"], line["case"], line["target"])
        if "start_s" in line:
            found[key][line["round"]] = {"start_s": line["start_s"]}
        else:
            replies = [Reply(**{**r, "times": tuple(r["times"])}) for r in line["replies"]]
            found[key][line["round"]] = metrics.of(replies)
    return dict(found)


def outcome(ratio: Ratio, measured: Measured) -> Outcome:
    """The ratio of medians over the rounds that both targets did, side by side in one group."""
    for group, case, target in measured:
        other = (group, case, ratio.against)
        if (case, target) != (ratio.case, ratio.target) or other not in measured:
            continue
        mine, theirs = measured[group, case, target], measured[other]
        both = [
            r
            for r in sorted(mine.keys() & theirs.keys())
            if ratio.metric in mine[r] and ratio.metric in theirs[r]
        ]
        if both:
            values = [[of[r][ratio.metric] for r in both] for of in (mine, theirs)]
            return Outcome(ratio, metrics.ratio(*values), len(both))
    return Outcome(ratio, None, 0)


def _spread(rounds: dict[int, dict[str, float]], metric: str) -> Spread | None:
    values = [each[metric] for each in rounds.values() if metric in each]
    return Spread.of(values) if values else None


def _summary(measured: Measured, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "cases": [
            {
                **{"group": group, "case": case, "target": target, "rounds": len(rounds)},
                "metrics": {
                    metric: {k: round(v, 3) for k, v in asdict(spread).items()}
                    for metric in UNITS
                    if (spread := _spread(rounds, metric)) is not None
                },
            }
            for (group, case, target), rounds in measured.items()
        ],
        "ratios": [
            {
                **each.ratio.model_dump(exclude_none=True),
                "rounds": each.rounds,
                "spread": asdict(each.spread) if each.spread else None,
                "holds": each.holds,
            }
            for each in outcomes
        ],
    }


def shown(case: Case) -> list[str]:
    """The metrics that say something about a case."""
    load = case.load
    if load.kind == "start":
        return ["start_s"]
    if load.kind == "closed" and load.output == 1:
        return ["prefill_tokens_s", "ttft_ms_p50"]
    if load.kind == "closed":
        return ["decode_tokens_s", "output_tokens_s", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p99"]
    return ["output_tokens_s", "requests_s", *WAITS]


def table(
    workload: Workload,
    machine: dict[str, Any],
    measured: Measured,
    outcomes: Sequence[Outcome],
) -> str:
    """Everything measured, as Markdown."""
    rounds = max((len(each) for each in measured.values()), default=0)
    parts = [f"# {workload.name}", workload.about.strip(), _about_machine(machine)]
    parts.append(
        f"Medians over {rounds} rounds, in parentheses the lowest and highest round. Ratios are "
        "of two medians of this run; their lowest and highest are of single rounds."
    )
    if outcomes:
        parts += ["## Ratios", _markdown(*_ratio_rows(outcomes))]
    for case in workload.cases:
        names = shown(case)
        rows = [
            [target if len(workload.side_by_side) == 1 else f"{target} (group {group + 1})"]
            + [_said(_spread(rounds_, name)) for name in names]
            for (group, of_case, target), rounds_ in measured.items()
            if of_case == case.name
        ]
        if rows:
            parts += [f"## {case.name}", _markdown(["target", *(UNITS[n] for n in names)], rows)]
    return "\n\n".join(parts) + "\n"


def _ratio_rows(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    head = ["case", "target", "against", "of", "ratio", "rounds", "bar", "cleared"]
    holds = {True: "yes", False: "**no**", None: ""}
    rows = [
        [
            *(each.ratio.case, each.ratio.target, each.ratio.against),
            UNITS.get(each.ratio.metric, each.ratio.metric),
            _said(each.spread, 3) if each.spread else "not measured",
            *(str(each.rounds), each.bar, holds[each.holds]),
        ]
        for each in outcomes
    ]
    return head, rows


def _about_machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    changed = machine["changed_files"]
    state = f" with {changed} files changed" if changed else ""
    flags = " ".join(machine["flags"])
    return (
        f"{machine['when']}: {machine['cpu']}, {machine['cores']} cores ({flags}), "
        f"{machine['memory_gib']} GiB{', virtual' if machine['virtual_machine'] else ''}, "
        f"Linux {machine['kernel']}, load before {machine['load_before']}; "
        f"Python {machine['python']}, {packages}; commit {machine['commit'][:12]}{state}."
    )


def _said(spread: Spread | None, digits: int | None = None) -> str:
    if spread is None:
        return ""
    if digits is None:
        digits = 0 if spread.median >= 100 else 1 if spread.median >= 10 else 2
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_ratios(
    path: Path, workload: Workload, measured: Measured, outcomes: Sequence[Outcome]
) -> None:
    """A row a ratio: its lowest to highest round, its median, its bar."""
    run = [(each, each.spread) for each in outcomes if each.spread is not None]
    if not run:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(run)))
    for row, (each, spread) in enumerate(reversed(run)):
        colour = {True: "tab:green", False: "tab:red", None: "tab:blue"}[each.holds]
        axes.plot([spread.low, spread.high], [row, row], color=colour, alpha=0.4, linewidth=4)
        axes.plot([spread.median], [row], "o", color=colour)
        axes.annotate(f"{spread.median:.2f}", (spread.median, row + 0.2), fontsize=7, ha="center")
        for bar in (each.ratio.at_least, each.ratio.at_most):
            if bar is not None:
                axes.plot([bar, bar], [row - 0.35, row + 0.35], color="black", linewidth=1.5)
    labels = [f"{e.ratio.case}\n{e.ratio.target} / {e.ratio.against}" for e, _ in reversed(run)]
    axes.set_yticks(range(len(run)), labels, fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{workload.name}: ratios (dot: medians, band: single rounds, tick: bar)")
    _save(figure, path)


def _plot_cases(path: Path, workload: Workload, measured: Measured) -> None:
    """A panel a case: the first metric of its table, a bar a target, a dot a round."""
    cases = [c for c in workload.cases if any(key[1] == c.name for key in measured)]
    if not cases:
        return
    rows = -(-len(cases) // 2)
    figure, panels = pyplot.subplots(rows, 2, figsize=(10, 2.3 * rows), squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.axis("off")
    for case, panel in zip(cases, panels.flat, strict=False):
        metric = shown(case)[0]
        bars = [
            (target, [r[metric] for r in rounds.values() if metric in r])
            for (_, name, target), rounds in measured.items()
            if name == case.name
        ]
        bars = [(target, values) for target, values in bars if values]
        for at, (_, values) in enumerate(bars):
            panel.bar(at, Spread.of(values).median, color="tab:blue", alpha=0.5, width=0.6)
            panel.plot([at] * len(values), values, ".", color="black", markersize=4)
        panel.set_xticks(range(len(bars)), [target for target, _ in bars], fontsize=7)
        panel.set_title(case.name, fontsize=8)
        panel.set_ylabel(UNITS[metric], fontsize=7)
    _save(figure, path)


def _plot_waits(path: Path, workload: Workload, lines: Sequence[dict[str, Any]]) -> None:
    """For cases with arrivals: the share of requests that had their first token within a time."""
    cases = [case for case in workload.cases if case.load.kind == "open"]
    if not cases:
        return
    figure, panels = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 3), squeeze=False)
    for case, panel in zip(cases, panels.flat, strict=True):
        for target in case.targets:
            waits = sorted(
                reply["times"][0] - reply["due_s"]
                for line in lines
                if (line["case"], line["target"]) == (case.name, target)
                and line["round"] != WARM_UP
                for reply in line["replies"]
            )
            if waits:
                share = [(i + 1) / len(waits) for i in range(len(waits))]
                panel.plot(waits, share, drawstyle="steps-post", label=target)
        panel.set_title(case.name, fontsize=8)
        panel.set_xlabel("time to first token, s")
        panel.set_ylabel("share of requests")
        panel.legend(fontsize=7)
    _save(figure, path)
