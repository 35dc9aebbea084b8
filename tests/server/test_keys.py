"""Keys in their database, and what they may use."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters.database import Database
from adapters.errors import InvalidName
from server import keys
from server.errors import BadRequest, KeyNotFound, RateLimited
from server.keys import ANYBODY, Key, Keys, Limits
from server.quotas import Quotas


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.of(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(keys, "_now", lambda: now[0])
    return now


def test_a_key_comes_back_as_it_was_made(database: Database) -> None:
    limits = Limits(60, 10_000, 4, 10**9)
    expires = datetime(2099, 1, 1, tzinfo=UTC)
    made, token = Keys(database).create("a", ("infer",), ("a.*", "base"), 2.5, limits, expires)
    assert Keys(database).find(token) == made == Keys(database).get(made.id)
    assert Keys(database).list() == [made]


def test_only_the_hash_is_kept(database: Database, tmp_path: Path) -> None:
    _, token = Keys(database).create("a", ("infer",))
    database.close()
    secret = token.rpartition("_")[2] if "-" not in token else token[-20:]
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_a_token_is_good_as_a_whole_or_not_at_all(database: Database) -> None:
    them = Keys(database)
    _, token = them.create("a", ("infer",))
    _, other = them.create("b", ("infer",))
    mixed = "_".join(other.split("_", 2)[:2] + token.split("_", 2)[2:])
    for wrong in (mixed, token[:-1], token + "x", token.upper(), token.removeprefix("lpx_"), ""):
        assert them.find(wrong) is None, wrong


def test_a_key_expires(database: Database, clock: list[datetime]) -> None:
    them = Keys(database)
    _, token = them.create("a", ("infer",), expires=clock[0] + timedelta(days=1))
    assert them.find(token) is not None
    clock[0] += timedelta(days=1)
    assert them.find(token) is None


def test_the_former_token_holds_for_its_grace(database: Database, clock: list[datetime]) -> None:
    them = Keys(database)
    key, first = them.create("a", ("infer",))
    _, second = them.rotate(key.id, 60)
    assert them.find(first) is not None
    clock[0] += timedelta(seconds=60)
    assert them.find(first) is None
    assert them.find(second) is not None


def test_keys_are_wanted_once_there_was_one(database: Database) -> None:
    assert not Keys(database).wanted()
    key, token = Keys(database).create("a", ("infer",))
    Keys(database).revoke(key.id)
    assert Keys(database).wanted()
    assert Keys(database).find(token) is None
    with pytest.raises(BadRequest):
        Keys(database).rotate(key.id)


def test_revoking_again_keeps_the_first_time(database: Database, clock: list[datetime]) -> None:
    them = Keys(database)
    key, _ = them.create("a", ("infer",))
    first = them.revoke(key.id)
    clock[0] += timedelta(days=1)
    assert them.revoke(key.id) == first
    with pytest.raises(KeyNotFound):
        them.revoke("nobody")


def test_the_operators_key_is_in_no_database(database: Database) -> None:
    them = Keys(database, "0123456789abcdef")
    assert them.wanted()
    operator = them.find("0123456789abcdef")
    assert operator is not None and operator.may("adapters:write") and operator.sees("a")
    assert them.find("0123456789abcdee") is None
    assert them.list() == []


@pytest.mark.parametrize("pattern", ["", "A", "a b", "a?", "[a]", "a/b", "a" * 129])
def test_a_pattern_that_means_no_names(database: Database, pattern: str) -> None:
    with pytest.raises(InvalidName):
        Keys(database).create("a", ("infer",), (pattern,))


def test_admin_is_everything() -> None:
    for key in (ANYBODY, Key("x", "x", ("admin",), ("a.*",))):
        assert key.may("infer") and key.sees("b") and key.patterns == ("*",)
    assert not Key("x", "x", ("infer",), ("a.*",)).may("adapters:read")
    assert not Key("x", "x", ("infer",), ("a.*",)).sees("base")


def test_what_is_refused_is_not_counted() -> None:
    quotas = Quotas()
    key = Key("x", "x", ("infer",), limits=Limits(2, 100, 1))
    quotas.enter(key)
    with pytest.raises(RateLimited, match="1 requests at once"):
        quotas.enter(key)
    quotas.leave(key, 40)
    quotas.enter(key)
    quotas.leave(key, 70)
    with pytest.raises(RateLimited, match="100 tokens a minute"):
        quotas.enter(key)
    freer = Key("x", "x", ("infer",), limits=Limits(2))
    with pytest.raises(RateLimited, match="2 requests a minute") as refused:
        quotas.enter(freer)
    assert 1 <= refused.value.retry_after <= 60
