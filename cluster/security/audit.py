"""The audit log: who did what to what, only ever added to.

log = AuditLog(open_database(settings.database))
log.record("ops/key_1", "deploy", "digits/3", {})
log.list(action="deploy")        # [Act(at=…, actor='ops/key_1', action='deploy', …)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import audit_log, now


@dataclass(frozen=True)
class Act:
    """One row; the time is ISO 8601 in UTC."""

    at: str
    actor: str
    action: str
    target: str
    detail: dict[str, Any]


class AuditLog:
    """The log in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(self, actor: str, action: str, target: str, detail: dict[str, Any]) -> None:
        """Add one row."""
        row = {"at": now(), "actor": actor, "action": action, "target": target[:256]}
        with self._engine.begin() as connection:
            connection.execute(sa.insert(audit_log).values(**row, detail=detail))

    def list(
        self, *, action: str | None = None, since: datetime | None = None, last: int = 100
    ) -> Sequence[Act]:
        """The newest `last` acts, oldest first.

        Args:
            action: only this one, or all that begin with it and a dot.
        """
        columns = audit_log.c
        query = sa.select(audit_log).order_by(columns.id.desc()).limit(last)
        if action is not None:
            kind = columns.action.startswith(f"{action}.", autoescape=True)
            query = query.where(sa.or_(columns.action == action, kind))
        if since is not None:
            start = since.astimezone(UTC).isoformat(timespec="milliseconds")
            query = query.where(columns.at >= start)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [
            Act(row.at, row.actor, row.action, row.target, row.detail) for row in reversed(rows)
        ]
