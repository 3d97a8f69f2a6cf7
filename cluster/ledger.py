"""The ledger: who used how many requests, tokens and seconds of CPU and GPU, and what for.

One table for training and serving alike. An entry's key makes it count once, however often it is
handed in, so whoever is not sure that it was taken hands it in again. What gateways hand in each
second is summed up by months, once it is old. Knows nothing of what is metered.

    ledger = Ledger(open_database(settings.database))
    ledger.record([Entry(key="run/4f1c/1", tenant="local", kind="training", model="pydoc-lm",
                         source="4f1c", cpu_s=120.0)])
    ledger.totals(tenant="local")    # [Total(tenant='local', kind='training', …, cpu_s=120.0, …)]
"""

from __future__ import annotations

import calendar
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from cluster.database import begin_alone, budgets, later, ledger_entries, now

LEDGER_LOCK = 7233543
"""Held by whoever adds to the ledger or counts what a tenant has spent."""

COMPLETION = "completion"
INFERENCE = "inference"
"""Kinds of what the gateway answers: text by language models, tensors by graphs."""

SUMMED_AFTER_S = 30 * 86_400.0
"""How long after its end a month's entries by gateways may be summed up."""


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
    """Rows, of which there are fewer once a month is summed up."""
    cpu_s: float
    gpu_s: float
    prompt_tokens: int
    completion_tokens: int
    num_requests: int
    version: int | None = None
    """Set where totals are by version."""
    source: str | None = None
    """Set where totals are by source."""


@dataclass(frozen=True)
class Month:
    """A calendar month in UTC, and how much of the ledger lies in it."""

    name: str
    """As times begin: 2026-01."""
    num_entries: int = 0

    @property
    def last_moment(self) -> str:
        year, month = map(int, self.name.split("-"))
        return f"{self.name}-{calendar.monthrange(year, month)[1]}T23:59:59.999+00:00"

    @property
    def ended_at_s(self) -> float:
        """In seconds since 1970."""
        return datetime.fromisoformat(self.last_moment).timestamp()


Detail = Literal["version", "source"]

_COUNTS = ("prompt_tokens", "completion_tokens", "num_requests")
# SQLite takes no more than 32,766 values in a statement.
_ROWS_PER_STATEMENT = 500
_UNITS = ("cpu_s", "gpu_s", *_COUNTS)
_SUM = "month/"
"""How the keys of sums begin, and no others."""
_IS_SUMMABLE = sa.and_(
    ledger_entries.c.kind.in_((COMPLETION, INFERENCE)),
    sa.not_(ledger_entries.c.key.startswith(_SUM)),
)
"""What nobody hands in again, once it is old. A job that is taken up again does, however old its
beginning is; a gateway only while it does not know whether its last entries were taken."""
_ROWS_SUMMED_AT_ONCE = 10_000


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
        query = sa.select(*groups, sa.func.count().label("num_entries"), *_sums())
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

    def months_to_sum(self) -> list[Month]:
        """The months that ended a while ago, as far as gateways' entries lie there one by one."""
        month = sa.func.substr(ledger_entries.c.at, 1, 7).label("month")
        is_over = ledger_entries.c.at < later(-SUMMED_AFTER_S)[:7]
        query = sa.select(month, sa.func.count()).where(_IS_SUMMABLE, is_over)
        with self._engine.connect() as connection:
            found = connection.execute(query.group_by("month").order_by("month")).all()
        return [Month(name, num_entries) for name, num_entries in found]

    def sum_up(self, month: str) -> int:
        """Put sums in the place of gateways' entries of a month: one for each tenant, kind, model,
        version and key, dated to the month's last moment. Returns how many entries went."""
        num_gone = 0
        while num := self._sum_some(month):
            num_gone += num
        return num_gone

    def _sum_some(self, month: str) -> int:
        """A transaction's worth: gateways wait for it."""
        columns = ledger_entries.c
        some = (
            sa.select(columns.key)
            .where(_IS_SUMMABLE, _is_in(month))
            .order_by(columns.tenant, columns.at, columns.key)
            .limit(_ROWS_SUMMED_AT_ONCE)
            .correlate(None)
        )
        groups = [columns[name] for name in ("tenant", "kind", "model", "source", "version")]
        with begin_alone(self._engine, LEDGER_LOCK) as connection:
            query = sa.select(*groups, *_sums()).where(columns.key.in_(some)).group_by(*groups)
            rows = connection.execute(query).mappings().all()
            gone = connection.execute(sa.delete(ledger_entries).where(columns.key.in_(some)))
            for row in rows:
                digest = hashlib.sha256(repr([row[group.name] for group in groups]).encode())
                key, at = f"{_SUM}{month}/{digest.hexdigest()}", Month(month).last_moment
                statement = _insert(connection).values(key=key, at=at, **row)
                more = {unit: columns[unit] + statement.excluded[unit] for unit in _UNITS}
                statement = statement.on_conflict_do_update(index_elements=["key"], set_=more)
                connection.execute(statement)
        return gone.rowcount


def add_entries(connection: Connection, entries: Sequence[Entry]) -> int:
    """Add entries within a transaction that holds LEDGER_LOCK; returns how many were new.

    What limited tenants have spent of their month is counted with them.
    """
    new: set[str] = set()
    for start in range(0, len(entries), _ROWS_PER_STATEMENT):
        rows = [asdict(entry) for entry in entries[start : start + _ROWS_PER_STATEMENT]]
        statement = _insert(connection).values(rows).on_conflict_do_nothing()
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
    query = sa.select(tokens).where(columns.tenant == tenant, _is_in(month))
    return int(connection.scalar(query) or 0)


def _is_in(month: str) -> sa.ColumnElement[bool]:
    # Days begin with '-', which sorts below '~'.
    at = ledger_entries.c.at
    return sa.and_(at >= month, at < f"{month}~")


def _sums() -> list[sa.Label[Any]]:
    return [sa.func.sum(ledger_entries.c[unit]).label(unit) for unit in _UNITS]


def _insert(connection: Connection) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(ledger_entries)


def _total(row: sa.RowMapping) -> Total:
    # PostgreSQL adds big integers up to a Decimal.
    return Total(**{**row, **{name: int(row[name]) for name in _COUNTS}})
