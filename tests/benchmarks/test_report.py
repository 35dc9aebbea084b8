"""From raw lines to tables and plots, without a run."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, report
from benchmarks.workload import Ratio, Workload, WorkloadError

MACHINE = {
    "when": "2026-01-01T00:00:00+00:00",
    "cpu": "Some CPU",
    "cores": 2,
    "flags": ["avx2"],
    "memory_gib": 8.0,
    "load_before": 0.1,
    "virtual_machine": True,
    "kernel": "6.1",
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "commit": "0123456789abcdef",
    "changed_files": 1,
}
WORKLOAD = Workload.model_validate(
    {
        "name": "made up",
        "about": "No server was there.",
        "adapters": {"a": {"count": 1, "rank": 8}},
        "targets": {
            "base": {"kind": "vllm"},
            "ours": {"kind": "loraplex", "adapters": ["a"]},
        },
        "cases": [
            {
                "name": "decode",
                "targets": ["base", "ours"],
                "load": {"kind": "closed", "streams": 1, "prompt": 4, "output": 3},
            },
            {
                "name": "arrivals",
                "targets": ["ours"],
                "load": {
                    **{"kind": "open", "rate": 1, "seconds": 1, "adapters": "a"},
                    **{"prompt": [1, 2], "output": [1, 2]},
                },
            },
            {"name": "start", "targets": ["base", "ours"], "load": {"kind": "start"}},
        ],
        "ratios": [
            {"case": "decode", "target": "ours", "against": "base", "at_least": 0.9},
            {
                **{"case": "start", "target": "ours", "against": "base"},
                **{"metric": "start_s", "at_most": 1.1},
            },
        ],
    }
)


def decode(target: str, round_: int, step: float) -> dict[str, Any]:
    reply = {
        **{"stream": 0, "adapter": None, "prompt": 4, "output": 3, "due_s": 0.0, "sent_s": 0.0},
        **{"times": [1.0, 1 + step, 1 + 2 * step], "error": None},
    }
    return {"group": 0, "case": "decode", "target": target, "round": round_, "replies": [reply]}


def start(target: str, round_: int, seconds: float) -> dict[str, Any]:
    return {"group": 0, "case": "start", "target": target, "round": round_, "start_s": seconds}


LINES = [
    decode("base", -1, 50.0),
    *(decode("base", i, step) for i, step in enumerate((0.1, 0.1, 0.2))),
    *(decode("ours", i, step) for i, step in enumerate((0.1, 0.125, 0.25))),
    decode("ours", 0, 0.1) | {"case": "arrivals"},
    *(start(name, i, s) for name, s in (("base", 10.0), ("ours", 12.0)) for i in (-1, 0)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workload.json").write_text(WORKLOAD.model_dump_json())
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    with gzip.open(tmp_path / measure.RAW, mode="wt") as raw:
        raw.write("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_the_warm_up_is_not_counted() -> None:
    rounds = report.figures(LINES)[0, "decode", "base"]
    assert sorted(rounds) == [0, 1, 2]
    assert [round(r["decode_tokens_s"]) for r in rounds.values()] == [10, 10, 5]


def test_ratios_are_of_medians_and_bars_are_held() -> None:
    measured = report.figures(LINES)
    decoded, started = (report.outcome(ratio, measured) for ratio in WORKLOAD.ratios)
    assert decoded.spread is not None
    assert decoded.spread.median == pytest.approx(8 / 10)
    assert (decoded.spread.low, decoded.spread.high) == pytest.approx((0.8, 1.0))
    assert decoded.holds is False
    assert started.spread is not None
    assert started.spread.median == pytest.approx(1.2)
    assert started.holds is False
    lenient = Ratio(case="decode", target="ours", against="base", at_least=0.8 - 1e-9)
    assert report.outcome(lenient, measured).holds is True


def test_what_was_not_run_is_said() -> None:
    ratio = Ratio(case="decode", target="ours", against="other", at_least=1)
    found = report.outcome(ratio, report.figures(LINES))
    assert found.spread is None
    assert found.holds is None


def test_groups_are_not_mixed() -> None:
    lines = [decode("base", 0, 0.1), decode("ours", 0, 0.1) | {"group": 1}]
    ratio = WORKLOAD.ratios[0]
    assert report.outcome(ratio, report.figures(lines)).spread is None


def test_the_table(folder: Path) -> None:
    text = report.write(folder)
    assert text == (folder / "table.md").read_text()
    assert "| decode | ours | base | decode, tokens/s | 0.800 (0.800-1.000) | 3 | ≥ 0.9" in text
    assert "| start | ours | base | start, s | 1.200 (1.200-1.200) | 1 | ≤ 1.1 | **no** |" in text
    assert "Some CPU, 2 cores (avx2), 8.0 GiB, virtual" in text
    assert "commit 0123456789ab with 1 files changed" in text


def test_summary_and_plots(folder: Path) -> None:
    report.write(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert {case["case"] for case in summary["cases"]} == {"decode", "arrivals", "start"}
    assert summary["ratios"][0]["holds"] is False
    for plot in ("ratios", "cases", "ttft"):
        assert "<svg" in (folder / f"{plot}.svg").read_text()


def test_drawn_again_it_is_the_same(folder: Path) -> None:
    report.write(folder)
    once = {path.name: path.read_bytes() for path in folder.iterdir()}
    report.write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == once


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no run there"):
        report.write(tmp_path)
