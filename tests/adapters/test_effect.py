"""What an engine says with an adapter and without, and what follows from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from adapters.database import Database
from adapters.effect import Effect, distance
from adapters.errors import InvalidAdapter
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry
from adapters.store import Store

MUCH = Effect(difference=1.5, noise=0.1, finite=True)
NONE = Effect(difference=0.0, noise=0.1, finite=True)
LITTLE = Effect(difference=0.05, noise=0.1, finite=True)
NAN = Effect(difference=0.0, noise=0.0, finite=False)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({1: -1.0, 2: -2.0}, {1: -1.0, 2: -2.0}, 0.0),
        ({1: -1.0, 2: -2.0}, {1: -1.5, 2: -2.25}, 0.5),
        # 3 can be -2.5 at most in the first, where it is not listed.
        ({1: -1.0, 2: -2.5}, {1: -1.0, 3: -1.25}, 1.25),
    ],
)
def test_the_distance_of_two_answers(one, other, apart):
    assert distance(one, other) == distance(other, one) == apart


def test_a_distance_from_nan_is_nan():
    assert math.isnan(distance({1: -1.0}, {1: math.nan}))
    assert math.isnan(distance({1: math.nan}, {2: -1.0}))


def test_what_is_certain():
    assert [e.certain for e in (MUCH, NONE, LITTLE, NAN)] == [True, True, False, True]


@pytest.fixture
def run(make, base, tmp_path: Path):
    """Ingests with an engine that answers `effect`; gives the version and how often it asked."""
    store = Store(tmp_path / "store")
    registry = Registry(Database.of(tmp_path))
    asked = []

    def work(effect, name="sql", seed=0, **rules):
        def prove(digest: str, folder: Path) -> Effect:
            assert (folder / "adapter_model.safetensors").is_file()
            assert not store.has(digest)
            asked.append(digest)
            return effect

        with store.staging() as folder:
            make(seed=seed).write(folder)
            version, _ = Ingest(store, registry, base, Rules(8, **rules), prove).ingest(
                folder, name, "upload"
            )
        return version, asked

    work.store = store
    return work


def test_an_effect_is_kept_and_the_same_bytes_are_not_asked_about_again(run):
    version, asked = run(MUCH)
    assert version.checks["effect"] == {"difference": 1.5, "noise": 0.1, "finite": True}
    again, asked = run(NONE, name="code")
    assert again.checks["effect"] == version.checks["effect"] and len(asked) == 1


@pytest.mark.parametrize(("effect", "code"), [(NONE, "no_effect"), (NAN, "nonfinite_output")])
def test_no_effect_and_nan_are_refused_and_leave_nothing(run, effect, code):
    with pytest.raises(InvalidAdapter) as refused:
        run(effect)
    assert [p.code for p in refused.value.problems] == [code]
    assert list(run.store.sealed()) == []


def test_no_effect_can_be_allowed_but_nan_cannot(run):
    version, _ = run(NONE, allow_noop=True)
    assert "no_effect" in {w["code"] for w in version.checks["warnings"]}
    with pytest.raises(InvalidAdapter):
        run(NAN, seed=1, allow_noop=True)


def test_what_was_allowed_once_is_judged_again(run):
    run(NONE, allow_noop=True)
    again, asked = run(MUCH, name="code", allow_noop=True)
    assert "no_effect" in {w["code"] for w in again.checks["warnings"]} and len(asked) == 1
    with pytest.raises(InvalidAdapter):
        run(MUCH, name="third")


def test_an_effect_that_noise_may_hide_is_a_warning(run):
    version, _ = run(LITTLE)
    assert "effect_within_noise" in {w["code"] for w in version.checks["warnings"]}


@pytest.mark.parametrize("allowed", [False, True])
def test_zero_is_found_without_an_engine(make, base, tmp_path, allowed):
    made = make()
    for name, (_, numbers) in made.tensors.items():
        if "lora_B" in name:
            numbers[:] = 0
    store = Store(tmp_path / "store")
    registry = Registry(Database.of(tmp_path))
    with store.staging() as folder:
        made.write(folder)
        report = Ingest(store, registry, base, Rules(8, allow_noop=allowed)).check(folder).report
    found = report.warnings if allowed else report.problems
    assert [p.code for p in found if p.code == "no_effect"] == ["no_effect"]
    assert bool(report.problems) != allowed
