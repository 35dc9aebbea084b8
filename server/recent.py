"""The last minutes, for those who watch: tokens and times by adapter, and what was loaded where.

Kept in intervals of a few seconds, all of them in memory and the oldest dropped; what is kept of an
adapter does not grow with its requests.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

INTERVAL_S = 5
KEPT = 60  # intervals: five minutes
EVENTS = 200
_BIN = 1.05  # each bin of times ends so many times above where it begins


class Times:
    """Counts of seconds in bins so narrow that a percentile is right to a few per cent."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Counts one."""
        self._bins[round(math.log(max(seconds, 1e-6), _BIN))] += 1

    def update(self, other: "Times") -> None:
        """Counts all of another."""
        self._bins.update(other._bins)

    def percentile(self, share: float) -> float | None:
        """The seconds that a `share` of all, 0 to 1, does not exceed; None if there are none."""
        rank = share * self._bins.total()
        for bin in sorted(self._bins):
            rank -= self._bins[bin]
            if rank <= 0:
                return float(f"{_BIN**bin:.3g}")
        return None


@dataclass
class Work:
    """What was done for one adapter in some time.

    `first` are the times to first tokens, `gaps` those between two tokens of a stream.
    """

    requests: int = 0  # that have ended
    errors: int = 0  # of those
    prompt_tokens: int = 0
    output_tokens: int = 0
    first: Times = field(default_factory=Times)
    gaps: Times = field(default_factory=Times)

    def update(self, other: "Work") -> None:
        """Counts all of another."""
        self.requests += other.requests
        self.errors += other.errors
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.first.update(other.first)
        self.gaps.update(other.gaps)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version in the engine: at what time, and how long it took.

    `what` is `loaded`, `load_failed`, `slot`, `evicted` (others needed its place) or `unloaded`.
    """

    at: float
    what: str
    digest: str
    seconds: float | None = None


@dataclass
class Interval:
    """What was done by adapter from `at` on, INTERVAL_S seconds long; `at` in epoch seconds."""

    at: int
    work: dict[str, Work] = field(default_factory=dict)


class Recent:
    """The intervals and events; `clock` gives epoch seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = clock()
        self._intervals: deque[Interval] = deque(maxlen=KEPT)
        self.events: deque[Event] = deque(maxlen=EVENTS)

    def came(self, adapter: str, tokens: int, gaps: Iterable[float]) -> None:
        """Tokens of a reply came, each so many seconds after the one before."""
        work = self._work(adapter)
        work.output_tokens += tokens
        for seconds in gaps:
            work.gaps.add(seconds)

    def ended(self, adapter: str, failed: bool, prompt_tokens: int, first: float | None) -> None:
        """A request has ended; `first` is how many seconds its first token took, if one came."""
        work = self._work(adapter)
        work.requests += 1
        work.errors += failed
        work.prompt_tokens += prompt_tokens
        if first is not None:
            work.first.add(first)

    def event(self, what: str, digest: str, seconds: float | None = None) -> None:
        """Something happened to a version in the engine."""
        self.events.append(Event(self._clock(), what, digest, seconds))

    def since(self, at: float) -> Sequence[Interval]:
        """The intervals that ended after `at`, oldest first; the last one is not over yet."""
        return [each for each in self._intervals if each.at + INTERVAL_S > at]

    def looks_back(self, seconds: float) -> float:
        """How many seconds `tokens` and `within` look back, asked for so many.

        Up to an interval more, to where one began; no further than there has been anything to see.
        """
        now = self._clock()
        begin = (now - seconds) // INTERVAL_S * INTERVAL_S
        return max(1.0, now - max(begin, self._began))

    def tokens(self, seconds: float) -> Counter[str]:
        """Tokens of replies by adapter in the last `seconds`; see looks_back."""
        total: Counter[str] = Counter()
        for interval in self.since(self._clock() - seconds):
            for adapter, work in interval.work.items():
                total[adapter] += work.output_tokens
        return total

    def within(self, seconds: float, adapter: str) -> Work:
        """All that was done for one adapter in that time; see looks_back."""
        total = Work()
        for interval in self.since(self._clock() - seconds):
            if (work := interval.work.get(adapter)) is not None:
                total.update(work)
        return total

    def _work(self, adapter: str) -> Work:
        begin = int(self._clock() // INTERVAL_S) * INTERVAL_S
        if not self._intervals or self._intervals[-1].at < begin:
            self._intervals.append(Interval(begin))
        return self._intervals[-1].work.setdefault(adapter, Work())
