"""Admission against random schedules: limits, turns, shares and books hold whatever happens when.

`World` is an engine in lockstep, for which residency loads: in a step every request in flight gets
one token for each of its seats, the first one in the step after its admission.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server import admission as module
from server.admission import OUTPUT, PROMPT, Admission, Limits, Ticket
from server.errors import Overloaded
from server.residency import Entry, Residency, State

seeds = st.integers(0, 2**32 - 1)
LOADING = 2  # loads at once, as in the gateway


def ticket(adapter: str = "base", prompt: int = 10, most: int = 10, **more: object) -> Ticket:
    """A request for the adapter of that name; `digest` is the adapter's name unless given."""
    digest = more.pop("digest", None if adapter == "base" else adapter)
    return Ticket(adapter, digest, prompt, most, **more)  # type: ignore[arg-type]


def alone(limits: Limits, **more: object) -> Admission:
    """An admission for which everything is loaded."""
    return Admission(limits, lambda digest: State.HOST, **more)  # type: ignore[arg-type]


def admitted(admission: Admission) -> list[Ticket]:
    return list(iter(admission.next, None))


@dataclass(eq=False)
class Sent:
    """A request as the world sees it; `takes` is how many tokens a seat really makes."""

    ticket: Ticket
    takes: int
    joined: int
    entry: Entry | None = None
    admitted: int | None = None


class World:
    def __init__(
        self,
        limits: Limits,
        places: int | None = None,
        *,
        load_steps: Callable[[], int] = lambda: 1,
        fails: Callable[[], bool] = lambda: False,
        weights: dict[str, float] | None = None,
        key_weights: dict[str, float] | None = None,
    ) -> None:
        self.residency = Residency(places or limits.slots, limits.slots)
        self.admission = Admission(limits, self.residency.standing, weights, key_weights)
        self.residency.changed = self.admission.changed
        self.limits = limits
        self.step = 0
        self.sent: dict[Ticket, Sent] = {}  # that wait or run
        self.loads: dict[str, int] = {}  # digest → the step that ends it
        self.ended: list[Sent] = []
        self.order: list[int] = []  # numbers of tickets, as they were admitted
        self.service: Counter[str] = Counter()  # by adapter
        self.of_key: Counter[str] = Counter()
        self.most_tokens = 0  # in flight, prompts and whole replies
        self._load_steps, self._fails = load_steps, fails

    def join(self, ticket: Ticket, takes: int | None = None) -> Ticket:
        self.admission.join(ticket)
        self.sent[ticket] = Sent(ticket, takes or ticket.most, self.step)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        sent = self.sent.pop(ticket)
        self.admission.leave(ticket)
        self.admission.leave(ticket)  # once more does nothing
        if sent.entry is not None:
            self.residency.release(sent.entry)
        self.ended.append(sent)

    def running(self) -> list[Sent]:
        return [sent for sent in self.sent.values() if sent.admitted is not None]

    def waiting(self) -> list[Sent]:
        return [sent for sent in self.sent.values() if sent.admitted is None]

    def tick(self) -> None:
        """One step: what is loaded arrives, turns are granted, tokens come, requests end."""
        self.step += 1
        for digest in [digest for digest, end in self.loads.items() if end <= self.step]:
            del self.loads[digest]
            if not self._fails():
                self.residency.loaded(digest, 1, 1)
                continue
            for ticket in self.admission.waiting(digest):
                self.leave(ticket)
            self.residency.failed(digest)
        self.decide()
        for sent in self.running():
            if sent.admitted != self.step:
                self.progress(sent)

    def progress(self, sent: Sent) -> None:
        ticket = sent.ticket
        self.admission.progress(ticket, ticket.output + ticket.seats)
        self.charge(ticket, OUTPUT * ticket.seats)
        if ticket.output >= sent.takes * ticket.seats:
            self.leave(ticket)

    def charge(self, ticket: Ticket, service: float) -> None:
        self.service[ticket.adapter] += int(service)
        self.of_key[ticket.key] += int(service)

    def decide(self) -> None:
        self.load_wanted()
        while (ticket := self.admission.next()) is not None:
            self.grant(self.sent[ticket])
            self.hold_limits(ticket)
        self.load_wanted()
        running = [sent.ticket for sent in self.running()]
        tokens = sum(each.prompt + each.most * each.seats for each in running)
        self.most_tokens = max(self.most_tokens, tokens)

    def load_wanted(self) -> None:
        admission, residency = self.admission, self.residency
        while len(self.loads) < LOADING and (digest := admission.wanted()) is not None:

            def before(other: str, digest: str = digest) -> bool:
                return admission.precedes(other, digest)

            if not residency.begin(digest, admission.waits) and not residency.begin(digest, before):
                return
            self.loads[digest] = self.step + self._load_steps()

    def grant(self, sent: Sent) -> None:
        sent.admitted = self.step
        self.order.append(sent.ticket.number)
        self.charge(sent.ticket, PROMPT * sent.ticket.prompt)
        if sent.ticket.digest is not None:
            sent.entry = self.residency.lease(sent.ticket.digest)  # raises if it is not loaded
            self.residency.enter(sent.ticket.digest)  # raises if no slot is free

    # -- what must hold -----------------------------------------------------------------------

    def hold_limits(self, last: Ticket) -> None:
        running = [sent.ticket for sent in self.running()]
        assert len({each.digest for each in running} - {None}) <= self.limits.slots
        if len(running) == 1:
            return  # one alone may be larger
        assert sum(each.seats for each in running) <= self.limits.requests
        prefill = sum(each.prompt for each in running if not each.output)
        assert prefill - last.prompt < self.limits.prefill

    def hold_work(self) -> None:
        """Whoever waits when nothing more can be begun has a reason to."""
        before = None
        while before != (before := (dict(self.loads), len(self.order))):
            self.decide()
        waiting = [sent.ticket for sent in self.waiting()]
        running = [sent.ticket for sent in self.running()]
        slots = {each.digest for each in running} - {None}
        queues = self.admission._queues.values()
        draining = {queue.digest for queue in queues if queue.draining}
        late = {queue.digest for queue in queues if queue.late}
        assert late <= self.loads.keys()
        in_line = {
            each.digest for each in waiting if each.digest not in slots | late and each.digest
        }
        free = self.limits.slots - len(slots)
        assert not draining or len(draining) <= len(in_line) - free
        could = [
            each
            for each in waiting
            if each.digest is None
            or (each.digest in slots and each.digest not in draining)
            or (each.digest in in_line and free and self.on_host(each.digest))
        ]
        before_end = [each for each in waiting if each.digest in draining]  # some of them may be
        seats = sum(each.seats for each in running)
        prefill = sum(each.prompt for each in running if not each.output)
        assert (
            not could
            or prefill >= self.limits.prefill
            or any(seats + each.seats > self.limits.requests for each in [*could, *before_end])
        )
        assert not could or running

    def on_host(self, digest: str) -> bool:
        return self.residency.standing(digest) is State.HOST

    def hold_answers(self) -> None:
        """What can be asked agrees with our own books."""
        waiting, running = self.waiting(), self.running()
        assert len(self.admission) == len(waiting)
        assert self.admission.busy == bool(self.sent)
        assert self.admission.oldest() is (waiting[0].ticket if waiting else None)
        assert set(self.admission.running()) == {sent.ticket for sent in running}
        counts = self.admission.counts()
        for name in {sent.ticket.adapter for sent in self.sent.values()}:
            both = [sum(s.ticket.adapter == name for s in some) for some in (waiting, running)]
            assert counts.pop(name) == tuple(both)
        assert not counts
        self.hold_order()

    def hold_order(self) -> None:
        """`precedes` is one order of all for which somebody waits, and they come before others."""
        precedes = self.admission.precedes
        waiting = {s.ticket.digest for s in self.waiting()} - {None}
        others = {s.ticket.digest for s in self.sent.values()} - waiting - {None}
        ranks = {a: sum(precedes(b, a) for b in waiting if b and a) for a in waiting}
        for a in waiting:
            for b in waiting:
                assert precedes(a or "", b or "") == (ranks[a] <= ranks[b])
            assert all(precedes(a or "", b or "") for b in others)
            assert not any(precedes(b or "", a or "") for b in others)


# Any schedule ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(seed=seeds)
def test_any_schedule(seed: int) -> None:
    """Joins, ends, disconnects, loads that fail or take long, evictions by hand; at the end all is
    served, and the books are even."""
    random = Random(seed)
    slots = random.randint(1, 3)
    limits = Limits(
        slots,
        random.randint(1, 8),
        random.choice((50, 200)),
        waiting=40,
        quantum=random.choice((0, 50, 500)),
    )
    digests = [f"d{i}" for i in range(random.randint(1, 5))]
    # Versions of one adapter have several digests, and equal adapters have one.
    named = {
        f"a{i}": random.sample(digests, random.randint(1, min(2, len(digests))))
        for i in range(random.randint(1, 6))
    }
    world = World(
        limits,
        slots + random.randint(0, 3),
        load_steps=lambda: random.choice((1, 1, 5, 20)),
        fails=lambda: random.random() < 0.1,
        weights={"a0": 3, "a1": 0.5},
        key_weights={"x": 2},
    )
    for _ in range(random.choice((50, 250))):
        for _ in range(random.choice((0, 0, 1, 3))):
            name = random.choice(["base", *named])
            asked = ticket(
                name,
                random.randint(1, 60),
                random.randint(1, 30),
                digest=random.choice(named[name]) if name in named else None,
                key=random.choice("xyz"),
                seats=random.choice((1, 1, 1, 2, 9)),
            )
            try:
                world.join(asked, random.randint(1, asked.most))
            except Overloaded:
                assert len(world.admission) == limits.waiting
        if world.sent and random.random() < 0.1:
            world.leave(random.choice(list(world.sent)))
        if random.random() < 0.1:
            world.residency.drop(random.choice(digests))
        world.tick()
        world.hold_work()
        if random.random() < 0.2:
            world.hold_answers()
    for _ in range(5000):
        if not world.sent:
            break
        world.tick()
    assert not world.sent
    assert world.admission.left_behind() == []


# Starvation --------------------------------------------------------------------------------


def longest_wait(limits: Limits, before: float, most: int, load_steps: int) -> float:
    """Steps that a request may wait which `before` others precede.

    Each of those times, and its own,
    - its adapter may have to be loaded: `load_steps`, for all of which the places may be in use
      until a slot turns over;
    - a slot must turn over. Whatever is admitted from now on has a counter of at least its own, so
      the one in the slot is ahead or ends by itself within `most` + 1 steps. It drains when it had
      its quantum, of which every step brings a token, and has ended at most `most` + 2 later;
    - a running request must end for its seats, within `most` + 1 steps.
    """
    turn = limits.quantum / OUTPUT + 2 * (most + 2)
    return (before + 1) * (load_steps + turn + most + 1)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_nobody_starves_in_a_flood(seed: int) -> None:
    random = Random(seed)
    limits = Limits(
        random.randint(1, 3), random.randint(2, 8), 100, quantum=random.choice((0, 40, 200))
    )
    most, load_steps = 12, random.choice((1, 4))
    # Hot ones: adapters, versions of one adapter, the base, and adapters of equal bytes.
    hot = [("base", None), ("a", "a@1"), ("a", "a@2"), ("b", "b"), ("c", "shared"), ("d", "shared")]
    hot = random.sample(hot, random.randint(1, len(hot)))
    world = World(limits, limits.slots + random.randint(0, 2), load_steps=lambda: load_steps)
    victim = random.choice(
        [
            ticket("victim", 5, 5),
            ticket("victim", 5, 5, digest="shared"),
            ticket("victim", 9, 2, seats=2),
            ticket("base-like", 5, 5, digest=None),
        ]
    )

    def keep_flooding() -> None:
        waiting = Counter(sent.ticket.digest for sent in world.waiting())
        for name, digest in hot:
            for _ in range(3 - waiting[digest]):
                length = random.randint(1, most)
                world.join(ticket(name, random.randint(1, 30), length, digest=digest))

    for _ in range(random.randint(1, 100)):
        keep_flooding()
        world.tick()
    came = world.step
    sent = world.sent[world.join(victim)]
    # It may have been lifted above others, who catch up first. Then nobody who waits is before it
    # by more than one request, for its counter is then above.
    own = world.admission.counter(victim.adapter)
    behind = [max(0.0, own - world.admission.counter(name)) for name, _ in hot]
    before = sum(1 + service / (PROMPT + OUTPUT) for service in behind)
    longest = longest_wait(limits, before, most, load_steps)
    while sent.admitted is None:
        assert world.step - came <= longest
        keep_flooding()
        world.tick()


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_nobody_starves_however_many_others_come_for_the_first_time(seed: int) -> None:
    """More than there are slots for, each with one request, and then another in its place."""
    random = Random(seed)
    limits = Limits(random.randint(1, 3), 8, 100, quantum=random.choice((0, 40)))
    most, load_steps = 12, random.choice((1, 4))
    prompt, output = 10, random.randint(1, most)
    newcomers = limits.slots + random.randint(2, 4)
    world = World(limits, limits.slots + random.randint(0, 2), load_steps=lambda: load_steps)
    names = (f"new{i}" for i in itertools.count())

    def tick() -> None:
        for _ in range(newcomers - sum(s.ticket.adapter != "steady" for s in world.sent.values())):
            world.join(ticket(next(names), prompt, output))
        world.tick()

    for _ in range(3):
        sent = world.sent[world.join(ticket("steady", random.randint(1, 30), most))]
        floor = min(world.admission.counter(each.ticket.adapter) for each in world.waiting())
        behind = world.admission.counter("steady") - floor
        # Time reaches its counter when all have been served so much, and newcomers come after it
        # from then on; before it are those who waited at its arrival, and who do when it is then.
        served = (newcomers + 1) * behind / (PROMPT * prompt + OUTPUT * output)
        longest = longest_wait(limits, served + 2 * newcomers, most, load_steps)
        while sent.admitted is None:
            assert world.step - sent.joined <= longest
            tick()
        while sent.ticket in world.sent:
            tick()


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_everybody_in_a_flood_is_served(seed: int) -> None:
    """Each of the flood itself waits for at most the requests of each other that fit between two of
    its own, of which there are `depth` before it."""
    random = Random(seed)
    limits = Limits(random.randint(1, 2), 4, 100, quantum=random.choice((0, 40)))
    most, depth = 8, 2
    hot = ["base", *(f"a{i}" for i in range(random.randint(1, 4)))]
    world = World(limits, limits.slots + random.randint(0, 1))
    # In service, what a request may cost: others may be served so much until they have caught up.
    cost = PROMPT * 20 + OUTPUT * most
    catches_up = (limits.requests + limits.quantum / cost + 1) * (depth + 1)
    longest = longest_wait(limits, len(hot), most, 1) * catches_up
    while world.step < 2 * longest:
        for name in hot:
            waiting = sum(sent.ticket.adapter == name for sent in world.waiting())
            for _ in range(depth - waiting):
                world.join(ticket(name, random.randint(1, 20), random.randint(1, most)))
        world.tick()
        if world.step % 20 == 0:
            assert all(world.step - sent.joined <= longest for sent in world.waiting())
    assert {sent.ticket.adapter for sent in world.ended} == set(hot)


@pytest.mark.parametrize("slots", [1, 2])
def test_two_versions_of_one_adapter_share_its_turns(slots: int) -> None:
    world = World(Limits(slots, 2, 100), 2)
    for _ in range(60):
        for digest in ("a@1", "a@2"):
            if not any(sent.ticket.digest == digest for sent in world.waiting()):
                world.join(ticket("a", 10, 8, digest=digest))
        world.tick()
    served = Counter(sent.ticket.digest for sent in world.ended)
    assert abs(served["a@1"] - served["a@2"]) <= 40 * (2 - slots) + 2
    assert min(served.values()) > 0


# Shares ------------------------------------------------------------------------------------


def backlog(
    world: World,
    names: Iterable[str],
    steps: int,
    make: Callable[[str], Ticket],
    of: Callable[[Ticket], str],
) -> list[dict[str, int]]:
    """Keeps more of each waiting than can be admitted in a step; their service at every step."""
    counter = world.service if of(ticket("q", key="k")) == "q" else world.of_key
    seen = []
    for _ in range(steps):
        waiting = Counter(of(sent.ticket) for sent in world.waiting())
        for name in names:
            for _ in range(world.limits.requests + 1 - waiting[name]):
                world.join(make(name))
        world.tick()
        seen.append(dict(counter))
    return seen


def widest(seen: list[dict[str, int]], weights: dict[str, float]) -> float:
    """The largest gap of weighted service between any two, over any interval."""
    names = seen[-1].keys()
    widest = 0.0
    for a in names:
        for b in names - {a}:
            apart = [
                now.get(a, 0) / weights.get(a, 1) - now.get(b, 0) / weights.get(b, 1)
                for now in seen
            ]
            widest = max(widest, max(apart) - min(apart))
    return widest


def by_adapter(each: Ticket) -> str:
    return each.adapter


def by_key(each: Ticket) -> str:
    return each.key


def paper(world: World, most_prompt: int, weights: dict[str, float]) -> float:
    """max(wp·L_in, wq·M), of the least weight: how far counters of the backlogged can be apart.

    Theorem 4.4 of Sheng et al.: the gap is at most twice that.
    """
    least = min([1.0, *weights.values()])
    return max(PROMPT * most_prompt, OUTPUT * world.most_tokens) / least


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_adapters_that_fit_get_their_shares(seed: int) -> None:
    random = Random(seed)
    names = ["base", *(f"a{i}" for i in range(random.randint(1, 4)))]
    weights = {name: random.choice((0.5, 1.0, 2.0, 4.0)) for name in names}
    lengths = {name: random.choice((2, 8, 30)) for name in names}
    world = World(Limits(5, random.randint(1, 6), 100), weights=weights)
    backlog(world, names, 30, lambda name: ticket(name, 5, lengths[name]), by_adapter)

    def make(name: str) -> Ticket:
        return ticket(name, random.randint(1, 40), random.randint(1, lengths[name]))

    seen = backlog(world, names, 400, make, by_adapter)
    assert widest(seen, weights) <= 2 * paper(world, 40, weights)
    assert seen[-1].keys() == set(names)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_adapters_that_take_turns_in_slots_get_their_shares(seed: int) -> None:
    """With fewer slots than adapters, one in a slot may get ahead of those that wait for one by
    its quantum, once more by that much while another that is about as far ahead drains, and by
    what the engine does until what drains has ended: `most` + 2 steps, and a load."""
    random = Random(seed)
    names = [f"a{i}" for i in range(random.randint(2, 6))]
    quantum, prompt, most, load_steps = random.choice((0, 100, 400)), 40, 10, 2
    limits = Limits(
        random.randint(1, min(2, len(names) - 1)), random.randint(1, 6), 100, quantum=quantum
    )
    world = World(limits, limits.slots + random.randint(0, 2), load_steps=lambda: load_steps)

    def make(name: str) -> Ticket:
        return ticket(name, random.randint(1, prompt), random.randint(1, most))

    backlog(world, names, 60, make, by_adapter)
    seen = backlog(world, names, 1000, make, by_adapter)
    step = OUTPUT * limits.requests + PROMPT * (limits.prefill + prompt)
    until_ended = step * (most + 2 + load_steps)
    assert widest(seen, {}) <= 2 * (paper(world, prompt, {}) + 2 * quantum + until_ended)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_keys_of_an_adapter_get_their_shares(seed: int) -> None:
    random = Random(seed)
    keys = list("wxyz")[: random.randint(2, 4)]
    weights = {key: random.choice((0.5, 1.0, 3.0)) for key in keys}
    lengths = {key: random.choice((2, 8, 30)) for key in keys}
    world = World(Limits(2, random.randint(1, 6), 100), key_weights=weights)

    def make(key: str) -> Ticket:
        return ticket("a", random.randint(1, 40), random.randint(1, lengths[key]), key=key)

    backlog(world, keys, 30, make, by_key)
    seen = backlog(world, keys, 400, make, by_key)
    assert widest(seen, weights) <= 2 * paper(world, 40, weights)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_nobody_saves_up(seed: int) -> None:
    """While it was away the other was served alone; then it gets no more than the other."""
    random = Random(seed)
    world = World(Limits(2, 4, 100))
    backlog(world, ["late"], random.choice((0, 5)), lambda name: ticket(name, 10, 5), by_adapter)
    backlog(world, ["busy"], random.randint(50, 300), lambda name: ticket(name, 10, 5), by_adapter)
    seen = backlog(world, ["busy", "late"], 60, lambda name: ticket(name, 10, 5), by_adapter)
    got = {name: seen[-1][name] - seen[0].get(name, 0) for name in ("busy", "late")}
    assert abs(got["late"] - got["busy"]) <= 2 * paper(world, 10, {})


def test_keys_of_one_adapter_share_it_across_its_versions() -> None:
    admission = alone(Limits(4, 1, 100))
    for key, digest in (("x", "a@1"), ("x", "a@1"), ("y", "a@2")):
        admission.join(ticket("a", 10, 5, digest=digest, key=key))
    first = admission.next()
    assert first is not None
    assert first.key == "x"
    admission.leave(first)
    second = admission.next()
    assert second is not None
    assert second.key == "y"


def test_what_a_key_had_of_one_adapter_counts_nothing_at_another() -> None:
    """Of two adapters with equal counters who came first goes first."""
    admission = alone(Limits(4, 1, 1000))
    for _ in range(2):
        each = ticket("a", 100, key="x")
        admission.join(each)
        admission.next()
        admission.leave(each)
    first, second = ticket("a", key="x"), ticket("b", key="y")
    for each in (first, second):
        admission.join(each)
    assert admission.counter("a") == admission.counter("b")
    assert admission.next() is first


# Counters that are let go ------------------------------------------------------------------


def orders(seed: int, remembered: int) -> tuple[list[int], int]:
    """A schedule's order of admission, and how often counters were let go; -1 if of too many.

    Only one at or below the floor is the same as none: if more than `remembered` are above, some of
    those go as well, on purpose.
    """
    random = Random(seed)
    names = [f"a{i}" for i in range(30)]
    forgotten = 0
    plain = module._Shares._forget

    def forget(shares: module._Shares) -> None:
        nonlocal forgotten
        floor = shares.floor()
        idle = shares._counters.keys() - shares.waiting.keys() - shares.running.keys()
        above = sum(shares[name] > floor for name in shares._counters)
        forgotten = -1 if forgotten < 0 or (above > remembered and idle) else forgotten + 1
        plain(shares)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REMEMBERED", remembered)
        patch.setattr(module._Shares, "_forget", forget)
        world = World(Limits(2, 3, 100, quantum=40), 6)
        for _ in range(250):
            waiting = Counter(sent.ticket.adapter for sent in world.waiting())
            for name in ["steady", "base"]:
                if waiting[name] < 2:
                    world.join(ticket(name, random.randint(1, 30), random.randint(1, 8), key="x"))
            if random.random() < 0.2:
                world.join(ticket(random.choice(names), 3, random.randint(1, 4), key="y"))
            world.tick()
    return world.order, forgotten


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_what_is_forgotten_changes_no_decision(seed: int) -> None:
    order, forgotten = orders(seed, 4)
    assume(forgotten > 0)
    assert order == orders(seed, 10**6)[0]


def test_one_that_runs_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 0)
    admission = alone(Limits(9, 9, 1000))
    running = ticket("a", 10, 100)
    for each in (ticket("a", 500), running):
        admission.join(each)
        admission.next()
    for i in range(20):
        admission.join(ticket(f"b{i}", 1))
        admission.leave(ticket(f"b{i}"))
    before = admission.counter("a")
    admission.progress(running, 50)
    assert admission.counter("a") == before + OUTPUT * 50 > 500


def test_keys_of_those_who_came_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    admission = alone(Limits(1, 1, 1000))
    for i in range(50):
        for name in (f"a{i}", "often"):
            each = ticket(name, 10, key="x")
            admission.join(each)
            admission.next()
            admission.leave(each)
    assert len(admission._keys) <= 2 * (3 + 1) + 1
    assert admission._keys["often"]["x"] >= 10 * 50


# Rules one by one --------------------------------------------------------------------------


def test_the_least_counter_goes_first_and_of_equals_who_came_first() -> None:
    admission = alone(Limits(3, 1, 1000))
    first = [ticket("a"), ticket("a"), ticket("b"), ticket()]
    for each in first:
        admission.join(each)
    order = []
    while (each := admission.next()) is not None:
        order.append(each)
        admission.leave(each)
    assert order == [first[0], first[2], first[3], first[1]]


def test_one_alone_may_be_larger_than_the_limits() -> None:
    admission = alone(Limits(1, 2, 10))
    admission.join(ticket("a", 500, seats=5))
    admission.join(ticket("a", 1))
    assert len(admitted(admission)) == 1


def test_prompts_in_flight_are_those_without_a_first_token() -> None:
    admission = alone(Limits(1, 9, 10))
    for _ in range(3):
        admission.join(ticket("a", 10))
    (one,) = admitted(admission)
    admission.progress(one, 1)
    (two,) = admitted(admission)
    admission.leave(two)
    assert len(admitted(admission)) == 1


@pytest.mark.parametrize(
    ("limits", "others"),
    [
        (Limits(1, 1, 1, waiting=2), ("a", "x")),
        (Limits(1, 1, 1, of_adapter=2), ("c", "x")),
        (Limits(1, 1, 1, of_key=2), ("a", "z")),
    ],
)
def test_a_full_queue_refuses_and_nothing_is_left(limits: Limits, others: tuple[str, str]) -> None:
    admission = alone(limits)
    waiting = [ticket(others[0], key="x"), ticket("c", key=others[1] if others[1] != "z" else "y")]
    full = ticket("c", key="x")
    if limits.of_key == 2:
        waiting[1].key = "x"
    for each in waiting:
        admission.join(each)
    before = admission.counts()
    with pytest.raises(Overloaded, match="Ask again later"):
        admission.join(full)
    assert admission.counts() == before
    admission.leave(full)
    assert admission.counts() == before
    for each in waiting:
        admission.leave(each)
    assert admission.left_behind() == []
    assert not admission.busy


def test_a_slot_turns_over_after_its_quantum() -> None:
    admission = alone(Limits(1, 4, 1000, quantum=100))
    long = ticket("a", 10, 60)
    admission.join(long)
    admission.join(ticket("b", 10, 10))
    assert admitted(admission) == [long]
    admission.join(ticket("a", 10, 59))
    assert [each.adapter for each in admitted(admission)] == ["a"]  # 20 of 100
    admission.progress(long, 41)  # 102
    admission.join(ticket("a", 10, 60))
    fits = ticket("a", 10, 30)
    admission.join(ticket("a", 10, 70))
    assert admitted(admission) == []
    other = next(each for each in admission.running() if each is not long)
    admission.leave(long)
    admission.leave(other)
    assert [each.adapter for each in admitted(admission)] == ["b"]
    admission.join(fits)


def test_what_ends_sooner_is_admitted_beside_what_drains() -> None:
    admission = alone(Limits(1, 4, 1000, quantum=0))
    admission.join(ticket("a", 10, 60))
    admitted(admission)
    admission.join(ticket("b", 10, 10))
    sooner, later = ticket("a", 10, 58), ticket("a", 10, 59)
    for each in (sooner, later):
        admission.join(each)
    assert admitted(admission) == [sooner]


def test_what_is_loaded_has_a_slot_turn_over_meanwhile_but_once() -> None:
    places: dict[str, State] = {"a": State.HOST, "b": State.LOADING}
    admission = Admission(Limits(1, 9, 1000, quantum=0), places.get)
    first = ticket("a", 10, 60)
    admission.join(first)
    assert admitted(admission) == [first]
    cold = ticket("b", 10, 60)
    admission.join(cold)
    second = ticket("a", 10, 60)
    admission.join(second)
    assert admitted(admission) == []  # it drains
    admission.leave(first)
    assert admitted(admission) == [second]  # no slot is kept for what is not there
    third = ticket("a", 10, 60)
    admission.join(third)
    assert admitted(admission) == [third]  # and none drains again for a load that takes long
    places["b"] = State.HOST
    admission.changed("b")
    admission.join(ticket("a", 10, 60))
    assert admitted(admission) == []
    admission.leave(second)
    admission.leave(third)
    assert admitted(admission)[0] is cold


def test_a_slot_that_turned_over_for_another_leaves_a_load_its_own() -> None:
    places: dict[str, State] = {"a": State.HOST, "b": State.LOADING, "c": State.HOST}
    admission = Admission(Limits(1, 9, 1000, quantum=0), places.get)
    first, cold, warm = ticket("a", 10, 60), ticket("b", 10, 60), ticket("c", 10, 60)
    admission.join(first)
    assert admitted(admission) == [first]
    for each in (cold, warm):
        admission.join(each)
    assert admitted(admission) == []
    admission.leave(first)
    assert admitted(admission) == [warm]
    admission.join(ticket("c", 10, 60))
    assert admitted(admission) == []  # drains for the load


def test_nothing_drains_for_one_that_has_gone() -> None:
    admission = alone(Limits(2, 9, 1000, quantum=0))
    for name in ("a", "b"):
        admission.join(ticket(name, 10, 60))
    admitted(admission)
    first, second = ticket("c"), ticket("d")
    for each in (first, second):
        admission.join(each)
    assert admitted(admission) == []
    for name in ("a", "b"):
        admission.join(ticket(name, 10, 60))
    assert admitted(admission) == []
    admission.leave(second)
    assert len(admitted(admission)) == 1  # one drains on for the first
    admission.leave(first)
    assert len(admitted(admission)) == 1


def test_one_that_comes_to_a_queue_brings_it_forward() -> None:
    """Equal adapters share a digest: the one with the lower counter speaks for it."""
    admission = alone(Limits(1, 9, 10**6, quantum=10**9))
    for name in ("other", "ahead"):
        each = ticket(name, 100 if name == "other" else 5000, digest=f"{name}'s")
        admission.join(each)
        admission.next()
        admission.leave(each)
    for name, digest in (
        ("low", "low"),
        ("other", "other"),
        ("ahead", "shared"),
        ("low", "shared"),
    ):
        admission.join(ticket(name, digest=digest))
    order = []
    while (first := admission.next()) is not None:
        order.append(first.adapter)
        admission.leave(first)
    assert order == ["low", "low", "other", "ahead"]


def test_loads_are_wanted_by_turn_and_not_long_before_it() -> None:
    places: dict[str, State] = {}
    admission = Admission(Limits(1, 9, 1000), places.get)
    for name in "abc":
        admission.join(ticket(name))
    assert admission.wanted() == "a"
    places["a"] = State.LOADING
    admission.changed("a")
    assert admission.wanted() == "b"
    places["a"] = State.HOST
    admission.changed("a")
    assert admission.wanted() is None  # "a" has the only slot before anybody else
    assert [each.adapter for each in admitted(admission)] == ["a"]
    assert admission.wanted() == "b"
    assert admission.precedes("b", "c")
    assert not admission.precedes("a", "c")


def test_progress_is_counted_once() -> None:
    admission = alone(Limits(1, 1, 1000))
    each = ticket("a", 10)
    admission.join(each)
    admission.next()
    for output in (3, 3, 2, 5):
        admission.progress(each, output)
    assert admission.counter("a") == PROMPT * 10 + OUTPUT * 5
