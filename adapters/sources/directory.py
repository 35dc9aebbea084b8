"""A PEFT folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from adapters.errors import InvalidAdapter, Problem
from adapters.folder import FILES, absent, disk, open_regular
from adapters.sources.intake import Intake
from adapters.weights import BLOCK


def copy(folder: Path, into: Path, max_bytes: int) -> None:
    """Copies the adapter's two files from `folder` into `into`, following no links.

    Whether `folder` may be read at all is the caller's to decide. Raises InvalidAdapter,
    TooLarge beyond `max_bytes`, StoreError.
    """
    if folder.is_symlink() or not folder.is_dir():
        message = f"{folder} is not a folder."
        fix = "Give the folder that PEFT's save_pretrained wrote, and no link to it."
        raise InvalidAdapter([Problem("not_a_folder", str(folder), message, fix)])
    with disk(f"read {folder}"):
        names = os.listdir(folder)
    if problems := absent(names):
        raise InvalidAdapter(problems)
    intake = Intake(into, max_bytes)
    for name in FILES:
        with open_regular(folder, name) as file:
            intake.write(name, _blocks(file))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block
