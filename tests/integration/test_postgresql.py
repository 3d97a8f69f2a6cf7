"""The same tables and code on a real PostgreSQL server, as a fleet uses it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from cluster import database
from cluster.errors import AuthenticationError, ConflictError, NotRunningError
from cluster.ledger import Entry, Ledger
from cluster.releases import ReleaseStore
from cluster.security.api_keys import ApiKeys


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def _as_server_user() -> list[str]:
    """PostgreSQL refuses to run as root; its Debian package brings a user for it."""
    # Root's own PATH may lack the folder.
    runuser = shutil.which("runuser") or "/usr/sbin/runuser"
    return [runuser, "-u", "postgres", "--"] if os.getuid() == 0 else []


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str]:
    initdb, postgres = _binary("initdb"), _binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    directory = Path(tempfile.mkdtemp(prefix="hst-pg-"))
    if os.getuid() == 0:
        shutil.chown(directory, "postgres")
    data = directory / "data"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [*_as_server_user(), initdb, "-D", str(data), "-U", "heliostat", "-A", "trust", "-N"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    server = subprocess.Popen(
        [*_as_server_user(), postgres, "-D", str(data), "-p", str(port), "-k", str(directory),
         "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )  # fmt: skip
    try:
        _wait_for(port)
        yield f"postgresql+psycopg://heliostat:secret@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(timeout=20)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(port: int) -> None:
    url = f"postgresql+psycopg://heliostat@127.0.0.1:{port}/postgres"
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    for _ in range(100):
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start")


def test_processes_that_race_to_migrate_all_succeed(postgresql_url: str) -> None:
    code = f"from cluster.database import open_database; open_database({postgresql_url!r})"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr.decode()


def test_the_migrations_give_exactly_the_tables(postgresql_url: str) -> None:
    engine = database.open_database(postgresql_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.metadata) == []


def test_keys_are_created_verified_and_revoked(postgresql_url: str) -> None:
    keys = ApiKeys(database.open_database(postgresql_url))
    created = keys.create("acme", ["infer"])
    assert keys.verify(created.key).tenant == "acme"
    keys.revoke(created.id)
    with pytest.raises(AuthenticationError):
        keys.verify(created.key)


def test_what_was_used_counts_once(postgresql_url: str) -> None:
    ledger = Ledger(database.open_database(postgresql_url))
    entry = Entry("r/1", tenant="acme", kind="completion", model="lm", source="r", gpu_s=1.5,
                  prompt_tokens=2**40)  # fmt: skip
    assert ledger.record([entry, entry]) == 1
    assert ledger.record([entry]) == 0
    (total,) = ledger.totals(tenant="acme")
    assert (total.gpu_s, total.prompt_tokens, total.num_entries) == (1.5, 2**40, 1)


def test_writers_of_releases_wait_for_each_other(postgresql_url: str) -> None:
    store = ReleaseStore(database.open_database(postgresql_url))

    def request(version: int) -> bool:
        with store.writing() as tables:
            if tables.deployments("m"):
                return False
            tables.create("m", version, "sha256:0", {}, "asked", requested_by="ops")
            return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(request, range(1, 33))) == 1
    (row,) = store.deployments("m")
    with store.writing() as tables:
        tables.promote(row, actor="tester", reason="ready")
    with pytest.raises(ConflictError, match="changed meanwhile"), store.writing() as tables:
        tables.promote(row, actor="tester", reason="seen before")
    assert store.weights("m") == {row.version: 1.0}


def test_an_unreachable_server_is_one_line_without_the_password() -> None:
    with pytest.raises(NotRunningError) as caught:
        database.open_database("postgresql+psycopg://heliostat:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
