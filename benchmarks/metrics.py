"""From the times of tokens to figures: rates in tokens a second, times in milliseconds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Reply:
    """What happened to one request; all times in seconds since the beginning of its case.

    `times` has one entry a token; tokens that came together have the same time. `due_s` is when
    the request should have been sent, which in a closed loop is when it was. `load_ms` is what
    the server says that loading the adapter took, None where it says nothing.
    """

    stream: int
    adapter: str | None
    prompt: int
    output: int
    due_s: float
    sent_s: float
    times: tuple[float, ...]
    error: str | None = None
    load_ms: float | None = None


def of(replies: Sequence[Reply]) -> dict[str, float]:
    """Every metric that `replies` allow; one that they do not is left out.

    - `decode_tokens_s`: tokens a second in the steady state of a closed loop, from the first token
      of the last stream to begin until the last token of the first stream to end. Where streams
      send several requests, the prefill of the later ones is in that time.
    - `output_tokens_s`, `requests_s`: all of them, from the first arrival to the last token.
    - `prefill_tokens_s`: prompt length over time to first token, median of the requests.
    - `ttft_ms_…`: from when a request was due to its first token. `itl_ms_…`: between tokens of
      one reply. `latency_ms_…`: from due to the last token. Percentiles 50, 90 and 99.
    """
    found: dict[str, float] = {}
    if not replies:
        return found
    if (rate := decode_rate(replies)) is not None:
        found["decode_tokens_s"] = rate
    span = max(r.times[-1] for r in replies) - min(r.due_s for r in replies)
    found["output_tokens_s"] = sum(len(r.times) for r in replies) / span
    found["requests_s"] = len(replies) / span
    found["prefill_tokens_s"] = median(r.prompt / (r.times[0] - r.due_s) for r in replies)
    gaps = [
        after - before for r in replies for before, after in zip(r.times, r.times[1:], strict=False)
    ]
    found |= _percentiles("ttft_ms", [r.times[0] - r.due_s for r in replies])
    found |= _percentiles("itl_ms", gaps)
    found |= _percentiles("latency_ms", [r.times[-1] - r.due_s for r in replies])
    return found


def decode_rate(replies: Sequence[Reply]) -> float | None:
    """Tokens a second while every stream was decoding; None if there was no such time."""
    streams: dict[int, list[float]] = {}
    for reply in replies:
        streams.setdefault(reply.stream, []).extend(reply.times)
    begin = max(min(times) for times in streams.values())
    end = min(max(times) for times in streams.values())
    if end <= begin:
        return None
    tokens = sum(begin < time <= end for times in streams.values() for time in times)
    return tokens / (end - begin)


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.percentile(seconds, (50, 90, 99)) * 1000
    return {f"{name}_p{p}": float(v) for p, v in zip((50, 90, 99), values, strict=True)}


@dataclass(frozen=True)
class Spread:
    """A median over rounds, and the lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises StatisticsError if there are no values."""
        listed = sorted(values)
        return cls(median(listed), listed[0] if listed else math.nan, listed[-1])


def ratio(target: Sequence[float], against: Sequence[float]) -> Spread:
    """Ratio of the two medians over rounds; lowest and highest are those of single rounds.

    Both have one value a round, in the same order.
    """
    rounds = [one / other for one, other in zip(target, against, strict=True)]
    return Spread(median(target) / median(against), min(rounds), max(rounds))
