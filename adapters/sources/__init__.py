"""Where adapters come from: each module brings one kind of source into a folder."""

from __future__ import annotations

from pathlib import Path

from adapters.sources import directory
from adapters.sources.address import Address, Allowed
from adapters.sources.intake import Transfer
from adapters.sources.remote import emptied


def fetch(
    address: Address,
    into: Path,
    transfer: Transfer,
    allowed: Allowed,
    allow_pickle: bool = False,
) -> str:
    """Brings the adapter at `address` into the folder `into`, if that is `allowed`.

    Returns the address it came from, on the hub with its commit. A failure leaves no file.
    Raises SourceForbidden, SourceNotFound, SourceFailed, InvalidAdapter, StoreError and what
    `transfer` raises.
    """
    if address.scheme == "file":
        with allowed.opened(address) as folder, emptied(into):
            directory.copy(folder, into, transfer, allow_pickle)
        return str(address)
    allowed.check(address)
    # Both libraries are slow to import, and most servers need neither.
    if address.scheme == "hf":
        from adapters.sources import hub

        return hub.fetch(address, into, transfer, allow_pickle)
    from adapters.sources import objects

    return objects.fetch(address, into, transfer, allow_pickle)
