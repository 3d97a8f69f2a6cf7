"""The ledger: who used how many seconds of CPU and GPU and how many tokens, and what for.

One table for training and serving alike, only ever added to. An entry's key makes it count once,
however often it is handed in, so whoever is not sure that it was taken hands it in again. Knows
nothing of what is metered.

    ledger = Ledger(open_database(settings.database))
    ledger.record([Entry(key="run/4f1c/1", tenant="local", kind="training", model="pydoc-lm",
                         source="4f1c", cpu_s=120.0)])
    ledger.totals(tenant="local")    # [Total(tenant='local', kind='training', …, cpu_s=120.0, …)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine

from cluster.database import ledger_entries, now


@dataclass(frozen=True)
class Entry:
    """What was used, once."""

    key: str
    """Names what is counted; a second entry of the same key is not taken."""
    tenant: str
    kind: str
    """What for: training, completion, …"""
    model: str
    source: str
    """The run or the request."""
    cpu_s: float = 0.0
    """CPUs held, times seconds."""
    gpu_s: float = 0.0
    """GPUs held, times seconds."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    at: str = field(default_factory=now)
    """ISO 8601 in UTC."""


@dataclass(frozen=True)
class Total:
    """The sum over the entries of one tenant, kind and model."""

    tenant: str
    kind: str
    model: str
    num_entries: int
    cpu_s: float
    gpu_s: float
    prompt_tokens: int
    completion_tokens: int


_UNITS = ("cpu_s", "gpu_s", "prompt_tokens", "completion_tokens")


class Ledger:
    """The ledger in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(self, entries: Sequence[Entry]) -> int:
        """Add entries, all or none; returns how many were new."""
        if not entries:
            return 0
        statement = self._insert().values([asdict(entry) for entry in entries])
        new = statement.on_conflict_do_nothing().returning(ledger_entries.c.key)
        with self._engine.begin() as connection:
            return len(connection.execute(new).all())

    def totals(
        self,
        *,
        tenant: str | None = None,
        source: str | None = None,
        since: datetime | None = None,
    ) -> list[Total]:
        """Sums by tenant, kind and model, of the entries that match."""
        columns = ledger_entries.c
        groups = (columns.tenant, columns.kind, columns.model)
        sums = (sa.func.sum(columns[unit]).label(unit) for unit in _UNITS)
        query = sa.select(*groups, sa.func.count().label("num_entries"), *sums)
        if tenant is not None:
            query = query.where(columns.tenant == tenant)
        if source is not None:
            query = query.where(columns.source == source)
        if since is not None:
            start = since.astimezone(UTC).isoformat(timespec="milliseconds")
            query = query.where(columns.at >= start)
        with self._engine.connect() as connection:
            rows = connection.execute(query.group_by(*groups).order_by(*groups)).mappings()
            return [_total(row) for row in rows]

    def _insert(self) -> Any:
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        return dialect.insert(ledger_entries)


def _total(row: sa.RowMapping) -> Total:
    values = dict(row)
    # PostgreSQL adds big integers up to a Decimal.
    tokens = {name: int(values[name]) for name in ("prompt_tokens", "completion_tokens")}
    return Total(**{**values, **tokens})
