"""Sealed adapters on disk, each under the digest of its content.

    incoming/<random>/              being written
    sealed/<ab>/<abcd…>/            complete, synced to disk, read-only
    sealed/<ab>/<abcd…>/engine-…/   the same weights in the form an engine loads (`canonical`)
    trash/<random>/                 on its way out

Folders move between the three by rename, which a crash does or does not do, never half.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters import peft
from adapters.errors import InvalidAdapter
from adapters.folder import FILES, WEIGHTS, disk, open_regular
from adapters.weights import blocks

_PREFIX = "sha256:"
_HEX = re.compile("[0-9a-f]{64}")
_FORMS = "engine-*"
_DIGEST = "digest"  # the file in a form's folder that has the digest of its content
# Sealed files have a time of modification that follows from the adapter's digest. Whoever writes to
# one changes it, and another adapter's files bring another time, so a look at the folder tells
# whether its bytes have to be read again. In even seconds, which any filesystem keeps.
_FIRST_S, _TIMES = 946_684_800, 300_000_000  # 2000-01-01 UTC, and until 2019
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

        Its forms move with it; files that are no part of the adapter are dropped. When it returns,
        a power loss cannot take the adapter away. An adapter that is there already stays as it is,
        unless its bytes are not what they were: then this one takes its place.
        """
        self._must_be_staged(folder)
        place = self.path(digest)
        with disk("seal an adapter"):
            place.parent.mkdir(exist_ok=True)
            if place.is_dir() and self.damage(digest) is not None:
                self._discard(place)
            if not place.is_dir():
                _prepare(folder, _sealed_at(digest))
                _move(folder, place)
            # Also when it was there: another thread may have renamed it a moment ago.
            _sync(place.parent)
            _sync(self._sealed)
        return place

    def seal_form(self, folder: Path, digest: str, key: str) -> Path:
        """Moves a staging folder with another form of a sealed adapter beside it, as form `key`.

        It takes the place of one that is there. Returns the place.
        """
        self._must_be_staged(folder)
        place = self.form(digest, key)
        with disk("seal an adapter's form"):
            _prepare_form(folder, _sealed_at(digest))
            if place.is_dir():
                self._discard(place)
            _move(folder, place)
            _sync(place.parent)
        return place

    def path(self, digest: str) -> Path:
        """Where the adapter with this digest is, if it is here."""
        hexdigits = digest.removeprefix(_PREFIX)
        if not _HEX.fullmatch(hexdigits):
            raise ValueError(f"{digest!r} is not a digest")
        return self._sealed / hexdigits[:2] / hexdigits

    def form(self, digest: str, key: str) -> Path:
        """Where the form `key` of the adapter with this digest is, if it is here."""
        return self.path(digest) / key

    def has(self, digest: str) -> bool:
        """Whether the adapter with this digest is here."""
        return self.path(digest).is_dir()

    def has_form(self, digest: str, key: str) -> bool:
        """Whether its form `key` is here and nobody has written to it."""
        return _untouched(self.form(digest, key), (*FILES, _DIGEST), _sealed_at(digest))

    def damage(self, digest: str, full: bool = False) -> str | None:
        """What is wrong with the bytes of a sealed adapter, as a sentence; None if nothing is.

        They are read only if somebody has written to them since they were sealed, or if `full`.
        """
        place, sealed_at = self.path(digest), _sealed_at(digest)
        if not full and _untouched(place, FILES, sealed_at):
            return None
        with disk("check an adapter"):
            if not place.is_dir():
                return "Its folder is gone."
            if missing := [name for name in FILES if not (place / name).is_file()]:
                return f"{' and '.join(missing)} is gone."
            if not _is(place, digest):
                # From now on a look is enough to doubt them, whatever time they had kept.
                os.utime(place / WEIGHTS)
                return "Its files are not what was sealed."
            if not _untouched(place, FILES, sealed_at):
                with suppress(InvalidAdapter):  # removed a moment ago: the next look tells
                    _settle(place, FILES, sealed_at)
        return None

    def damaged_forms(self, digest: str) -> list[str]:
        """Removes the forms whose bytes, read in full, are not what was sealed; their keys.

        A form is made of the adapter, so it can be made again.
        """
        damaged = []
        with disk("check an adapter's forms"):
            for form in self.path(digest).glob(_FORMS):
                if not _is(form, _recorded(form)):
                    self._discard(form)
                    damaged.append(form.name)
        return sorted(damaged)

    def delete(self, digest: str) -> None:
        """Removes the adapter with this digest, if it is here."""
        with disk("delete an adapter"):
            if self.has(digest):
                self._discard(self.path(digest))

    def sealed(self) -> Iterator[str]:
        """The digests of all adapters that are here."""
        with disk("list the adapters"):
            for place in self._sealed.glob("*/*"):
                if _HEX.fullmatch(place.name):
                    yield _PREFIX + place.name

    def sweep(self) -> None:
        """Removes what a crash left half written or half removed.

        Only for the start, before anything is staged.
        """
        with disk("clean up"):
            for folder in (self._incoming, self._trash):
                for leftover in folder.iterdir():
                    _remove(leftover)

    def _must_be_staged(self, folder: Path) -> None:
        if self._incoming not in folder.parents:
            raise ValueError(f"{folder} is not in a staging folder of this store")

    def _discard(self, place: Path) -> None:
        """By way of the trash: half a folder must never have a sealed name."""
        doomed = self._trash / uuid.uuid4().hex
        place.chmod(0o700)  # one that nobody may enter can be neither moved nor emptied
        for form in place.glob(_FORMS):
            form.chmod(0o700)
        place.rename(doomed)
        _sync(place.parent)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sealed_at(digest: str) -> int:
    """The time of modification, in nanoseconds, of the sealed files of the adapter `digest`."""
    return (_FIRST_S + 2 * (int(digest.removeprefix(_PREFIX), 16) % _TIMES)) * 10**9


def _prepare(folder: Path, sealed_at: int) -> None:
    forms = set(folder.glob(_FORMS))
    for form in forms:
        _prepare_form(form, sealed_at)
    for entry in folder.iterdir():
        if entry.name not in FILES and entry not in forms:
            _remove(entry)
    _settle(folder, FILES, sealed_at)


def _prepare_form(folder: Path, sealed_at: int) -> None:
    (folder / _DIGEST).write_text(digest(folder))
    _settle(folder, (*FILES, _DIGEST), sealed_at)


def _settle(folder: Path, names: Collection[str], sealed_at: int) -> None:
    """Makes the files read-only, marks them as sealed and syncs them and the folder to disk."""
    for name in names:
        with open_regular(folder, name) as file:
            os.fchmod(file.fileno(), 0o444)
            os.utime(file.fileno(), ns=(sealed_at, sealed_at))
            os.fsync(file.fileno())
    folder.chmod(0o755)
    _sync(folder)


def _untouched(folder: Path, names: Collection[str], sealed_at: int) -> bool:
    try:
        found = [os.lstat(folder / name) for name in names]
    except OSError:
        return False
    return all(stat.S_ISREG(f.st_mode) and f.st_mtime_ns == sealed_at for f in found)


def _is(folder: Path, expected: str | None) -> bool:
    """Whether the content of `folder` has this digest."""
    try:
        return digest(folder) == expected
    except InvalidAdapter:
        return False


def _recorded(form: Path) -> str | None:
    try:
        return (form / _DIGEST).read_text()
    except (OSError, ValueError):
        return None


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
