"""The last minutes: what is kept, for how long, and percentiles that can be believed."""

from random import Random

import pytest

from server.recent import EVENTS, INTERVAL_S, KEPT, Recent, Times


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
def test_percentiles_are_right_to_three_per_cent(share: float) -> None:
    random, times = Random(1), Times()
    seconds = sorted(random.lognormvariate(-3, 2) for _ in range(2000))
    for each in seconds:
        times.add(each)
    true = seconds[max(0, round(share * len(seconds)) - 1)]
    assert times.percentile(share) == pytest.approx(true, rel=0.03)


def test_of_nothing_there_is_no_percentile() -> None:
    assert Times().percentile(0.5) is None
    zero = Times()
    zero.add(0.0)
    assert zero.percentile(0.5) < 1e-5


def test_what_was_done_is_added_up_over_intervals(clock: Clock) -> None:
    recent = Recent(clock)
    recent.came("sql", 3, [0.1])
    clock.now += 2 * INTERVAL_S
    recent.came("sql", 4, [0.1, 0.3])
    recent.ended("sql", False, 20, 0.5)
    recent.ended("code", True, 0, None)
    work = {name: recent.within(60, name) for name in ("sql", "code")}
    assert (work["sql"].output_tokens, work["sql"].prompt_tokens) == (7, 20)
    assert (work["sql"].requests, work["sql"].errors) == (1, 0)
    assert (work["code"].requests, work["code"].errors) == (1, 1)
    assert work["sql"].gaps.percentile(1) == pytest.approx(0.3, rel=0.03)
    assert work["code"].first.percentile(0.5) is None
    assert recent.within(INTERVAL_S, "sql").output_tokens == 4
    assert recent.within(60, "nobody").requests == 0
    assert recent.tokens(60) == {"sql": 7, "code": 0}
    assert [len(each.work) for each in recent.since(0)] == [1, 2]
    assert [each.at for each in recent.since(clock.now)] == [clock.now // INTERVAL_S * INTERVAL_S]


def test_the_old_is_dropped(clock: Clock) -> None:
    recent = Recent(clock)
    for turn in range(3 * KEPT):
        recent.came("sql", 1, ())
        recent.event("loaded", f"d{turn}", 0.1)
        clock.now += INTERVAL_S
    assert len(recent.since(0)) == KEPT
    for turn in range(2 * EVENTS):
        recent.event("slot", f"e{turn}")
    assert len(recent.events) == EVENTS
    assert recent.events[-1].digest == f"e{2 * EVENTS - 1}"


def test_rates_divide_by_the_time_that_was_looked_at(clock: Clock) -> None:
    """A constant stream has a constant rate, at every moment and from the beginning."""
    recent = Recent(clock)
    for second in range(1, 200):
        recent.came("sql", 10, ())
        clock.now += 1
        rate = recent.tokens(60)["sql"] / recent.looks_back(60)
        assert rate == pytest.approx(10), f"after {second} s"
    assert 60 <= recent.looks_back(60) <= 60 + INTERVAL_S
