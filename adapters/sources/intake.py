"""What every source writes through: files into one folder, counted, limited and stoppable."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from adapters.errors import ImportStopped, ImportTimeout, TooLarge
from adapters.folder import CONFIG, disk
from adapters.peft import MAX_CONFIG


class Transfer:
    """One adapter on its way in, seen by the thread that moves it and by those who watch.

    `done` and `total` are bytes; `total` is None until the source has said. Whatever moves bytes
    calls `advance`, which is where limits and the wish to stop take effect.
    """

    def __init__(self, max_bytes: int, timeout_s: float | None = None) -> None:
        self.max_bytes = max_bytes
        self.total: int | None = None
        self.done = 0
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._stopped = False

    def begin(self) -> None:
        """Time counts from here, and no longer from when this was made."""
        if self._timeout_s is not None:
            self._deadline = time.monotonic() + self._timeout_s

    def expect(self, total: int) -> None:
        """The source announces `total` bytes. Raises TooLarge before any of them is fetched."""
        self.total = total
        if total > self.max_bytes:
            raise too_large(self.max_bytes)

    def advance(self, count: int = 0) -> None:
        """`count` more bytes have come. Raises TooLarge, ImportTimeout, ImportStopped."""
        self.done += count
        if self.done > self.max_bytes:
            raise too_large(self.max_bytes)
        if self._stopped:
            raise ImportStopped("The import was given up: the server is ending. Ask again later.")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise ImportTimeout(
                f"The source took more than {self._timeout_s:.0f} s. Ask again, or raise the "
                "server's --import-timeout."
            )

    def stop(self) -> None:
        """The next `advance` raises ImportStopped."""
        self._stopped = True


class Intake:
    """Takes files into one folder, as far as `transfer` allows."""

    def __init__(self, into: Path, transfer: Transfer) -> None:
        self._into = into
        self._transfer = transfer

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Makes the file `name` of `blocks`; raises TooLarge, and StoreError if it exists."""
        limit = MAX_CONFIG if name == CONFIG else None
        size = 0
        with disk(f"write {name}"):
            file = (self._into / name).open("xb", buffering=0)
        with file:
            # Only writing is the disk's fault: where blocks come from has failures of its own.
            for block in blocks:
                self._transfer.advance(len(block))
                size += len(block)
                if limit is not None and size > limit:
                    raise TooLarge(f"{name} has more than {limit} bytes. {_CONFIG_FIX}")
                with disk(f"write {name}"):
                    file.write(block)


_CONFIG_FIX = "Send the file PEFT's save_pretrained wrote, which has a few thousand."


def too_large(max_bytes: int) -> TooLarge:
    """The refusal of a source with more than `max_bytes`."""
    return TooLarge(
        f"The adapter has more than {max_bytes} bytes. Save it in bfloat16 or with a smaller "
        "rank, or raise the server's limit."
    )
