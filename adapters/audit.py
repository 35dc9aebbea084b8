"""What the registry says is stored, held against what is: both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import StoreError
from adapters.registry import QUARANTINED, Registry
from adapters.store import Store


@dataclass(slots=True)
class Audit:
    """What was found; everything is a digest.

    `damaged` maps those that are served no more to the reason, a sentence; `mended` are served
    again; `orphans` are sealed, and no version needs them. `checked` is how many are needed.
    """

    checked: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def audit(
    store: Store,
    registry: Registry,
    full: bool = False,
    locked: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> Audit:
    """Quarantines versions whose bytes are gone or altered, and serves those again that are whole.

    With `full`, every byte is read; otherwise only files that were written to since they were
    sealed. `locked(digest)` keeps others from changing it meanwhile; `track` is passed what there
    is to do and gives it back, to show how far it is. Orphans are not collected: their bytes may
    be in use. Raises StoreError, RegistryError.
    """
    quarantined, needed = registry.digests(QUARANTINED), registry.digests()
    found = Audit(len(needed))
    for digest in track(sorted(needed)):
        with locked(digest):
            damage = _damage(store, digest, full)
            if damage is not None:
                registry.quarantine(digest, damage)
                # Another process, which no lock here keeps out, may have deleted it meanwhile, or
                # taken the same bytes in anew.
                if not registry.references_to(digest):
                    continue
                if (damage := _damage(store, digest, full)) is None:
                    registry.heal(digest)
                    continue
                found.damaged[digest] = damage
            elif digest in quarantined and registry.heal(digest):
                found.mended.append(digest)
    found.orphans = [digest for digest in store.sealed() if digest not in needed]
    return found


def _damage(store: Store, digest: str, full: bool) -> str | None:
    try:
        damage = store.damage(digest, full)
        if damage is None and full:
            store.damaged_forms(digest)
    except StoreError as error:  # one bad sector must not keep the others from being checked
        return error.message
    return damage
