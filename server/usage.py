"""Who used what: requests and tokens by API key and adapter, an hour each, in the database.

Counted in memory and written every few seconds, so that a request never waits for the disk; what a
killed server had not written yet is lost.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from threading import Lock
from typing import Any

import sqlalchemy as sa

from adapters.database import Database, Moment, tables

FLUSH_S = 5.0
_PAGE = 1000  # rows read at once

_usage = sa.Table(
    "usage",
    tables,
    sa.Column("hour", Moment, primary_key=True),
    sa.Column("key", sa.String(16), primary_key=True),
    sa.Column("adapter", sa.String(128), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
)
_COUNTS = ("requests", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Used:
    """What one key ("" without keys) had of one adapter ("base" of none) in one hour."""

    hour: datetime
    key: str
    adapter: str
    requests: int
    prompt_tokens: int
    output_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `hour` is in seconds since the epoch."""
        return asdict(self) | {"hour": int(self.hour.timestamp())}


_COLUMNS = tuple(field.name for field in fields(Used))


class Usage:
    """The ledger. Safe for threads; reading and flushing raise RegistryError."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._lock = Lock()
        self._counted: dict[tuple[datetime, str, str], Counter[str]] = {}

    def add(self, key: str, adapter: str, prompt_tokens: int, output_tokens: int) -> None:
        """Counts one request."""
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        more = {"requests": 1, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        with self._lock:
            self._counted.setdefault((hour, key, adapter), Counter()).update(more)

    def flush(self) -> None:
        """Writes what was counted since the last time; nothing is lost if that fails."""
        with self._lock:
            taken, self._counted = self._counted, {}
        if not taken:
            return

        def write(db: sa.Connection) -> None:
            for place, counts in taken.items():
                _add(db, place, counts)

        try:
            self._db.write(write)
        except Exception:
            with self._lock:
                for place, counts in taken.items():
                    self._counted.setdefault(place, Counter()).update(counts)
            raise

    def read(self, since: datetime, until: datetime) -> Iterator[Used]:
        """What was used in the hours that begin in [since, until), oldest first."""
        place = tuple(_usage.primary_key.columns)
        query = sa.select(_usage).where(_usage.c.hour >= since, _usage.c.hour < until)
        query = query.order_by(*place).limit(_PAGE)
        rest = query
        while True:
            with self._db.read() as db:
                rows = db.execute(rest).all()
            yield from (Used(*row) for row in rows)
            if len(rows) < _PAGE:
                return
            last = (sa.literal(rows[-1][n], column.type) for n, column in enumerate(place))
            rest = query.where(sa.tuple_(*place) > sa.tuple_(*last))

    def of(self, adapter: str, since: datetime) -> list[Used]:
        """What all keys together used of one adapter, in the hours from `since` on, oldest first.

        What was counted since the last flush is not in it.
        """
        sums = [sa.func.sum(_usage.c[name]).label(name) for name in _COUNTS]
        query = sa.select(_usage.c.hour, *sums).group_by(_usage.c.hour).order_by(_usage.c.hour)
        query = query.where(_usage.c.adapter == adapter, _usage.c.hour >= since)
        with self._db.read() as db:
            return [Used(row[0], "", adapter, *map(int, row[1:])) for row in db.execute(query)]


def as_csv(rows: Iterable[Used]) -> Iterator[str]:
    """Lines of CSV, a header first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        hour = f"{row.hour:%Y-%m-%dT%H:%MZ}"
        counts = (row.requests, row.prompt_tokens, row.output_tokens)
        writer.writerow([hour, row.key, row.adapter, *counts])
        yield text.getvalue()
        text.seek(0)
        text.truncate()
    yield text.getvalue()


def _add(db: sa.Connection, place: tuple[datetime, str, str], counts: Counter[str]) -> None:
    hour, key, adapter = place
    there = (_usage.c.hour == hour) & (_usage.c.key == key) & (_usage.c.adapter == adapter)
    more = {name: _usage.c[name] + counts[name] for name in _COUNTS}
    if not db.execute(_usage.update().where(there).values(more)).rowcount:
        row = {"hour": hour, "key": key, "adapter": adapter}
        db.execute(_usage.insert().values(row | {name: counts[name] for name in _COUNTS}))
