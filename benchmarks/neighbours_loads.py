"""What is asked of a server in one turn of each case of `benchmarks.neighbours`.

Prompts are random token ids, all distinct, so no prefix cache helps. Everything random comes from
the case, the round and the stream: in a round, every server is asked the same by every stream.
Loads that last a time have no last request: what is counted is what came in that time, and the
requests that it cut through are let finish, so that nothing runs when a turn has ended.
"""

import asyncio
import itertools
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from benchmarks import scale
from benchmarks.metrics import Reply
from benchmarks.workload import FIRST_TOKEN, Request, adapter_names

SEED = 42
VOCABULARY = 49152  # of the default base
WARM_UP = -1
WARM_UP_S = 4.0  # the most that a timed load lasts in the warm-up
AFTER_FAILURE_S = 0.2  # a stream that was refused does not ask again at once

RANK_8, RANK_64 = "rank8", "rank64"  # adapter sets

HOT, CLIENTS = 2, 4  # adapters of the flood, and clients of each
FLOOD_S = 60.0
FLOOD_PROMPT, FLOOD_OUTPUT = (32, 256), (16, 64)
VICTIM_PROMPT, VICTIM_OUTPUT = 64, 16
THIRD_AT_S = 5.0
BASE_AT_S = (2.0, 12.0, 22.0, 32.0, 42.0)
VICTIMS = 6

SHARES_S = 45.0
SEATS = 8  # sequences that the engine runs at once
BACKLOG = 12  # clients of each adapter: more than seats, so at least four of each always wait
LONG_PROMPT, LONG_OUTPUT = (128, 256), (32, 64)
SHORT_PROMPT, SHORT_OUTPUT = (16, 48), (8, 24)
OWN_KIND = 0.8  # of an adapter's requests are of its own length

DECODERS, DECODED, DECODER_PROMPT = 4, 400, 32
LOADED, LOAD_EVERY_S, LOAD_PROMPT = 8, 1.0, 16
LOADS_MOST = 60  # of a turn: a server that loads too slowly does not catch up

MANY_S = 15.0
FIFTY = 50
MANY_STREAMS = 32
MANY_PROMPT, MANY_OUTPUT = (32, 128), (16, 48)

THOUSAND = 1000
THOUSAND_S = 20.0
THOUSAND_STREAMS = 16
THOUSAND_PROMPT, THOUSAND_OUTPUT = (32, 96), (8, 24)
ALPHAS = (0.3, 1.0)

ALONE_S = 12.0
ALONE_PROMPT, ALONE_OUTPUT = 80, 32  # of one stream: too few to draw lengths for


@dataclass(frozen=True)
class Part:
    """Replies of one kind in a turn, and the time in which their tokens count, in seconds."""

    begin_s: float
    end_s: float
    replies: tuple[Reply, ...]

    @property
    def good(self) -> list[Reply]:
        """Those that are whole."""
        return [reply for reply in self.replies if reply.error is None]

    @property
    def tokens_s(self) -> float:
        """Output tokens a second."""
        times = [time for reply in self.replies for time in reply.times]
        return sum(self.begin_s < time <= self.end_s for time in times) / (
            self.end_s - self.begin_s
        )

    def packed(self) -> dict[str, Any]:
        """For JSON. Tokens' times are steps of 0.1 ms, each from the one before, which is small."""
        return {
            "begin_s": round(self.begin_s, 4),
            "end_s": round(self.end_s, 4),
            "replies": [_pack(reply) for reply in self.replies],
        }

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> "Part":
        """What `packed` made."""
        replies = [
            Reply(**{**one, "times": tuple(t / 1e4 for t in itertools.accumulate(one["times"]))})
            for one in packed["replies"]
        ]
        return cls(packed["begin_s"], packed["end_s"], tuple(replies))


Parts = dict[str, Part]


def _pack(reply: Reply) -> dict[str, Any]:
    steps = [round(time * 1e4) for time in reply.times]
    times = [now - before for before, now in itertools.pairwise([0, *steps])]
    given = {key: value for key, value in asdict(reply).items() if value is not None}
    return given | {
        "adapter": reply.adapter,
        "due_s": round(reply.due_s, 4),
        "sent_s": round(reply.sent_s, 4),
        "times": times,
    }


class Asks(Protocol):
    """What sends requests: `load.Client`."""

    def now(self) -> float: ...
    async def ask(self, request: Request) -> Reply: ...
    async def in_turn(self, requests: Sequence[Request]) -> list[Reply]: ...


@dataclass(frozen=True)
class Turn:
    """One round of one case on one server."""

    client: Asks
    case: str
    round: int

    def random(self, stream: int) -> np.random.Generator:
        """Where a stream draws from."""
        return np.random.default_rng([SEED, zlib.crc32(self.case.encode()), self.round + 1, stream])

    def lasts(self, seconds: float) -> float:
        """How long a timed load lasts in this round."""
        return min(seconds, WARM_UP_S) if self.round == WARM_UP else seconds


Load = Callable[[Turn], Awaitable[Parts]]
Draw = Callable[[np.random.Generator], tuple[str | None, int, int]]  # adapter, prompt, output


def ask(
    random: np.random.Generator,
    stream: int,
    adapter: str | None,
    prompt: int,
    output: int,
    due_s: float | None = None,
) -> Request:
    """A request with `prompt` random tokens for `output` more."""
    tokens = tuple(random.integers(FIRST_TOKEN, VOCABULARY, prompt).tolist())
    return Request(stream=stream, adapter=adapter, prompt=tokens, output=output, due_s=due_s)


def between(random: np.random.Generator, range_: tuple[int, int]) -> int:
    """One of `range_`, both ends included."""
    return int(random.integers(range_[0], range_[1] + 1))


async def timed(
    turn: Turn,
    seconds: float,
    streams: Iterable[tuple[int, Draw]],
    enough: asyncio.Event | None = None,
) -> Part:
    """Closed loops from now on: each stream sends what it draws, for so many seconds at most.

    When it is `enough`, no more is sent.
    """
    begin = turn.client.now()
    end = begin + turn.lasts(seconds)
    enough = enough or asyncio.Event()

    async def stream(number: int, draw: Draw) -> list[Reply]:
        random = turn.random(number)
        replies = []
        while turn.client.now() < end and not enough.is_set():
            reply = await turn.client.ask(ask(random, number, *draw(random)))
            replies.append(reply)
            if reply.error is not None:
                await asyncio.sleep(AFTER_FAILURE_S)
        return replies

    done = await asyncio.gather(*(stream(number, draw) for number, draw in streams))
    return Part(begin, end, tuple(itertools.chain(*done)))


async def whole(turn: Turn, replies: Coroutine[Any, Any, list[Reply]]) -> Part:
    """A load that has a last request, from its beginning to its end."""
    begin = turn.client.now()
    done = await replies
    return Part(begin, turn.client.now(), tuple(done))


# Two slots ---------------------------------------------------------------------------------


async def flood(turn: Turn) -> Parts:
    """Base requests alone; then a flood, with some to the base and one to a third adapter."""
    third = adapter_names(RANK_8, HOT + 1)[HOT]
    random = turn.random(100)
    victim = (VICTIM_PROMPT, VICTIM_OUTPUT)
    alone = [ask(random, 100, None, *victim) for _ in BASE_AT_S]
    quiet = await whole(turn, turn.client.in_turn(alone))
    begin = turn.client.now()
    base = [
        ask(random, 100, None, *victim, due_s=begin + at)
        for at in BASE_AT_S
        if at < turn.lasts(FLOOD_S)
    ]
    one = [ask(random, 101, third, *victim, due_s=begin + _third_at(turn))]
    hot, bases, thirds = await asyncio.gather(
        _hot(turn),
        whole(turn, turn.client.in_turn(base)),
        whole(turn, turn.client.in_turn(one)),
    )
    return {"alone": quiet, "flood": hot, "base": bases, "third": thirds}


async def six(turn: Turn) -> Parts:
    """Six adapters one after the other, alone and then in a flood of two others.

    The flood ends when they have been answered, or when it is over.
    """
    names = adapter_names(RANK_8, HOT + 1 + VICTIMS)[HOT + 1 :]
    random = turn.random(100)
    victim = (VICTIM_PROMPT, VICTIM_OUTPUT)
    alone = [ask(random, 100, name, *victim) for name in names]
    quiet = await whole(turn, turn.client.in_turn(alone))
    first = turn.client.now() + _third_at(turn)
    asked = [
        ask(random, 100, name, *victim, due_s=None if i else first) for i, name in enumerate(names)
    ]
    enough = asyncio.Event()
    flooding = asyncio.create_task(_hot(turn, enough))
    victims = await whole(turn, turn.client.in_turn(asked))
    enough.set()
    hot = await flooding
    hot = replace(hot, end_s=min(hot.end_s, victims.end_s))
    return {"alone": quiet, "flood": hot, "victims": victims}


def _third_at(turn: Turn) -> float:
    """When a flood has been going on for a while: its requests have not all just begun."""
    return min(THIRD_AT_S, turn.lasts(FLOOD_S) / 4)


async def _hot(turn: Turn, enough: asyncio.Event | None = None) -> Part:
    names = adapter_names(RANK_8, HOT)
    draws = [_mixed(name, FLOOD_PROMPT, FLOOD_OUTPUT) for name in names for _ in range(CLIENTS)]
    return await timed(turn, FLOOD_S, enumerate(draws), enough)


def _mixed(adapter: str | None, prompt: tuple[int, int], output: tuple[int, int]) -> Draw:
    return lambda random: (adapter, between(random, prompt), between(random, output))


async def bystanders(turn: Turn) -> Parts:
    """Four streams on the base; once alone, once while adapters of rank 64 load, one a second."""
    quiet = await whole(turn, _decoders(turn, 0))
    decoding = asyncio.create_task(whole(turn, _decoders(turn, DECODERS)))
    begin = turn.client.now()
    loads = await _loads(turn, decoding)
    return {
        "quiet": quiet,
        "disturbed": await decoding,
        "loads": Part(begin, turn.client.now(), tuple(loads)),
    }


async def _decoders(turn: Turn, first: int) -> list[Reply]:
    output = DECODED // 4 if turn.round == WARM_UP else DECODED
    requests = [
        ask(turn.random(stream), stream, None, DECODER_PROMPT, output)
        for stream in range(first, first + DECODERS)
    ]
    return list(await asyncio.gather(*map(turn.client.ask, requests)))


async def _loads(turn: Turn, until: asyncio.Task[Part]) -> list[Reply]:
    """A token of another adapter every second, until `until` is done or there were LOADS_MOST.

    They go round, and the host cache holds fewer than there are: each has to be loaded.
    """
    random = turn.random(100)
    names = itertools.islice(itertools.cycle(adapter_names(RANK_64, LOADED)), LOADS_MOST)
    begin = turn.client.now()
    sent: list[asyncio.Task[Reply]] = []
    for number, name in enumerate(names, 1):
        due = begin + number * LOAD_EVERY_S
        await asyncio.wait([until], timeout=due - turn.client.now())
        if until.done():
            break
        request = ask(random, 100 + number, name, LOAD_PROMPT, 1, due_s=due)
        sent.append(asyncio.create_task(turn.client.ask(request)))
    return list(await asyncio.gather(*sent))


# Shares ------------------------------------------------------------------------------------


async def shares(turn: Turn) -> Parts:
    """Two adapters that always have more to do than they get, one with longer requests."""
    long, short = (LONG_PROMPT, LONG_OUTPUT), (SHORT_PROMPT, SHORT_OUTPUT)

    def draw(adapter: str, own: Any, other: Any) -> Draw:
        def drawn(random: np.random.Generator) -> tuple[str | None, int, int]:
            prompt, output = own if random.random() < OWN_KIND else other
            return adapter, between(random, prompt), between(random, output)

        return drawn

    first, second = adapter_names(RANK_8, 2)
    streams = [draw(first, long, short), draw(second, short, long)] * BACKLOG
    return {"all": await timed(turn, SHARES_S, enumerate(streams))}


# Many --------------------------------------------------------------------------------------


async def fifty(turn: Turn) -> Parts:
    """The same load on fifty adapters, the i-th of them 1/i as popular as the first, and on one."""
    names = adapter_names(RANK_8, FIFTY)
    one = _mixed(names[0], MANY_PROMPT, MANY_OUTPUT)
    return {
        "fifty": await timed(turn, MANY_S, enumerate([_zipf(names)] * MANY_STREAMS)),
        "one": await timed(turn, MANY_S, enumerate([one] * MANY_STREAMS, MANY_STREAMS)),
    }


def _zipf(names: Sequence[str]) -> Draw:
    shares = 1 / np.arange(1, len(names) + 1)
    shares /= shares.sum()

    def draw(random: np.random.Generator) -> tuple[str | None, int, int]:
        name = names[int(random.choice(len(names), p=shares))]
        return name, between(random, MANY_PROMPT), between(random, MANY_OUTPUT)

    return draw


async def overhead(turn: Turn) -> Parts:
    """The base only: one stream, and many."""
    many = _mixed(None, MANY_PROMPT, MANY_OUTPUT)
    return {
        "one": await timed(turn, ALONE_S, [(0, lambda _: (None, ALONE_PROMPT, ALONE_OUTPUT))]),
        "many": await timed(turn, ALONE_S, enumerate([many] * MANY_STREAMS, 1)),
    }


async def thousand(turn: Turn) -> Parts:
    """A thousand adapters, drawn by numpy's power distribution: P(i < x·1000) = x^α (S-LoRA)."""
    return {
        f"alpha {alpha:g}": await timed(
            turn,
            THOUSAND_S,
            enumerate([_power(alpha)] * THOUSAND_STREAMS, number * THOUSAND_STREAMS),
        )
        for number, alpha in enumerate(ALPHAS)
    }


def _power(alpha: float) -> Draw:
    def draw(random: np.random.Generator) -> tuple[str | None, int, int]:
        name = scale.name(int(random.power(alpha) * THOUSAND))
        return name, between(random, THOUSAND_PROMPT), between(random, THOUSAND_OUTPUT)

    return draw


LOADS: dict[str, Load] = {
    "flood": flood,
    "six": six,
    "bystanders": bystanders,
    "shares": shares,
    "fifty": fifty,
    "thousand": thousand,
    "overhead": overhead,
}


def everything(parts: Parts) -> Iterator[Reply]:
    """All replies of a turn."""
    for part in parts.values():
        yield from part.replies
