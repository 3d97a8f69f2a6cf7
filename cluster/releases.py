"""What is deployed, as the tables tell it: the release controller writes, the gateways read.

A version goes deploying → warming → parity → champion, or → failed. The champion before it stays
up as standby, for rollback; what is no longer needed is retiring until its application is gone.
Knows nothing of Ray and HTTP.

    store = ReleaseStore(open_database(settings.database))
    store.deployments()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.aliases import AliasChange, move_alias, read_history
from cluster.database import aliases, deployments, now, routes
from cluster.model_ref import CHAMPION

State = Literal["deploying", "warming", "parity", "champion", "standby", "failed", "retiring"]

STARTING: tuple[State, ...] = ("deploying", "warming", "parity")
"""On its way to champion: not up yet, building its replicas, answering its golden inputs."""
SERVING: tuple[State, ...] = ("champion", "standby")
"""Ready to answer whoever asks for this version."""


@dataclass(frozen=True)
class Deployment:
    """One served version of a model."""

    name: str
    version: int
    digest: str
    application: str
    """Name of its Serve application."""
    state: State
    reason: str
    """Why it is in this state, in one line."""
    options: dict[str, Any]
    created_at: str
    updated_at: str


@dataclass(frozen=True)
class RoutingSnapshot:
    """What gateways need, read in one transaction."""

    serving: tuple[Deployment, ...]
    weights: dict[str, dict[int, float]]
    """Shares of a name's traffic by version."""
    aliases: dict[tuple[str, str], int]


def application_name(name: str, version: int) -> str:
    return f"{name}.v{version}"


class ReleaseStore:
    """The `deployments` and `routes` tables."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def deployments(self, name: str | None = None) -> Sequence[Deployment]:
        """Every deployment, by name and version."""
        query = sa.select(deployments).order_by(deployments.c.name, deployments.c.version)
        if name is not None:
            query = query.where(deployments.c.name == name)
        with self._engine.connect() as connection:
            return [Deployment(**row._mapping) for row in connection.execute(query)]

    def get(self, name: str, version: int) -> Deployment | None:
        found = [row for row in self.deployments(name) if row.version == version]
        return found[0] if found else None

    def snapshot(self) -> RoutingSnapshot:
        """Everything that routing depends on, at one moment."""
        ready = sa.select(deployments).where(deployments.c.state.in_(SERVING))
        with self._engine.connect() as connection:
            serving = [Deployment(**row._mapping) for row in connection.execute(ready)]
            weights = connection.execute(sa.select(routes.c.name, routes.c.weights)).all()
            pointers = connection.execute(sa.select(aliases)).all()
        return RoutingSnapshot(
            serving=tuple(serving),
            weights={row.name: _parse_weights(row.weights) for row in weights},
            aliases={(row.name, row.alias): row.version for row in pointers},
        )

    def weights(self, name: str) -> dict[int, float]:
        """Shares of traffic by version; empty where nothing is routed."""
        query = sa.select(routes.c.weights).where(routes.c.name == name)
        with self._engine.connect() as connection:
            return _parse_weights(connection.scalar(query) or {})

    def champion_history(self, name: str) -> Sequence[AliasChange]:
        """Every move of the champion alias, oldest first."""
        with self._engine.connect() as connection:
            return [c for c in read_history(connection, name) if c.alias == CHAMPION]

    def request(
        self, name: str, version: int, digest: str, options: dict[str, Any], reason: str
    ) -> Deployment:
        """Record that a version is wanted, replacing what was recorded of it."""
        row = Deployment(
            name=name,
            version=version,
            digest=digest,
            application=application_name(name, version),
            state="deploying",
            reason=reason,
            options=options,
            created_at=now(),
            updated_at=now(),
        )
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deployments).where(_is(name, version)))
            connection.execute(sa.insert(deployments).values(**row.__dict__))
        return row

    def set_state(self, name: str, version: int, state: State, reason: str) -> None:
        with self._engine.begin() as connection:
            _set_state(connection, name, version, state, reason)

    def promote(self, name: str, version: int, *, actor: str, reason: str) -> None:
        """Give a version all traffic and the champion alias, in one transaction.

        The champion before it stands by for rollback, and what stood by until now retires.
        """
        change = AliasChange(name, CHAMPION, None, version, actor, reason, now())
        with self._engine.begin() as connection:
            others = _others_serving(connection, name, version)
            has_champion = any(row.state == "champion" for row in others)
            for row in others:
                if row.state == "champion":
                    shown = f"kept for rollback from version {version}"
                    _set_state(connection, name, row.version, "standby", shown)
                elif has_champion:
                    _set_state(connection, name, row.version, "retiring", "two releases old")
            _set_state(connection, name, version, "champion", reason)
            _write_route(connection, name, {version: 1.0})
            move_alias(connection, change, None)

    def retire(self, name: str, version: int, reason: str) -> None:
        """Take a version's traffic away and mark its application for removal."""
        weights = self.weights(name)
        remaining = {v: weight for v, weight in weights.items() if v != version}
        with self._engine.begin() as connection:
            _set_state(connection, name, version, "retiring", reason)
            if version in weights:
                _write_route(connection, name, remaining)

    def fail(self, name: str, version: int, reason: str) -> None:
        """Mark a version as failed, without traffic."""
        self.retire(name, version, reason)
        self.set_state(name, version, "failed", reason)

    def remove(self, name: str, version: int) -> None:
        """Forget a deployment whose application is gone."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deployments).where(_is(name, version)))


def _others_serving(connection: Connection, name: str, version: int) -> Sequence[Deployment]:
    query = sa.select(deployments).where(
        deployments.c.name == name,
        deployments.c.version != version,
        deployments.c.state.in_(SERVING),
    )
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def _parse_weights(weights: dict[str, float]) -> dict[int, float]:
    return {int(version): float(weight) for version, weight in weights.items()}


def _is(name: str, version: int) -> sa.ColumnElement[bool]:
    return sa.and_(deployments.c.name == name, deployments.c.version == version)


def _set_state(connection: Connection, name: str, version: int, state: State, reason: str) -> None:
    connection.execute(
        sa.update(deployments)
        .where(_is(name, version))
        .values(state=state, reason=reason, updated_at=now())
    )


def _write_route(connection: Connection, name: str, weights: dict[int, float]) -> None:
    """Replace a name's weights; a row without weights stays, to keep its revision growing."""
    values = {
        "weights": {str(version): weight for version, weight in weights.items()},
        "updated_at": now(),
    }
    updated = connection.execute(
        sa.update(routes)
        .where(routes.c.name == name)
        .values(revision=routes.c.revision + 1, **values)
    )
    if updated.rowcount == 0:
        connection.execute(sa.insert(routes).values(name=name, revision=1, **values))
