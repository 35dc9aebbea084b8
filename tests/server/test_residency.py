"""Residency against random schedules: capacity, leases and order hold whatever happens when."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from server.residency import Entry, GreedyDual, Load, Lru, Policy, Residency, State, Swap

DIGESTS = ["a", "b", "c", "d", "e", "f"]
digests = st.sampled_from(DIGESTS)


def has(residency: Residency, digest: str, size: int = 2) -> Load:
    """`digest` on the host."""
    load = residency.begin(digest)
    assert load is not None
    residency.loaded(digest, 1.0, size)
    return load


def use(residency: Residency, digest: str) -> None:
    residency.release(residency.lease(digest))


def test_a_load_goes_from_nowhere_to_the_host() -> None:
    residency = Residency(2, 1)
    assert residency.begin("a") == Load("a", None)
    assert (residency.tier("a"), residency.standing("a")) == ("loading", State.LOADING)
    residency.loaded("a", 0.5, 10)
    assert (residency.tier("a"), residency.size("a"), residency.bytes()) == ("host", 10, 10)
    assert residency.counts.loads == 1


def test_what_is_here_is_not_loaded_again() -> None:
    residency = Residency(2, 1)
    residency.begin("a")
    with pytest.raises(ValueError, match="here already"):
        residency.begin("a")


def test_of_several_with_one_name_the_nearest_to_the_engine_counts() -> None:
    residency = Residency(4, 1)
    for digest in "ab":
        has(residency, digest)
    residency.begin("c")
    residency.enter("a")
    residency.lease("b")
    assert residency.pin("b")
    names = {"a": ["sql", "code"], "b": ["sql", "poetry"], "c": ["poetry", "new"], "d": ["gone"]}
    assert residency.nearest(names) == {
        "sql": ("slot", True),
        "code": ("slot", False),
        "poetry": ("host", True),
        "new": ("loading", False),
    }


def test_a_failed_load_leaves_nothing() -> None:
    residency = Residency(1, 1)
    residency.begin("a")
    residency.failed("a")
    assert (residency.tier("a"), residency.counts.failures) == ("disk", 1)
    assert residency.begin("b") == Load("b", None)


def test_only_what_is_loaded_can_be_leased() -> None:
    residency = Residency(1, 1)
    residency.begin("a")
    with pytest.raises(ValueError, match="not loaded"):
        residency.lease("a")


def test_the_least_recently_leased_goes_first() -> None:
    residency = Residency(2, 1)
    for digest in ("a", "b"):
        has(residency, digest)
    use(residency, "a")
    assert has(residency, "c").evict == "b"


def test_no_place_while_all_are_leased() -> None:
    residency = Residency(1, 1)
    has(residency, "a")
    entry = residency.lease("a")
    assert residency.begin("b") is None
    residency.release(entry)
    assert residency.begin("b") == Load("b", "a")


def test_what_is_to_be_kept_is_kept() -> None:
    residency = Residency(2, 1)
    has(residency, "a")
    has(residency, "b")
    assert residency.begin("c", lambda digest: True) is None
    assert residency.begin("c", lambda digest: digest == "a") == Load("c", "b")


def test_what_is_used_or_loading_cannot_be_dropped() -> None:
    residency = Residency(2, 1)
    residency.begin("a")
    assert not residency.drop("a")
    residency.loaded("a", 1, 1)
    entry = residency.lease("a")
    assert not residency.drop("a")
    residency.release(entry)
    assert residency.drop("a")
    assert residency.tier("a") == "disk"
    assert not residency.drop("a")


def test_a_lease_is_given_back_once() -> None:
    residency = Residency(1, 1)
    has(residency, "a")
    entry = residency.lease("a")
    residency.release(entry)
    with pytest.raises(ValueError, match="no lease"):
        residency.release(entry)


@pytest.mark.parametrize("policy", [Lru, GreedyDual])
def test_what_is_useless_goes_first(policy: Callable[[], Policy]) -> None:
    residency = Residency(2, 1, policy())
    has(residency, "a")
    has(residency, "b")
    use(residency, "a")
    residency.release(residency.lease("b"), useless=True)
    assert has(residency, "c").evict == "b"


def test_as_many_as_slots_stay_free_of_pins() -> None:
    residency = Residency(3, 2)
    for digest in "abc":
        has(residency, digest)
    assert residency.pin("a")
    assert residency.pin("a")
    assert not residency.pin("b")
    residency.pin_only({"b"})
    assert residency.pin("b")
    residency.pin_only({"a", "b"})
    assert residency.pinned() == ["b"]


def test_the_least_recently_used_leaves_its_slot() -> None:
    residency = Residency(3, 2)
    for digest in "abc":
        has(residency, digest)
    for digest in ("a", "b", "a"):
        entry = residency.lease(digest)
        residency.enter(digest)
        residency.release(entry)
    residency.lease("c")
    assert residency.enter("c") == Swap("c", "b")
    assert residency.in_slots() == ["a", "c"]
    residency.leave("c")
    assert (residency.tier("c"), residency.tier("a")) == ("host", "slot")


def test_greedy_dual_keeps_what_is_dear_until_it_is_old() -> None:
    residency = Residency(2, 1, GreedyDual())
    has(residency, "dear", size=10)
    has(residency, "cheap", size=2)
    use(residency, "dear")
    use(residency, "cheap")
    assert has(residency, "c", size=4).evict == "cheap"  # level 2
    use(residency, "c")  # worth 6
    assert has(residency, "d", size=5).evict == "c"  # level 6
    use(residency, "d")  # worth 11: dearer by now than what was used once at level 0
    assert has(residency, "e").evict == "dear"


class Machine(RuleBasedStateMachine):
    """An engine that does as it is told, a model of what is where, and books of our own."""

    @initialize(
        slots=st.integers(1, 3),
        spare=st.integers(0, 2),
        greedy=st.booleans(),
    )
    def begin_with(self, slots: int, spare: int, greedy: bool) -> None:
        self.policy: Policy = GreedyDual() if greedy else Lru()
        self.told: list[str] = []
        self.residency = Residency(slots + spare, slots, self.policy, self._changed)
        self.loading: set[str] = set()
        self.host: dict[str, tuple[float, float]] = {}  # worth by our own books, size
        self.uses: dict[str, int] = {}
        self.slots: list[str] = []
        self.pinned: set[str] = set()
        self.held: list[Entry] = []
        self.level, self.turn = 0.0, 0
        self.expected: list[str] = []
        self.counted = [0, 0, 0, 0]  # loads, failures, evictions, swaps

    def _changed(self, digest: str) -> None:
        self.told.append(digest)

    def _used(self, digest: str, size: float) -> None:
        self.turn += 1
        worth = (
            float(self.turn)
            if isinstance(self.policy, Lru)
            else self.level + self.uses[digest] * size
        )
        self.host[digest] = worth, size

    def _gone(self, digest: str) -> None:
        self.expected.append(digest)
        self.loading.discard(digest)
        self.host.pop(digest, None)
        self.pinned.discard(digest)
        if digest in self.slots:
            self.slots.remove(digest)

    def _leased(self) -> set[str]:
        return {entry.digest for entry in self.held}

    @rule(digest=digests, kept=st.sets(digests))
    def begin(self, digest: str, kept: set[str]) -> None:
        if digest in self.host or digest in self.loading:
            with pytest.raises(ValueError, match="here already"):
                self.residency.begin(digest)
            return
        idle = self.host.keys() - self._leased() - self.pinned - kept
        load = self.residency.begin(digest, kept.__contains__)
        full = len(self.host) + len(self.loading) == self.residency.places
        if load is None:
            assert full
            assert not idle
            return
        assert load.digest == digest
        assert (load.evict is not None) == full
        if load.evict is not None:
            assert load.evict in idle
            worth = self.host[load.evict][0]
            assert worth == min(self.host[each][0] for each in idle)
            self.level = max(self.level, worth)
            self._gone(load.evict)
            self.counted[2] += 1
        self.loading.add(digest)
        self.expected.append(digest)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans(), size=st.integers(1, 5))
    def end_a_load(self, data: st.DataObject, fails: bool, size: int) -> None:
        digest = data.draw(st.sampled_from(sorted(self.loading)))
        if fails:
            self.residency.failed(digest)
            self._gone(digest)
            self.counted[1] += 1
            return
        self.residency.loaded(digest, 1.0, size)
        self.loading.remove(digest)
        self.uses[digest] = 0
        self._used(digest, size)
        self.expected.append(digest)
        self.counted[0] += 1

    @precondition(lambda self: self.host)
    @rule(data=st.data(), enters=st.booleans())
    def lease(self, data: st.DataObject, enters: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.host)))
        if len(self._leased() | {digest}) > self.residency.slots:
            return  # admission never lets more be in flight
        self.held.append(self.residency.lease(digest))
        self.uses[digest] += 1
        self._used(digest, self.host[digest][1])
        if not enters:
            return
        free = len(self.slots) < self.residency.slots
        swap = self.residency.enter(digest)
        if digest in self.slots:
            assert swap is None
            self.slots.remove(digest)
        else:
            idle = [each for each in self.slots if each not in self._leased()]
            assert swap == Swap(digest, None if free else idle[0])
            if not free:
                self.slots.remove(idle[0])
            self.counted[3] += 1
        self.slots.append(digest)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), useless=st.booleans())
    def release(self, data: st.DataObject, useless: bool) -> None:
        entry = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.residency.release(entry, useless=useless)
        if useless:
            self.host[entry.digest] = 0.0, self.host[entry.digest][1]

    @rule(digest=digests)
    def drop(self, digest: str) -> None:
        could = digest in self.host and digest not in self._leased()
        assert self.residency.drop(digest) == could
        if could:
            self._gone(digest)

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        if digest not in self.host and digest not in self.loading:
            self.residency.pin_only(self.pinned)
            return
        room = len(self.pinned) < self.residency.places - self.residency.slots
        assert self.residency.pin(digest) == (digest in self.pinned or room)
        if room:
            self.pinned.add(digest)

    @rule(digest=digests)
    def unpin(self, digest: str) -> None:
        self.pinned.discard(digest)
        self.residency.pin_only(self.pinned)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def a_swap_fails(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.slots))
        if digest not in self._leased():
            self.residency.leave(digest)
            self.slots.remove(digest)

    @invariant()
    def the_books_agree(self) -> None:
        residency = self.residency
        assert self.told == self.expected
        assert len(self.host) + len(self.loading) <= residency.places
        assert {entry.digest for entry in residency.entries()} == self.host.keys() | self.loading
        assert residency.in_slots() == self.slots
        assert len(self.slots) <= residency.slots
        assert set(self.slots) <= self.host.keys()
        assert self._leased() | self.pinned <= self.host.keys() | self.loading
        assert set(residency.pinned()) == self.pinned
        assert residency.bytes() == sum(size for _, size in self.host.values())
        counts = residency.counts
        assert [counts.loads, counts.failures, counts.evictions, counts.swaps] == self.counted
        for digest in DIGESTS:
            place = "slot" if digest in self.slots else "host" if digest in self.host else "disk"
            assert residency.tier(digest) == ("loading" if digest in self.loading else place)
            assert residency.leases(digest) == sum(e.digest == digest for e in self.held)


TestAnySchedule = Machine.TestCase
TestAnySchedule.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@settings(max_examples=100, deadline=None)
@given(used=st.lists(digests, max_size=30), places=st.integers(1, 5))
def test_lru_is_the_textbooks(used: list[str], places: int) -> None:
    residency = Residency(places, 1, Lru())
    order: list[str] = []  # least recently used first
    for digest in used:
        if residency.standing(digest) is None:
            evicted = has(residency, digest).evict
            assert evicted == (order.pop(0) if len(order) == places else None)
        else:
            order.remove(digest)
        use(residency, digest)
        order.append(digest)
