"""What is loaded where: which versions the engine keeps on its host and in slots, and for whom.

Synchronous, no I/O: it decides, the gateway does. An *entry* is one version, by digest.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class State(Enum):
    """Where an entry stands: on its way to the host, or there."""

    LOADING = "loading"
    HOST = "host"


_TIERS = (State.LOADING.value, State.HOST.value, "slot")  # the last is nearest to the engine


@dataclass(eq=False)
class Entry:
    """One version in the engine or on its way there.

    `bytes` is its size there, `leases` the running requests on it.
    """

    digest: str
    bytes: int = 0
    state: State = State.LOADING
    leases: int = 0
    pinned: bool = False
    uses: int = 0
    worth: float = 0.0


@dataclass(frozen=True)
class Load:
    """To be done by whoever gets it: unload `evict` (unless None), then load `digest`."""

    digest: str
    evict: str | None


@dataclass(frozen=True)
class Swap:
    """To be done by whoever gets it: `out` (unless None) out of its slot, `digest` into one."""

    digest: str
    out: str | None


class Policy(Protocol):
    """Sets the `worth` of entries: the least goes first."""

    def used(self, entry: Entry) -> None: ...
    def evicted(self, entry: Entry) -> None: ...


class Lru:
    """The least recently used goes first."""

    def __init__(self) -> None:
        self._turns = itertools.count(1)

    def used(self, entry: Entry) -> None:
        entry.worth = next(self._turns)

    def evicted(self, entry: Entry) -> None: ...


class GreedyDual:
    """The one that costs least to be without goes first: uses × reload cost, aged by evictions.

    GreedyDual-Size with Frequency (Cherkasova, "Improving WWW Proxies Performance with
    Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998), for places that are all alike. Cost
    is bytes, which a reload takes its time by: times that were measured beside a busy engine say
    more of the engine than of the adapter.
    """

    def __init__(self) -> None:
        self._level = 0.0

    def used(self, entry: Entry) -> None:
        entry.worth = self._level + entry.uses * entry.bytes

    def evicted(self, entry: Entry) -> None:
        self._level = max(self._level, entry.worth)


@dataclass
class Counts:
    """What has happened since the start, for metrics."""

    loads: int = 0
    load_s: float = 0.0
    failures: int = 0
    evictions: int = 0
    swaps: int = 0
    hits: int = 0  # requests that found their adapter on the host
    misses: int = 0


@dataclass
class Residency:
    """The host cache of `places` versions, and the `slots`, for which what is there is copied.

    Invariants: never more entries than that; an entry with leases, pinned or being loaded is never
    evicted, and one with leases never leaves its slot. `changed` is called with each digest whose
    `standing` is another from then on.
    """

    places: int
    slots: int
    policy: Policy = field(default_factory=GreedyDual)
    changed: Callable[[str], None] = lambda digest: None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._slots: OrderedDict[str, None] = OrderedDict()  # least recently used first

    # -- host ---------------------------------------------------------------------------------

    def begin(self, digest: str, keep: Callable[[str], bool] = lambda digest: False) -> Load | None:
        """The load of `digest`, which is not here; None if there is no place for it.

        Evicts, if it must, the entry that is worth least and is not for `keep`.
        """
        if digest in self._entries:
            raise ValueError(f"{digest} is here already")
        evict = None
        if len(self._entries) >= self.places:
            evict = self._least(keep)
            if evict is None:
                return None
            self._out(evict)
            self.policy.evicted(evict)
            self.counts.evictions += 1
        self._entries[digest] = Entry(digest)
        self.changed(digest)
        return Load(digest, evict.digest if evict else None)

    def loaded(self, digest: str, seconds: float, size: int) -> None:
        """The load of `digest` has ended well; it took so long, and `size` bytes were loaded."""
        entry = self._entries[digest]
        entry.state, entry.bytes = State.HOST, size
        self.policy.used(entry)
        self.counts.loads += 1
        self.counts.load_s += seconds
        self.changed(digest)

    def failed(self, digest: str) -> None:
        """The load of `digest` has failed: it is out."""
        self.counts.failures += 1
        self._out(self._entries[digest])

    def drop(self, digest: str) -> bool:
        """Takes `digest` out if it is loaded and nobody uses it; True if the engine must unload."""
        entry = self._entries.get(digest)
        if entry is None or entry.leases or entry.state is not State.HOST:
            return False
        self._out(entry)
        return True

    def pin(self, digest: str) -> bool:
        """Keeps `digest`, which is here, from being evicted; False if too many are.

        As many places as there are slots stay for everybody else, or somebody could wait for ever.
        """
        entry = self._entries[digest]
        if not entry.pinned and len(self.pinned()) >= self.places - self.slots:
            return False
        entry.pinned = True
        return True

    def pin_only(self, digests: Collection[str]) -> None:
        """Lets all but these be evicted again."""
        for entry in self._entries.values():
            entry.pinned = entry.pinned and entry.digest in digests

    # -- use ----------------------------------------------------------------------------------

    def lease(self, digest: str) -> Entry:
        """A running request's claim on `digest`, which is loaded."""
        entry = self._entries[digest]
        if entry.state is not State.HOST:
            raise ValueError(f"{digest} is not loaded")
        entry.leases += 1
        entry.uses += 1
        self.policy.used(entry)
        return entry

    def release(self, entry: Entry, *, useless: bool = False) -> None:
        """Gives back one lease; of what is `useless` from now on the place is the next to go."""
        if entry.leases <= 0:
            raise ValueError(f"{entry.digest} has no lease to release")
        entry.leases -= 1
        if useless:
            entry.worth = 0.0

    def enter(self, digest: str) -> Swap | None:
        """What it takes to have `digest`, which is leased, in a slot; None if it is in one."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return None
        out = None
        if len(self._slots) >= self.slots:
            out = next((each for each in self._slots if not self._entries[each].leases), None)
            if out is None:
                raise ValueError("all slots are leased")
            del self._slots[out]
        self._slots[digest] = None
        self.counts.swaps += 1
        return Swap(digest, out)

    def leave(self, digest: str) -> None:
        """The swap of `digest` has failed: it is in no slot."""
        self._slots.pop(digest, None)

    # -- what can be asked --------------------------------------------------------------------

    def standing(self, digest: str) -> State | None:
        """Whether `digest` is on the host, on its way there, or neither."""
        entry = self._entries.get(digest)
        return entry.state if entry else None

    def tier(self, digest: str) -> str:
        """`disk`, `loading`, `host` or `slot`."""
        entry = self._entries.get(digest)
        if entry is None:
            return "disk"
        return "slot" if digest in self._slots else entry.state.value

    def nearest(self, names: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, bool]]:
        """Tier, and whether it is pinned, of what is here, by name; `names` has them by digest.

        Of several entries with one name, the one that is nearest to the engine counts.
        """
        found: dict[str, tuple[str, bool]] = {}
        for entry in self._entries.values():
            tier = self.tier(entry.digest)
            for name in names.get(entry.digest, ()):
                other, pinned = found.get(name, (tier, False))
                found[name] = (max(tier, other, key=_TIERS.index), pinned or entry.pinned)
        return found

    def leases(self, digest: str) -> int:
        """Running requests on `digest`."""
        entry = self._entries.get(digest)
        return entry.leases if entry else 0

    def size(self, digest: str) -> int:
        """Bytes of `digest` in the host cache; 0 if it is not there."""
        entry = self._entries.get(digest)
        return entry.bytes if entry else 0

    def is_pinned(self, digest: str) -> bool:
        """Whether `digest` is kept from being evicted."""
        entry = self._entries.get(digest)
        return entry is not None and entry.pinned

    def pinned(self) -> list[str]:
        """What is kept from being evicted."""
        return [entry.digest for entry in self._entries.values() if entry.pinned]

    def in_slots(self) -> list[str]:
        """What is in slots, least recently used first."""
        return list(self._slots)

    def entries(self) -> Iterable[Entry]:
        """All that is in the host cache or on its way there."""
        return self._entries.values()

    def bytes(self) -> int:
        """Of all entries together."""
        return sum(entry.bytes for entry in self._entries.values())

    def _least(self, keep: Callable[[str], bool]) -> Entry | None:
        idle = (
            entry
            for entry in self._entries.values()
            if not entry.leases
            and not entry.pinned
            and entry.state is State.HOST
            and not keep(entry.digest)
        )
        return min(idle, key=lambda entry: entry.worth, default=None)

    def _out(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self._slots.pop(entry.digest, None)
        self.changed(entry.digest)
