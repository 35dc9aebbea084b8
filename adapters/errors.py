"""What can go wrong with adapters, as an exception tree that knows no HTTP status.

Every message says what is wrong and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MAX_WHERE = 300
_MAX_TEXT = 1000


def clean(text: str, limit: int = _MAX_TEXT) -> str:
    """`text` without anything that cannot be printed or encoded as UTF-8, at most `limit` long."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def listing(items: Iterable[str], shown: int = 3) -> str:
    """`a, b, c and 5 more`: the first `shown` items by name, and how many there are besides."""
    ordered = sorted(items)
    head = ", ".join(clean(item, 120) for item in ordered[:shown])
    return head if len(ordered) <= shown else f"{head} and {len(ordered) - shown} more"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to say about an adapter.

    `code` is stable; `where` is the offending file, tensor or key; `fix` is what to do.
    Names in an upload are free text, so every field is made printable and short here, once.
    """

    code: str
    where: str
    message: str
    fix: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", clean(self.where, _MAX_WHERE))
        object.__setattr__(self, "message", clean(self.message))
        object.__setattr__(self, "fix", clean(self.fix))

    @classmethod
    def grouped(cls, code: str, names: Iterable[str], message: str, fix: str) -> list[Problem]:
        """One problem for all of `names`, the offenders; none if there are none."""
        found = list(names)
        if not found:
            return []
        return [cls(code, min(found), f"{message} ({len(found)}): {listing(found)}.", fix)]

    def as_dict(self) -> dict[str, str]:
        """The four fields, for JSON."""
        return {
            "code": self.code,
            "where": self.where,
            "message": self.message,
            "fix": self.fix,
        }


class AdapterError(Exception):
    """Root of the tree. `code` names the class for machines, `param` the argument at fault."""

    code: str = "adapter_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidName(AdapterError):
    """An adapter name or alias that breaks the naming rule."""

    code = "invalid_name"


class ReservedName(AdapterError):
    """A name or alias that means something already."""

    code = "reserved_name"


class InvalidReference(AdapterError):
    """Text that is no adapter reference."""

    code = "invalid_reference"


class AdapterNotFound(AdapterError):
    """No adapter has that name."""

    code = "adapter_not_found"


def no_adapter(name: str, param: str | None = None) -> AdapterNotFound:
    """The same words whether there is none, or one that the caller is not to know of."""
    advice = "That is the base model, which not every API key may use." if name == "base" else ""
    advice = advice or "Check the name, or upload it."
    return AdapterNotFound(f"There is no adapter {name}. {advice}", param)


class VersionNotFound(AdapterError):
    """The adapter has no such version, or not one that is ready."""

    code = "version_not_found"


class AliasNotFound(AdapterError):
    """The adapter has no such alias."""

    code = "alias_not_found"


class AliasInUse(AdapterError):
    """A version cannot go while an alias points to it."""

    code = "alias_in_use"


class AliasConflict(AdapterError):
    """An alias does not point where the caller expected it to."""

    code = "alias_conflict"


class InvalidAdapter(AdapterError):
    """The files are not an adapter that can be served. `problems` has every reason."""

    code = "invalid_adapter"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: list[Problem] = list(problems)
        first = self.problems[0]
        more = len(self.problems) - 1
        tail = f" ({more} more in problems)" if more else ""
        super().__init__(f"The adapter was refused: {first.message} {first.fix}{tail}")


class TooLarge(AdapterError):
    """More bytes or entries than the limit allows."""

    code = "too_large"


class QuotaExceeded(AdapterError):
    """More bytes than an API key may store."""

    code = "insufficient_quota"


class VersionQuarantined(AdapterError):
    """The version's bytes on disk are not what was sealed, so it is not served."""

    code = "version_quarantined"


class InvalidSource(AdapterError):
    """Text that names no source of adapters."""

    code = "invalid_source"


class SourceForbidden(AdapterError):
    """A source, or a place it leads to, that this server may not import from."""

    code = "source_forbidden"


class SourceNotFound(AdapterError):
    """There is nothing where the source says."""

    code = "source_not_found"


class SourceFailed(AdapterError):
    """The source could not be read to its end; asking again may help."""

    code = "source_failed"


class ImportTimeout(AdapterError):
    """The source took longer than an import may."""

    code = "import_timeout"


class ImportStopped(AdapterError):
    """The import was given up because the server is ending."""

    code = "import_stopped"


class BaseModelError(AdapterError):
    """The base model's folder cannot be understood."""

    code = "base_model_unreadable"


class StoreError(AdapterError):
    """The disk under the store did not do what was asked."""

    code = "store_error"


class NoSpace(StoreError):
    """The disk under the store is full."""

    code = "no_space"


class RegistryError(AdapterError):
    """The database did not do what was asked."""

    code = "registry_error"
