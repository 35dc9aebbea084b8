"""A folder on another machine: its files have sizes, and can be read from any byte on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapters.errors import SourceFailed
from adapters.folder import disk, wanted
from adapters.sources.intake import Intake, Transfer

ATTEMPTS = 5  # in a row without a byte
PAUSE_S = 0.5  # after the first, and longer by as much after each

_HEARING_S = 0.05  # how long a stop can go unheard in a pause

_T = TypeVar("_T")


class Dropped(Exception):
    """The connection was lost or not had, or the other side is busy: going on may help.

    The text says which, and completes "The source could not be read: …".
    """


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file. `read(begin)` yields its bytes from the byte `begin` on, and raises Dropped.

    `size` is in bytes, `sha256` hexadecimal if known, both as the source announces them: claims,
    which are checked.
    """

    name: str
    size: int
    read: Callable[[int], Generator[bytes, None, None]]
    sha256: str | None = None


def take(
    files: Iterable[RemoteFile], into: Path, transfer: Transfer, allow_pickle: bool = False
) -> None:
    """Brings the adapter's two files of a folder with these `files` into the folder `into`.

    Raises InvalidAdapter and TooLarge before anything is read, SourceFailed, StoreError and what
    `transfer` raises.
    """
    by_name = {file.name: file for file in files}
    chosen = [by_name[name] for name in wanted(by_name, allow_pickle)]
    transfer.expect(sum(file.size for file in chosen))
    intake = Intake(into, transfer)
    with emptied(into):
        for file in chosen:
            intake.write(file.name, _blocks(file, transfer))


@contextmanager
def emptied(into: Path) -> Iterator[None]:
    """If what is inside fails, takes away the files that it made in `into`."""
    with disk("read the import's folder"):
        before = set(os.listdir(into))
    try:
        yield
    except BaseException:
        for name in set(os.listdir(into)) - before:
            (into / name).unlink(missing_ok=True)
        raise


def ask(question: Callable[[], _T], transfer: Transfer) -> _T:
    """The answer to `question`, put again when Dropped; raises SourceFailed after ATTEMPTS."""
    patience = _Patience(transfer)
    while True:
        transfer.advance()
        try:
            return question()
        except Dropped as drop:
            patience.wait(drop)


def _blocks(file: RemoteFile, transfer: Transfer) -> Iterator[bytes]:
    """The bytes of `file`, read on from where a connection broke; as many as it announced."""
    patience = _Patience(transfer)
    digest = hashlib.sha256()
    done = 0
    while done < file.size:
        transfer.advance()
        try:
            with closing(file.read(done)) as blocks:
                for block in blocks:
                    done += len(block)
                    if done > file.size:
                        raise _other_size(file, "more")
                    patience.renew()
                    digest.update(block)
                    yield block
        except Dropped as drop:
            patience.wait(drop)
        else:
            if done < file.size:
                raise _other_size(file, "fewer")
    if file.sha256 not in (None, digest.hexdigest()):
        raise SourceFailed(f"{file.name} came with other bytes than announced. Ask again.")


def _other_size(file: RemoteFile, how: str) -> SourceFailed:
    return SourceFailed(
        f"{file.name} has {how} bytes than the {file.size} that the source announced. Ask again."
    )


class _Patience:
    """How often in a row nothing came, and the pauses after it."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._drops = 0

    def renew(self) -> None:
        """Something came."""
        self._drops = 0

    def wait(self, drop: Dropped) -> None:
        """Returns when it is time to try again; raises SourceFailed when it was tried enough."""
        self._drops += 1
        if self._drops == ATTEMPTS:
            message = (
                f"The source could not be read: {drop} ({ATTEMPTS} attempts). Ask again later."
            )
            raise SourceFailed(message) from drop
        until = time.monotonic() + PAUSE_S * self._drops
        while (left := until - time.monotonic()) > 0:
            self._transfer.advance()
            time.sleep(min(left, _HEARING_S))
