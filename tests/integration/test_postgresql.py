"""The same tables and code on a real PostgreSQL server, as a fleet uses it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from cluster import database
from cluster.backup import write_backup
from cluster.controller_lease import ControllerLease
from cluster.errors import AuthenticationError, ConflictError, NotRunningError
from cluster.evaluations import EvaluationRecord
from cluster.ledger import Entry, Ledger
from cluster.registry import ModelRegistry
from cluster.release_evidence import EvidenceDelta, Metric
from cluster.releases import ReleaseStore
from cluster.restore import restore_backup
from cluster.security.api_keys import ApiKeys
from cluster.security.audit import AuditLog
from cluster.security.leases import LeaseStore
from cluster.security.limits import Ask
from cluster.settings import Settings
from cluster.statistics.sequential import Sample
from tests.servers import free_port


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


def test_old_months_become_sums(postgresql_url: str) -> None:
    ledger = Ledger(database.open_database(postgresql_url))
    entry = Entry("", "summed", "completion", "lm", "r", prompt_tokens=2**40, num_requests=1,
                  at="2020-01-05T00:00:00.000+00:00")  # fmt: skip
    for batch in (range(3), range(3, 5)):
        ledger.record([replace(entry, key=f"g/{number}") for number in batch])
        (month,) = ledger.months_to_sum()
        assert ledger.sum_up(month.name) == len(batch)
    (total,) = ledger.totals(tenant="summed")
    assert (total.num_entries, total.prompt_tokens, total.num_requests) == (1, 5 * 2**40, 5)
    assert ledger.months_to_sum() == []


def test_replicas_that_race_for_a_budget_never_get_more_than_there_is(postgresql_url: str) -> None:
    engine = database.open_database(postgresql_url)
    ApiKeys(engine).set_tenant("racer", {"requests_per_minute": 100, "monthly_tokens": 1000})
    now_s = time.time()
    store = LeaseStore(engine, clock=lambda: now_s)

    def replica(number: int) -> int:
        granted = 0
        for turn in range(10):
            entry = Entry(f"race/{number}/{turn % 5}", tenant="racer", kind="completion",
                          model="lm", source="k", completion_tokens=10)  # fmt: skip
            ask = Ask(needs={"requests": 1}, wants={"requests": 7})
            lease = store.exchange(f"replica-{number}", [entry], {"racer": ask})["racer"]
            granted += lease.granted["requests"]
        return granted

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(replica, range(4))) == 100
    lease = store.exchange("last", (), {"racer": Ask(needs={"month_tokens": 1})})["racer"]
    assert lease.left["month_tokens"] == 1000 - 4 * 5 * 10 - 1


@pytest.mark.parametrize("change", ["UPDATE audit_log SET actor = ''", "TRUNCATE audit_log"])
def test_the_audit_log_only_grows(postgresql_url: str, change: str) -> None:
    engine = database.open_database(postgresql_url)
    AuditLog(engine).record("ops/key_1", "deploy", "audited/3", {})
    with (
        pytest.raises(sa.exc.DatabaseError, match="only ever added to"),
        engine.begin() as connection,
    ):
        connection.execute(sa.text(change))
    assert "audited/3" in [act.target for act in AuditLog(engine).list(action="deploy")]


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


def test_gateways_add_evidence_at_once_and_one_controller_acts(postgresql_url: str) -> None:
    engine = database.open_database(postgresql_url)
    store = ReleaseStore(engine)
    with store.writing() as tables:
        row = tables.create("evident", 1, "sha256:0", {}, "asked", requested_by="ops")
    metrics: tuple[Metric, ...] = ("errors", "slow", "slow_token")

    def add(number: int) -> None:
        for metric in metrics if number % 2 else metrics[::-1]:
            delta = EvidenceDelta(
                row.release_id, row.step, "evident", 1, "candidate", metric, 2, 0.5
            )
            store.add_evidence([delta, delta])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(32)))
    assert store.evidence(row) == {("candidate", metric): Sample(128, 32.0) for metric in metrics}
    leases = [ControllerLease(engine, "evident") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ControllerLease.hold, leases)) == 1
    for lease in leases:
        if not lease.hold():
            with pytest.raises(ConflictError, match="taken over"), store.writing() as tables:
                lease.require(tables.connection)


def test_a_lease_is_not_missed_while_it_is_renewed(postgresql_url: str) -> None:
    engine = database.open_database(postgresql_url)
    lease = ControllerLease(engine, "renewed", lease_s=0)
    assert lease.hold()
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(lambda: [lease.check() for _ in range(300)])
        while not checking.done():
            assert lease.hold()
        checking.result()


def test_routes_are_read_as_of_one_moment(postgresql_url: str) -> None:
    store = ReleaseStore(database.open_database(postgresql_url))
    for version in (1, 2):
        with store.writing() as tables:
            asked = tables.create("read", version, "sha256:0", {}, "asked", requested_by="ops")
            tables.promote(asked, actor="tester", reason="ready")

    def switch() -> None:
        for number in range(100):
            with store.writing() as tables:
                (row,) = (r for r in tables.deployments("read") if r.version == 1 + number % 2)
                tables.promote(row, actor="tester", reason="to and fro")

    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        while not switching.done():
            found = store.snapshot()
            (champion,) = (
                r.version for r in found.serving if (r.name, r.state) == ("read", "champion")
            )
            assert found.weights["read"] == {champion: 1.0}
            assert found.aliases["read", "champion"] == champion
        switching.result()


@pytest.fixture
def settings(postgresql_url: str, tmp_path: Path) -> Settings:
    """A home on that server with three versions of a model, and no MLflow."""
    name = f"m-{uuid.uuid4().hex[:8]}"
    columns = {"name": name, "location": "l", "kind": "graph", "created_at": database.now()}
    rows = [{**columns, "version": n, "digest": f"sha256:{name}{n}"} for n in (1, 2, 3)]
    with database.open_database(postgresql_url).begin() as connection:
        connection.execute(sa.insert(database.model_versions), rows)
    return Settings(home=tmp_path / name, database_url=postgresql_url, mlflow_port=free_port())


def test_of_writers_of_an_alias_one_wins(settings: Settings) -> None:
    registry, name = ModelRegistry.open(settings), settings.home.name

    def move(version: int) -> int:
        try:
            registry.set_alias(name, "best", version, actor="t", reason="r", expected_revision=seen)
        except ConflictError:
            return 0
        return version

    seen = 0
    for _ in range(2):  # first the alias is new, then it exists
        with ThreadPoolExecutor(3) as pool:
            winners = [version for version in pool.map(move, (1, 2, 3)) if version]
        after = registry.get_alias(name, "best")
        assert after is not None
        assert winners == [after.version]
        seen = after.revision
    assert len(registry.history(name)) == 2


@pytest.mark.parametrize(
    "change", ["UPDATE alias_history SET reason = ''", "TRUNCATE alias_history"]
)
def test_the_alias_history_only_grows(settings: Settings, change: str) -> None:
    registry, name = ModelRegistry.open(settings), settings.home.name
    registry.set_alias(name, "best", 1, actor="t", reason="r")
    with (
        pytest.raises(sa.exc.DatabaseError, match="only ever added to"),
        database.open_database(settings.database).begin() as connection,
    ):
        connection.execute(sa.text(change))
    assert [each.reason for each in registry.history(name)] == ["r"]


def test_a_backup_moves_between_databases_and_goes_on_counting(settings: Settings) -> None:
    """From PostgreSQL to SQLite, and from there to an empty PostgreSQL."""
    name = settings.home.name
    (settings.home / "storage").mkdir(parents=True)
    (settings.home / "storage" / "kept").write_text("a backup without its storage is refused")
    registry = ModelRegistry.open(settings)
    registry.set_alias(name, "best", 1, actor="t", reason="r")
    record = EvaluationRecord("sha256:0", "sha256:1", "test", {"mae": 0.5}, "run")
    registry.add_evaluation(record)
    server = sa.create_engine(settings.database_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE restored"))
    server.dispose()
    for number, url in ((2, ""), (3, settings.database_url.rpartition("/")[0] + "/restored")):
        settings = move_to(settings, url, number)
        registry = ModelRegistry.open(settings)
        assert registry.evaluations("sha256:0") == [record]
        registry.set_alias(name, "best", number, actor="t", reason="later")
        moves = [change.to_version for change in registry.history(name)]
        assert moves == list(range(1, number + 1))
    database.open_database(settings.database).dispose()


def move_to(settings: Settings, database_url: str, number: int) -> Settings:
    """Restore a backup of one home into a new one with another database."""
    home = settings.home.with_name(f"home-{number}")
    archive = settings.home.with_name(f"{number}.tar")
    write_backup(settings, archive)
    changed = settings.model_copy(update={"database_url": database_url})
    restore_backup(archive, home, lambda home: changed.model_copy(update={"home": home}))
    return changed.model_copy(update={"home": home})


def test_an_unreachable_server_is_one_line_without_the_password() -> None:
    with pytest.raises(NotRunningError) as caught:
        database.open_database("postgresql+psycopg://heliostat:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
