"""Who runs next: queues in front of the engine, fair between adapters and between their callers.

Synchronous, no I/O, no clock: it decides, the gateway does. Fairness is by virtual token counters
(Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each adapter, and the base
as one of them, has a counter of the tokens it was served, over its weight; the waiting request of
the least counter goes first. Below an adapter the same holds between the keys that call it.

One that begins to wait is lifted, so that nobody saves up. The paper lifts it to the least counter
that waits; then adapters that each come with one request, and others after them, stay before one
that has had a request served for as long as new ones come, and with hundreds of adapters that is
for ever. Here it is lifted to the system's virtual time, which goes on with all that is served over
the weights of all that wait or run (Parekh and Gallager, "A Generalized Processor Sharing Approach
to Flow Control", 1993): who waits is behind it by less and less, whoever comes. It is held between
the least counter that waits and the greatest there is, and so the paper's bound stands.

What the paper does not have are slots. At most `Limits.slots` different adapters are in flight.
When one waits for a slot, an adapter that has had its quantum and is ahead of it *drains*: nothing
more of it is admitted, but for what ends before the last of its running requests does, and its slot
turns over when that has ended. What is being loaded waits for a slot as well, so load and drain go
on at the same time; but a load that outlasts its drain gets no other until it has ended.
"""

import heapq
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.errors import Overloaded
from server.residency import State

PROMPT, OUTPUT = 1.0, 2.0  # what a token of each counts: the paper's weights
BASE = None
T = TypeVar("T", bound=Hashable)
REMEMBERED = 1000  # counters kept before those that mean nothing any more are let go


@dataclass(frozen=True)
class Limits:
    """`requests` and `prefill` are the engine's: sequences in flight, and tokens of a step.

    So many prompt tokens may be in flight without a first token as the engine takes in one step:
    less would leave it idle, more would wait in a queue of its own that knows no fairness.
    """

    slots: int
    requests: int
    prefill: int
    waiting: int = 2048  # requests, in all
    of_adapter: int = 512
    of_key: int = 1024
    quantum: float = 512  # service that a slot gives before it turns over


@dataclass(eq=False)
class Ticket:
    """One request, from its arrival to its end.

    `adapter` is whose share it uses, `digest` what must be in a slot (None: nothing, the base).
    `prompt` and `most` are tokens: of the prompt, and of the longest reply. `seats` is how many
    sequences it makes; `output` how many tokens of all of them have come so far.
    """

    adapter: str
    digest: str | None
    prompt: int
    most: int
    key: str = ""
    seats: int = 1
    arrived: float = 0.0
    output: int = 0
    admitted: bool = False
    number: int = 0  # in the order of joining

    def remaining(self) -> int:
        """Tokens that it may still take, one after the other."""
        return self.most - self.output // self.seats


class _Least(Generic[T]):
    """Things by a number that may change while they are in it: the least first."""

    def __init__(self, number: Callable[[T], float]) -> None:
        self._number = number
        self._heap: list[tuple[float, int, T]] = []
        self._entries = itertools.count()
        self._entry: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._entry)

    def __contains__(self, thing: T) -> bool:
        return thing in self._entry

    def add(self, thing: T) -> None:
        """Puts it in. If it is there already, this is how one learns that its number has fallen."""
        if len(self._heap) > 2 * len(self._entry) + REMEMBERED:
            self._heap = [(self._number(each), entry, each) for each, entry in self._entry.items()]
            heapq.heapify(self._heap)
        if thing not in self._entry:
            self._entry[thing] = next(self._entries)
        heapq.heappush(self._heap, (self._number(thing), self._entry[thing], thing))

    def discard(self, thing: T) -> None:
        """Takes it out, if it is there. What it leaves in the heap is passed over."""
        self._entry.pop(thing, None)

    def first(self) -> T | None:
        """The one of the least number; of equals the one that came first."""
        while self._heap:
            number, entry, thing = self._heap[0]
            if self._entry.get(thing) != entry:
                heapq.heappop(self._heap)
            elif number < (now := self._number(thing)):
                heapq.heapreplace(self._heap, (now, entry, thing))
            else:
                return thing
        return None

    def smallest(self, count: int) -> list[float]:
        """The `count` least numbers, ascending."""
        return heapq.nsmallest(count, map(self._number, self._entry))


class _Shares:
    """Virtual token counters, by name."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._level = 0.0  # of the last one that waited, when nobody does
        self._virtual = 0.0  # time: what all would have been served, had each its share always
        # Of those that wait or run, as they were when they began to: they may be changed.
        self._active: dict[str, float] = {}
        self._weight = 0.0  # of all these
        self._least = _Least(self.__getitem__)
        self.waiting: Counter[str] = Counter()
        self.running: Counter[str] = Counter()

    def __getitem__(self, name: str) -> float:
        return self._counters.get(name, 0.0)

    def join(self, name: str) -> None:
        """`name` has one more that waits."""
        if name not in self._least:
            if len(self._counters) > 2 * (REMEMBERED + len(self.waiting) + len(self.running)):
                self._forget()
            self._virtual = self._lift()
            self._counters[name] = max(self[name], self._virtual)
            self._least.add(name)
        self._add(self.waiting, name)

    def leave(self, name: str) -> None:
        """`name` has one less that waits."""
        self._remove(self.waiting, name)
        if name not in self.waiting:
            self._least.discard(name)
            if not self.waiting:
                self._level = self[name]

    def admit(self, name: str) -> None:
        """One of `name` waits no longer: it runs."""
        self._add(self.running, name)
        self.leave(name)

    def end(self, name: str) -> None:
        """`name` has one less that runs."""
        self._remove(self.running, name)

    def charge(self, name: str, service: float) -> None:
        """`name`, of which one runs, was served so much."""
        self._counters[name] += service / self._active[name]
        self._virtual += service / self._weight

    def floor(self) -> float:
        """What one that begins to wait is lifted to at least; never falls."""
        least = self._least.first()
        return self._level if least is None else self[least]

    def _lift(self) -> float:
        """The virtual time, held between the least counter that waits and the greatest there is."""
        counters = map(self.__getitem__, itertools.chain(self.waiting, self.running))
        greatest = max(counters, default=0.0)
        return max(self.floor(), min(self._virtual, greatest))

    def _add(self, to: Counter[str], name: str) -> None:
        if name not in self._active:
            self._active[name] = self._weights.get(name, 1.0)
            self._weight += self._active[name]
        to[name] += 1

    def _remove(self, of: Counter[str], name: str) -> None:
        _decrease(of, name)
        if name not in self.waiting and name not in self.running:
            weight = self._active.pop(name)
            # From anew where it can be: sums of fractions drift.
            self._weight = self._weight - weight if self._active else 0.0

    def _forget(self) -> None:
        # At or below the floor a counter says no more than one that is not there, unless it will be
        # charged: what runs goes on from where it is.
        floor = self.floor()
        ahead = (pair for pair in self._counters.items() if pair[1] > floor)
        kept = dict(heapq.nlargest(REMEMBERED, ahead, key=lambda pair: pair[1]))
        self._counters = kept | {name: self[name] for name in self.waiting | self.running}


def _decrease(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


@dataclass(eq=False)
class _Queue:
    """The requests of one digest: `lanes` are those that wait, by adapter, then by key."""

    digest: str | None
    lanes: dict[str, dict[str, OrderedDict[Ticket, None]]] = field(default_factory=dict)
    waiting: int = 0
    running: dict[Ticket, None] = field(default_factory=dict)
    slot: bool = False
    service: float = 0.0  # since it took its slot
    draining: bool = False
    late: bool = False  # it is being loaded, and a slot has turned over for it in vain

    def remaining(self) -> int:
        """Tokens until the last of its running requests has ended, at most."""
        return max((ticket.remaining() for ticket in self.running), default=0)


class Admission:
    """The queues. `standing(digest)` says whether it is loaded; `changed` is to be told of changes.

    `weights` of adapters and `key_weights` of keys are shares relative to each other; 1 if absent.
    """

    def __init__(
        self,
        limits: Limits,
        standing: Callable[[str], State | None],
        weights: Mapping[str, float] | None = None,
        key_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.limits = limits
        self._standing = standing
        self._key_weights = {} if key_weights is None else key_weights
        self._adapters = _Shares(weights or {})
        self._keys: dict[str, _Shares] = {}  # by adapter, the last to be joined last
        self._numbers = itertools.count()
        self._of_key: Counter[str] = Counter()
        self._queues: dict[str | None, _Queue] = {}
        self._holders: dict[_Queue, None] = {}  # that hold a slot, or need none
        self._taken = 0  # slots
        # Those that wait for a slot: loaded, to be loaded, and being loaded.
        self._warm = _Least(self._counter)
        self._cold = _Least(self._counter)
        self._loading: dict[_Queue, None] = {}
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()  # by arrival
        self._running = 0  # sequences
        self._prefill = 0  # prompt tokens of those that have no first token yet

    # -- a request's way ----------------------------------------------------------------------

    def join(self, ticket: Ticket) -> None:
        """Puts a request in its queue.

        Raises:
            Overloaded: a queue that it needs is full.
        """
        self._refuse_if_full(ticket)
        queue = self._queues.get(ticket.digest)
        if queue is None:
            queue = self._queues[ticket.digest] = _Queue(ticket.digest)
            if ticket.digest is BASE:
                queue.slot = True
                self._holders[queue] = None
        ticket.number = next(self._numbers)
        self._adapters.join(ticket.adapter)
        self._keys_for(ticket.adapter).join(ticket.key)
        self._of_key[ticket.key] += 1
        self._waiting[ticket] = None
        sooner = bool(queue.lanes) and self._adapters[ticket.adapter] < self._counter(queue)
        lanes = queue.lanes.setdefault(ticket.adapter, {})
        lanes.setdefault(ticket.key, OrderedDict())[ticket] = None
        queue.waiting += 1
        if not queue.slot:
            self._line_up(queue, sooner=sooner)

    def next(self) -> Ticket | None:
        """Admits the request whose turn it is; None if nothing can be admitted now."""
        self._turn_over()
        ticket = self._best()
        if ticket is None or not self._fits(ticket):
            return None
        queue = self._queues[ticket.digest]
        self._forget_waiting(queue, ticket)
        self._adapters.admit(ticket.adapter)
        self._keys[ticket.adapter].admit(ticket.key)
        if not queue.slot:
            self._take_slot(queue)
        ticket.admitted = True
        queue.running[ticket] = None
        self._running += ticket.seats
        self._prefill += ticket.prompt
        self._charge(queue, ticket, PROMPT * ticket.prompt)
        return ticket

    def progress(self, ticket: Ticket, output: int) -> None:
        """`output` tokens of a request in flight have come so far."""
        more = output - ticket.output
        if more <= 0:
            return
        if not ticket.output:
            self._prefill -= ticket.prompt
        ticket.output = output
        self._charge(self._queues[ticket.digest], ticket, OUTPUT * more)

    def leave(self, ticket: Ticket) -> None:
        """It has ended, or waits no longer; once more does nothing."""
        queue = self._queues.get(ticket.digest)
        if queue is None:
            return
        if ticket in queue.running:
            del queue.running[ticket]
            self._adapters.end(ticket.adapter)
            self._keys[ticket.adapter].end(ticket.key)
            self._running -= ticket.seats
            if not ticket.output:
                self._prefill -= ticket.prompt
            if not queue.running and queue.digest is not BASE:
                self._give_slot(queue)
        elif ticket in self._waiting:
            self._forget_waiting(queue, ticket)
            self._adapters.leave(ticket.adapter)
            self._keys[ticket.adapter].leave(ticket.key)
            if not queue.waiting:
                self._step_aside(queue)
        if not queue.waiting and not queue.running:
            del self._queues[queue.digest]
            self._holders.pop(queue, None)

    # -- what is loaded -----------------------------------------------------------------------

    def changed(self, digest: str) -> None:
        """`standing` of a digest has changed."""
        queue = self._queues.get(digest)
        if queue is not None and queue.waiting and not queue.slot:
            self._line_up(queue)

    def wanted(self) -> str | None:
        """The digest to load next: of those that are not, the one whose turn comes first.

        None while as many loaded ones as there are slots come before it: what is loaded long before
        its turn only pushes out others that wait.
        """
        queue = self._cold.first()
        if queue is None:
            return None
        slots = self.limits.slots
        if len(self._warm) >= slots and self._warm.smallest(slots)[-1] <= self._counter(queue):
            return None
        return queue.digest

    def precedes(self, digest: str, other: str) -> bool:
        """Whether a request waits for `digest` that comes before those that wait for `other`."""
        if not self.waits(digest) or not self.waits(other):
            return self.waits(digest)
        return self._counter(self._queues[digest]) <= self._counter(self._queues[other])

    # -- what can be asked --------------------------------------------------------------------

    def has(self, digest: str) -> bool:
        """Whether a request for `digest` waits or runs."""
        return digest in self._queues

    def waits(self, digest: str) -> bool:
        """Whether a request waits for `digest`."""
        queue = self._queues.get(digest)
        return queue is not None and queue.waiting > 0

    def waiting(self, digest: str) -> list[Ticket]:
        """Requests that wait for `digest`."""
        queue = self._queues.get(digest)
        lanes = queue.lanes.values() if queue else ()
        return [ticket for keys in lanes for lane in keys.values() for ticket in lane]

    def running(self) -> Iterator[Ticket]:
        """Requests in flight."""
        for queue in self._queues.values():
            yield from queue.running

    def oldest(self) -> Ticket | None:
        """Who has waited longest."""
        return next(iter(self._waiting), None)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Waiting and running requests, by adapter; those that have neither are not in it."""
        waiting, running = self._adapters.waiting, self._adapters.running
        return {name: (waiting[name], running[name]) for name in waiting | running}

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._queues)

    def left_behind(self) -> list[str]:
        """Books that are not even when no request waits or runs; for tests."""
        books = {
            "slots": self._taken,
            "sequences": self._running,
            "prompt tokens": self._prefill,
            "waiting": len(self._waiting) + len(self._of_key) + len(self._adapters.waiting),
            "in line": len(self._warm) + len(self._cold) + len(self._loading),
            "running": len(self._adapters.running),
            "holders": len(self._holders),
        }
        return [f"{name}: {count}" for name, count in books.items() if count and not self._queues]

    def counter(self, adapter: str) -> float:
        """The virtual token counter of `adapter`."""
        return self._adapters[adapter]

    def __len__(self) -> int:
        return len(self._waiting)

    # -- inside -------------------------------------------------------------------------------

    def _refuse_if_full(self, ticket: Ticket) -> None:
        limits = self.limits
        if len(self._waiting) >= limits.waiting:
            raise Overloaded(f"{limits.waiting} requests wait already. Ask again later.")
        if self._adapters.waiting[ticket.adapter] >= limits.of_adapter:
            raise Overloaded(
                f"{limits.of_adapter} requests wait for {ticket.adapter} already. Ask again later."
            )
        if ticket.key and self._of_key[ticket.key] >= limits.of_key:
            raise Overloaded(f"{limits.of_key} of your requests wait already. Ask again later.")

    def _keys_for(self, adapter: str) -> _Shares:
        """The shares of the keys that call `adapter`, from which one is about to join."""
        self._keys[adapter] = shares = self._keys.pop(adapter, None) or _Shares(self._key_weights)
        waiting, running = self._adapters.waiting, self._adapters.running
        if len(self._keys) > 2 * (REMEMBERED + len(waiting) + len(running)):
            idle = [name for name in self._keys if name not in waiting and name not in running]
            for name in idle[:-REMEMBERED]:
                del self._keys[name]
        return shares

    def _counter(self, queue: _Queue) -> float:
        return min(map(self._adapters.__getitem__, queue.lanes), default=math.inf)

    def _first(self, heads: list[Ticket]) -> Ticket:
        """Whose turn it is: the adapters' counters say, then the keys', then who came first."""
        if len(heads) == 1:
            return heads[0]
        adapter = min(heads, key=lambda each: (self._adapters[each.adapter], each.number)).adapter
        keys = self._keys[adapter]
        return min(
            (each for each in heads if each.adapter == adapter),
            key=lambda each: (keys[each.key], each.number),
        )

    def _head(self, queue: _Queue) -> Ticket:
        """Whose turn it is in a queue in which somebody waits."""
        lanes = queue.lanes.values()
        return self._first([next(iter(lane)) for keys in lanes for lane in keys.values()])

    def _best(self) -> Ticket | None:
        """Whose turn it is of those of which something may be admitted."""
        heads = [
            self._head(queue) for queue in self._holders if queue.waiting and self._may_go_on(queue)
        ]
        if self._taken < self.limits.slots and (newcomer := self._warm.first()) is not None:
            heads.append(self._head(newcomer))
        return self._first(heads) if heads else None

    def _may_go_on(self, queue: _Queue) -> bool:
        if not queue.draining:
            return True
        ticket = self._head(queue)
        steps = ticket.most + 1 + -(-ticket.prompt // self.limits.prefill)
        return steps <= queue.remaining()

    def _fits(self, ticket: Ticket) -> bool:
        if not self._running:
            return True
        return (
            self._running + ticket.seats <= self.limits.requests
            and self._prefill < self.limits.prefill
        )

    def _line_up(self, queue: _Queue, *, sooner: bool = False) -> None:
        """Puts it among those that wait for a slot, by what is loaded; `sooner` than before."""
        assert queue.digest is not None  # noqa: S101 (the base waits for no slot)
        standing = self._standing(queue.digest)
        queue.late = queue.late and standing is State.LOADING
        if standing is State.LOADING:
            self._step_aside(queue)
            self._loading[queue] = None
            return
        order = self._cold if standing is None else self._warm
        if queue not in order:
            self._step_aside(queue)
        elif not sooner:
            return
        order.add(queue)

    def _step_aside(self, queue: _Queue) -> None:
        self._warm.discard(queue)
        self._cold.discard(queue)
        self._loading.pop(queue, None)

    def _take_slot(self, queue: _Queue) -> None:
        self._step_aside(queue)
        queue.slot, queue.service, queue.draining = True, 0.0, False
        self._holders[queue] = None
        self._taken += 1

    def _give_slot(self, queue: _Queue) -> None:
        if queue.draining and not self._warm and (early := self._early()):
            early[0].late = True
        queue.slot = queue.draining = False
        self._holders.pop(queue)
        self._taken -= 1
        if queue.waiting:
            self._line_up(queue)

    def _turn_over(self) -> None:
        """Has adapters drain that are ahead of those that wait for a slot."""
        waiting = len(self._warm) + len(self._cold) + len(self._early())
        draining = [queue for queue in self._holders if queue.draining]
        missing = waiting - (self.limits.slots - self._taken)
        for queue in draining[max(0, missing) :]:  # whoever waited for its slot has gone
            queue.draining = False
        if missing <= len(draining):
            return
        ripe = {
            queue: self._ahead(queue)
            for queue in self._holders
            if queue.digest is not BASE
            and not queue.draining
            and queue.service >= self.limits.quantum
        }
        if not ripe or max(ripe.values()) < self._least_waiting():
            return
        coming = waiting - missing + len(draining)
        for counter in self._waiting_counters(coming + len(ripe))[coming:]:
            ahead = {queue: number for queue, number in ripe.items() if number >= counter}
            if not ahead:
                return
            # Of those that are about as far ahead, the one that is done first.
            most = max(ahead.values()) - self.limits.quantum
            queue = min((q for q in ahead if ahead[q] >= most), key=_Queue.remaining)
            queue.draining = True
            del ripe[queue]

    def _early(self) -> list[_Queue]:
        """Those that are being loaded, and for which a slot may turn over."""
        return [queue for queue in self._loading if not queue.late]

    def _least_waiting(self) -> float:
        """The least counter of those for which a slot may turn over."""
        first = (self._warm.first(), self._cold.first(), *self._early())
        return min(self._counter(queue) for queue in first if queue is not None)

    def _waiting_counters(self, count: int) -> list[float]:
        """The least counters of those for which a slot may turn over, ascending."""
        early = [self._counter(queue) for queue in self._early()]
        return sorted(self._warm.smallest(count) + self._cold.smallest(count) + early)[:count]

    def _ahead(self, queue: _Queue) -> float:
        """The counter of what runs in a slot."""
        adapters = {ticket.adapter for ticket in queue.running}
        return max(map(self._adapters.__getitem__, adapters), default=0.0)

    def _forget_waiting(self, queue: _Queue, ticket: Ticket) -> None:
        lanes = queue.lanes[ticket.adapter]
        del lanes[ticket.key][ticket]
        if not lanes[ticket.key]:
            del lanes[ticket.key]
        if not lanes:
            del queue.lanes[ticket.adapter]
        queue.waiting -= 1
        del self._waiting[ticket]
        _decrease(self._of_key, ticket.key)

    def _charge(self, queue: _Queue, ticket: Ticket, service: float) -> None:
        queue.service += service
        self._adapters.charge(ticket.adapter, service)
        self._keys[ticket.adapter].charge(ticket.key, service)
