"""The arithmetic, on timelines that can be reckoned by hand."""

import pytest

from benchmarks import metrics
from benchmarks.metrics import Reply, Spread


def reply(stream: int, times: list[float], due: float = 0, prompt: int = 10) -> Reply:
    return Reply(stream, None, prompt, len(times), due, due, tuple(times))


def test_decode_counts_only_while_every_stream_decodes() -> None:
    first = reply(0, [1, 2, 3, 4])
    second = reply(1, [2, 3, 4, 5, 6])
    # From 2 (the second begins) to 4 (the first ends): 3 and 4 of both.
    assert metrics.decode_rate([first, second]) == pytest.approx(4 / 2)


def test_decode_of_one_stream() -> None:
    assert metrics.decode_rate([reply(0, [1, 1.5, 2])]) == pytest.approx(2)


def test_decode_joins_the_requests_of_a_stream() -> None:
    assert metrics.decode_rate([reply(0, [1, 2]), reply(0, [4, 5], due=2)]) == pytest.approx(3 / 4)


def test_no_decode_without_a_common_time() -> None:
    assert metrics.decode_rate([reply(0, [1, 2]), reply(1, [3, 4])]) is None
    assert "decode_tokens_s" not in metrics.of([reply(0, [1])])


def test_all_metrics() -> None:
    found = metrics.of([reply(0, [1, 2, 4]), reply(1, [3, 4], due=1)])
    assert found["output_tokens_s"] == pytest.approx(5 / 4)
    assert found["requests_s"] == pytest.approx(2 / 4)
    assert found["prefill_tokens_s"] == pytest.approx((10 / 1 + 10 / 2) / 2)
    assert found["ttft_ms_p50"] == pytest.approx(1500)
    assert found["itl_ms_p50"] == pytest.approx(1000)
    assert found["latency_ms_p50"] == pytest.approx(3500)
    assert found["latency_ms_p99"] == pytest.approx(3990)


def test_tokens_that_came_together_are_all_counted() -> None:
    assert metrics.decode_rate([reply(0, [1, 2, 2, 2])]) == pytest.approx(3)


def test_spread_and_ratio() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    # Medians 20 and 10; single rounds 10/10, 20/5, 30/20.
    assert metrics.ratio([10, 20, 30], [10, 5, 20]) == Spread(2, 1, 4)
