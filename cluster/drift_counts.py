"""What gateways have counted of served data, per version; the release controller adds it up.

Each gateway replica keeps one row per version and writes it anew, so nothing is counted twice. Rows
of replicas that are gone are left out after a while, and removed.

    store = DriftStore(open_database(settings.database))
    store.write("gateway-1", "digits", 3, window.counts)
    store.windows("digits", 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import drift_counts, now
from cluster.statistics.drift import WindowCounts

KEPT_S = 86_400.0
"""For how long a replica's rows count after it last wrote."""


class DriftStore:
    """The `drift_counts` table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def write(self, source: str, name: str, version: int, counts: WindowCounts) -> None:
        """Replace what `source` has said of a version, and remove what is too old to count."""
        mine = sa.and_(
            drift_counts.c.name == name,
            drift_counts.c.version == version,
            drift_counts.c.source == source,
        )
        with self._engine.begin() as connection:
            connection.execute(
                sa.delete(drift_counts).where(
                    sa.or_(mine, drift_counts.c.updated_at < _oldest_kept())
                )
            )
            connection.execute(
                sa.insert(drift_counts).values(
                    name=name,
                    version=version,
                    source=source,
                    counts=counts.to_json(),
                    updated_at=now(),
                )
            )

    def windows(self, name: str, version: int) -> Sequence[WindowCounts]:
        """What every replica has counted of a version."""
        query = sa.select(drift_counts.c.counts).where(
            drift_counts.c.name == name,
            drift_counts.c.version == version,
            drift_counts.c.updated_at >= _oldest_kept(),
        )
        with self._engine.connect() as connection:
            return [WindowCounts.from_json(row.counts) for row in connection.execute(query)]


def _oldest_kept() -> str:
    moment = datetime.now(UTC) - timedelta(seconds=KEPT_S)
    return moment.isoformat(timespec="milliseconds")
