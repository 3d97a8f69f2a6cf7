"""What is deployed, as the tables tell it: the release controller writes, the gateways read.

A version goes deploying → warming → parity → champion, or → failed. The champion before it stays
up as standby, for rollback; what is no longer needed is retiring until its application is gone.
Every change is made to a row as it was seen, and refused if the row has changed since.
Knows nothing of Ray and HTTP.

    store = ReleaseStore(open_database(settings.database))
    with store.writing() as tables:
        tables.promote(store.get("digits", 3), actor="ops", reason="ready")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.aliases import ALIASES_LOCK, AliasChange, move_alias, read_alias, read_history
from cluster.database import aliases, begin_alone, deployments, now, routes
from cluster.errors import ConflictError
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
    revision: int = 0
    """Grows with every change."""
    started_at: str | None = None
    """When Serve was asked for the application; None where one that is there is not this row's."""
    requested_by: str = "controller"
    """Who asked for it."""


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
        with self._engine.connect() as connection:
            return _read(connection, name)

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
        with self._engine.connect() as connection:
            return _read_weights(connection, name)

    def champion_history(self, name: str) -> Sequence[AliasChange]:
        """Every move of the champion alias, oldest first."""
        with self._engine.connect() as connection:
            return _read_champion_history(connection, name)

    @contextmanager
    def writing(self) -> Iterator[ReleaseWriter]:
        """One transaction that no other writer runs beside; an error undoes all of it."""
        with begin_alone(self._engine, ALIASES_LOCK) as connection:
            yield ReleaseWriter(connection)


class ReleaseWriter:
    """Reads and changes within one transaction.

    A row to change is passed as it was seen: if it is another one by now, ConflictError is raised.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def deployments(self, name: str | None = None) -> Sequence[Deployment]:
        return _read(self._connection, name)

    def champion_history(self, name: str) -> Sequence[AliasChange]:
        return _read_champion_history(self._connection, name)

    def create(
        self,
        name: str,
        version: int,
        digest: str,
        options: dict[str, Any],
        reason: str,
        *,
        requested_by: str,
    ) -> Deployment:
        """Record that a version is wanted, replacing what was recorded of it."""
        before = [row.revision for row in self.deployments(name) if row.version == version]
        at = now()
        row = Deployment(
            name=name,
            version=version,
            digest=digest,
            application=application_name(name, version),
            state="deploying",
            reason=reason,
            options=options,
            created_at=at,
            updated_at=at,
            revision=before[0] + 1 if before else 0,
            requested_by=requested_by,
        )
        self._connection.execute(sa.delete(deployments).where(_is(name, version)))
        self._connection.execute(sa.insert(deployments).values(asdict(row)))
        return row

    def enter(
        self,
        row: Deployment,
        state: State,
        reason: str,
        *,
        starting: bool = False,
        requested_by: str = "",
    ) -> Deployment:
        """Move a deployment to another state; `starting` where Serve is asked for it now."""
        values: dict[str, Any] = {"state": state, "reason": reason}
        if starting:
            values["started_at"] = now()
        if requested_by:
            values["requested_by"] = requested_by
        return self._change(row, **values)

    def promote(self, row: Deployment, *, actor: str, reason: str) -> Deployment:
        """Give a version all traffic and the champion alias.

        The champion before it stands by for rollback, and what stood by until now retires.
        """
        if row.state in ("failed", "retiring"):
            raise ConflictError(
                f"version {row.version} of '{row.name}' is {row.state}",
                hint=f"deploy it: `heliostat deploy {row.name}/{row.version}`",
            )
        others = [
            other
            for other in self.deployments(row.name)
            if other.state in SERVING and other.version != row.version
        ]
        has_champion = any(other.state == "champion" for other in others)
        for other in others:
            if other.state == "champion":
                shown = f"kept for rollback from version {row.version}"
                self._change(other, state="standby", reason=shown)
            elif has_champion:
                self._change(other, state="retiring", reason="two releases old")
        promoted = self._change(row, state="champion", reason=reason)
        _write_route(self._connection, row.name, {row.version: 1.0})
        self._move_champion(row.name, row.version, actor, reason)
        return promoted

    def take_down(
        self,
        row: Deployment,
        state: Literal["failed", "retiring"],
        reason: str,
        *,
        actor: str,
        successor: Deployment | None = None,
    ) -> None:
        """Take a version's traffic and alias away, and mark its application for removal.

        Args:
            successor: who gets them in its place; without one, nobody has them.
        """
        was_up = state == "retiring" and row.state in SERVING
        started_at = row.started_at if was_up else None
        self._change(row, state=state, reason=reason, started_at=started_at)
        shown = f"version {row.version} {state}: {reason}"
        if successor is not None:
            self.promote(successor, actor=actor, reason=shown)
            return
        weights = _read_weights(self._connection, row.name)
        if row.version in weights:
            remaining = {v: weight for v, weight in weights.items() if v != row.version}
            _write_route(self._connection, row.name, remaining)
        alias = read_alias(self._connection, row.name, CHAMPION)
        if row.state == "champion" and alias is not None and alias.version == row.version:
            self._move_champion(row.name, None, actor, shown)

    def remove(self, row: Deployment) -> None:
        """Forget a deployment whose application is gone."""
        if self._connection.execute(sa.delete(deployments).where(_is_still(row))).rowcount != 1:
            raise _changed(row)

    def _change(self, row: Deployment, **values: Any) -> Deployment:
        changed = replace(row, **values, revision=row.revision + 1, updated_at=now())
        done = self._connection.execute(
            sa.update(deployments).where(_is_still(row)).values(asdict(changed))
        )
        if done.rowcount != 1:
            raise _changed(row)
        return changed

    def _move_champion(self, name: str, version: int | None, actor: str, reason: str) -> None:
        change = AliasChange(name, CHAMPION, None, version, actor, reason, now())
        move_alias(self._connection, change, None)


def _read(connection: Connection, name: str | None) -> list[Deployment]:
    query = sa.select(deployments).order_by(deployments.c.name, deployments.c.version)
    if name is not None:
        query = query.where(deployments.c.name == name)
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def _read_weights(connection: Connection, name: str) -> dict[int, float]:
    query = sa.select(routes.c.weights).where(routes.c.name == name)
    return _parse_weights(connection.scalar(query) or {})


def _read_champion_history(connection: Connection, name: str) -> list[AliasChange]:
    return [change for change in read_history(connection, name) if change.alias == CHAMPION]


def _parse_weights(weights: dict[str, float]) -> dict[int, float]:
    return {int(version): float(weight) for version, weight in weights.items()}


def _is(name: str, version: int) -> sa.ColumnElement[bool]:
    return sa.and_(deployments.c.name == name, deployments.c.version == version)


def _is_still(row: Deployment) -> sa.ColumnElement[bool]:
    seen = (deployments.c.created_at == row.created_at, deployments.c.revision == row.revision)
    return sa.and_(_is(row.name, row.version), *seen)


def _changed(row: Deployment) -> ConflictError:
    return ConflictError(
        f"version {row.version} of '{row.name}' was {row.state} and has changed meanwhile",
        hint=f"look at `heliostat releases status {row.name}` and decide again",
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
