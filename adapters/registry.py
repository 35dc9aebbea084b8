"""What is known about adapters: SQL records of adapters, versions and aliases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from types import EllipsisType
from typing import Any, TypeAlias

import sqlalchemy as sa

from adapters.database import Database, Id, Moment, tables
from adapters.errors import (
    AliasConflict,
    AliasInUse,
    AliasNotFound,
    QuotaExceeded,
    VersionNotFound,
    VersionQuarantined,
    no_adapter,
)
from adapters.names import ANY, LATEST, Reference, check_alias, check_name

READY = "ready"
QUARANTINED = "quarantined"
DELETED = "deleted"

Digests: TypeAlias = list[str]


# Tables ------------------------------------------------------------------------------------

# Neither adapters nor versions are ever removed: a name that comes back goes on counting, and
# no id is given twice.
_adapters = sa.Table(
    "adapters",
    tables,
    sa.Column("id", Id, primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("created", Moment, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
_versions = sa.Table(
    "versions",
    tables,
    sa.Column("id", Id, primary_key=True),
    sa.Column("adapter_id", sa.ForeignKey("adapters.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(71), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created", Moment, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("alpha", sa.Double, nullable=False),
    sa.Column("rslora", sa.Boolean, nullable=False),
    sa.Column("target_modules", sa.JSON, nullable=False),
    sa.Column("dtype", sa.String(64), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("parameters", sa.BigInteger, nullable=False),
    sa.Column("base_model", sa.Text),
    sa.Column("source", sa.Text, nullable=False, index=True),
    sa.Column("checks", sa.JSON, nullable=False),
    sa.Column("algebra", sa.JSON, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("pinned", sa.Boolean),
    sa.Column("lasting", sa.Boolean),
    sa.Column("owner", sa.String(16), index=True),
    sa.UniqueConstraint("adapter_id", "number"),
    sqlite_autoincrement=True,
)
_aliases = sa.Table(
    "aliases",
    tables,
    sa.Column("adapter_id", sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["adapter_id", "number"], ["versions.adapter_id", "versions.number"]),
)

# Tens of kilobytes each: read only where one adapter is shown.
_DETAILS = (_versions.c.checks, _versions.c.algebra)
_BRIEF = tuple(c for c in _versions.c if c not in {*_DETAILS})


# Records -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owner:
    """Who brings a version: the id of an API key, and the bytes that all of its versions may have
    together (None: any number)."""

    key: str
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What ingest found out about a version; see Version for the fields."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...] | str
    dtype: str
    bytes: int
    parameters: int
    base_model: str | None
    source: str
    checks: Mapping[str, Any]
    algebra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable set of weights of an adapter.

    `id` is unique among all versions of all adapters for ever, `number` among the adapter's.
    `bytes` is the weights file's size, `parameters` what A and B have in numbers, `source` where
    the files came from. `reason` says why a version is quarantined. `pinned`: it is to be kept
    loaded. `owner` is the id of the API key that brought it, None if there was none. `checks` and
    `algebra` are None where many versions are read at once.
    """

    id: int
    adapter: str
    number: int
    digest: str
    state: str
    created: datetime
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...] | str
    dtype: str
    bytes: int
    parameters: int
    base_model: str | None
    source: str
    reason: str | None = None
    pinned: bool = False
    owner: str | None = None
    checks: Mapping[str, Any] | None = None
    algebra: Mapping[str, Any] | None = None

    @property
    def reference(self) -> str:
        """`name@number`, which means this version for ever."""
        return f"{self.adapter}@{self.number}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A named LoRA: its versions that are not deleted, oldest first, and its aliases.

    `aliases` maps to version numbers and has `latest` unless no version is ready.
    """

    name: str
    versions: tuple[Version, ...]
    aliases: Mapping[str, int]
    created: datetime
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Some adapters in name order; `next` is what to pass as `after` for more, None at the end."""

    data: tuple[Adapter, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Summary:
    """How much there is: adapters, versions by state, and bytes of weights, equal ones once."""

    adapters: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0


# Registry ----------------------------------------------------------------------------------


class Registry:
    """The records in a database. Safe for threads.

    A write that returned is synced to disk. Every call raises RegistryError if the database
    fails.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def add_version(
        self,
        name: str,
        digest: str,
        facts: Facts,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: Owner | None = None,
    ) -> tuple[Version, bool]:
        """Makes `digest` a ready version of `name`; False if it was one already.

        A quarantined version of it is ready again. `alias` is then made to point to it, wherever
        it pointed before; `metadata`, if given, replaces the adapter's. A new version is `owner`'s.
        All of it happens or nothing. Raises InvalidName, ReservedName, QuotaExceeded.
        """
        check_name(name)
        if alias is not None:
            check_alias(alias)

        def write(db: sa.Connection) -> tuple[Version, bool]:
            adapter_id = _make_adapter(db, name, metadata)
            found = _first(db, adapter_id, _versions.c.digest == digest)
            number = found.number if found else _next_number(db, adapter_id)
            if found is None:
                if owner is not None:
                    _hold_to_quota(db, owner, facts.bytes)
                _insert_version(db, adapter_id, number, digest, facts, owner)
            else:
                _heal(db, digest)
            if alias is not None:
                _point(db, adapter_id, alias, number)
            version = _first(db, adapter_id, _versions.c.number == number)
            assert version is not None  # noqa: S101 - written a line ago in this transaction
            return _version(name, version), found is None

        return self._db.write(write)

    def get(self, name: str) -> Adapter:
        """The adapter; the version that `latest` means has checks and algebra.

        Raises AdapterNotFound.
        """
        with self._db.read() as db:
            adapter = _assemble(db, [_adapter(db, name)])[0]
            if LATEST not in adapter.aliases:
                return adapter
            newest = _version(name, db.execute(_resolution(Reference(name), _versions.c)).one())
            shown = (newest if v.id == newest.id else v for v in adapter.versions)
            return replace(adapter, versions=tuple(shown))

    def knows(self, name: str) -> bool:
        """Whether an adapter has this name, or had it once and was deleted."""
        with self._db.read() as db:
            found = db.execute(sa.select(_adapters.c.id).where(_adapters.c.name == name))
            return found.first() is not None

    def list(
        self,
        after: str | None = None,
        limit: int = 50,
        prefix: str | None = None,
        patterns: Sequence[str] = (ANY,),
    ) -> Page:
        """Up to `limit` adapters in name order whose names begin with `prefix`.

        `patterns` are those of which a name must match one, as in `names.matches`.
        """
        query = sa.select(_adapters).where(~_adapters.c.deleted, _match(patterns))
        query = query.order_by(_adapters.c.name)
        if after is not None:
            query = query.where(_adapters.c.name > after)
        if prefix:
            query = query.where(self._db.begins(_adapters.c.name, prefix))
        with self._db.read() as db:
            rows = db.execute(query.limit(limit + 1)).all()
            data = _assemble(db, rows[:limit])
        return Page(tuple(data), data[-1].name if data and len(rows) > limit else None)

    def names(self, patterns: Sequence[str] = (ANY,)) -> Iterable[tuple[str, datetime]]:
        """Name and time of creation of every adapter with a ready version, in name order.

        `patterns` are those of which a name must match one, as in `names.matches`.
        """
        ready = sa.exists().where(
            _versions.c.adapter_id == _adapters.c.id, _versions.c.state == READY
        )
        columns = sa.select(_adapters.c.name, _adapters.c.created)
        query = columns.where(~_adapters.c.deleted, ready, _match(patterns))
        query = query.order_by(_adapters.c.name)
        with self._db.read() as db:
            return [(row.name, row.created) for row in db.execute(query)]

    def from_source(self, prefix: str) -> Iterable[Version]:
        """The versions whose source begins with `prefix`, but for deleted ones."""
        query = (
            sa.select(_adapters.c.name.label("adapter"), *_BRIEF)
            .join_from(_versions, _adapters)
            .where(_versions.c.state != DELETED, self._db.begins(_versions.c.source, prefix))
        )
        with self._db.read() as db:
            return [_version(row.adapter, row) for row in db.execute(query)]

    def resolve(self, reference: str | Reference) -> Version:
        """The ready version that `reference` means.

        Raises InvalidReference, AdapterNotFound, VersionNotFound, VersionQuarantined,
        AliasNotFound.
        """
        return self._resolve(reference, _BRIEF)

    def show(self, reference: str | Reference) -> Version:
        """The same with checks and algebra, which a request that only runs has no use for."""
        return self._resolve(reference, tuple(_versions.c))

    def delete_if_empty(self, name: str) -> None:
        """Deletes the adapter if it has no version any more. Raises AdapterNotFound."""

        def write(db: sa.Connection) -> None:
            adapter_id = _adapter(db, name).id
            if _first(db, adapter_id, sa.true()) is None:
                _forget(db, adapter_id)

        self._db.write(write)

    def delete_adapter(self, name: str) -> Digests:
        """Deletes the adapter, its versions and aliases. Raises AdapterNotFound.

        Returns the digests of its versions that no version of any adapter has any more.
        """

        def write(db: sa.Connection) -> Digests:
            adapter_id = _adapter(db, name).id
            mine = _versions.c.adapter_id == adapter_id
            live = sa.select(_versions.c.digest).where(mine, _versions.c.state != DELETED)
            digests = db.scalars(live).all()
            db.execute(_aliases.delete().where(_aliases.c.adapter_id == adapter_id))
            db.execute(_versions.update().where(mine).values(state=DELETED))
            _forget(db, adapter_id)
            return _unreferenced(db, digests)

        return self._db.write(write)

    def delete_version(self, name: str, number: int) -> Digests:
        """Deletes one version; returns its digest if no version of any adapter has it any more.

        Raises AdapterNotFound, VersionNotFound, and AliasInUse if an alias points to it.
        """

        def write(db: sa.Connection) -> Digests:
            adapter_id = _adapter(db, name).id
            version = _numbered(db, adapter_id, name, number)
            pointing = sa.select(_aliases.c.alias).where(
                _aliases.c.adapter_id == adapter_id, _aliases.c.number == number
            )
            if aliases := db.scalars(pointing).all():
                raise AliasInUse(
                    f"{name}@{number} is what {', '.join(sorted(aliases))} points to. "
                    "Move or remove the alias first."
                )
            doomed = _versions.update().where(_versions.c.id == version.id)
            db.execute(doomed.values(state=DELETED))
            return _unreferenced(db, [version.digest])

        return self._db.write(write)

    def set_alias(
        self, name: str, alias: str, number: int, expected: int | EllipsisType | None = ...
    ) -> None:
        """Makes `alias` point to version `number`.

        With `expected`, only if it points there now (None: only if there is no such alias), or
        AliasConflict. Raises InvalidName, ReservedName, AdapterNotFound, VersionNotFound.
        """
        check_alias(alias)

        def write(db: sa.Connection) -> None:
            adapter_id = _adapter(db, name).id
            if _numbered(db, adapter_id, name, number).state != READY:
                raise VersionNotFound(f"{name}@{number} is not ready. Point to one that is.")
            _expect(_pointed(db, adapter_id, alias), expected, name, alias)
            _point(db, adapter_id, alias, number)

        self._db.write(write)

    def delete_alias(
        self, name: str, alias: str, expected: int | EllipsisType | None = ...
    ) -> None:
        """Removes `alias`; with `expected`, only if it points there now, or AliasConflict.

        Raises ReservedName, AdapterNotFound, AliasNotFound.
        """
        check_alias(alias)

        def write(db: sa.Connection) -> None:
            adapter_id = _adapter(db, name).id
            pointed = _pointed(db, adapter_id, alias)
            if pointed is None:
                raise _no_alias(name, alias)
            _expect(pointed, expected, name, alias)
            db.execute(_aliases.delete().where(_is_alias(adapter_id, alias)))

        self._db.write(write)

    def quarantine(self, digest: str, reason: str, lasting: bool = False) -> None:
        """From now on the versions with `digest` are not served, for `reason`: a sentence.

        With `lasting` it is not for damage, so `heal` leaves them as they are.
        """
        ready = (_versions.c.digest == digest) & (_versions.c.state == READY)
        values = {"state": QUARANTINED, "reason": reason, "lasting": lasting}
        self._db.write(lambda db: db.execute(_versions.update().where(ready).values(values)))

    def heal(self, digest: str) -> bool:
        """Serves the versions with `digest` again that were quarantined for damage, if any."""
        for_damage = _versions.c.lasting.is_not(True)
        return self._db.write(lambda db: _heal(db, digest, for_damage).rowcount > 0)

    def pin(self, version: Version, pinned: bool) -> None:
        """Notes that a version is to be kept loaded, or not any more."""
        it = _versions.update().where(_versions.c.id == version.id).values(pinned=pinned)
        self._db.write(lambda db: db.execute(it))

    def pinned(self) -> Sequence[Version]:
        """The ready versions that are to be kept loaded, those first that came first."""
        query = (
            sa.select(_adapters.c.name.label("adapter"), *_BRIEF)
            .join_from(_versions, _adapters)
            .where(_versions.c.pinned.is_(True), _versions.c.state == READY)
            .order_by(_versions.c.id)
        )
        with self._db.read() as db:
            return [_version(row.adapter, row) for row in db.execute(query)]

    def references_to(self, digest: str) -> Sequence[str]:
        """`name@number` of every version with `digest`, but for deleted ones."""
        return self.references([digest]).get(digest, [])

    def references(self, digests: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """The same for many digests, by digest; one that no version has is not in it."""
        query = (
            sa.select(_versions.c.digest, _adapters.c.name, _versions.c.number)
            .join_from(_versions, _adapters)
            .where(_versions.c.digest.in_(digests), _versions.c.state != DELETED)
            .order_by(_versions.c.id)
        )
        found: dict[str, Any] = {}
        with self._db.read() as db:
            for digest, name, number in db.execute(query):
                found.setdefault(digest, []).append(f"{name}@{number}")
        return found

    def alive(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are adapters."""
        query = sa.select(_adapters.c.name).where(_adapters.c.name.in_(names), ~_adapters.c.deleted)
        with self._db.read() as db:
            return set(db.scalars(query))

    def summary(self) -> Summary:
        """How much there is."""
        adapters = sa.select(sa.func.count()).where(~_adapters.c.deleted)
        states = sa.select(_versions.c.state, sa.func.count()).group_by(_versions.c.state)
        kept = _versions.c.state != DELETED
        once = sa.select(sa.func.max(_versions.c.bytes).label("bytes")).where(kept)
        each = once.group_by(_versions.c.digest).subquery()
        with self._db.read() as db:
            return Summary(
                db.scalar(adapters) or 0,
                {state: count for state, count in db.execute(states.where(kept))},
                int(db.scalar(sa.select(sa.func.sum(each.c.bytes))) or 0),
            )

    def proven(self, digest: str) -> Mapping[str, Any] | None:
        """The checks of a ready version with `digest`, whatever adapter it is of; None if none."""
        query = sa.select(_versions.c.checks).where(
            _versions.c.digest == digest, _versions.c.state == READY
        )
        with self._db.read() as db:
            return db.scalar(query.limit(1))

    def stored_bytes(self, key: str) -> int:
        """Bytes of the versions that the API key with this id brought, but for deleted ones."""
        with self._db.read() as db:
            return _stored_bytes(db, key)

    def digests(self, state: str | None = None) -> set[str]:
        """The digests that versions need: all but those of deleted ones, or those in `state`."""
        wanted = _versions.c.state != DELETED if state is None else _versions.c.state == state
        with self._db.read() as db:
            return set(db.scalars(sa.select(_versions.c.digest).where(wanted).distinct()))

    def _resolve(self, reference: str | Reference, columns: tuple[sa.Column[Any], ...]) -> Version:
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        with self._db.read() as db:
            row = db.execute(_resolution(asked, columns)).first()
            if row is not None:
                return _version(asked.name, row)
            raise _why_not(db, asked)


# Queries -----------------------------------------------------------------------------------


def _match(patterns: Sequence[str]) -> sa.ColumnElement[bool]:
    """That an adapter's name matches one of `patterns`."""
    if ANY in patterns:
        return sa.true()
    likes = (each.replace("_", r"\_").replace("*", "%") for each in patterns)
    return sa.or_(sa.false(), *(_adapters.c.name.like(each, escape="\\") for each in likes))


def _adapter(db: sa.Connection, name: str) -> sa.Row[Any]:
    query = sa.select(_adapters).where(_adapters.c.name == name, ~_adapters.c.deleted)
    # Holds off other writers to the same adapter until this transaction ends.
    lock = db.get_execution_options().get("writes", False)
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise no_adapter(name)
    return row


def _make_adapter(db: sa.Connection, name: str, metadata: Mapping[str, Any] | None) -> int:
    query = sa.select(_adapters.c.id, _adapters.c.deleted).where(_adapters.c.name == name)
    row = db.execute(query.with_for_update()).first()
    fresh = {"deleted": False, "created": datetime.now(UTC), "metadata": dict(metadata or {})}
    if row is None:
        inserted = db.execute(_adapters.insert().values(name=name, **fresh))
        return int(inserted.inserted_primary_key[0])  # type: ignore[index]
    update = _adapters.update().where(_adapters.c.id == row.id)
    if row.deleted:
        db.execute(update.values(fresh))
    elif metadata is not None:
        db.execute(update.values(metadata=dict(metadata)))
    return int(row.id)


def _forget(db: sa.Connection, adapter_id: int) -> None:
    gone = {"deleted": True, "metadata": {}}
    db.execute(_adapters.update().where(_adapters.c.id == adapter_id).values(gone))


def _next_number(db: sa.Connection, adapter_id: int) -> int:
    highest = sa.select(sa.func.max(_versions.c.number))
    return (db.scalar(highest.where(_versions.c.adapter_id == adapter_id)) or 0) + 1


def _stored_bytes(db: sa.Connection, key: str) -> int:
    kept = (_versions.c.owner == key) & (_versions.c.state != DELETED)
    return int(db.scalar(sa.select(sa.func.sum(_versions.c.bytes)).where(kept)) or 0)


def _hold_to_quota(db: sa.Connection, owner: Owner, more: int) -> None:
    if owner.max_bytes is None or _stored_bytes(db, owner.key) + more <= owner.max_bytes:
        return
    raise QuotaExceeded(
        f"This API key may store {owner.max_bytes} bytes; it has {_stored_bytes(db, owner.key)}, "
        f"and this version has {more}. Delete versions that are no longer used."
    )


def _insert_version(
    db: sa.Connection,
    adapter_id: int,
    number: int,
    digest: str,
    facts: Facts,
    owner: Owner | None,
) -> None:
    row = asdict(facts) | {
        "adapter_id": adapter_id,
        "number": number,
        "digest": digest,
        "state": READY,
        "created": datetime.now(UTC),
        "owner": owner.key if owner else None,
    }
    db.execute(_versions.insert().values(row))


def _first(
    db: sa.Connection, adapter_id: int, condition: sa.ColumnElement[bool]
) -> sa.Row[Any] | None:
    mine = (_versions.c.adapter_id == adapter_id) & (_versions.c.state != DELETED)
    return db.execute(sa.select(_versions).where(mine, condition)).first()


def _heal(db: sa.Connection, digest: str, *only: sa.ColumnElement[bool]) -> sa.CursorResult[Any]:
    broken = (_versions.c.digest == digest) & (_versions.c.state == QUARANTINED)
    served = {"state": READY, "reason": None, "lasting": None}
    return db.execute(_versions.update().where(broken, *only).values(served))


def _numbered(db: sa.Connection, adapter_id: int, name: str, number: int) -> sa.Row[Any]:
    query = sa.select(*_BRIEF).where(
        _versions.c.adapter_id == adapter_id,
        _versions.c.number == number,
        _versions.c.state != DELETED,
    )
    # Larger numbers than the column holds would be a database error, not an answer.
    row = db.execute(query).first() if 0 < number < 2**31 else None
    if row is None:
        raise _no_version(name, str(number))
    return row


def _pointed(db: sa.Connection, adapter_id: int, alias: str) -> int | None:
    return db.scalar(sa.select(_aliases.c.number).where(_is_alias(adapter_id, alias)))


def _is_alias(adapter_id: int, alias: str) -> sa.ColumnElement[bool]:
    return (_aliases.c.adapter_id == adapter_id) & (_aliases.c.alias == alias)


def _point(db: sa.Connection, adapter_id: int, alias: str, number: int) -> None:
    moved = _aliases.update().where(_is_alias(adapter_id, alias)).values(number=number)
    if not db.execute(moved).rowcount:
        row = {"adapter_id": adapter_id, "alias": alias, "number": number}
        db.execute(_aliases.insert().values(row))


def _expect(
    pointed: int | None, expected: int | EllipsisType | None, name: str, alias: str
) -> None:
    if expected is ... or pointed == expected:
        return
    now = "does not exist" if pointed is None else f"points to version {pointed}"
    then = "not to exist" if expected is None else f"to point to version {expected}"
    raise AliasConflict(
        f"The alias {alias} of {name} {now}; it was expected {then}. Look again and decide anew."
    )


def _unreferenced(db: sa.Connection, digests: Iterable[str]) -> Digests:
    asked = set(digests)
    needed = sa.select(_versions.c.digest).where(
        _versions.c.digest.in_(asked), _versions.c.state != DELETED
    )
    return sorted(asked - set(db.scalars(needed)))


def _resolution(asked: Reference, columns: Iterable[sa.Column[Any]]) -> sa.Select[Any]:
    joined = _versions.join(_adapters, _versions.c.adapter_id == _adapters.c.id)
    if asked.alias not in (None, LATEST):
        same = _aliases.c.number == _versions.c.number
        joined = joined.join(_aliases, (_aliases.c.adapter_id == _adapters.c.id) & same)
    query = (
        sa.select(*columns)
        .select_from(joined)
        .where(_adapters.c.name == asked.name, ~_adapters.c.deleted, _versions.c.state == READY)
        .order_by(_versions.c.number.desc())
        .limit(1)
    )
    if asked.version is not None:
        return query.where(_versions.c.number == asked.version)
    if asked.digest is not None:
        return query.where(_versions.c.digest == asked.digest)
    if asked.alias not in (None, LATEST):
        return query.where(_aliases.c.alias == asked.alias)
    return query


def _why_not(db: sa.Connection, asked: Reference) -> Exception:
    adapter_id = _adapter(db, asked.name).id
    named: sa.ColumnElement[bool] = sa.true()
    if asked.version is not None:
        named = _versions.c.number == asked.version
    elif asked.digest is not None:
        named = _versions.c.digest == asked.digest
    elif asked.alias not in (None, LATEST):
        number = _pointed(db, adapter_id, asked.alias)
        if number is None:
            return _no_alias(asked.name, asked.alias)
        named = _versions.c.number == number
    if (row := _first(db, adapter_id, named)) is not None:
        return _quarantined(asked, row)
    if asked.version is None and asked.digest is None:
        return VersionNotFound(f"{asked.name} has no version that is ready. Upload one.")
    return _no_version(asked.name, str(asked.version or asked.digest))


def _quarantined(asked: Reference, row: sa.Row[Any]) -> VersionQuarantined:
    mend = "Save the adapter anew" if row.lasting else "Upload the same files again to mend it"
    return VersionQuarantined(
        f"{asked} is version {row.number}, which is not served: {row.reason} {mend}, or name "
        "another version."
    )


def _no_version(name: str, which: str) -> VersionNotFound:
    return VersionNotFound(
        f"{name} has no version {which} that can be used. Look at its versions and choose one."
    )


def _no_alias(name: str, alias: str) -> AliasNotFound:
    return AliasNotFound(f"{name} has no alias {alias}. Set it, or name a version.")


def _assemble(db: sa.Connection, adapters: Iterable[sa.Row[Any]]) -> list[Adapter]:
    """The adapters of these rows, with two queries however many they are."""
    rows = {row.id: row for row in adapters}
    versions: dict[int, list[Version]] = {key: [] for key in rows}
    aliases: dict[int, dict[str, int]] = {key: {} for key in rows}
    kept = sa.select(*_BRIEF).where(_versions.c.adapter_id.in_(rows), _versions.c.state != DELETED)
    for row in db.execute(kept.order_by(_versions.c.number)):
        versions[row.adapter_id].append(_version(rows[row.adapter_id].name, row))
        if row.state == READY:
            aliases[row.adapter_id][LATEST] = row.number
    for row in db.execute(sa.select(_aliases).where(_aliases.c.adapter_id.in_(rows))):
        aliases[row.adapter_id][row.alias] = row.number
    return [
        Adapter(row.name, tuple(versions[key]), aliases[key], row.created, row.metadata)
        for key, row in rows.items()
    ]


def _version(adapter: str, row: sa.Row[Any]) -> Version:
    fields = dict(row._mapping) | {"adapter": adapter, "pinned": bool(row.pinned)}
    del fields["adapter_id"], fields["lasting"]
    if isinstance(fields["target_modules"], list):
        fields["target_modules"] = tuple(fields["target_modules"])
    return Version(**fields)
