"""How requests went, by adapter: what /metrics shows of the busiest, and of the others together.

An adapter has series of its own while it is one of the `named` busiest; what it has counted by then
goes over to `_other` when it no longer is, or is deleted, so that all counters only ever grow, or
begin anew as those of a restarted process do.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

OTHER = "_other"
PERIOD_S = 60  # after which the busiest are found anew
FADES = 0.5  # what a request counts for that a period later

# Seconds. Waits from a warm slot to a queue's end; gaps from a GPU's step to a stall.
WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
GAPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Histogram:
    """Counts of seconds in buckets, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def add(self, other: "Histogram") -> None:
        """Counts all of another with the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds, and how many are not above them."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))


@dataclass(frozen=True)
class Outcome:
    """How one request went: HTTP status, our code of its error, tokens, and times in seconds.

    `first` is None if no token came one by one, `queue` if it never got into a queue.
    """

    status: int
    code: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue: float | None = None
    load: float | None = None
    first: float | None = None
    gaps: Collection[float] = ()


@dataclass
class Series:
    """What has been counted of one adapter."""

    requests: Counter[int] = field(default_factory=Counter)  # by status
    errors: Counter[str] = field(default_factory=Counter)  # by code
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue: Histogram = field(default_factory=lambda: Histogram(WAITS))
    load: Histogram = field(default_factory=lambda: Histogram(WAITS))
    first: Histogram = field(default_factory=lambda: Histogram(WAITS))
    gaps: Histogram = field(default_factory=lambda: Histogram(GAPS))

    def count(self, outcome: Outcome) -> None:
        """Counts one request."""
        self.requests[outcome.status] += 1
        if outcome.code is not None:
            self.errors[outcome.code] += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.output_tokens += outcome.output_tokens
        for histogram, seconds in (
            (self.queue, outcome.queue),
            (self.load, outcome.load),
            (self.first, outcome.first),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        for gap in outcome.gaps:
            self.gaps.observe(gap)

    def add(self, other: "Series") -> None:
        """Counts all of another."""
        self.requests.update(other.requests)
        self.errors.update(other.errors)
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        for mine, theirs in (
            (self.queue, other.queue),
            (self.load, other.load),
            (self.first, other.first),
            (self.gaps, other.gaps),
        ):
            mine.add(theirs)


class Traffic:
    """The series of `named` adapters, and of all others together; and of HTTP, by route."""

    def __init__(self, named: int) -> None:
        self._limit = named
        self._named: dict[str, Series] = {}
        self._other = Series()
        self._busy: dict[str, float] = {}  # requests by adapter, those of long ago counting less
        self._period = 0.0  # when it began
        self.http: Counter[tuple[str, str, int]] = Counter()  # method, route, status

    def count(self, adapter: str | None, outcome: Outcome, now: float) -> None:
        """Counts a request at `now`, of any clock in seconds; None if it named no adapter."""
        if adapter is None:
            self._other.count(outcome)
            return
        self._busy[adapter] = self._busy.get(adapter, 0.0) + 1
        if now - self._period > PERIOD_S:
            self._period = now
            self._choose()
        if adapter not in self._named and len(self._named) < self._limit:
            self._named[adapter] = Series()
        self._named.get(adapter, self._other).count(outcome)

    def names(self) -> list[str]:
        """The adapters with series of their own."""
        return list(self._named)

    def forget(self, names: Iterable[str]) -> None:
        """Ends the series of `names`, which were deleted."""
        for name in names:
            self._busy.pop(name, None)
            if (series := self._named.pop(name, None)) is not None:
                self._other.add(series)

    def series(self) -> Iterator[tuple[str, Series]]:
        """All series, by adapter."""
        yield from self._named.items()
        yield OTHER, self._other

    def _choose(self) -> None:
        busiest = sorted(
            self._busy, key=lambda name: (self._busy[name], name in self._named), reverse=True
        )[: self._limit]
        for name in self._named.keys() - set(busiest):
            self._other.add(self._named.pop(name))
        for name in busiest:
            self._named.setdefault(name, Series())
        # One that was asked once is forgotten after some minutes.
        self._busy = {n: count * FADES for n, count in self._busy.items() if count > 1 / 16}
