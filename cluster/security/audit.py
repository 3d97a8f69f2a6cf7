"""The audit log: who did what to what, only ever added to.

AuditLog(open_database(settings.database)).record("ops/key_1", "deploy", "digits/3", {})
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import audit_log, now


class AuditLog:
    """The log in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(self, actor: str, action: str, target: str, detail: dict[str, Any]) -> None:
        """Add one row."""
        row = {"at": now(), "actor": actor, "action": action, "target": target[:256]}
        with self._engine.begin() as connection:
            connection.execute(sa.insert(audit_log).values(**row, detail=detail))
