"""The one way into the store: read, check, write for the engine, prove, seal, register."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from adapters import canonical, peft, pickles, store, validate
from adapters.advice import advise
from adapters.algebra import Algebra, algebra
from adapters.audit import Audit, audit
from adapters.base import BaseSpec
from adapters.effect import Effect, no_effect
from adapters.errors import (
    AdapterError,
    InvalidAdapter,
    Problem,
    ReservedName,
    StoreError,
    VersionNotFound,
    VersionQuarantined,
)
from adapters.folder import PICKLE, WEIGHTS, disk, wanted
from adapters.names import check_alias, check_name
from adapters.peft import AdapterSpec
from adapters.registry import Facts, Owner, Registry, Version
from adapters.spectrum import spectra
from adapters.validate import Report

Prove = Callable[[str, Path], Effect]

_LOCKS = 64


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator decides about which adapters are taken.

    `dtype` is the engine's, in safetensors' words. `reserved` are names no adapter may take.
    """

    max_rank: int
    dtype: str = "BF16"
    reserved: frozenset[str] = frozenset()
    allow_pickle: bool = False
    allow_noop: bool = False


@dataclass(frozen=True, slots=True)
class Inspection:
    """What can be said of an adapter without storing it and without an engine.

    `spec` is None if the files could not be read, `algebra` if anything is wrong.
    """

    report: Report
    spec: AdapterSpec | None = None
    algebra: Algebra | None = None
    advice: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are stable. `ok` is whether nothing is wrong."""
        advice = [each.as_dict() for each in self.advice]
        return {
            "object": "adapter.check",
            "ok": self.algebra is not None,
            **({} if self.spec is None else described(self.spec)),
            "checks": self.report.as_dict() | {"advice": advice},
            "algebra": None if self.algebra is None else self.algebra.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter in a staging folder that nothing is wrong with; `form` is for the engine."""

    folder: Path
    digest: str
    form: Path
    seen: Inspection


def described(adapter: Version | AdapterSpec) -> dict[str, Any]:
    """For JSON, what an adapter says of itself, stored or not; the keys are stable."""
    return {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "rslora": adapter.rslora,
        "target_modules": adapter.target_modules,
        "dtype": adapter.dtype,
        "bytes": adapter.bytes,
        "parameters": adapter.parameters,
        "base_model": adapter.base_model,
    }


def inspect(folder: Path, base: BaseSpec, rules: Rules) -> Inspection:
    """Reads and checks the adapter in `folder`, which is the caller's to spoil; stores nothing.

    The form the engine loads is written into the folder as well, since some numbers may not
    fit it. Raises StoreError if the disk fails.
    """
    try:
        if rules.allow_pickle and wanted(os.listdir(folder), True)[1] == PICKLE:
            pickles.convert(folder)
        spec = peft.read(folder)
        report = validate.check(spec, base, rules.max_rank)
        problems = [*report.problems, *validate.scan(folder, spec)]
        problems = problems or _write_form(
            folder, spec, base, rules.dtype, folder / canonical.key(base, rules.dtype)
        )
        if problems:
            return Inspection(Report(tuple(problems), report.warnings), spec)
        numbers = algebra(spec, base, spectra(folder, spec))
    except InvalidAdapter as error:
        return Inspection(Report(tuple(error.problems)))
    if not numbers.norm:
        found = no_effect(WEIGHTS, "ΔW is zero everywhere: the adapter changes nothing.")
        if not rules.allow_noop:
            return Inspection(Report((found,), report.warnings), spec)
        report = Report((), (*report.warnings, found))
    return Inspection(report, spec, numbers, advise(spec, numbers))


class Ingest:
    """Brings adapters for one base into a store and a registry. Safe for threads.

    `prove(digest, folder)` asks an engine what the adapter in `folder` does; without it versions
    are registered unproven.
    """

    def __init__(
        self,
        store: store.Store,
        registry: Registry,
        base: BaseSpec,
        rules: Rules,
        prove: Prove | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._base = base
        self._rules = rules
        self._prove = prove
        self._key = canonical.key(base, rules.dtype)
        # Sealing with registering, and collecting, exclude each other per digest: in between,
        # bytes are there that no record speaks for.
        self._locks = [Lock() for _ in range(_LOCKS)]

    def check(self, folder: Path) -> Inspection:
        """What `inspect` finds in a staging folder, for this base and these rules."""
        return inspect(folder, self._base, self._rules)

    def ingest(
        self,
        folder: Path,
        name: str,
        source: str,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: Owner | None = None,
    ) -> tuple[Version, bool]:
        """Makes the adapter in a staging folder a version of `name`; False if it was one before.

        `alias` is then made to point to it; `metadata`, if given, replaces the adapter's; what is
        new is `owner`'s. When this returns, bytes and record are synced to disk. When it raises
        (InvalidName, ReservedName, InvalidAdapter, QuotaExceeded, StoreError, RegistryError, or
        what `prove` raises), nothing of it is stored.
        """
        made = self.prepare(folder, name, alias)
        effect = self.known_effect(made.digest)
        if effect is None and self._prove is not None:
            effect = self._prove(made.digest, made.form)
        return self.commit(made, effect, name, source, alias, metadata, owner)

    def prepare(self, folder: Path, name: str, alias: str | None = None) -> Prepared:
        """The first part of `ingest`: all that needs no engine. Raises what it raises."""
        self.check_name(name)
        if alias is not None:
            check_alias(alias)
        seen = self.check(folder)
        if seen.algebra is None:
            raise InvalidAdapter(seen.report.problems)
        return Prepared(folder, store.digest(folder), folder / self._key, seen)

    def known_effect(self, digest: str) -> Effect | None:
        """What the engine said of these bytes when they were taken in, if they are served."""
        known = (self._registry.proven(digest) or {}).get("effect")
        return Effect(**known) if known else None

    def commit(
        self,
        made: Prepared,
        effect: Effect | None,
        name: str,
        source: str,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: Owner | None = None,
    ) -> tuple[Version, bool]:
        """The last part of `ingest`: judges the effect, seals and registers."""
        checks = self._checks(made.seen, effect)
        facts = _facts(made.seen, checks, source)
        with self._lock(made.digest):
            # Bytes that were there may be serving requests of a version since deleted.
            ours = not self._store.has(made.digest)
            self._seal(made)
            try:
                return self._registry.add_version(name, made.digest, facts, alias, metadata, owner)
            except Exception:
                if ours:
                    # If even this fails, the next start collects.
                    with suppress(AdapterError):
                        self._collect(made.digest)
                raise

    def check_name(self, name: str) -> None:
        """Raises InvalidName or ReservedName unless an adapter may be called `name`."""
        if name in self._rules.reserved:
            raise ReservedName(f"{name} is not for adapters. Choose another name.", param="name")
        check_name(name)

    def form(self, digest: str) -> Path:
        """The folder that the engine loads the adapter with this digest from."""
        return self._store.form(digest, self._key)

    def vouch(self, digest: str) -> None:
        """Makes sure that `form(digest)` is there, as sealed; to be called before each load.

        A form that is missing or was written to is made again from the adapter's own files. Raises
        VersionNotFound if no version has the digest any more, VersionQuarantined if those files are
        damaged, which they are from then on for everybody, InvalidAdapter if this base or these
        rules are not those it was taken in under, StoreError.
        """
        if self._store.has_form(digest, self._key):
            return
        with self._lock(digest):
            if not self._registry.references_to(digest):
                raise VersionNotFound(f"{digest} was deleted meanwhile. Name another version.")
            if (damage := self._store.damage(digest)) is not None:
                self._registry.quarantine(digest, damage)
                raise VersionQuarantined(
                    f"The adapter {digest} is not served any more: {damage} Upload the same files "
                    "again to mend it, or name another version."
                )
            place = self._store.path(digest)
            with self._store.staging() as folder:
                spec = peft.read(place)
                problems = list(validate.check(spec, self._base, self._rules.max_rank).problems)
                problems = problems or _write_form(
                    place, spec, self._base, self._rules.dtype, folder / self._key
                )
                if problems:
                    raise InvalidAdapter(problems)
                self._store.seal_form(folder / self._key, digest, self._key)

    def mend(self, digest: str) -> bool:
        """Removes forms whose bytes, read in full, are damaged; True if there were any.

        To be called when a load has failed: damage that has kept a file's time is not seen before.
        What cannot be read is left as it is.
        """
        with self._lock(digest), suppress(StoreError):
            return bool(self._store.damaged_forms(digest))
        return False

    def audit(self) -> Audit:
        """`audit.audit` of what was written to since it was sealed, while others may ingest."""
        return audit(self._store, self._registry, locked=self._lock)

    def collect(self, digest: str) -> bool:
        """Removes the bytes of `digest` unless a version needs them; True if none does.

        To be called for what the registry's deletes return, once no request uses it any more.
        """
        with self._lock(digest):
            return self._collect(digest)

    def _checks(self, seen: Inspection, effect: Effect | None) -> dict[str, Any]:
        """What is kept of the checks. Raises InvalidAdapter for an effect that is none, or NaN."""
        warnings = list(seen.report.warnings)
        if effect is not None:
            problems = effect.problems()
            if not problems and effect.difference == 0:
                (warnings if self._rules.allow_noop else problems).append(
                    no_effect("logprobs", _UNCHANGED)
                )
            if problems:
                raise InvalidAdapter(problems)
            warnings += effect.warnings()
        return Report((), tuple(warnings)).as_dict() | {
            "advice": [each.as_dict() for each in seen.advice],
            "effect": None if effect is None else effect.as_dict(),
        }

    def _seal(self, made: Prepared) -> None:
        self._store.seal(made.folder, made.digest)
        if not self._store.has_form(made.digest, self._key):
            # The adapter was there, sealed for another base or type of the engine.
            self._store.seal_form(made.form, made.digest, self._key)

    def _collect(self, digest: str) -> bool:
        if self._registry.references_to(digest):
            return False
        self._store.delete(digest)
        return True

    def _lock(self, digest: str) -> Lock:
        return self._locks[hash(digest) % _LOCKS]


_UNCHANGED = (
    "The engine says exactly the same with the adapter as without it, after two prompts of its own."
)


def _write_form(
    folder: Path, spec: AdapterSpec, base: BaseSpec, dtype: str, into: Path
) -> list[Problem]:
    with disk("make a folder"):
        into.mkdir()
    return canonical.write(folder, spec, base, dtype, into)


def _facts(seen: Inspection, checks: Mapping[str, Any], source: str) -> Facts:
    assert seen.spec is not None and seen.algebra is not None  # noqa: S101 (nothing was wrong)
    spec = seen.spec
    return Facts(
        rank=spec.rank,
        alpha=spec.alpha,
        rslora=spec.rslora,
        target_modules=spec.target_modules,
        dtype=spec.dtype,
        bytes=spec.bytes,
        parameters=spec.parameters,
        base_model=spec.base_model,
        source=source,
        checks=checks,
        algebra=seen.algebra.as_dict(),
    )
