"""Where gateway replicas hand in what was used and lease what may be: one transaction for both.

So what is in the ledger and what is still held never overlap, and a replica that dies takes with it
only what it had not handed in.

    store = LeaseStore(open_database(settings.database))
    leases = store.exchange("gateway-1", entries, {"acme": Ask(wants={"requests": 10})})
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.database import begin_alone, budgets, tenants
from cluster.ledger import LEDGER_LOCK, Entry, add_entries, month_tokens
from cluster.security.api_keys import read_limits
from cluster.security.limits import Ask, Budget, Holdings, Lease, TenantLimits, decide, month_of


class LeaseStore:
    """The budgets and the ledger in one database."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def exchange(
        self, holder: str, entries: Sequence[Entry], asks: Mapping[str, Ask]
    ) -> dict[str, Lease]:
        """Record entries and answer what a replica asks of each tenant's budget.

        An entry that is handed in again counts once. Tenants that are not there get no answer.
        """
        with begin_alone(self._engine, LEDGER_LOCK) as connection:
            now_s = self._clock()
            add_entries(connection, entries)
            limits = _read_limits(connection, asks)
            leases = {}
            for tenant in limits:
                budget, is_new = _read_budget(connection, tenant, month_of(now_s))
                budget, leases[tenant] = decide(
                    budget, limits[tenant], asks[tenant], holder=holder, now_s=now_s
                )
                _write_budget(connection, tenant, budget, is_new)
            return leases


def _read_limits(connection: Connection, asks: Mapping[str, Ask]) -> dict[str, TenantLimits]:
    if not asks:
        return {}
    rows = connection.execute(sa.select(tenants).where(tenants.c.name.in_(list(asks))))
    return {row.name: read_limits(row) for row in rows}


def _read_budget(connection: Connection, tenant: str, month: str) -> tuple[Budget, bool]:
    """A tenant's budget in this month, and whether it has no row yet."""
    query = sa.select(budgets).where(budgets.c.tenant == tenant)
    row = connection.execute(query).one_or_none()
    if row is None:
        return Budget(month=month, month_tokens=month_tokens(connection, tenant, month)), True
    spent = row.month_tokens
    if row.month != month:
        spent = month_tokens(connection, tenant, month)
    slots = {
        rate: {int(slot): amount for slot, amount in found.items()}
        for rate, found in row.state["slots"].items()
    }
    holders = {name: Holdings(**found) for name, found in row.state["holders"].items()}
    return Budget(slots, month, spent, holders), False


def _write_budget(connection: Connection, tenant: str, budget: Budget, is_new: bool) -> None:
    values = asdict(budget)
    state = {"slots": values.pop("slots"), "holders": values.pop("holders")}
    if is_new:
        connection.execute(sa.insert(budgets).values(tenant=tenant, state=state, **values))
        return
    connection.execute(
        sa.update(budgets).where(budgets.c.tenant == tenant).values(state=state, **values)
    )
