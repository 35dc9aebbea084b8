"""The ledger of tokens, by hour, key and adapter."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest

from adapters.database import Database
from adapters.errors import RegistryError
from server import usage
from server.usage import Usage, Used, as_csv

LONG_AGO, FAR = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Usage]:
    database = Database.of(tmp_path)
    yield Usage(database)
    database.close()


def rows(ledger: Usage) -> list[tuple[str, str, int, int, int]]:
    found = ledger.read(LONG_AGO, FAR)
    return [(r.key, r.adapter, r.requests, r.prompt_tokens, r.output_tokens) for r in found]


def test_what_was_used_adds_up(ledger: Usage) -> None:
    ledger.add("k", "a", 10, 5)
    ledger.add("k", "a", 1, 2)
    ledger.add("", "base", 3, 4)
    ledger.flush()
    ledger.add("k", "a", 100, 100)
    ledger.flush()
    ledger.flush()
    assert rows(ledger) == [("", "base", 1, 3, 4), ("k", "a", 3, 111, 107)]


def test_of_one_adapter_all_keys_are_added_up(ledger: Usage) -> None:
    ledger.add("k", "a", 10, 5)
    ledger.add("other", "a", 1, 2)
    ledger.add("k", "b", 3, 4)
    ledger.flush()
    [used] = ledger.of("a", LONG_AGO)
    assert (used.key, used.requests, used.prompt_tokens, used.output_tokens) == ("", 2, 11, 7)
    assert ledger.of("a", FAR) == ledger.of("nobody", LONG_AGO) == []


def test_nothing_is_lost_while_the_database_fails(ledger: Usage) -> None:
    ledger.add("k", "a", 10, 5)
    with patch.object(Database, "write", side_effect=RegistryError("x")):
        with pytest.raises(RegistryError):
            ledger.flush()
        ledger.add("k", "a", 1, 1)
    ledger.flush()
    assert rows(ledger) == [("k", "a", 2, 11, 6)]


def test_nothing_is_lost_between_threads(ledger: Usage) -> None:
    def add() -> None:
        for _ in range(200):
            ledger.add("k", "a", 1, 2)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ledger.flush()
    ledger.flush()
    assert rows(ledger) == [("k", "a", 800, 800, 1600)]


def test_hours_are_read_in_pages_and_as_csv(ledger: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_PAGE", 3)
    for number in range(7):
        ledger.add("k", f"a{number}", number, 0)
    ledger.flush()
    assert [adapter for _, adapter, *_ in rows(ledger)] == [f"a{n}" for n in range(7)]
    hour = next(ledger.read(LONG_AGO, FAR)).hour
    assert hour.minute == 0 and hour.tzinfo is not None
    assert list(ledger.read(hour + timedelta(hours=1), FAR)) == []
    text = "".join(as_csv([Used(hour, "k", "a", 1, 2, 3)]))
    assert text.splitlines() == [
        "hour,key,adapter,requests,prompt_tokens,output_tokens",
        f"{hour:%Y-%m-%dT%H}:00Z,k,a,1,2,3",
    ]
    assert "".join(as_csv([])).count("\n") == 1
