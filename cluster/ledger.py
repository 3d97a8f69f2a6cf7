"""The ledger: who used how many requests, tokens and seconds of CPU and GPU, and what for.

One table for training and serving alike, only ever added to. An entry's key makes it count once,
however often it is handed in, so whoever is not sure that it was taken hands it in again. Knows
nothing of what is metered.

    ledger = Ledger(open_database(settings.database))
    ledger.record([Entry(key="run/4f1c/1", tenant="local", kind="training", model="pydoc-lm",
                         source="4f1c", cpu_s=120.0)])
    ledger.totals(tenant="local")    # [Total(tenant='local', kind='training', …, cpu_s=120.0, …)]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from cluster.database import begin_alone, budgets, ledger_entries, now

LEDGER_LOCK = 7233543
"""Held by whoever adds to the ledger or counts what a tenant has spent."""

COMPLETION = "completion"
INFERENCE = "inference"
"""Kinds of what the gateway answers: text by language models, tensors by graphs."""


@dataclass(frozen=True)
class Entry:
    """What was used, once."""

    key: str
    """Names what is counted; a second entry of the same key is not taken."""
    tenant: str
    kind: str
    """What for: training, completion, inference, …"""
    model: str
    source: str
    """The run, or the API key."""
    cpu_s: float = 0.0
    """CPUs held, times seconds."""
    gpu_s: float = 0.0
    """GPUs held, times seconds."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    version: int | None = None
    """Of the model, where there is one yet."""
    num_requests: int = 0
    """Answers, where the entry is a sum of many."""
    at: str = field(default_factory=now)
    """ISO 8601 in UTC."""


@dataclass(frozen=True)
class Total:
    """The sum over the entries of one tenant, kind and model, and by what else was asked for."""

    tenant: str
    kind: str
    model: str
    num_entries: int
    cpu_s: float
    gpu_s: float
    prompt_tokens: int
    completion_tokens: int
    num_requests: int
    version: int | None = None
    """Set where totals are by version."""
    source: str | None = None
    """Set where totals are by source."""


Detail = Literal["version", "source"]

_COUNTS = ("prompt_tokens", "completion_tokens", "num_requests")
# SQLite takes no more than 32,766 values in a statement.
_ROWS_PER_STATEMENT = 500
_UNITS = ("cpu_s", "gpu_s", *_COUNTS)


class Ledger:
    """The ledger in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(self, entries: Sequence[Entry]) -> int:
        """Add entries, all or none; returns how many were new."""
        if not entries:
            return 0
        with begin_alone(self._engine, LEDGER_LOCK) as connection:
            return add_entries(connection, entries)

    def totals(
        self,
        *,
        tenant: str | None = None,
        source: str | None = None,
        since: datetime | None = None,
        by: Sequence[Detail] = (),
    ) -> list[Total]:
        """Sums by tenant, kind and model, and by what else is named, of the entries that match."""
        columns = ledger_entries.c
        groups = (columns.tenant, columns.kind, columns.model, *(columns[name] for name in by))
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


def add_entries(connection: Connection, entries: Sequence[Entry]) -> int:
    """Add entries within a transaction that holds LEDGER_LOCK; returns how many were new.

    What limited tenants have spent of their month is counted with them.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    new: set[str] = set()
    for start in range(0, len(entries), _ROWS_PER_STATEMENT):
        rows = [asdict(entry) for entry in entries[start : start + _ROWS_PER_STATEMENT]]
        statement = dialect.insert(ledger_entries).values(rows).on_conflict_do_nothing()
        new.update(connection.scalars(statement.returning(ledger_entries.c.key)))
    spent: Counter[tuple[str, str]] = Counter()
    for entry in {entry.key: entry for entry in reversed(entries) if entry.key in new}.values():
        spent[entry.tenant, entry.at[:7]] += entry.prompt_tokens + entry.completion_tokens
    for (tenant, month), tokens in spent.items():
        if tokens:
            connection.execute(
                sa.update(budgets)
                .where(budgets.c.tenant == tenant, budgets.c.month == month)
                .values(month_tokens=budgets.c.month_tokens + tokens)
            )
    return len(new)


def month_tokens(connection: Connection, tenant: str, month: str) -> int:
    """Tokens in a tenant's entries of a month, as in 2026-01; reads them all."""
    columns = ledger_entries.c
    tokens = sa.func.sum(columns.prompt_tokens + columns.completion_tokens)
    # Days begin with '-', which sorts below '~'.
    query = sa.select(tokens).where(
        columns.tenant == tenant, columns.at >= month, columns.at < f"{month}~"
    )
    return int(connection.scalar(query) or 0)


def _total(row: sa.RowMapping) -> Total:
    # PostgreSQL adds big integers up to a Decimal.
    return Total(**{**row, **{name: int(row[name]) for name in _COUNTS}})
