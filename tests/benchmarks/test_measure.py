"""The order of a run, with servers that only note what is done to them."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load, measure
from benchmarks.load import LoadError, OpenAI
from benchmarks.metrics import Reply
from benchmarks.targets import Material
from benchmarks.workload import Request, Workload

WORKLOAD = Workload.model_validate(
    {
        "name": "w",
        "about": "",
        "adapters": {"a": {"count": 1, "rank": 8}},
        "targets": {
            "base": {"kind": "vllm"},
            "ours": {"kind": "loraplex", "adapters": ["a"]},
            "cold": {"kind": "loraplex"},
        },
        "cases": [
            {
                "name": "c",
                "targets": ["base", "ours"],
                "load": {
                    **{"kind": "closed", "streams": 1, "prompt": 2, "output": 1},
                    **{"pattern": "identical", "adapters": "a"},
                },
            },
            {"name": "s", "targets": ["cold"], "load": {"kind": "start"}},
        ],
    }
)


class Noted:
    """Stands in for a server; `log` is shared by all of a test."""

    log: list[str]
    dialect = OpenAI()

    def __init__(self, name: str, *rest: Any) -> None:
        self.name = self.url = name

    def start(self) -> float:
        self.log.append(f"start {self.name}")
        return 1.5

    def pause(self) -> None:
        self.log.append(f"pause {self.name}")

    def resume(self) -> None:
        self.log.append(f"resume {self.name}")

    def stop(self) -> None:
        self.log.append(f"stop {self.name}")

    def memory_gib(self) -> float:
        return 0


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []

    async def run(url: str, dialect: Any, requests: Sequence[Request]) -> list[Reply]:
        events.append(f"{url}: {','.join(r.adapter or 'base' for r in requests)}")
        return [Reply(0, r.adapter, 2, 1, 0, 0, (0.123456,)) for r in requests]

    monkeypatch.setattr(Noted, "log", events, raising=False)
    monkeypatch.setattr(measure, "Server", Noted)
    monkeypatch.setattr(load, "run", run)
    monkeypatch.setattr(measure, "CACHE", tmp_path)
    material = Material(tmp_path, {}, tmp_path)
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(measure, "_material", lambda *_: material)
    return events


def raw(out: Path) -> list[dict[str, Any]]:
    with gzip.open(out / measure.RAW, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_rounds_are_interleaved_and_the_order_moves_on(tmp_path: Path, log: list[str]) -> None:
    measure.run(WORKLOAD, tmp_path / "out", 2, lambda _: None)
    turns = {
        "base": ["resume base", "base: base", "pause base"],
        "ours": ["resume ours", "ours: a-0", "pause ours"],
        "cold": ["start cold", "stop cold"],
    }
    assert log == [
        *("start base", "pause base", "start ours", "pause ours"),
        *(turns["base"] + turns["ours"] + turns["cold"]),
        *(turns["base"] + turns["ours"] + turns["cold"]),
        *(turns["ours"] + turns["base"] + turns["cold"]),
        *("stop ours", "stop base"),
    ]
    lines = raw(tmp_path / "out")
    assert [line["round"] for line in lines] == [-1] * 3 + [0] * 3 + [1] * 3
    assert lines[1]["replies"][0]["times"] == [0.1235]
    assert lines[2]["start_s"] == 1.5


def test_a_failure_ends_all_servers_and_keeps_what_was_measured(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load.run

    async def run(url: str, dialect: Any, requests: Sequence[Request]) -> list[Reply]:
        if url == "ours":
            raise LoadError("gone")
        return await good(url, dialect, requests)

    monkeypatch.setattr(load, "run", run)
    with pytest.raises(LoadError, match="c: ours: gone"):
        measure.run(WORKLOAD, tmp_path / "out", 2, lambda _: None)
    assert log[-3:] == ["pause ours", "stop ours", "stop base"]
    assert len(raw(tmp_path / "out")) == 1
