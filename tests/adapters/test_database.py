"""The schema: what a new file gets, and how old ones are brought up to it."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from adapters.database import FILE, HEAD, MIGRATIONS, Database, tables
from adapters.errors import RegistryError
from adapters.registry import Registry
from server import keys

OLD = Path(__file__).with_name("old_registry.sql")


def old(home: Path, *changes: str) -> Path:
    """A state folder as it was before schemas were numbered: `sql` with two versions."""
    with closing(sqlite3.connect(home / FILE)) as db:
        db.executescript(OLD.read_text())
        for change in changes:
            db.execute(change)
        db.commit()
    return home


def differences(database: Database) -> list[object]:
    """Between the schema that a database has and the one that the code means."""
    assert keys  # its tables are a part of it
    with database.read() as db:
        return compare_metadata(MigrationContext.configure(db), tables)


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == HEAD


def test_a_new_file_has_the_schema_that_the_code_means(tmp_path: Path) -> None:
    assert differences(Database.of(tmp_path)) == []


def test_an_old_file_is_brought_up_to_date_and_loses_nothing(tmp_path: Path) -> None:
    database = Database.of(old(tmp_path))
    assert differences(database) == []
    adapter = Registry(database).get("sql")
    assert [(v.number, v.rank, v.owner) for v in adapter.versions] == [(1, 8, None), (2, 8, None)]
    assert adapter.aliases == {"latest": 2, "prod": 1}
    assert adapter.metadata == {"team": "a"}
    assert Registry(database).resolve("sql@prod").bytes == 1952376


def test_an_older_file_gets_the_columns_it_lacks(tmp_path: Path) -> None:
    lacking = (f"ALTER TABLE versions DROP COLUMN {name}" for name in ("reason", "pinned"))
    database = Database.of(old(tmp_path, *lacking))
    assert differences(database) == []
    assert Registry(database).get("sql").versions[0].reason is None


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Database.of(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
        db.commit()
    with pytest.raises(RegistryError, match="later version of Loraplex"):
        Database.of(tmp_path)


def test_a_change_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(tmp_path, "CREATE TABLE keys (id INTEGER)")  # in the way of the second migration
    with pytest.raises(RegistryError):
        Database.of(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        columns = {row[1] for row in db.execute("PRAGMA table_info(versions)")}
    assert "alembic_version" not in names and "owner" not in columns


def test_two_that_open_an_old_file_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from adapters.database import Database; "
    code += "Database.of(Path(sys.argv[1]))"
    home = old(tmp_path)
    both = [subprocess.Popen([sys.executable, "-c", code, home]) for _ in range(2)]
    assert [each.wait(60) for each in both] == [0, 0]
    assert differences(Database.of(home)) == []
