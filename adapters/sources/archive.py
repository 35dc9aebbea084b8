"""A .zip, .tar, .tar.gz or .tar.zst with one PEFT folder in it.

Only the adapter's two files are ever written, under their own names. Everything an archive says
of itself (sizes, names, types) is taken for a claim.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

import zstandard

from adapters.errors import InvalidAdapter, Problem, TooLarge
from adapters.folder import FILES, PICKLE, WEIGHTS, disk, wanted
from adapters.sources.intake import Intake, Transfer, too_large

MAX_ENTRIES = 1000

_BLOCK = 2**16
# What tarfile may read at once is a header: names and attributes of one entry. Its own parsing
# of them takes memory, and before Python 3.11.10 quadratic time.
_MAX_TAR_HEADER = 4096
# What zipfile may read at once includes the table of contents: about 100 bytes per entry.
_MAX_ZIP_READ = 2**20
# What zstd may remember of what it unpacked; its own tool allows as much by default.
_MAX_ZSTD_WINDOW = 2**27
_ENCRYPTED = 0x1
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    zstandard.ZstdError,
    EOFError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    ValueError,
    OverflowError,
    IndexError,
    struct.error,
)
_REPACK = "Pack the folder that PEFT's save_pretrained wrote, and nothing else."


def unpack(
    archive: Path,
    into: Path,
    max_bytes: int,
    max_entries: int = MAX_ENTRIES,
    allow_pickle: bool = False,
) -> None:
    """Unpacks the adapter in `archive` into the folder `into`; its other files are skipped.

    The kind is judged by content, not by name. Raises InvalidAdapter, StoreError, and TooLarge
    if it unpacks to more than `max_bytes` or has more than `max_entries` entries.
    """
    contents = _Contents(into, max_bytes, max_entries, allow_pickle)
    # In a tar, headers and skipped files count too: they cost time to unpack.
    tar_bytes = max_bytes + max_entries * _MAX_TAR_HEADER
    with disk("read the archive"), archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        try:
            if magic == b"PK\x03\x04":
                _unzip(archive, contents)
            else:
                _untar(_decompressed(file, magic), contents, tar_bytes)
        except _BROKEN as error:
            raise _broken(error) from error
    contents.finish()


def _refusal(code: str, where: str, message: str, fix: str = _REPACK) -> InvalidAdapter:
    return InvalidAdapter([Problem(code, where, message, fix)])


def _broken(error: BaseException) -> InvalidAdapter:
    message = f"The archive is broken or of no known kind: {error}."
    return _refusal("archive_broken", "archive", message, "Send a .zip, .tar, .tar.gz or .tar.zst.")


class _Contents:
    """What an archive has in it, entry by entry, and which of it is the adapter."""

    def __init__(self, into: Path, max_bytes: int, max_entries: int, allow_pickle: bool) -> None:
        self._into = into
        self._intake = Intake(into, Transfer(max_bytes))
        self._max_entries = max_entries
        self._allow_pickle = allow_pickle
        self._wanted = {*FILES, PICKLE} if allow_pickle else {*FILES}
        self._entries = 0
        self._files: set[PurePosixPath] = set()
        self._home: PurePosixPath | None = None

    def enter(self, name: str) -> PurePosixPath:
        """Counts an entry of any kind; its path, if that is a harmless one."""
        self._entries += 1
        if self._entries > self._max_entries:
            raise TooLarge(f"The archive has more than {self._max_entries} entries. {_REPACK}")
        path = PurePosixPath(name)
        # The backslash and the drive are paths where the archive may have been made.
        foreign = "\\" in name or "\0" in name or re.match("[A-Za-z]:", name)
        if foreign or path.is_absolute() or ".." in path.parts:
            raise _refusal("archive_path", name, "An entry's path leads out of the archive.")
        return path

    def file(self, path: PurePosixPath, blocks: Iterator[bytes]) -> None:
        """Takes a file, reading it only if it is the adapter's."""
        if path in self._files:
            raise _refusal("archive_duplicate", str(path), "Two entries have the same path.")
        self._files.add(path)
        if path.name not in self._wanted:
            return
        if self._home not in (None, path.parent):
            message = f"There is an adapter in {self._home} and another in {path.parent}."
            raise _refusal("archive_several", str(path), message)
        self._home = path.parent
        self._intake.write(path.name, blocks)

    def finish(self) -> None:
        """Refuses an archive in which no adapter was."""
        # An adapter's pickle may lie anywhere when there is nothing to say where it belongs.
        here = {p.name for p in self._files if self._home in (None, p.parent)}
        if WEIGHTS in wanted(here, self._allow_pickle):
            (self._into / PICKLE).unlink(missing_ok=True)


def _special(name: str) -> InvalidAdapter:
    return _refusal(
        "archive_special", name, "An entry is a link, a device or another thing not a plain file."
    )


# Zip ---------------------------------------------------------------------------------------


class _ZipFile(io.FileIO):
    """A file of which little can be read at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > _MAX_ZIP_READ:
            raise ValueError("its table of contents is too large")
        return super().read(size) or b""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == os.SEEK_SET and offset < 0:
            raise ValueError("its table of contents points before its beginning")
        return super().seek(offset, whence)


def _unzip(archive: Path, contents: _Contents) -> None:
    with _ZipFile(archive) as file, zipfile.ZipFile(file) as opened:
        for info in opened.infolist():
            path = contents.enter(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir() and kind in (0, stat.S_IFDIR):
                continue
            if kind not in (0, stat.S_IFREG):
                raise _special(info.filename)
            contents.file(path, _unzipped(opened, info))


def _unzipped(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{info.filename!a} is encrypted")
    # The other methods' decoders take memory that the archive chooses.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!a} is compressed with another method than deflate")
    with opened.open(info) as entry:
        while block := entry.read(_BLOCK):
            yield block


# Tar ---------------------------------------------------------------------------------------


class _TarFile:
    """What tarfile reads from: forward only, counted, and little at once."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int) -> int:
        if offset < self._position:
            raise ValueError("its entries overlap")
        for _ in self.blocks(offset - self._position):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_TAR_HEADER:
            raise ValueError("an entry's header is too large")
        return self._read(size)

    def blocks(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, fewer where the file ends."""
        while size > 0 and (block := self._read(min(size, _BLOCK))):
            size -= len(block)
            yield block

    def _read(self, size: int) -> bytes:
        block = self._file.read(size)
        self._position += len(block)
        if self._position > self._max_bytes:
            raise too_large(self._max_bytes)
        return block


def _decompressed(file: IO[bytes], magic: bytes) -> IO[bytes]:
    """What `file`, which begins with `magic`, has in it; itself if that is not compressed."""
    if magic[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if magic == b"\x28\xb5\x2f\xfd":
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).stream_reader(
            file, read_across_frames=True, closefd=False
        )
        return cast(IO[bytes], reader)
    return file


def _untar(file: IO[bytes], contents: _Contents, max_bytes: int) -> None:
    source = _TarFile(file, max_bytes)
    with tarfile.open(fileobj=cast(IO[bytes], source), mode="r:") as opened:
        for member in opened:
            path = contents.enter(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise _special(member.name)
            if member.size < 0:
                raise ValueError(f"{member.name!a} has a negative size")
            contents.file(path, _untarred(source, member))
    # A compressed stream's checksum comes at its very end, behind the tar's.
    for _ in source.blocks(max_bytes):
        pass


def _untarred(source: _TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    left = member.size
    for block in source.blocks(member.size):
        left -= len(block)
        yield block
    if left:
        raise EOFError(f"it ends inside {member.name!a}")
