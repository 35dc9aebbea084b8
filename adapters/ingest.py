"""The one way into the store: read, check, scan, digest, seal, register."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from adapters import peft, store, validate
from adapters.algebra import Algebra, algebra
from adapters.base import BaseSpec
from adapters.errors import AdapterError, InvalidAdapter, ReservedName
from adapters.names import check_alias, check_name
from adapters.peft import AdapterSpec
from adapters.registry import Facts, Registry, Version
from adapters.validate import Report

_LOCKS = 64


@dataclass(frozen=True, slots=True)
class Inspection:
    """What can be said of an adapter without storing it.

    `spec` is None if the files could not be read, `algebra` if anything is wrong.
    """

    report: Report
    spec: AdapterSpec | None = None
    algebra: Algebra | None = None


class Ingest:
    """Brings adapters for one base into a store and a registry. Safe for threads.

    `reserved` are names no adapter may take.
    """

    def __init__(
        self,
        store: store.Store,
        registry: Registry,
        base: BaseSpec,
        max_rank: int,
        reserved: Collection[str] = (),
    ) -> None:
        self._store = store
        self._registry = registry
        self._base = base
        self._max_rank = max_rank
        self._reserved = frozenset(reserved)
        # Sealing with registering, and collecting, exclude each other per digest: in between,
        # bytes are there that no record speaks for.
        self._locks = [Lock() for _ in range(_LOCKS)]

    def check(self, folder: Path) -> Inspection:
        """Reads and checks the adapter in `folder`, tensor data included; stores nothing.

        Raises StoreError if the disk fails.
        """
        try:
            spec = peft.read(folder)
            report = validate.check(spec, self._base, self._max_rank)
            nonfinite = validate.scan(folder, spec)
        except InvalidAdapter as error:
            return Inspection(Report(tuple(error.problems)))
        report = Report((*report.problems, *nonfinite), report.warnings)
        return Inspection(report, spec, None if report.problems else algebra(spec, self._base))

    def ingest(
        self,
        folder: Path,
        name: str,
        source: str,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> tuple[Version, bool]:
        """Makes the adapter in a staging folder a version of `name`; False if it was one before.

        `alias` is then made to point to it; `metadata`, if given, replaces the adapter's. When
        this returns, bytes and record are synced to disk. When it raises (InvalidName,
        ReservedName, InvalidAdapter, StoreError, RegistryError), nothing of it is stored.
        """
        self.check_name(name)
        if alias is not None:
            check_alias(alias)
        seen = self.check(folder)
        if seen.spec is None or seen.algebra is None:
            raise InvalidAdapter(seen.report.problems)
        digest = store.digest(folder)
        facts = _facts(seen.spec, seen.algebra, seen.report, source)
        with self._lock(digest):
            # Bytes that were there may be serving requests of a version since deleted.
            ours = not self._store.has(digest)
            self._store.seal(folder, digest)
            try:
                return self._registry.add_version(name, digest, facts, alias, metadata)
            except Exception:
                if ours:
                    # If even this fails, the sweep at the next start collects.
                    with suppress(AdapterError):
                        self._collect(digest)
                raise

    def check_name(self, name: str) -> None:
        """Raises InvalidName or ReservedName unless an adapter may be called `name`."""
        if name in self._reserved:
            raise ReservedName(f"{name} is not for adapters. Choose another name.", param="name")
        check_name(name)

    def collect(self, digest: str) -> bool:
        """Removes the bytes of `digest` unless a version needs them; True if none does.

        To be called for what the registry's deletes return, once no request uses it any more.
        """
        with self._lock(digest):
            return self._collect(digest)

    def _collect(self, digest: str) -> bool:
        if self._registry.references(digest):
            return False
        self._store.delete(digest)
        return True

    def _lock(self, digest: str) -> Lock:
        return self._locks[hash(digest) % _LOCKS]


def _facts(spec: AdapterSpec, numbers: Algebra, report: Report, source: str) -> Facts:
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
        checks=report.as_dict(),
        algebra=numbers.as_dict(),
    )
