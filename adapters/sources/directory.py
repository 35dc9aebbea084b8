"""A PEFT folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from adapters.errors import InvalidAdapter, Problem
from adapters.folder import disk, open_regular, wanted
from adapters.sources.intake import Intake, Transfer
from adapters.weights import BLOCK


def copy(folder: Path, into: Path, transfer: Transfer, allow_pickle: bool = False) -> None:
    """Copies the adapter's two files from `folder` into `into`, following no links.

    Whether `folder` may be read at all is the caller's to decide. Raises InvalidAdapter,
    StoreError, and what `transfer` raises.
    """
    with _opened(folder) as opened:
        with disk(f"read {folder}"):
            names = os.listdir(opened)
        intake = Intake(into, transfer)
        with ExitStack() as files:
            chosen = wanted(names, allow_pickle)
            sources = [files.enter_context(open_regular(opened, name)) for name in chosen]
            transfer.expect(sum(os.fstat(source.fileno()).st_size for source in sources))
            for name, source in zip(chosen, sources, strict=True):
                intake.write(name, _blocks(source, name))


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """A path that means this very folder, whatever takes its name meanwhile."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{folder} is not a folder."
        fix = "Give the folder that PEFT's save_pretrained wrote, and no link to it."
        raise InvalidAdapter([Problem("not_a_folder", str(folder), message, fix)]) from error
    except OSError as error:
        with disk(f"read {folder}"):
            raise error
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def _blocks(file: BinaryIO, name: str) -> Iterator[bytes]:
    with disk(f"read {name}"):
        while block := file.read(BLOCK):
            yield block
