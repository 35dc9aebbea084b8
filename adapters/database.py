"""The SQL database: connections, transactions, and the schema brought up to date.

Who keeps records in it adds its tables to `tables`; what they looked like at each release, and the
way from one to the next, is in `migrations/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from adapters.errors import RegistryError

FILE = "registry.db"
HEAD = "0003"  # the newest of the migrations
MIGRATIONS = Path(__file__).with_name("migrations")

_LOCK_WAIT_S = 30
# How often a write is tried when another process's write got in between (not on SQLite, where
# writes queue).
_TRIES = 5

T = TypeVar("T")


class Moment(sa.TypeDecorator[datetime]):
    """Aware UTC datetimes, also on databases that keep no time zone."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


# SQLite numbers rows by itself only in a column declared INTEGER.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
tables = sa.MetaData()


class Database:
    """The database at a SQLAlchemy URL, with the schema of this version. Safe for threads.

    A write that returned is synced to disk. Every call raises RegistryError if the database fails,
    or if it was written by a version after this one.
    """

    def __init__(self, url: str) -> None:
        with _reporting():
            self.engine = _engine(url)
            _migrate(self.engine)

    @classmethod
    def of(cls, home: Path) -> Database:
        """The one of a state folder, made if it is not there."""
        return cls(f"sqlite:///{home / FILE}")

    def close(self) -> None:
        """Closes the connections."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with _reporting(), self.engine.connect() as db:
            yield db

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, in a transaction of its own that is then committed."""
        for left in reversed(range(_TRIES)):
            try:
                with (
                    _reporting(),
                    self.engine.connect().execution_options(writes=True) as db,
                    db.begin(),
                ):
                    return work(db)
            except RegistryError as error:
                if not left or not isinstance(error.__cause__, IntegrityError):
                    raise
        raise AssertionError("unreachable")

    def begins(self, column: sa.Column[str], prefix: str) -> sa.ColumnElement[bool]:
        """That the text in `column` begins with `prefix`."""
        begins = column.startswith(prefix, autoescape=True)
        if self.engine.name != "sqlite":
            return begins
        # Its LIKE uses no index, but a range does. No character comes behind the last one.
        return begins & column.between(prefix, prefix + chr(0x10FFFF))


def _engine(url: str) -> sa.Engine:
    if sa.make_url(url).get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": _LOCK_WAIT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Python's driver would begin transactions on its own, and too late; _begin_sqlite does it.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(db: sa.Connection) -> None:
    # A write that begins as a read fails, instead of waiting, when another got in between.
    writes = db.get_execution_options().get("writes")
    db.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    """Brings the schema up to `HEAD`, all of it or nothing."""
    with engine.connect() as db:
        if _revision(db) == HEAD:  # as nearly always, and alembic takes a while to import
            return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.connect().execution_options(writes=True) as db, db.begin():
        if _revision(db) == HEAD:  # another process was first
            return
        config.attributes["connection"] = db
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise RegistryError(
                f"The registry's database was written by a later version of Loraplex ({error}). "
                "Start that version, or one after it."
            ) from error


def _revision(db: sa.Connection) -> str | None:
    if not sa.inspect(db).has_table("alembic_version"):
        return None
    revision: str | None = db.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


@contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise RegistryError(
            f"The registry's database failed: {error}. Check that it can be reached and written."
        ) from error
