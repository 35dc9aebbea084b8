"""Writes what a source yields into a folder, and counts it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapters.errors import TooLarge
from adapters.folder import disk


class Intake:
    """Takes files into one folder, `max_bytes` in all."""

    def __init__(self, into: Path, max_bytes: int) -> None:
        self._into = into
        self._max_bytes = max_bytes
        self._taken = 0

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Makes the file `name` of `blocks`; raises TooLarge, and StoreError if it exists."""
        with disk(f"write {name}"), (self._into / name).open("xb") as file:
            for block in blocks:
                self._taken += len(block)
                if self._taken > self._max_bytes:
                    raise too_large(self._max_bytes)
                file.write(block)


def too_large(max_bytes: int) -> TooLarge:
    """The refusal of a source with more than `max_bytes`."""
    return TooLarge(
        f"The adapter has more than {max_bytes} bytes. Save it in bfloat16 or with a smaller "
        "rank, or raise the server's limit."
    )
