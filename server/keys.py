"""API keys: who may do what, with which adapters, and how much of it.

A token is `lpx_<id>_<secret>`. Only its SHA-256 is stored: the secret is 256 random bits, which
nobody finds by trying, so a slow hash would only slow requests down.
"""

import hashlib
import hmac
import secrets
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from adapters.database import Database, Moment, tables
from adapters.names import ANY, check_pattern, matches
from adapters.registry import Owner
from server.errors import BadRequest, KeyNotFound

INFER, READ, WRITE, ADMIN = "infer", "adapters:read", "adapters:write", "admin"
SCOPES = (INFER, READ, WRITE, ADMIN)
BASE = "base"  # what patterns call the base

_PREFIX = "lpx_"
_LARGEST = 2**63 - 1

# Keys are never removed: an id in a log or the usage means the same key for ever.
_keys = sa.Table(
    "keys",
    tables,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("adapters", sa.JSON, nullable=False),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("concurrent_requests", sa.BigInteger),
    sa.Column("stored_bytes", sa.BigInteger),
    sa.Column("created", Moment, nullable=False),
    sa.Column("expires", Moment),
    sa.Column("revoked", Moment),
    sa.Column("former_hash", sa.String(64)),
    sa.Column("former_until", Moment),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use: requests and tokens a minute, requests at once, bytes of stored versions.

    None is no limit. Tokens are a prompt's and a reply's.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    stored_bytes: int | None = None


_LIMITS = tuple(field.name for field in fields(Limits))


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, without its secret.

    `scopes` are of SCOPES; ADMIN is all of them, on every adapter. `adapters` are patterns of the
    names that it may use, of which the base's is BASE. `weight` is its share against other keys
    that call the same adapter.
    """

    id: str
    name: str
    scopes: tuple[str, ...]
    adapters: tuple[str, ...] = (ANY,)
    weight: float = 1.0
    limits: Limits = Limits()
    created: datetime | None = None
    expires: datetime | None = None
    revoked: datetime | None = None

    def may(self, scope: str) -> bool:
        """Whether it has `scope`."""
        return scope in self.scopes or ADMIN in self.scopes

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the names that it may use."""
        return (ANY,) if ADMIN in self.scopes else self.adapters

    def sees(self, name: str) -> bool:
        """Whether it may use the adapter, or the base, of this name."""
        return matches(name, self.patterns)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without its secret; the keys are stable. Times are seconds since the epoch."""
        return {
            "object": "key",
            "id": self.id,
            "name": self.name,
            "scopes": list(self.scopes),
            "adapters": list(self.adapters),
            "weight": self.weight,
            **asdict(self.limits),
            "created": _seconds(self.created),
            "expires": _seconds(self.expires),
            "revoked": _seconds(self.revoked),
        }

    @property
    def owner(self) -> Owner | None:
        """What is brought with it belongs to it."""
        return Owner(self.id, self.limits.stored_bytes) if self.id else None


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


# Who asks where no keys are; and who has the key that the operator gave the server at its start.
ANYBODY = Key("", "anybody", (ADMIN,))
OPERATOR = Key("operator", "the server's --admin-key", (ADMIN,))


class Keys:
    """The keys in a database. Safe for threads; every call raises RegistryError if that fails.

    What is changed holds from the next request on, whichever process changed it.
    """

    def __init__(self, database: Database, admin_key: str | None = None) -> None:
        """`admin_key` is a token that is not in the database, and may do everything."""
        self._db = database
        self._admin = _hash(admin_key) if admin_key else None
        self._wanted = self._admin is not None

    def wanted(self) -> bool:
        """Whether requests need a key: once there has been one, for ever."""
        if not self._wanted:
            with self._db.read() as db:
                self._wanted = db.execute(sa.select(_keys.c.id).limit(1)).first() is not None
        return self._wanted

    def create(
        self,
        name: str,
        scopes: tuple[str, ...],
        adapters: tuple[str, ...] = (ANY,),
        weight: float = 1.0,
        limits: Limits = Limits(),
        expires: datetime | None = None,
    ) -> tuple[Key, str]:
        """A new key and its token, which cannot be had again.

        Raises:
            BadRequest: a value that makes no sense.
            InvalidName: a pattern that cannot mean names.
        """
        _check(name, scopes, adapters, weight, limits, expires)
        unique = tuple(scope for scope in SCOPES if scope in scopes)
        key = Key(
            id=secrets.token_hex(6),
            name=name,
            scopes=unique,
            adapters=tuple(dict.fromkeys(adapters)),
            weight=weight,
            limits=limits,
            created=_now(),
            expires=expires,
        )
        token = _token(key.id)
        row = {each: getattr(key, each) for each in _SAME} | {
            "scopes": list(key.scopes),
            "adapters": list(key.adapters),
            "hash": _hash(token),
            **{each: getattr(limits, each) for each in _LIMITS},
        }
        self._db.write(lambda db: db.execute(_keys.insert().values(row)))
        return key, token

    def list(self) -> list[Key]:
        """All keys, oldest first, those that were revoked or have expired too."""
        with self._db.read() as db:
            rows = db.execute(sa.select(_keys).order_by(_keys.c.created, _keys.c.id))
            return [_key(row) for row in rows]

    def get(self, id: str) -> Key:
        """One key. Raises KeyNotFound."""
        return _key(self._row(id))

    def revoke(self, id: str) -> Key:
        """Ends a key: requests with it are refused from now on. Raises KeyNotFound."""
        self._row(id)
        unless = _keys.update().where(_keys.c.id == id, _keys.c.revoked.is_(None))
        self._db.write(lambda db: db.execute(unless.values(revoked=_now())))
        return self.get(id)

    def rotate(self, id: str, grace_s: float = 0.0) -> tuple[Key, str]:
        """Another token for a key; the one before it holds for `grace_s` seconds more.

        Raises:
            KeyNotFound: there is no such key.
            BadRequest: it is revoked.
        """
        row, token = self._row(id), _token(id)
        if row.revoked is not None:
            raise BadRequest(f"The key {id} is revoked. Create another.", "id")
        values = {
            "hash": _hash(token),
            "former_hash": row.hash if grace_s else None,
            "former_until": _now() + timedelta(seconds=grace_s) if grace_s else None,
        }
        self._db.write(lambda db: db.execute(_keys.update().where(_keys.c.id == id).values(values)))
        return self.get(id), token

    def find(self, token: str) -> Key | None:
        """Whose token this is; None if it is nobody's, or does not hold any more."""
        sent = _hash(token)
        if self._admin is not None and hmac.compare_digest(sent, self._admin):
            return OPERATOR
        id = token.removeprefix(_PREFIX).partition("_")[0] if token.startswith(_PREFIX) else ""
        try:
            row = self._row(id)
        except KeyNotFound:
            return None
        now = _now()
        holds = hmac.compare_digest(sent, row.hash) or (
            row.former_until is not None
            and now < row.former_until
            and hmac.compare_digest(sent, row.former_hash)
        )
        ended = row.revoked is not None or (row.expires is not None and row.expires <= now)
        return _key(row) if holds and not ended else None

    def _row(self, id: str) -> sa.Row[Any]:
        with self._db.read() as db:
            row = db.execute(sa.select(_keys).where(_keys.c.id == id)).first()
        if row is None:
            raise KeyNotFound(
                f"There is no key with the id {id[:40]!r}; listing keys shows their ids.", "id"
            )
        return row


_SAME = ("id", "name", "weight", "created", "expires")  # as they are, in a key and in its row


def _key(row: sa.Row[Any]) -> Key:
    return Key(
        **{each: getattr(row, each) for each in _SAME},
        scopes=tuple(row.scopes),
        adapters=tuple(row.adapters),
        limits=Limits(**{each: getattr(row, each) for each in _LIMITS}),
        revoked=row.revoked,
    )


def _check(
    name: str,
    scopes: tuple[str, ...],
    adapters: tuple[str, ...],
    weight: float,
    limits: Limits,
    expires: datetime | None,
) -> None:
    if not 0 < len(name) <= 128 or not name.isprintable():
        raise BadRequest("A key's name is a line of 1 to 128 characters.", "name")
    if not scopes or (unknown := set(scopes) - set(SCOPES)):
        said = f", not {', '.join(sorted(unknown))}" if scopes else ""
        raise BadRequest(f"A key needs scopes, of {', '.join(SCOPES)}{said}.", "scopes")
    if not adapters:
        raise BadRequest("A key needs patterns of the adapters that it may use.", "adapters")
    for pattern in adapters:
        check_pattern(pattern)
    if not 0 < weight < float("inf"):
        raise BadRequest("A key's weight is a number above 0.", "weight")
    for each in _LIMITS:
        limit = getattr(limits, each)
        if limit is not None and not 0 < limit <= _LARGEST:
            raise BadRequest("A limit is a number above 0; leave it out for none.", each)
    if expires is not None and expires <= _now():
        raise BadRequest("A key must expire in the future.", "expires")


def _token(id: str) -> str:
    return f"{_PREFIX}{id}_{secrets.token_urlsafe(32)}"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)
