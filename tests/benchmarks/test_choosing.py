"""The comparison of ranks, α, dropout and layers: what is measured once stays, and is drawn."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import choosing
from benchmarks.choosing import CASES, FIGURES, Case, Figures, OtherRun

RECIPE = {"items": 3}


def run(task: str, case: Case, draw: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "name": case.name,
        "draw": draw,
        "r": case.r,
        "alpha": case.alpha,
        "dropout": case.dropout,
        "targets": list(case.targets),
        "parameters": 1000 * case.r,
        "bytes": 10**6 * case.r,
        "held_out_loss": (1 + draw) / case.r,
        "train_loss": 0.25,
        "rank_99": 2,
        "cpu_seconds": 60.4,
        **more,
    }


@pytest.fixture
def figures(tmp_path: Path) -> Figures:
    figures = Figures(tmp_path / FIGURES, RECIPE)
    figures.keep({"task": "sql", "name": "base", "draw": 0, "held_out_loss": 1.6})
    for case in reversed(CASES):
        figures.keep(run("sql", case))
    return figures


def test_what_was_measured_is_there_after_a_stop(figures: Figures, tmp_path: Path) -> None:
    again = Figures(tmp_path / FIGURES, RECIPE)
    assert again.of("sql", "r 8")["alpha"] == 16
    assert again.of("code", "r 8") == {}
    again.keep(again.of("sql", "r 8") | {"solved": 3, "items": 32})
    assert Figures(tmp_path / FIGURES, RECIPE).of("sql", "r 8")["solved"] == 3
    assert not list(tmp_path.glob("*.part"))


def test_figures_of_another_recipe_are_not_mixed_in(figures: Figures, tmp_path: Path) -> None:
    with pytest.raises(OtherRun):
        Figures(tmp_path / FIGURES, {"items": 4})


def test_the_table_has_a_line_a_case_ranks_ascending(figures: Figures, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == "α = r")
    figures.keep(run("sql", case, solved=3, items=32))
    figures.keep(run("sql", case, draw=1))
    choosing.report(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    ranks = ["r 2", "r 4", "r 8", "r 16", "r 64", "r 8, q and v", "r 16, q and v"]
    assert names == ["", "no adapter", *ranks, "α = r", "α = 4r", "dropout 0", "dropout 0.1"]
    (scored,) = (line for line in lines if line.startswith("| α = r |"))
    assert "| all seven | 8,000 | 8.0 | 0.125, 0.250 | 0.250, 0.250 | 3 of 32 |" in scored
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_a_base_that_is_none_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        choosing.main(["--base", str(tmp_path), "--out", str(tmp_path)])
    assert "no config.json there" in capsys.readouterr().err
