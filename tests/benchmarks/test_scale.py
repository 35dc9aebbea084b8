"""Filling folders, measuring without an engine, and the table from made-up data."""

import json
import sqlite3
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from benchmarks import scale
from server import app
from server.config import Settings

COUNT = 25
MACHINE = {
    "when": "2026-01-01T00:00:00+00:00",
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "load_before": 0.1,
    "commit": "0123456789abcdef",
    "changed_files": 0,
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    return scale.fill(tmp_path_factory.mktemp("cache"), COUNT, base_folder)


def test_a_folder_is_filled_once(filled: Path, base_folder: Path) -> None:
    rates = json.loads((filled / scale.FILLED).read_text())
    assert all(rate > 0 for rate in rates.values())
    assert [each.name for each in filled.parent.iterdir()] == [str(COUNT)]

    records = filled / "home" / "registry.db"
    written = records.stat().st_mtime_ns
    with sqlite3.connect(records) as db:
        names = [row[0] for row in db.execute("SELECT name FROM adapters ORDER BY name")]
        digests = db.execute("SELECT count(DISTINCT digest) FROM versions").fetchone()
    assert names == [scale.name(number) for number in range(COUNT)]
    assert digests == (COUNT,)

    assert scale.fill(filled.parent, COUNT, base_folder) == filled
    assert records.stat().st_mtime_ns == written


def test_what_was_interrupted_leaves_nothing(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        scale_make(folder, number)

    scale_make = scale.make
    monkeypatch.setattr(scale, "make", make)
    with pytest.raises(KeyboardInterrupt):
        scale.fill(tmp_path, COUNT, base_folder)
    assert list(tmp_path.iterdir()) == []


def test_the_parts_of_a_server(filled: Path, base_folder: Path) -> None:
    figures = scale.probe(filled / "home", base_folder) | scale.verify(filled)
    assert all(value > 0 for value in figures.values())
    assert figures.keys() <= known()


def test_lists_are_full_and_complete(filled: Path, base_folder: Path) -> None:
    settings = Settings.read(["--home", str(filled / "home"), "--no-demo-adapters"])
    serving = app.build(settings, base_folder)
    served = app.create_app(serving, start=lambda: None, done=lambda error: None)
    client = TestClient(served, base_url="http://localhost")
    figures = scale.pages(client, COUNT) | scale.models(client, COUNT)
    assert figures.keys() <= known()
    with pytest.raises(scale.ScaleError, match=r"26 models"):
        scale.models(client, COUNT + 1)
    serving.registry.close()


def test_every_folder_has_its_turn_first() -> None:
    turns = list(scale._turns([10, 20], 2, scale.WARM_UP))
    assert turns == [(-1, 20), (-1, 10), (0, 10), (0, 20), (1, 20), (1, 10)]


def test_the_table_says_what_grows(tmp_path: Path) -> None:
    def line(round_: int, count: int, **figures: float) -> dict[str, object]:
        return {"round": round_, "count": count, "figures": figures}

    rates = {"adapters_s": 80.0, "first_tenth_s": 100.0, "last_tenth_s": 90.0}
    lines = [
        line(0, 10, start_s=20, prefix_ms=2, models_ms=3),
        line(0, 10_000, start_s=22, prefix_ms=8, models_ms=300),
        line(1, 10, start_s=22, prefix_ms=2, models_ms=3),
        line(1, 10_000, start_s=21, prefix_ms=9, models_ms=330),
    ]
    raw = {"filled": {"10": rates, "10000": rates}, "lines": lines}
    (tmp_path / scale.RAW).write_text(json.dumps(raw))
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))

    text = scale.write(tmp_path)
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert "- Must not grow with the number of adapters (2 figures). Grows: a page by pre" in text
    assert "(1 figures). Grows: GET /v1/models, ms." in text
    assert "10,000 adapters were taken in at 80 a second" in text
    assert "at 0.90 times the rate" in text
    assert (
        "| `loraplex serve` to /ready, s | 21.0 (20.0-22.0) | 21.5 (21.0-22.0) | 1.02 (0.95-1.10) |"
        in text
    )


def known() -> set[str]:
    return {key for part in scale.PARTS for key in part.figures}
