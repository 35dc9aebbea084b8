"""What adapters, aliases and references may be called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapters.errors import InvalidName, InvalidReference, ReservedName, clean

LATEST = "latest"
ANY = "*"  # the pattern that every name matches

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
# Nine digits fit every database's integer column.
_PATTERN = re.compile(r"[a-z0-9._*-]{1,128}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RULE = "lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit, no '..'"


def _follows_rule(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and ".." not in text


def check_name(name: str) -> str:
    """`name` itself if it may name an adapter; raises InvalidName."""
    if not _follows_rule(name):
        raise InvalidName(
            f"{clean(name, 140)!r} cannot name an adapter. Use 1 to 128 {_RULE}.", param="name"
        )
    return name


def check_alias(alias: str) -> str:
    """`alias` itself if it can be set; raises InvalidName, or ReservedName for `latest`.

    All digits would read as a version number.
    """
    if alias == LATEST:
        raise ReservedName(
            f"The alias {LATEST} moves by itself. Choose another alias.", param="alias"
        )
    if not _follows_rule(alias) or alias.isdigit():
        raise InvalidName(
            f"{clean(alias, 140)!r} cannot be an alias. Use 1 to 128 {_RULE}, not digits alone.",
            param="alias",
        )
    return alias


def check_pattern(pattern: str) -> str:
    """`pattern` itself if it can mean names of adapters; raises InvalidName."""
    if _PATTERN.fullmatch(pattern) is None:
        raise InvalidName(
            f"{clean(pattern, 140)!r} cannot mean names of adapters. Use what names are made of, "
            "and * for any text: team-a.*",
            param="adapters",
        )
    return pattern


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` matches one of `patterns`, in which `*` stands for any text or none."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def name_of(reference: str) -> str:
    """The adapter's name in a reference, which need not be a valid one."""
    return reference.partition("@")[0]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a client writes to mean a version: a name, and at most one of the three selectors.

    No selector at all means the alias `latest`.
    """

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads `sql`, `sql@3`, `sql@prod` or `sql@sha256:<64 hex digits>`.

        Raises InvalidReference.
        """
        name, at, selector = text.partition("@")
        if not _follows_rule(name):
            raise _invalid(text)
        if not at:
            return cls(name)
        if _NUMBER.fullmatch(selector):
            return cls(name, version=int(selector))
        if _DIGEST.fullmatch(selector):
            return cls(name, digest=selector)
        if _follows_rule(selector) and not selector.isdigit():
            return cls(name, alias=selector)
        raise _invalid(text)

    def __str__(self) -> str:
        selector = self.alias or self.digest or self.version
        return self.name if selector is None else f"{self.name}@{selector}"


def _invalid(text: str) -> InvalidReference:
    return InvalidReference(
        f"{clean(text, 220)!r} is not an adapter reference. Write name, name@3, name@alias or "
        f"name@sha256:<64 hex digits>; a name is made of {_RULE}."
    )
