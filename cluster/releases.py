"""What is deployed, as the tables tell it: the release controller writes, the gateways read.

A version goes deploying → warming → parity → shadow → canary → champion, or → rolled back or
failed; docs/releases.md draws it. The champion before it stays up as standby, for rollback; what is
no longer needed is retiring until its application is gone, and retired if users had notice of that.
Traffic follows from the states: each change of a row writes the routes that go with it.
Every change is made to a row as it was seen, and refused if the row has changed since.
Knows nothing of Ray and HTTP.

    store = ReleaseStore(open_database(settings.database))
    with store.writing() as tables:
        tables.promote(store.get("digits", 3), actor="ops", reason="ready")
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.aliases import ALIASES_LOCK, AliasChange
from cluster.database import aliases, begin_alone, deployments, read_one_moment
from cluster.deployments import (
    COMPARED,
    CONTROLLER,
    OVER,
    SERVING,
    STARTING,
    Deployment,
    RoutingSnapshot,
    State,
    Strategy,
    application_name,
    weights_of,
)
from cluster.errors import first_line
from cluster.release_events import ReleaseEvent, read_events
from cluster.release_evidence import Evidence, EvidenceDelta, add_evidence, read_evidence
from cluster.release_writer import (
    ReleaseWriter,
    read_champion_history,
    read_deployments,
    read_weights,
)

logger = logging.getLogger(__name__)

__all__ = [
    "COMPARED",
    "CONTROLLER",
    "OVER",
    "SERVING",
    "STARTING",
    "Deployment",
    "ReleaseStore",
    "ReleaseWriter",
    "RoutingSnapshot",
    "State",
    "Strategy",
    "application_name",
]


class ReleaseStore:
    """The `deployments` and `routes` tables."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def deployments(self, name: str | None = None) -> Sequence[Deployment]:
        """Every deployment, by name and version."""
        with self._engine.connect() as connection:
            return read_deployments(connection, name)

    def get(self, name: str, version: int) -> Deployment | None:
        found = [row for row in self.deployments(name) if row.version == version]
        return found[0] if found else None

    def snapshot(self) -> RoutingSnapshot:
        """Everything that routing depends on, at one moment."""
        states = deployments.c.state
        gone = sa.and_(states.in_(("retiring", "retired")), deployments.c.sunset_at.is_not(None))
        query = sa.select(deployments).where(sa.or_(states.in_(SERVING), gone))
        with self._engine.connect() as connection:
            read_one_moment(connection)
            rows = [Deployment(**row._mapping) for row in connection.execute(query)]
            weights = read_weights(connection)
            pointers = connection.execute(sa.select(aliases)).all()
        serving = tuple(row for row in rows if row.state in SERVING)
        return RoutingSnapshot(
            serving=serving,
            weights=_usable(weights, _weights_by_name(serving)),
            aliases={(row.name, row.alias): row.version for row in pointers},
            shadows={
                row.name: (row.version, row.mirror_share)
                for row in serving
                if row.state in COMPARED and row.mirror_share > 0
            },
            retired=tuple(row for row in rows if row.state not in SERVING),
        )

    def weights(self, name: str) -> dict[int, float]:
        """Shares of traffic by version; empty where nothing is routed."""
        with self._engine.connect() as connection:
            return read_weights(connection, name).get(name) or {}

    def misrouted(self) -> list[str]:
        """Names whose weights somebody else has changed: they do not follow from the states."""
        with self._engine.connect() as connection:
            read_one_moment(connection)
            stored = read_weights(connection)
            expected = _weights_by_name(read_deployments(connection, None))
        names = sorted(stored.keys() | expected.keys())
        return [name for name in names if stored.get(name, {}) != expected.get(name, {})]

    def champion_history(self, name: str) -> Sequence[AliasChange]:
        """Every move of the champion alias, oldest first."""
        with self._engine.connect() as connection:
            return read_champion_history(connection, name)

    def events(self, name: str) -> Sequence[ReleaseEvent]:
        """The newest part of a model's timeline, oldest first."""
        with self._engine.connect() as connection:
            return read_events(connection, name)

    def add_evidence(self, deltas: Iterable[EvidenceDelta]) -> None:
        """Add what was observed; several gateways may do so at once.

        Whoever sees an error may hand the same in again. A commit whose reply was lost is none:
        observations that are missing speak for nobody, those that count twice might.

        Raises:
            InputError: a delta's observations are not in [0, 1].
        """
        with self._engine.connect() as connection:
            add_evidence(connection, deltas)
            try:
                connection.commit()
            except sa.exc.DBAPIError as error:
                logger.warning("evidence may be lost, its commit failed: %s", first_line(error))

    def evidence(self, row: Deployment) -> Evidence:
        """What the phase that a release is in has shown so far."""
        with self._engine.connect() as connection:
            return read_evidence(connection, row.release_id, row.step)

    @contextmanager
    def writing(self) -> Iterator[ReleaseWriter]:
        """One transaction that no other writer runs beside; an error undoes all of it."""
        with begin_alone(self._engine, ALIASES_LOCK) as connection:
            yield ReleaseWriter(connection)


def _weights_by_name(rows: Iterable[Deployment]) -> dict[str, dict[int, float]]:
    """As they follow from the states."""
    by_name: dict[str, list[Deployment]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return {name: weights_of(found) for name, found in by_name.items()}


def _usable(
    stored: dict[str, dict[int, float] | None], expected: dict[str, dict[int, float]]
) -> dict[str, dict[int, float]]:
    """Weights as they are stored, where they name the versions that they must; the controller,
    which sets others right, may be away."""
    names = stored.keys() | expected.keys()
    by_name = ((name, stored.get(name), expected.get(name, {})) for name in names)
    return {
        name: found if found is not None and found.keys() == wanted.keys() else wanted
        for name, found, wanted in by_name
    }
