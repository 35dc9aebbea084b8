"""Series of adapters: bounded, and counters that only grow."""

from collections import Counter
from random import Random

from server.traffic import GAPS, OTHER, PERIOD_S, WAITS, Histogram, Outcome, Traffic

FINE = Outcome(200, None, 10, 5, queue=0.2, first=0.3, gaps=(0.02, 0.04))


def counted(traffic: Traffic) -> dict[str, int]:
    return {name: series.requests.total() for name, series in traffic.series()}


def test_a_histogram_counts_as_prometheus_does() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 3.0):
        histogram.observe(seconds)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.sum == 6.0


def test_what_is_counted() -> None:
    traffic = Traffic(2)
    traffic.count("a", FINE, 0)
    traffic.count("a", Outcome(503, "adapter_load_failed", queue=1.0), 0)
    traffic.count(None, Outcome(404, "adapter_not_found"), 0)
    series = dict(traffic.series())
    a = series["a"]
    assert (a.requests, a.errors) == ({200: 1, 503: 1}, {"adapter_load_failed": 1})
    assert (a.prompt_tokens, a.output_tokens) == (10, 5)
    assert (sum(a.queue.counts), sum(a.first.counts), sum(a.gaps.counts)) == (2, 1, 2)
    assert series[OTHER].errors == {"adapter_not_found": 1}


def test_the_busiest_have_names() -> None:
    traffic = Traffic(2)
    for name in ("a", "b", "c", "c", "c"):
        traffic.count(name, FINE, 0)
    assert counted(traffic) == {"a": 1, "b": 1, OTHER: 3}
    traffic.count("b", FINE, PERIOD_S + 1)
    assert counted(traffic) == {"b": 2, "c": 0, OTHER: 4}  # a's is there too
    traffic.count("c", FINE, PERIOD_S + 1)
    assert counted(traffic) == {"b": 2, "c": 1, OTHER: 4}


def test_one_that_was_deleted_has_no_series() -> None:
    traffic = Traffic(2)
    traffic.count("a", FINE, 0)
    traffic.forget(["a", "never"])
    assert counted(traffic) == {OTHER: 1}


def test_however_many_there_are_no_counter_falls() -> None:
    """But for those of a name that begin anew after it had none."""
    random, traffic, before, total = Random(1), Traffic(5), {}, Counter[str]()
    for turn in range(5000):
        name = f"a{min(int(random.paretovariate(0.6)), 1000)}"
        traffic.count(name, FINE, turn / 10)
        total[name] += 1
        now = counted(traffic)
        assert len(now) <= 6
        assert sum(now.values()) == turn + 1
        assert now[OTHER] >= before.get(OTHER, 0)
        assert all(now[name] >= before[name] for name in now.keys() & before.keys())
        before = now
    assert {name for name, _ in total.most_common(2)} <= set(traffic.names())
    assert len(traffic._busy) < 1000


def test_bounds_ascend() -> None:
    for bounds in (WAITS, GAPS):
        assert list(bounds) == sorted(set(bounds))
