from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.database import Database
from adapters.errors import (
    AdapterNotFound,
    AliasConflict,
    AliasInUse,
    AliasNotFound,
    InvalidName,
    InvalidReference,
    RegistryError,
    ReservedName,
    VersionNotFound,
    VersionQuarantined,
)
from adapters.registry import Facts, Registry

FACTS = Facts(
    rank=8,
    alpha=16.0,
    rslora=False,
    target_modules=("q_proj", "v_proj"),
    dtype="BF16",
    bytes=5_000_000_000,
    parameters=2_500_000_000,
    base_model="org/base",
    source="upload",
    checks={"problems": [], "warnings": []},
    algebra={"parameters": 1, "layers": [{"module": "ü"}]},
)


def sha(n: int) -> str:
    return f"sha256:{n:064x}"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def registry(url):
    opened = Registry(Database(url))
    yield opened
    opened.close()


def test_a_version_comes_back_as_it_went_in(registry, url):
    before = datetime.now(UTC)
    version, created = registry.add_version(
        "sql", sha(1), FACTS, alias="prod", metadata={"team": "a"}
    )
    assert created
    assert (version.adapter, version.number, version.digest) == ("sql", 1, sha(1))
    assert version.reference == "sql@1"
    assert version.state == "ready"
    assert before <= version.created <= datetime.now(UTC)
    assert version.created.utcoffset() == timedelta(0)
    for field in FACTS.__slots__:
        assert getattr(version, field) == getattr(FACTS, field)
    registry.close()
    adapter = Registry(Database(url)).get("sql")
    assert adapter.versions == (version,)
    assert adapter.aliases == {"latest": 1, "prod": 1}
    assert adapter.metadata == {"team": "a"}
    assert adapter.created.utcoffset() == timedelta(0)


def test_the_same_digest_is_the_same_version(registry):
    first, _ = registry.add_version("sql", sha(1), FACTS)
    registry.add_version("sql", sha(2), FACTS)
    again, created = registry.add_version("sql", sha(1), FACTS, alias="prod")
    assert (again, created) == (first, False)
    assert registry.get("sql").aliases == {"latest": 2, "prod": 1}
    other, created = registry.add_version("code", sha(1), FACTS)
    assert created and other.number == 1 and other.id != first.id


def test_metadata_is_replaced_only_when_given(registry):
    registry.add_version("sql", sha(1), FACTS, metadata={"a": 1})
    registry.add_version("sql", sha(2), FACTS)
    assert registry.get("sql").metadata == {"a": 1}
    registry.add_version("sql", sha(2), FACTS, metadata={})
    assert registry.get("sql").metadata == {}


def test_resolving(registry):
    for n in (1, 2, 3):
        registry.add_version("sql", sha(n), FACTS)
    registry.add_version("other", sha(9), FACTS)
    registry.set_alias("sql", "prod", 2)

    def number(reference):
        found = registry.resolve(reference)
        assert found.adapter == "sql" and found.checks is None and found.algebra is None
        return found.number

    assert number("sql") == number("sql@latest") == number("sql@3") == 3
    assert number("sql@prod") == number(f"sql@{sha(2)}") == 2
    registry.delete_version("sql", 3)
    assert number("sql") == number("sql@latest") == 2
    for missing, error in [
        ("nobody", AdapterNotFound),
        ("nobody@1", AdapterNotFound),
        ("sql@3", VersionNotFound),
        ("sql@999999999", VersionNotFound),
        (f"sql@{sha(9)}", VersionNotFound),
        ("sql@stage", AliasNotFound),
        ("SQL", InvalidReference),
    ]:
        with pytest.raises(error):
            registry.resolve(missing)


def test_showing_one_version(registry):
    version, _ = registry.add_version("sql", sha(1), FACTS, alias="prod")
    for reference in ("sql", "sql@1", "sql@prod", f"sql@{sha(1)}"):
        assert registry.show(reference) == version
    with pytest.raises(VersionNotFound):
        registry.show("sql@2")


def test_a_deleted_name_is_still_known(registry):
    assert not registry.knows("sql")
    registry.add_version("sql", sha(1), FACTS)
    assert registry.knows("sql")
    registry.delete_adapter("sql")
    assert registry.knows("sql")


def test_a_name_that_comes_back_goes_on_counting(registry):
    first, _ = registry.add_version("sql", sha(1), FACTS, alias="prod", metadata={"a": 1})
    registry.add_version("sql", sha(2), FACTS)
    assert registry.delete_adapter("sql") == [sha(1), sha(2)]
    for call in (registry.get, registry.resolve, registry.delete_adapter):
        with pytest.raises(AdapterNotFound):
            call("sql")
    assert registry.list().data == ()
    assert registry.digests() == set()
    again, created = registry.add_version("sql", sha(1), FACTS)
    assert created and again.number == 3 and again.id > first.id
    adapter = registry.get("sql")
    assert [v.number for v in adapter.versions] == [3]
    assert adapter.aliases == {"latest": 3}
    assert adapter.metadata == {}
    with pytest.raises(VersionNotFound):
        registry.resolve("sql@1")


def test_a_deleted_version_that_comes_back_has_a_new_number(registry):
    registry.add_version("sql", sha(1), FACTS)
    assert registry.delete_version("sql", 1) == [sha(1)]
    with pytest.raises(VersionNotFound):
        registry.resolve("sql")
    with pytest.raises(VersionNotFound):
        registry.delete_version("sql", 1)
    version, created = registry.add_version("sql", sha(1), FACTS)
    assert created and version.number == 2


def test_deletes_name_only_digests_nobody_needs(registry):
    registry.add_version("a", sha(1), FACTS)
    registry.add_version("a", sha(2), FACTS)
    registry.add_version("b", sha(1), FACTS)
    assert registry.digests() == {sha(1), sha(2)}
    assert registry.delete_version("a", 1) == []
    assert registry.delete_adapter("a") == [sha(2)]
    assert registry.references_to(sha(1)) and not registry.references_to(sha(2))
    assert registry.delete_adapter("b") == [sha(1)]


def test_a_version_with_an_alias_stays(registry):
    registry.add_version("sql", sha(1), FACTS, alias="prod")
    with pytest.raises(AliasInUse, match="prod"):
        registry.delete_version("sql", 1)
    registry.delete_alias("sql", "prod")
    assert registry.delete_version("sql", 1) == [sha(1)]


def test_aliases_compare_and_set(registry):
    registry.add_version("sql", sha(1), FACTS)
    registry.add_version("sql", sha(2), FACTS)
    registry.set_alias("sql", "prod", 1, expected=None)
    with pytest.raises(AliasConflict):
        registry.set_alias("sql", "prod", 2, expected=None)
    with pytest.raises(AliasConflict):
        registry.set_alias("sql", "prod", 2, expected=2)
    registry.set_alias("sql", "prod", 2, expected=1)
    registry.set_alias("sql", "prod", 2)
    assert registry.resolve("sql@prod").number == 2
    with pytest.raises(AliasConflict):
        registry.delete_alias("sql", "prod", expected=1)
    registry.delete_alias("sql", "prod", expected=2)
    with pytest.raises(AliasNotFound):
        registry.delete_alias("sql", "prod")


def test_alias_mistakes(registry):
    registry.add_version("sql", sha(1), FACTS)
    registry.add_version("sql", sha(2), FACTS)
    registry.delete_version("sql", 1)
    for number in (0, -1, 1, 3, 2**31, 2**70):
        with pytest.raises(VersionNotFound):
            registry.set_alias("sql", "prod", number)
    with pytest.raises(AdapterNotFound):
        registry.set_alias("nobody", "prod", 1)
    with pytest.raises(ReservedName):
        registry.set_alias("sql", "latest", 2)
    with pytest.raises(InvalidName):
        registry.set_alias("sql", "12", 2)
    with pytest.raises(ReservedName):
        registry.delete_alias("sql", "latest")
    with pytest.raises(InvalidName):
        registry.add_version("Sql", sha(1), FACTS)
    with pytest.raises(ReservedName):
        registry.add_version("new", sha(1), FACTS, alias="latest")
    assert [a.name for a in registry.list().data] == ["sql"]


def test_lists_are_paged_by_name(registry):
    names = [f"{team}.{i:02}" for team in ("a", "b_", "bx") for i in range(5)]
    for n, name in enumerate(reversed(names)):
        registry.add_version(name, sha(n), FACTS, alias="prod")
    seen, after, pages = [], None, 0
    while True:
        page = registry.list(after=after, limit=4)
        seen += [a.name for a in page.data]
        pages += 1
        if page.next is None:
            break
        after = page.next
    assert seen == names and pages == 4
    assert [a.name for a in registry.list(prefix="b_").data] == names[5:10]
    assert registry.list(limit=15).next is None
    first = registry.list(limit=1).data[0]
    assert first.aliases == {"latest": 1, "prod": 1}
    assert first.versions[0].algebra is None and first.versions[0].rank == 8


def test_a_page_costs_the_same_whatever_the_number_of_adapters(registry):
    import sqlalchemy as sa

    for n in range(40):
        registry.add_version(f"a{n:02}", sha(n), FACTS)
    statements = []
    sa.event.listen(
        registry._db.engine, "before_cursor_execute", lambda *a: statements.append(a[2])
    )
    registry.list(limit=30)
    assert len([s for s in statements if s.startswith("SELECT")]) == 3


def in_threads(count, work):
    barrier, results = threading.Barrier(count), []

    def run(n):
        barrier.wait()
        try:
            results.append(work(n))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("shared", [True, False])
def test_the_same_upload_at_once_is_one_version(registry, url, shared):
    def work(n):
        mine = registry if shared else Registry(Database(url))
        return mine.add_version("sql", sha(1), FACTS)

    results = in_threads(8, work)
    assert {v.number for v, _ in results} == {1}
    assert sum(created for _, created in results) == 1
    assert len(registry.get("sql").versions) == 1


def test_uploads_at_once_are_numbered_without_gaps(registry):
    results = in_threads(12, lambda n: registry.add_version("sql", sha(n), FACTS)[0].number)
    assert sorted(results) == list(range(1, 13))


def test_only_one_of_many_moves_an_alias(registry):
    for n in range(8):
        registry.add_version("sql", sha(n), FACTS)
    registry.set_alias("sql", "prod", 1)
    results = in_threads(8, lambda n: registry.set_alias("sql", "prod", n + 1, expected=1))
    # Version 1 itself may move it from 1 to 1 before the winner does.
    won = [r for r in results if r is None]
    assert 1 <= len(won) <= 2
    assert all(isinstance(r, AliasConflict) for r in results if r is not None)


def test_a_failing_write_changes_nothing(registry, monkeypatch):
    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr("adapters.registry._point", fail)
    with pytest.raises(RuntimeError):
        registry.add_version("sql", sha(1), FACTS, alias="prod")
    assert registry.list().data == () and registry.digests() == set()


def test_sqlite_syncs_every_commit_and_checks_references(registry):
    with registry._db.engine.connect() as db:
        pragmas = {
            p: db.exec_driver_sql(f"PRAGMA {p}").scalar()
            for p in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_what_was_acknowledged_survives_kill_9(url):
    code = """
import os, signal, sys
sys.path.insert(0, "tests/adapters")
from test_registry import FACTS, Database, Registry, sha
registry = Registry(Database(sys.argv[1]))
for n in range(1, 6):
    registry.add_version("sql", sha(n), FACTS)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, url], env={"PYTHONPATH": "."}, cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -9
    assert [v.number for v in Registry(Database(url)).get("sql").versions] == [1, 2, 3, 4, 5]


def test_a_database_that_cannot_be_opened(tmp_path):
    with pytest.raises(RegistryError):
        Database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryError):
        Database(f"sqlite:///{tmp_path / 'broken.db'}")


def test_what_every_request_asks_goes_by_an_index(registry):
    """However many adapters there are: SQLite says how it would look each thing up."""
    registry.add_version("sql", sha(1), FACTS, alias="prod")
    asked = []
    sa.event.listen(
        registry._db.engine,
        "before_cursor_execute",
        lambda db, cursor, text, values, *_: asked.append((text, values)),
    )
    for reference in ("sql", "sql@1", "sql@prod", f"sql@{sha(1)}"):
        registry.resolve(reference)
    registry.get("sql")
    registry.list(after="a", limit=5)
    registry.list(prefix="s", limit=5)
    registry.from_source("up")
    registry.proven(sha(1))
    registry.references_to(sha(1))
    with registry._db.engine.connect() as db:
        for text, values in [each for each in asked if each[0].startswith("SELECT")]:
            plan = db.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)
            steps = [row.detail for row in plan]
            assert not [step for step in steps if step.startswith("SCAN")], (text, steps)
    assert len(asked) > 12


def test_a_quarantined_version_is_not_served_until_it_is_mended(registry):
    registry.add_version("sql", sha(1), FACTS, alias="prod")
    registry.add_version("sql", sha(2), FACTS)
    registry.quarantine(sha(1), "Its folder is gone.")
    for reference in ("sql@1", "sql@prod", f"sql@{sha(1)}"):
        with pytest.raises(VersionQuarantined, match=r"Its folder is gone\. Upload the same"):
            registry.resolve(reference)
    assert registry.resolve("sql").number == 2
    with pytest.raises(VersionNotFound):
        registry.set_alias("sql", "canary", 1)
    (first, second) = registry.get("sql").versions
    assert (first.state, first.reason) == ("quarantined", "Its folder is gone.")
    assert (second.state, second.reason) == ("ready", None)
    registry.quarantine(sha(2), "Its files are not what was sealed.")
    with pytest.raises(VersionQuarantined):
        registry.resolve("sql")
    assert list(registry.names()) == [] and len(registry.list().data) == 1

    again, created = registry.add_version("sql", sha(1), FACTS)
    assert not created and again.number == 1 and again.reason is None
    assert registry.resolve("sql@prod").number == 1
    registry.heal(sha(2))
    assert registry.resolve("sql").number == 2
    registry.delete_version("sql", 2)
    registry.heal(sha(2))
    with pytest.raises(VersionNotFound):
        registry.resolve("sql@2")


def test_sound_bytes_do_not_end_a_quarantine_that_is_not_for_damage(registry):
    registry.add_version("sql", sha(1), FACTS)
    registry.quarantine(sha(1), "The engine has ended.", lasting=True)
    assert not registry.heal(sha(1))
    with pytest.raises(VersionQuarantined, match=r"has ended\. Save the adapter anew, or"):
        registry.resolve("sql@1")
    again, created = registry.add_version("sql", sha(1), FACTS)
    assert not created and again.reason is None
    registry.quarantine(sha(1), "Its folder is gone.")
    assert registry.heal(sha(1)) and registry.resolve("sql").number == 1


def test_versions_are_found_by_where_they_came_from(registry):
    registry.add_version("sql", sha(1), replace(FACTS, source="watch:/a/sql"))
    registry.add_version("code", sha(2), replace(FACTS, source="watch:/a/code"))
    registry.add_version("code", sha(3), replace(FACTS, source="watch:/ab/code"))
    registry.add_version("c_de", sha(4), FACTS)
    found = [(v.adapter, v.number) for v in registry.from_source("watch:/a/")]
    assert sorted(found) == [("code", 1), ("sql", 1)]
    registry.delete_version("sql", 1)
    assert [v.adapter for v in registry.from_source("watch:/a/")] == ["code"]
    assert [a.name for a in registry.list(prefix="c_").data] == ["c_de"]
