"""Batches of requests, as the table tells it: clients ask for them, gateways drive them.

validating → in_progress → finalizing → completed; or → failed, expired, or cancelling → cancelled.
Every change is made to a row as it was seen, and refused if the row has changed since, so of two
gateways one is first. Knows nothing of HTTP, jobs and lines.

    store = BatchStore(open_database(settings.database))
    for batch in store.claim("gateway-1", lease_s=30):
        store.change(batch, status="finalizing")
"""

from __future__ import annotations

import builtins
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.database import batches, begin_alone, now
from cluster.errors import ConflictError, NotFoundError

Status = Literal[
    "validating", "in_progress", "finalizing", "completed",
    "failed", "expired", "cancelling", "cancelled",
]  # fmt: skip
ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
RUNNING: tuple[Status, ...] = ("in_progress", "cancelling")
"""A job of theirs may be at work."""

_BATCHES_LOCK = 7233544


@dataclass(frozen=True)
class Batch:
    """One batch."""

    id: str
    tenant: str
    api_key_id: str
    endpoint: str
    model: str
    """As its requests name it."""
    version: str
    """NAME/VERSION that this meant when the batch was made."""
    input_file_id: str
    status: Status = "validating"
    reason: str = ""
    """Why it ends early, where it does: expired or cancelled."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    """What is wrong with the whole batch."""
    notes: dict[str, str] = field(default_factory=dict)
    """The client's own."""
    moments: dict[str, int] = field(default_factory=dict)
    """Unix seconds by name: created_at, in_progress_at, expires_at, …"""
    counts: dict[str, int] = field(default_factory=dict)
    """total, completed, failed; prompt_tokens, completion_tokens."""
    created_at: str = field(default_factory=now)
    attempt: int = 0
    """Jobs of it that have failed."""
    revision: int = 0

    @property
    def job_id(self) -> str:
        """The job that runs it; the same for every gateway, so there is one."""
        return f"{self.id}-{self.attempt}"


class BatchStore:
    """The `batches` table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, batch: Batch) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.insert(batches).values(asdict(batch)))

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFoundError, for another tenant's batch too."""
        query = sa.select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
        with self._engine.connect() as connection:
            # PostgreSQL takes no NUL in a text.
            row = None if "\0" in batch_id else connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no batch {batch_id[:80]!r}", hint="see GET /v1/batches", param="batch_id"
            )
        return _batch(row)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> list[Batch]:
        """A tenant's batches, newest first; those after one, at most `limit`."""
        columns = batches.c
        order = (columns.created_at, columns.id)
        query = sa.select(batches).where(columns.tenant == tenant)
        if after is not None:
            last = self.get(tenant, after)
            query = query.where(sa.tuple_(*order) < sa.tuple_(last.created_at, last.id))
        query = query.order_by(*(column.desc() for column in order)).limit(limit)
        with self._engine.connect() as connection:
            return [_batch(row) for row in connection.execute(query)]

    def claim(self, owner: str, *, lease_s: float) -> builtins.list[Batch]:
        """The batches that `owner` drives from now on, oldest first: its own, new ones, and those
        whose owner has been silent for its lease."""
        columns = batches.c
        moment = datetime.now(UTC)
        free = sa.or_(
            columns.owner.is_(None), columns.owner == owner, columns.owned_until < _text(moment)
        )
        until = _text(moment + timedelta(seconds=lease_s))
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(batches)
                .where(columns.status.in_(ACTIVE), free)
                .values(owner=owner, owned_until=until)
            )
            query = sa.select(batches).where(columns.status.in_(ACTIVE), columns.owner == owner)
            rows = connection.execute(query.order_by(columns.created_at, columns.id))
            return [_batch(row) for row in rows]

    def release(self, owner: str) -> None:
        """Let others drive at once what `owner` drove."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(batches).where(batches.c.owner == owner).values(owner=None)
            )

    def begin(self, batch: Batch, *, max_running: int) -> Batch | None:
        """From validating to in_progress; None while so many batches run already.

        Raises:
            ConflictError: the row has changed.
        """
        with begin_alone(self._engine, _BATCHES_LOCK) as connection:
            query = sa.select(sa.func.count()).where(batches.c.status.in_(RUNNING))
            if (connection.scalar(query) or 0) >= max_running:
                return None
            return _change(connection, batch, status="in_progress")

    def change(self, batch: Batch, **values: Any) -> Batch:
        """The batch with other values; a new status gets its moment.

        Raises:
            ConflictError: the row has changed.
        """
        with self._engine.begin() as connection:
            return _change(connection, batch, **values)


def _change(connection: Connection, batch: Batch, **values: Any) -> Batch:
    status = values.get("status", batch.status)
    if status != batch.status:
        values["moments"] = {f"{status}_at": int(time.time())} | batch.moments
    values["revision"] = batch.revision + 1
    changed = connection.execute(
        sa.update(batches)
        .where(batches.c.id == batch.id, batches.c.revision == batch.revision)
        .values(values)
    )
    if changed.rowcount != 1:
        raise ConflictError(
            f"batch {batch.id} was changed by another request or gateway", hint="look at it again"
        )
    return Batch(**{**asdict(batch), **values})


def _batch(row: Any) -> Batch:
    names = Batch.__dataclass_fields__
    return Batch(**{name: value for name, value in row._mapping.items() if name in names})


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
