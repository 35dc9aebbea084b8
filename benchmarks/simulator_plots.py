"""The plots of the simulator, from its figures."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

Line = dict[str, Any]  # {"run": …, "figures": …}


def draw(lines: list[Line], folder: Path) -> None:
    """Writes quantum.png, adapters.png and eviction.png."""
    pyplot.rcParams |= {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
    _quantum(lines, folder / "quantum.png")
    _adapters(lines, folder / "adapters.png")
    _eviction(lines, folder / "eviction.png")


def _some(lines: list[Line], load: str, **wanted: object) -> list[Line]:
    return [
        line
        for line in lines
        if line["run"]["load"] == load
        and all(line["run"][name] == value for name, value in wanted.items())
    ]


def _policy(line: Line) -> str:
    quantum = line["run"]["quantum"]
    return "fcfs" if quantum is None else f"{quantum:g}"


def _quantum(lines: list[Line], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3))
    panels = (
        ("flood", "worst", "flood: the victim's TTFT, s"),
        ("shares", "tokens_s", "shares: tokens/s, of the best"),
        ("shares", "gap", "shares: gap between adapters, service"),
    )
    for panel, (load, name, title) in zip(axes, panels, strict=True):
        for engine in ("gpu", "cpu"):
            chosen = _some(lines, load, engine=engine)
            values = [line["figures"][name] for line in chosen]
            if name == "tokens_s":
                values = [value / max(values) for value in values]
            panel.plot([_policy(line) for line in chosen], values, "o-", label=engine)
        panel.set_title(title)
        panel.set_xlabel("quantum")
        panel.legend()
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    _save(figure, path)


def _adapters(lines: list[Line], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3))
    chosen = _some(lines, "synthetic")
    for policy in dict.fromkeys(map(_policy, chosen)):
        of_policy = [line for line in chosen if _policy(line) == policy]
        counts = [line["run"]["adapters"] for line in of_policy]
        for panel, name in zip(axes, ("tokens_s", "ttft_p50", "ttft_p99"), strict=True):
            values = [line["figures"][name] for line in of_policy]
            panel.plot(counts, values, "o-", label=policy)
    for panel, title in zip(axes, ("tokens/s", "TTFT p50, s", "TTFT p99, s"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("adapters")
        panel.set_xscale("log")
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(title="policy, quantum")
    _save(figure, path)


def _eviction(lines: list[Line], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3))
    chosen = _some(lines, "eviction")
    groups = list(dict.fromkeys((line["run"]["places"], line["run"]["alpha"]) for line in chosen))
    policies = list(dict.fromkeys(line["run"]["eviction"] for line in chosen))
    panels = (("hit_rate", "hit rate"), ("load_s", "time of loads, s"), ("ttft_p99", "TTFT p99, s"))
    for panel, (name, title) in zip(axes, panels, strict=True):
        for at, policy in enumerate(policies):
            values = [
                line["figures"][name]
                for group in groups
                for line in chosen
                if line["run"]["eviction"] == policy
                and (line["run"]["places"], line["run"]["alpha"]) == group
            ]
            panel.bar([i + 0.4 * at for i in range(len(groups))], values, 0.4, label=policy)
        labels = [f"{places} places\nα {alpha:g}" for places, alpha in groups]
        panel.set_xticks([i + 0.2 for i in range(len(groups))], labels)
        panel.set_title(title)
    axes[0].legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
