"""From the replies of `benchmarks.neighbours` to figures.

Times are seconds unless a name says otherwise. A figure whose requests all failed is left out, and
`failed` says how many did.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from benchmarks import neighbours_loads as loads
from benchmarks.metrics import Reply
from benchmarks.neighbours_loads import Part, Parts
from benchmarks.workload import adapter_names

Figures = dict[str, float]

# What a token counts: the weights of Sheng et al., "Fairness in Serving Large Language Models"
# (OSDI 2024), whose service W and bound on its differences are used here.
OF_PROMPT, OF_OUTPUT = 1, 2
WEIGHTS: Mapping[str, tuple[int, int]] = {"1:1": (1, 1), "1:3": (1, 3)}  # of long and short
HOST_CACHE = 32  # adapters, in the case with a thousand


def of(case: str, turns: Sequence[Parts], tells_loads: bool) -> list[Figures]:
    """The figures of every turn that one server had at `case`, in the order of `turns`.

    `tells_loads`: its replies say whether an adapter had to be loaded for them.
    """
    if case == "thousand":
        return [
            _thousand(parts, cold) | _failed(parts)
            for parts, cold in zip(turns, _cold(turns, tells_loads), strict=True)
        ]
    return [_FIGURES[case](parts) | _failed(parts) for parts in turns]


def _failed(parts: Parts) -> Figures:
    return {"failed": sum(reply.error is not None for reply in loads.everything(parts))}


def waits(replies: Iterable[Reply]) -> list[float]:
    """Times to first token, from when a request was due."""
    return [reply.times[0] - reply.due_s for reply in replies]


def gaps(replies: Iterable[Reply], since: float = 0) -> list[float]:
    """Times between the tokens of each reply, of those that end after `since`."""
    return [
        after - before
        for reply in replies
        for before, after in pairwise(reply.times)
        if after > since
    ]


def percentile(key: str, values: Sequence[float], p: float, scale: float = 1) -> Figures:
    """`key`: the percentile `p` of `values` (linear between neighbours) times `scale`."""
    return {key: scale * float(np.percentile(values, p))} if values else {}


# Two slots ---------------------------------------------------------------------------------


def _flood(parts: Parts) -> Figures:
    return (
        {"tokens_s": parts["flood"].tokens_s}
        | percentile("third_s", waits(parts["third"].good), 50)
        | _victims(parts["alone"], parts["base"], parts["flood"])
    )


def _six(parts: Parts) -> Figures:
    return {"tokens_s": parts["flood"].tokens_s} | _victims(
        parts["alone"], parts["victims"], parts["flood"]
    )


def _victims(alone: Part, victims: Part, flood: Part) -> Figures:
    """What the victims' p99 is over: 1.5 times their p99 alone plus the drain of a slot.

    `of_bound`: the drain is the longest that a request of the flood took from its first token to
    its last. `of_pace_bound`: it is what its longest output takes at its median ITL, so as if
    nobody's prompt came between.
    """
    found = percentile("alone_p99_s", waits(alone.good), 99)
    found |= percentile("p99_s", waits(victims.good), 99)
    drains = {"": longest(flood.good), "pace_": at_median_pace(flood.good)}
    for which, drain in drains.items():
        if drain is not None:
            found[f"{which}drain_s"] = drain
        if drain is not None and {"alone_p99_s", "p99_s"} <= found.keys():
            bound = 1.5 * found["alone_p99_s"] + drain
            found[f"of_{which}bound"] = found["p99_s"] / bound
    return found


def longest(replies: Sequence[Reply]) -> float | None:
    """The longest time from a first token to the last of the same reply."""
    return max((reply.times[-1] - reply.times[0] for reply in replies), default=None)


def at_median_pace(replies: Sequence[Reply]) -> float | None:
    """The longest output of `replies` × their median ITL."""
    between = gaps(replies)
    return max(reply.output for reply in replies) * median(between) if between else None


def _bystanders(parts: Parts) -> Figures:
    quiet, disturbed = bystanders_gaps(parts["quiet"]), bystanders_gaps(parts["disturbed"])
    found = percentile("quiet_p99_ms", quiet, 99, 1e3) | percentile("p99_ms", disturbed, 99, 1e3)
    if quiet and disturbed:
        found["of_quiet"] = found["p99_ms"] / found["quiet_p99_ms"]
        found["longest_ms"] = 1e3 * max(disturbed)
        found["quiet_longest_ms"] = 1e3 * max(quiet)
        found["of_median"] = max(disturbed) / median(quiet)
    found["loads"] = len(parts["loads"].good)
    told = [reply.load_ms for reply in parts["loads"].good if reply.load_ms is not None]
    if told:
        found["loaded"] = sum(ms > 0 for ms in told) / len(told)
    return found | percentile("load_p50_s", waits(parts["loads"].good), 50)


def bystanders_gaps(part: Part) -> list[float]:
    """Those since the first load was due, or would have been: by then all streams decode, and no
    gap is the prefill of another one of them."""
    return gaps(part.good, part.begin_s + loads.LOAD_EVERY_S)


# Shares ------------------------------------------------------------------------------------


def _shares(parts: Parts) -> Figures:
    part = parts["all"]
    names = adapter_names(loads.RANK_8, 2)
    long, short = services = [service(part, name) for name in names]
    found = {
        "tokens_s": part.tokens_s,
        "service_s": sum(map(_sum, services)) / (part.end_s - part.begin_s),
    }
    for said, weights in WEIGHTS.items():
        found[f"gap_{said}"] = gap(long, short, *weights)
        found[f"of_bound_{said}"] = found[f"gap_{said}"] / bound()
        rates = [_sum(each) / weight for each, weight in zip(services, weights, strict=True)]
        found[f"jain_{said}"] = jain(rates)
    found |= {f"share_{i}": _sum(each) for i, each in enumerate(services)}
    return found


Service = list[tuple[float, float]]  # when, how much


def service(part: Part, adapter: str) -> Service:
    """What `adapter` was served within the part's time: its prompts at their first token, and
    every token of output when it came."""
    served = []
    for reply in part.replies:
        if reply.adapter == adapter and reply.times:
            served.append((reply.times[0], float(OF_PROMPT * reply.prompt)))
            served += [(time, float(OF_OUTPUT)) for time in reply.times]
    return sorted(each for each in served if part.begin_s < each[0] <= part.end_s)


def _sum(service: Service) -> float:
    return sum(amount for _, amount in service)


def difference(one: Service, other: Service, w_one: float, w_other: float) -> Service:
    """W(one)/w_one − W(other)/w_other over time; what comes at one time comes at once."""
    steps: dict[float, float] = {}
    for time, amount in one:
        steps[time] = steps.get(time, 0.0) + amount / w_one
    for time, amount in other:
        steps[time] = steps.get(time, 0.0) - amount / w_other
    total, found = 0.0, []
    for time in sorted(steps):
        total += steps[time]
        found.append((time, total))
    return found


def gap(one: Service, other: Service, w_one: float, w_other: float) -> float:
    """The most by which weighted service differs in any interval of the time.

    For an interval it is the change of the difference, so for any it is highest less lowest; both
    begin at 0.
    """
    levels = [0.0, *(level for _, level in difference(one, other, w_one, w_other))]
    return max(levels) - min(levels)


def bound() -> float:
    """2·max(wp·L_in, wq·M): L_in is the longest prompt, M the tokens of the fullest batch (all
    seats taken by the longest prompts with the longest outputs)."""
    longest = max(loads.LONG_PROMPT[1], loads.SHORT_PROMPT[1])
    fullest = loads.SEATS * (longest + max(loads.LONG_OUTPUT[1], loads.SHORT_OUTPUT[1]))
    return 2 * max(OF_PROMPT * longest, OF_OUTPUT * fullest)


def jain(rates: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has everything; 0 if nobody has anything."""
    squares = len(rates) * sum(rate**2 for rate in rates)
    return sum(rates) ** 2 / squares if squares else 0.0


# Many --------------------------------------------------------------------------------------


def _fifty(parts: Parts) -> Figures:
    many, one = parts["fifty"], parts["one"]
    found = {"tokens_s": many.tokens_s, "one_tokens_s": one.tokens_s}
    if one.tokens_s:
        found["of_one"] = many.tokens_s / one.tokens_s
    wait = waits(many.good)
    return found | percentile("p50_s", wait, 50) | percentile("p99_s", wait, 99)


def _overhead(parts: Parts) -> Figures:
    found: Figures = {}
    for name, part in parts.items():
        found[f"{name}_tokens_s"] = part.tokens_s
        found |= percentile(f"{name}_p50_ms", waits(part.good), 50, 1e3)
    return found


class Lru:
    """Which of so many places least recently used things have lost."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._held: OrderedDict[Hashable, None] = OrderedDict()

    def misses(self, thing: Hashable) -> bool:
        """Uses `thing`; whether it was not held."""
        missed = thing not in self._held
        self._held[thing] = None
        self._held.move_to_end(thing)
        if len(self._held) > self._places:
            self._held.popitem(last=False)
        return missed


# Part → of each of its replies, whether its adapter was loaded for it; None where nobody said.
Cold = dict[str, list[bool | None]]


def _cold(turns: Sequence[Parts], tells_loads: bool) -> list[Cold]:
    """Of every turn. A server that does not tell is taken to keep the adapters last asked for.

    They are followed through all turns in the order in which requests were sent, from nothing: the
    first ones of the first turn may have been there from the warm-up.
    """
    lru = Lru(HOST_CACHE)
    found = []
    for parts in turns:
        cold: Cold = {}
        for name, part in parts.items():
            if tells_loads:
                told = (reply.load_ms for reply in part.replies)
                cold[name] = [None if ms is None else ms > 0 for ms in told]
                continue
            order = sorted(range(len(part.replies)), key=lambda i: part.replies[i].sent_s)
            missed = {i: lru.misses(part.replies[i].adapter) for i in order}
            cold[name] = [missed[i] for i in range(len(part.replies))]
        found.append(cold)
    return found


def cold_and_warm(part: Part, cold: Sequence[bool | None]) -> tuple[list[float], list[float]]:
    """Times to first token of those that waited for a load, and of the others."""
    pairs = [pair for pair in zip(part.replies, cold, strict=True) if pair[0].error is None]
    loaded, ready = (waits(r for r, was in pairs if was is wanted) for wanted in (True, False))
    return loaded, ready


def _thousand(parts: Parts, cold: Cold) -> Figures:
    found: Figures = {}
    for name, part in parts.items():
        found[f"{name} tokens_s"] = part.tokens_s
        loaded, ready = cold_and_warm(part, cold[name])
        if loaded or ready:
            found[f"{name} hits"] = len(ready) / len(loaded + ready)
        for said, values in (("cold", loaded), ("warm", ready)):
            for p in (50, 99):
                found |= percentile(f"{name} {said}_p{p}_s", values, p)
    return found


def thousand_waits(turns: Sequence[Parts], tells_loads: bool) -> dict[str, list[float]]:
    """Times to first token over all turns, by part and cold or warm."""
    found: dict[str, list[float]] = {}
    for parts, cold in zip(turns, _cold(turns, tells_loads), strict=True):
        for name, part in parts.items():
            both = zip(("cold", "warm"), cold_and_warm(part, cold[name]), strict=True)
            for said, values in both:
                found.setdefault(f"{name}, {said}", []).extend(values)
    return found


_FIGURES: dict[str, Callable[[Parts], Figures]] = {
    "flood": _flood,
    "six": _six,
    "bystanders": _bystanders,
    "shares": _shares,
    "fifty": _fifty,
    "overhead": _overhead,
}
