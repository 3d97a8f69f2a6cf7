"""The SQL tables and the door to them: SQLite on a laptop, PostgreSQL for a fleet.

    engine = open_database(settings.database)      # migrates to the newest schema
    with engine.begin() as connection:
        connection.execute(sa.select(model_versions))

Times are UTC and ISO 8601 text, so both databases sort and show them alike.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from cluster.errors import ConfigError, DatabaseBusyError, NotRunningError

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 7233542
_BUSY_TIMEOUT_S = 10
_BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

metadata = sa.MetaData()

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("created_at", sa.String(32), nullable=False),
    # Without a number there is no limit.
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("max_streams", sa.BigInteger),
    sa.Column("monthly_tokens", sa.BigInteger),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(128), sa.ForeignKey("tenants.name"), nullable=False),
    sa.Column("key_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("expires_at", sa.String(32)),
    sa.Column("revoked_at", sa.String(32)),
    # Names of the models it is for; without any it is for all.
    sa.Column("models", sa.JSON(none_as_null=True)),
)

model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(71), nullable=False),
    sa.Column("location", sa.Text, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("run_id", sa.String(64)),
    sa.Column("parent_digest", sa.String(71)),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.UniqueConstraint("name", "digest", name="one_version_per_digest"),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
)

alias_history = sa.Table(
    "alias_history",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(128), nullable=False, index=True),
    sa.Column("alias", sa.String(128), nullable=False),
    sa.Column("from_version", sa.Integer),
    sa.Column("to_version", sa.Integer),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.String(32), nullable=False),
)

# What packages were measured to be, after they were made; only ever added to.
evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(71), nullable=False, index=True),
    sa.Column("dataset_digest", sa.String(71), nullable=False),
    sa.Column("split", sa.String(32), nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("run_id", sa.String(64), nullable=False),
)

# Desired and observed state of each served version; the release controller is the only writer.
deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(71), nullable=False),
    sa.Column("application", sa.String(160), nullable=False),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("updated_at", sa.String(32), nullable=False),
    # Grows with every change; a writer that has seen an older one is too late.
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),
    # When Serve was asked for its application; empty where what is there is from an earlier try.
    sa.Column("started_at", sa.String(32)),
    # Who asked for it: the one that the alias history names.
    sa.Column("requested_by", sa.String(128), nullable=False, server_default="controller"),
    # One for each time that the version was asked for; its events and evidence have it too.
    sa.Column("release_id", sa.String(32), nullable=False, server_default=""),
    sa.Column("strategy", sa.String(16), nullable=False, server_default="direct"),
    # Counts the phases in which it is compared with the champion: each has evidence of its own.
    sa.Column("step", sa.Integer, nullable=False, server_default="0"),
    # Of the name's traffic, while it is in canary.
    sa.Column("share", sa.Float, nullable=False, server_default="0"),
    # Of what the champion answers, while it is compared.
    sa.Column("mirror_share", sa.Float, nullable=False, server_default="0"),
    sa.Column("is_paused", sa.Boolean, nullable=False, server_default=sa.false()),
    # When it ends, for a version that its users were given notice of.
    sa.Column("sunset_at", sa.String(32)),
    # Since when they have known.
    sa.Column("noticed_at", sa.String(32)),
)

# Each state that a release has come to, and why; only ever added to.
release_events = sa.Table(
    "release_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("name", sa.String(128), nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("release_id", sa.String(32), nullable=False),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

# Sums of observations from 0 to 1, by all gateways together.
release_evidence = sa.Table(
    "release_evidence",
    metadata,
    sa.Column("release_id", sa.String(32), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("arm", sa.String(16), primary_key=True),
    sa.Column("metric", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("num", sa.BigInteger, nullable=False),
    sa.Column("total", sa.Float, nullable=False),
    sa.Column("updated_at", sa.String(32), nullable=False),
)

# Who acts, and until when nobody else does.
controller_leases = sa.Table(
    "controller_leases",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("expires_at", sa.String(32), nullable=False),
)

# One row per served model name; `weights` maps version number (text) to its share of traffic.
routes = sa.Table(
    "routes",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("weights", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.String(32), nullable=False),
)

# Only ever added to, which the database itself sees to.
audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", sa.String(256), nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
)

# Who used what, training and serving alike. `key` makes an entry count once; old ones become sums.
ledger_entries = sa.Table(
    "ledger_entries",
    metadata,
    sa.Column("key", sa.String(200), primary_key=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("tenant", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("source", sa.String(128), nullable=False),
    sa.Column("cpu_s", sa.Float, nullable=False),
    sa.Column("gpu_s", sa.Float, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("num_requests", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("ledger_entries_by_tenant", "tenant", "at"),
)

# What limited tenants have spent of their month, and what gateway replicas hold of their limits.
budgets = sa.Table(
    "budgets",
    metadata,
    sa.Column("tenant", sa.String(128), sa.ForeignKey("tenants.name"), primary_key=True),
    sa.Column("month", sa.String(7), nullable=False),
    sa.Column("month_tokens", sa.BigInteger, nullable=False),
    sa.Column("state", sa.JSON, nullable=False),
)

# What tenants have uploaded and what was written for them; the bytes are in storage.
tenant_files = sa.Table(
    "tenant_files",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(128), nullable=False),
    sa.Column("name", sa.String(256), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Index("tenant_files_by_tenant", "tenant", "created_at"),
)

# Batches of requests; every change is made to a row as it was seen.
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(128), nullable=False),
    sa.Column("api_key_id", sa.String(32), nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    # As its requests call it, and the version that this meant when the batch was made.
    sa.Column("model", sa.String(160), nullable=False),
    sa.Column("version", sa.String(160), nullable=False),
    sa.Column("input_file_id", sa.String(64), nullable=False),
    sa.Column("output_file_id", sa.String(64)),
    sa.Column("error_file_id", sa.String(64)),
    sa.Column("status", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("errors", sa.JSON, nullable=False),
    sa.Column("notes", sa.JSON, nullable=False),
    # Unix seconds by the name of what happened then.
    sa.Column("moments", sa.JSON, nullable=False),
    sa.Column("counts", sa.JSON, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    # The gateway replica that drives it, and until when no other does.
    sa.Column("owner", sa.String(64)),
    sa.Column("owned_until", sa.String(32)),
    sa.Index("batches_by_tenant", "tenant", "created_at"),
    sa.Index("batches_by_status", "status"),
)

# What each gateway replica has counted of the rows that a version was asked and answered.
drift_counts = sa.Table(
    "drift_counts",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("source", sa.String(64), primary_key=True),
    sa.Column("counts", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.String(32), nullable=False),
)

# Training that drift has led to, and how far it has come; the release controller writes it.
retrainings = sa.Table(
    "retrainings",
    metadata,
    sa.Column("job_id", sa.String(200), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    # The version that drifted.
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("requested_at", sa.String(32), nullable=False),
    sa.Column("updated_at", sa.String(32), nullable=False),
    # The version that came of it, once its gate is asked.
    sa.Column("candidate", sa.Integer),
    sa.Index("retrainings_by_name", "name", "requested_at"),
)


def now() -> str:
    """The current time as the tables hold it."""
    return later(0)


def later(seconds: float) -> str:
    """The time so many seconds from now."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds")


@functools.cache
def open_database(url: str) -> Engine:
    """Connect and bring the schema to its newest version; one engine per URL and process.

    Any use of it raises DatabaseBusyError while another process keeps SQLite's file to itself.

    Raises:
        NotRunningError: the database cannot be reached.
    """
    try:
        location = sa.engine.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(
            "HELIOSTAT_DATABASE_URL is not a database URL",
            hint="expected sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME",
        ) from None
    try:
        if location.get_backend_name() == "sqlite" and location.database:
            Path(location.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = sa.create_engine(location, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "handle_error", _name_busy)
        migrate(engine)
    except (sa.exc.DBAPIError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise NotRunningError(
            f"database {location.render_as_string(hide_password=True)} cannot be opened: {cause}",
            hint="check HELIOSTAT_DATABASE_URL, the disk and its permissions",
        ) from None
    return engine


def migrate(engine: Engine) -> None:
    """Apply every migration that `engine` lacks; safe to call from several processes."""
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() == head:
            return
    with begin_alone(engine, _MIGRATION_LOCK) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextlib.contextmanager
def begin_alone(engine: Engine, lock: int) -> Iterator[Connection]:
    """A transaction that waits for every other one of the same `lock`, and sees what they did.

    SQLite has one writer at a time, whatever the lock.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def read_one_moment(connection: Connection) -> None:
    """Let all that a new transaction reads be of one moment, whoever writes meanwhile."""
    if connection.dialect.name == "sqlite":
        # Its driver begins no transaction for reading.
        connection.exec_driver_sql("BEGIN")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _name_busy(context: sa.engine.ExceptionContext) -> None:
    error = context.original_exception
    # The lowest byte is the code, the others say more of it.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, sqlite3.OperationalError) and code in _BUSY_CODES:
        location = context.engine.url.database if context.engine is not None else "SQLite"
        raise DatabaseBusyError(
            f"the database {location} is busy: another process has kept it locked for "
            f"{_BUSY_TIMEOUT_S} s",
            hint="try again once that is done, or use PostgreSQL: HELIOSTAT_DATABASE_URL",
        ) from None
