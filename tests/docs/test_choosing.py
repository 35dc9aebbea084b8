"""docs/choosing.md has the figures of benchmarks/results/choosing, and no others."""

import json
import re
from pathlib import Path

from adapters import peft
from adapters.algebra import algebra
from adapters.base import BaseSpec
from adapters.demo import WEIGHTS
from adapters.spectrum import spectra
from benchmarks.choosing import FIGURES, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "choosing"
PAGE = (ROOT / "docs" / "choosing.md").read_text()
DATA = json.loads((RESULTS / FIGURES).read_text())


def test_the_table_is_made_of_the_figures() -> None:
    for task in dict.fromkeys(run["task"] for run in DATA["runs"]):
        assert table(DATA, task) in PAGE
        assert table(DATA, task) in (RESULTS / "table.md").read_text()


def test_losses_in_the_text_are_in_the_figures() -> None:
    known = {f"{run[key]:.3f}" for run in DATA["runs"] for key in run if key.endswith("_loss")}
    assert set(re.findall(r"\b\d\.\d{3}\b", PAGE)) <= known


def test_the_recipe_is_the_one_that_was_used() -> None:
    recipe = DATA["recipe"]
    assert f"{recipe['items']} items" in PAGE
    assert f"{recipe['held_out']} held-out" in PAGE
    assert recipe["dtype"] in PAGE


def test_the_demo_adapters_use_so_many_directions(base_folder: Path) -> None:
    base = BaseSpec.read(base_folder, "base")
    for folder in WEIGHTS.iterdir():
        spec = peft.read(folder)
        rank = algebra(spec, base, spectra(folder, spec)).rank_99
        assert re.search(rf"\b{rank} \(`{folder.name}`\)", PAGE), (folder.name, rank)
