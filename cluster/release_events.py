"""The timeline of releases: each state that a version came to, who or what brought it there, why.

event = ReleaseEvent(now(), "digits", 3, "rel_1", "canary 5 %", "controller", "no worse so far")
record_event(connection, event)
read_events(connection, "digits")[-1].reason
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.database import deployments, later, release_events

KEPT_S = 90 * 86_400.0
"""For how long history is kept of what is over."""


@dataclass(frozen=True)
class ReleaseEvent:
    """One line of the timeline."""

    at: str
    name: str
    version: int
    release_id: str
    """The same for all that happened since the version was asked for."""
    state: str
    """The state it came to; a canary's with its share."""
    actor: str
    reason: str


def record_event(connection: Connection, event: ReleaseEvent) -> None:
    """Add a line."""
    connection.execute(sa.insert(release_events).values(asdict(event)))


def read_events(connection: Connection, name: str, limit: int = 200) -> list[ReleaseEvent]:
    """The newest lines of a model, oldest first."""
    query = sa.select(release_events).where(release_events.c.name == name)
    newest = query.order_by(release_events.c.id.desc()).limit(limit)
    rows = connection.execute(newest).mappings().all()
    return [ReleaseEvent(**{k: v for k, v in row.items() if k != "id"}) for row in rows[::-1]]


def forget_events(connection: Connection, name: str) -> None:
    """Remove a model's older lines of versions that are not deployed any more."""
    table = release_events.c
    deployed = sa.select(deployments.c.version).where(deployments.c.name == name)
    is_over = sa.and_(table.at < later(-KEPT_S), table.version.not_in(deployed))
    connection.execute(sa.delete(release_events).where(table.name == name, is_over))
