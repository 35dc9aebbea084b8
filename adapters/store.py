"""Sealed adapters on disk, each under the digest of its content.

    incoming/<random>/        being written
    sealed/<ab>/<abcd…>/      complete, synced to disk, read-only
    trash/<random>/           on its way out

Folders move between the three by rename, which a crash does or does not do, never half.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters import peft
from adapters.folder import CONFIG, FILES, WEIGHTS, disk, open_regular
from adapters.weights import blocks

_PREFIX = "sha256:"
# Lists whose order means nothing to PEFT, which keeps some of them as sets.
_SETS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
# Here the first pattern that matches wins, so order is content.
_ORDERED = ("rank_pattern", "alpha_pattern")


def digest(folder: Path) -> str:
    """`sha256:<hex>` over what the adapter in `folder` is, not how its files happen to say it.

    The same for any order of files, config keys, set-like lists and tensors, and for any
    safetensors metadata. Raises InvalidAdapter and StoreError, as `peft.read` does.
    """
    spec = peft.read(folder)
    hashed = hashlib.sha256(_canonical(spec.config))
    with open_regular(folder, WEIGHTS) as file:
        for tensor in spec.weights.tensors.values():
            # JSON ends where it ends, and the shape says how many bytes follow: no two
            # adapters make the same stream.
            hashed.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for block in blocks(file, tensor):
                hashed.update(block)
    return _PREFIX + hashed.hexdigest()


def _canonical(config: Any) -> bytes:
    shaped = dict(config)
    for key in _SETS:
        if isinstance(shaped.get(key), list):
            shaped[key] = sorted(shaped[key], key=json.dumps)
    for key in _ORDERED:
        if isinstance(shaped.get(key), dict):
            shaped[key] = list(shaped[key].items())
    return json.dumps(shaped, sort_keys=True, separators=(",", ":")).encode()


class Store:
    """One folder of sealed adapters. Safe for threads; one process at a time.

    Every call raises StoreError, or NoSpace when the disk is full.
    """

    def __init__(self, root: Path) -> None:
        self._incoming = root / "incoming"
        self._sealed = root / "sealed"
        self._trash = root / "trash"
        with disk("make its folders"):
            for folder in (self._incoming, self._sealed, self._trash):
                folder.mkdir(parents=True, exist_ok=True)
            _sync(root)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder on the store's filesystem; what is not sealed by the end is removed."""
        folder = self._incoming / uuid.uuid4().hex
        with disk("make a folder"):
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def seal(self, folder: Path, digest: str) -> Path:
        """Moves the adapter in a staging folder to its place for good and returns the place.

        Files that are no part of the adapter are dropped. When it returns, a power loss cannot
        take the adapter away. An adapter that is there already stays as it is.
        """
        if folder.parent != self._incoming:
            raise ValueError(f"{folder} is not a staging folder of this store")
        place = self.path(digest)
        with disk("seal an adapter"):
            place.parent.mkdir(exist_ok=True)
            if not place.is_dir():
                _prepare(folder)
                _move(folder, place)
            # Also when it was there: another thread may have renamed it a moment ago.
            _sync(place.parent)
            _sync(self._sealed)
        return place

    def path(self, digest: str) -> Path:
        """Where the adapter with this digest is, if it is here."""
        hexdigits = digest.removeprefix(_PREFIX)
        if len(hexdigits) != 64 or not set(hexdigits) <= set("0123456789abcdef"):
            raise ValueError(f"{digest!r} is not a digest")
        return self._sealed / hexdigits[:2] / hexdigits

    def has(self, digest: str) -> bool:
        """Whether the adapter with this digest is here."""
        return self.path(digest).is_dir()

    def delete(self, digest: str) -> None:
        """Removes the adapter with this digest, if it is here."""
        with disk("delete an adapter"):
            if self.has(digest):
                self._discard(self.path(digest))

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Removes everything but the sealed adapters in `keep`; returns the digests removed.

        Only for the start, before anything is staged: what an earlier crash left goes too.
        """
        removed = []
        with disk("clean up"):
            for place in self._sealed.glob("*/*"):
                if _PREFIX + place.name not in keep:
                    self._discard(place)
                    removed.append(_PREFIX + place.name)
            for folder in (self._incoming, self._trash):
                for leftover in folder.iterdir():
                    _remove(leftover)
        return removed

    def _discard(self, place: Path) -> None:
        """By way of the trash: half a folder must never have a sealed name."""
        doomed = self._trash / uuid.uuid4().hex
        place.rename(doomed)
        _sync(place.parent)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _prepare(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in FILES:
            _remove(entry)
    for name in (CONFIG, WEIGHTS):
        with open_regular(folder, name) as file:
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
    folder.chmod(0o755)
    _sync(folder)


def _move(folder: Path, place: Path) -> None:
    try:
        folder.rename(place)
    except OSError:
        # Another thread has sealed the same content first: as good as ours.
        if not place.is_dir():
            raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
