import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from cluster import database
from cluster.errors import NotRunningError, OverloadedError


def test_the_migrations_give_exactly_the_tables(tmp_path: Path) -> None:
    engine = database.open_database(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.metadata) == []


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    engine = database.open_database(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.begin() as connection:
        connection.execute(sa.insert(database.tenants).values(name="t", created_at=database.now()))
    database.migrate(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.select(database.tenants.c.name)).scalar_one() == "t"


def test_several_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'race.db'}"
    code = f"from cluster.database import open_database; open_database({url!r})"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr.decode()


def test_a_database_that_another_keeps_locked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0)
    engine = database.open_database(f"sqlite:///{tmp_path / 'a.db'}")
    tenant = {"name": "t", "created_at": database.now()}
    with sqlite3.connect(tmp_path / "a.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OverloadedError, match=r"a\.db is busy"), engine.begin() as connection:
            connection.execute(sa.insert(database.tenants).values(tenant))
        with pytest.raises(OverloadedError, match="try again"), database.begin_alone(engine, 1):
            pass
        other.rollback()
    with engine.begin() as connection:
        connection.execute(sa.insert(database.tenants).values(tenant))


def test_a_database_that_cannot_be_opened_is_one_line_without_its_password() -> None:
    with pytest.raises(NotRunningError) as caught:
        database.open_database("sqlite:////proc/nowhere/a.db")
    assert "\n" not in str(caught.value)
