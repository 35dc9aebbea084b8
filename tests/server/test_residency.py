"""Residency against random schedules: capacity and leases hold whatever happens in what order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.residency import Entry, Residency

DIGESTS = ["a", "b", "c", "d", "e"]


def load(residency: Residency, digest: str) -> Entry:
    granted = residency.lease(digest)
    assert granted is not None
    entry, work = granted
    if work is not None:
        residency.loaded(digest)
    return entry


def test_the_first_lease_brings_the_load_and_later_ones_wait_for_it() -> None:
    residency = Residency(2)
    entry, work = residency.lease("a")  # type: ignore[misc]
    assert work is not None
    assert (work.digest, work.evict) == ("a", None)
    assert residency.lease("a") == (entry, None)
    assert (residency.tier("a"), residency.leases("a")) == ("loading", 2)
    residency.loaded("a")
    assert residency.tier("a") == "host"


def test_the_least_recently_leased_goes_first() -> None:
    residency = Residency(2)
    for digest in ("a", "b", "a"):
        residency.release(load(residency, digest))
    _, work = residency.lease("c")  # type: ignore[misc]
    assert work is not None
    assert work.evict == "b"


def test_no_place_while_all_are_leased() -> None:
    residency = Residency(1)
    entry = load(residency, "a")
    assert residency.lease("b") is None
    residency.release(entry)
    assert residency.lease("b") is not None


def test_what_is_used_or_loading_cannot_be_dropped() -> None:
    residency = Residency(2)
    entry, _ = residency.lease("a")  # type: ignore[misc]
    assert not residency.drop("a")
    residency.loaded("a")
    assert not residency.drop("a")
    residency.release(entry)
    assert residency.drop("a")
    assert residency.tier("a") == "disk"
    assert not residency.drop("a")


def test_a_lease_is_given_back_once() -> None:
    residency = Residency(1)
    entry = load(residency, "a")
    residency.release(entry)
    with pytest.raises(ValueError, match="no lease"):
        residency.release(entry)


@settings(max_examples=300, deadline=None)
@given(
    capacity=st.integers(1, 4),
    schedule=st.lists(
        st.tuples(st.sampled_from(["lease", "end", "release", "drop"]), st.sampled_from(DIGESTS)),
        max_size=80,
    ),
    fails=st.lists(st.booleans(), min_size=80, max_size=80),
)
def test_invariants_hold_in_any_order(
    capacity: int, schedule: list[tuple[str, str]], fails: list[bool]
) -> None:
    residency = Residency(capacity)
    held: list[Entry] = []
    loading: set[str] = set()
    inside: set[str] = set()  # what an engine that does as told has
    for (action, digest), fail in zip(schedule, fails, strict=False):
        if action == "lease":
            granted = residency.lease(digest)
            if granted is None:
                assert digest not in inside | loading
                leased = {entry.digest for entry in held} | loading
                assert len(leased) == capacity
                continue
            entry, work = granted
            held.append(entry)
            if work is not None:
                assert digest not in inside | loading
                if work.evict is not None:
                    assert work.evict not in {e.digest for e in held} | loading
                    inside.remove(work.evict)
                loading.add(digest)
        elif action == "end" and digest in loading:
            loading.remove(digest)
            if fail:
                residency.failed(digest)
                held = [entry for entry in held if entry.digest != digest]
            else:
                residency.loaded(digest)
                inside.add(digest)
        elif action == "release":
            for entry in held:
                if entry.digest == digest:
                    residency.release(entry)
                    held.remove(entry)
                    break
        elif action == "drop" and residency.drop(digest):
            assert digest not in {entry.digest for entry in held}
            inside.remove(digest)
        assert len(inside | loading) <= capacity
        for each in DIGESTS:
            known = "host" if each in inside else "loading" if each in loading else "disk"
            assert residency.tier(each) == known
            assert residency.leases(each) == sum(entry.digest == each for entry in held)
