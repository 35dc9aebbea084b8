"""What is loaded where: which versions the engine keeps on the host, and who uses them.

Synchronous, no I/O: it decides, the gateway does. An *entry* is one version, by digest.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where an entry stands."""

    LOADING = "loading"
    HOST = "host"


@dataclass
class Entry:
    """One version in the engine or on its way there."""

    digest: str
    state: State = State.LOADING
    leases: int = 0


@dataclass(frozen=True)
class Load:
    """To be done by whoever gets it: unload `evict` (unless None), then load `digest`."""

    digest: str
    evict: str | None


class Residency:
    """The host cache: at most `capacity` versions, the least recently leased goes first.

    Invariants: never more than `capacity` entries; an entry with leases, or one being loaded, is
    never evicted.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently leased first

    def lease(self, digest: str) -> tuple[Entry, Load | None] | None:
        """A lease on `digest`, with the load it takes, if any; None if all places are leased.

        The caller of the first lease gets the Load, later ones wait for its end.
        """
        entry = self._entries.get(digest)
        load = None
        if entry is None:
            evict = None
            if len(self._entries) >= self.capacity:
                evict = self._idle()
                if evict is None:
                    return None
                del self._entries[evict]
            entry = self._entries[digest] = Entry(digest)
            load = Load(digest, evict)
        self._entries.move_to_end(digest)
        entry.leases += 1
        return entry, load

    def loaded(self, digest: str) -> None:
        """The load of `digest` has ended well."""
        self._entries[digest].state = State.HOST

    def failed(self, digest: str) -> None:
        """The load of `digest` has failed: it is out, and so are the leases on it."""
        del self._entries[digest]

    def release(self, entry: Entry) -> None:
        """Gives back one lease on `entry`."""
        if entry.leases <= 0:
            raise ValueError(f"{entry.digest} has no lease to release")
        entry.leases -= 1

    def drop(self, digest: str) -> bool:
        """Takes `digest` out if it is loaded and nobody uses it; True if the engine must unload."""
        entry = self._entries.get(digest)
        if entry is None or entry.leases or entry.state is not State.HOST:
            return False
        del self._entries[digest]
        return True

    def tier(self, digest: str) -> str:
        """`disk`, `loading` or `host`."""
        entry = self._entries.get(digest)
        return entry.state.value if entry else "disk"

    def leases(self, digest: str) -> int:
        """Running requests on `digest`."""
        entry = self._entries.get(digest)
        return entry.leases if entry else 0

    def _idle(self) -> str | None:
        for entry in self._entries.values():
            if not entry.leases and entry.state is State.HOST:
                return entry.digest
        return None
