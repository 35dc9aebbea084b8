"""Import addresses: what they may say, and from which of them this server may import."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from adapters.errors import InvalidSource, SourceForbidden, SourceNotFound, clean

MAX_LENGTH = 2048  # characters

_FORMS = {
    "hf": "hf://org/repo[@revision][/folder]",
    "s3": "s3://bucket/folder",
    "gs": "gs://bucket/folder",
    "az": "az://container/folder",
    "file": "file:///folder",
}
_PLACE_PARTS = {"hf": 2, "s3": 1, "gs": 1, "az": 1, "file": 0}
# Both become parts of a URL, the second a part of a host's name.
_REPO_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_BUCKET = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,221}")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+=-]*(/\w[\w.+=-]*)*", re.ASCII)
_ANY_REPOSITORY = "hf://*"
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP = _READ | os.O_PATH


@dataclass(frozen=True, slots=True)
class Address:
    """Where an adapter lies.

    `parts` lead to its folder, the outermost first: on the hub (`hf`) they are the organisation,
    the repository and folders in it; in object storage (`s3`, `gs`, `az`) the bucket or container
    and folders; on this machine (`file`) folders only. A `revision` has only the hub; None is the
    newest.
    """

    scheme: str
    parts: tuple[str, ...]
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` writes; raises InvalidSource, saying what to write instead.

        One slash at the end is allowed. Nothing is percent-decoded but the hub's revision, so that
        a path means one thing only.
        """
        address = _parse(text)
        if len(address.parts) < max(1, _PLACE_PARTS[address.scheme]):
            raise _invalid(address.scheme, "It is not complete.")
        return address

    def __str__(self) -> str:
        slash = "/" if self.scheme == "file" else ""
        parts = list(self.parts)
        if self.revision is not None:
            parts[1] += "@" + quote(self.revision, safe="")
        return f"{self.scheme}://{slash}{'/'.join(parts)}"

    @property
    def place(self) -> str:
        """What `folder` is in: `org/repo`, the bucket or container; empty for `file`."""
        return "/".join(self.parts[: _PLACE_PARTS[self.scheme]])

    @property
    def folder(self) -> str:
        """The path of the folder in `place`, without slashes around it; may be empty."""
        return "/".join(self.parts[_PLACE_PARTS[self.scheme] :])


def _parse(text: str) -> Address:
    """An address, or a shorter prefix of one."""
    if len(text) > MAX_LENGTH:
        raise InvalidSource(f"The source has more than {MAX_LENGTH} characters. Write an address.")
    scheme, separator, rest = text.partition("://")
    if scheme not in _FORMS or not separator:
        raise InvalidSource(
            f"{clean(text, 40) or 'Nothing'} is no source. Write {', '.join(_FORMS.values())}."
        )
    if not rest.isprintable() or "\\" in rest:
        raise _invalid(scheme, "It has a backslash or a character that cannot be printed in it.")
    if "?" in rest or "#" in rest:
        raise _invalid(scheme, "It may have no query (?) and no fragment (#).")
    if scheme == "file":
        if not rest.startswith("/"):
            raise _invalid(scheme, "Its path must be absolute, on this machine.")
        rest = rest[1:]
    parts = rest.removesuffix("/").split("/") if rest else []
    revision = _take_revision(parts) if scheme == "hf" else None
    _check_parts(scheme, parts)
    return Address(scheme, tuple(parts), revision)


def _take_revision(parts: list[str]) -> str | None:
    """Cuts `@revision` off the repository in `parts`."""
    if len(parts) < 2 or "@" not in parts[1]:
        return None
    parts[1], _, quoted = parts[1].partition("@")
    revision = unquote(quoted)
    if not _REVISION.fullmatch(revision):
        raise _invalid(
            "hf", "After @ comes a branch, tag or commit, with each slash in it written %2F."
        )
    return revision


def _check_parts(scheme: str, parts: list[str]) -> None:
    for part in parts:
        if part in ("", ".", ".."):
            raise _invalid(scheme, "It may have no empty part (//) and no . or .. in its path.")
        if "%" in part:
            raise _invalid(scheme, "Nothing in it is percent-encoded: write the characters.")
    named = _REPO_NAME if scheme == "hf" else _BUCKET
    for part in parts[: _PLACE_PARTS[scheme]]:
        if "@" in part or ":" in part:
            raise _invalid(
                scheme,
                "It has no user, password or port: those are in the server's environment.",
            )
        if not named.fullmatch(part):
            raise _invalid(scheme, f"{clean(part, 100)!r} cannot be a name there.")


def _invalid(scheme: str, reason: str) -> InvalidSource:
    return InvalidSource(f"The source is not an address. {reason} Write {_FORMS[scheme]}.")


class Allowed:
    """What this server may import: everything below the operator's prefixes, by default nothing.

    A prefix is an address that may end early (`hf://my-org`, `s3://bucket`), or `hf://*` for the
    whole hub. It covers whole parts: `s3://bucket/team-a` has nothing to do with
    `s3://bucket/team-abc`. Any revision of an allowed repository is allowed.
    """

    def __init__(self, prefixes: Iterable[str] = ()) -> None:
        """Raises ValueError, with the prefix in it, for one that is none."""
        self._prefixes = [_prefix(text) for text in prefixes]

    def check(self, address: Address) -> None:
        """Raises SourceForbidden unless `address` is allowed; a `file` one once links are followed.

        What this says of files holds only now. `opened` is for using them.
        """
        if address.scheme == "file":
            self._resolved(address)
        elif not any(
            address.scheme == prefix.scheme and address.parts[: len(prefix.parts)] == prefix.parts
            for prefix in self._prefixes
        ):
            raise _forbidden(address)

    @contextmanager
    def opened(self, address: Address) -> Iterator[Path]:
        """The folder of a `file` address, under a path that cannot be turned elsewhere meanwhile.

        The path is good inside the `with` only. Raises SourceForbidden and SourceNotFound.
        """
        folder = self._resolved(address)
        parent = _parent_of(folder, address)
        try:
            yield Path(f"/proc/self/fd/{parent}", folder.name)
        finally:
            os.close(parent)

    def _resolved(self, address: Address) -> Path:
        # Roots are resolved each time too: a mounted volume may be a link that changes.
        resolved = Path(os.path.realpath(_local(address)))
        for prefix in self._prefixes:
            if prefix.scheme == "file" and resolved.is_relative_to(
                os.path.realpath(_local(prefix))
            ):
                return resolved
        raise _forbidden(address)


def _prefix(text: str) -> Address:
    if text == _ANY_REPOSITORY:
        return Address("hf", ())
    try:
        prefix = _parse(text)
    except InvalidSource as error:
        raise ValueError(f"{clean(text, 100)}: {error.message}") from error
    if not prefix.parts:
        raise ValueError(f"{text}: it would allow everything there. Name a part of it.")
    if prefix.revision is not None:
        raise ValueError(f"{text}: a prefix has no revision, for it allows every one.")
    return prefix


def _forbidden(address: Address) -> SourceForbidden:
    return SourceForbidden(
        f"This server does not import from {address}. To allow it, start the server with "
        "--import-from PREFIX, where PREFIX is that address or how it begins."
    )


def _local(address: Address) -> str:
    return "/" + address.folder


def _parent_of(folder: Path, address: Address) -> int:
    """A handle of the folder in which `folder`, what `address` resolves to, can be opened."""
    if os.path.islink(_local(address)):
        raise SourceForbidden(f"{address} is a link. Name the folder that it leads to.")
    try:
        with _stepped_to(folder.parent) as parent:
            os.close(os.open(folder.name, _READ, dir_fd=parent))
            return os.dup(parent)
    except PermissionError as error:
        message = f"The server's user may not read {address}. Change its permissions."
        raise SourceForbidden(message) from error
    except OSError as error:
        raise SourceNotFound(f"There is no folder {address} on the server's machine.") from error


@contextmanager
def _stepped_to(folder: Path) -> Iterator[int]:
    """A handle of `folder`, which is absolute, reached over no link: none can have come since."""
    with ExitStack() as steps:
        handle = os.open("/", _STEP)
        steps.callback(os.close, handle)
        for name in folder.parts[1:]:
            handle = os.open(name, _STEP, dir_fd=handle)
            steps.callback(os.close, handle)
        yield handle
