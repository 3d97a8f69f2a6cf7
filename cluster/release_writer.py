"""Changes to what is deployed, within one transaction; `releases.py` opens it.

Every change is made to a row as it was seen, is a line of the timeline, and brings the traffic that
follows from the states.

    with store.writing() as tables:
        tables.promote(row, actor="ops", reason="ready")
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.aliases import AliasChange, move_alias, read_alias, read_history
from cluster.database import deployments, later, now, routes
from cluster.deployments import (
    COMPARED,
    CONTROLLER,
    OVER,
    SERVING,
    STARTING,
    Deployment,
    State,
    Strategy,
    application_name,
    weights_of,
)
from cluster.errors import ConflictError
from cluster.model_ref import CHAMPION
from cluster.release_events import KEPT_S, ReleaseEvent, forget_events, record_event
from cluster.release_evidence import forget_evidence


class ReleaseWriter:
    """Reads and changes within one transaction.

    A row to change is passed as it was seen: if it is another one by now, ConflictError is raised.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def deployments(self, name: str | None = None) -> Sequence[Deployment]:
        return read_deployments(self.connection, name)

    def champion_history(self, name: str) -> Sequence[AliasChange]:
        return read_champion_history(self.connection, name)

    def create(
        self,
        name: str,
        version: int,
        digest: str,
        options: dict[str, Any],
        reason: str,
        *,
        requested_by: str,
        strategy: Strategy = "direct",
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
            release_id=_new_release_id(),
            strategy=strategy,
        )
        self._forget_what_is_over(name)
        self.connection.execute(sa.delete(deployments).where(_is(name, version)))
        self.connection.execute(sa.insert(deployments).values(asdict(row)))
        self._record(row, requested_by)
        return row

    def enter(
        self, row: Deployment, state: State, reason: str, *, starting: bool = False
    ) -> Deployment:
        """Move a deployment to another state; `starting` where Serve is asked for it now."""
        values: dict[str, Any] = {"state": state, "reason": reason}
        if starting:
            values["started_at"] = now()
        return self._change(row, CONTROLLER, **values)

    def ask_again(
        self,
        row: Deployment,
        state: Literal["deploying", "standby"],
        options: dict[str, Any],
        reason: str,
        *,
        actor: str,
        strategy: Strategy,
    ) -> Deployment:
        """Begin a release of a version whose replicas are still up."""
        self._forget_what_is_over(row.name)
        return self._change(
            row,
            actor,
            state=state,
            options=options,
            reason=reason,
            started_at=now() if state == "deploying" else row.started_at,
            requested_by=actor,
            release_id=_new_release_id(),
            strategy=strategy,
            step=0,
            is_paused=False,
            sunset_at=None,
        )

    def compare(
        self,
        row: Deployment,
        state: Literal["shadow", "canary"],
        reason: str,
        *,
        mirror_share: float,
        share: float = 0.0,
    ) -> Deployment:
        """Begin the next phase beside the champion, with evidence of its own."""
        return self._change(
            row,
            CONTROLLER,
            state=state,
            reason=reason,
            step=row.step + 1,
            share=share,
            mirror_share=mirror_share,
        )

    def set_paused(
        self, row: Deployment, is_paused: bool, reason: str, *, actor: str
    ) -> Deployment:
        """Hold a release where it is, or let it go on."""
        return self._change(row, actor, is_paused=is_paused, reason=reason)

    def set_sunset(
        self, row: Deployment, sunset_at: str | None, reason: str, *, actor: str
    ) -> Deployment:
        """Say when a version ends; None takes the notice back."""
        return self._change(row, actor, sunset_at=sunset_at, reason=reason)

    def set_options(self, row: Deployment, options: dict[str, Any], *, actor: str) -> Deployment:
        """Take other options, of those that its replicas need not know."""
        return row if row.options == options else self._change(row, actor, options=options)

    def promote(self, row: Deployment, *, actor: str, reason: str) -> Deployment:
        """Give a version all traffic and the champion alias.

        The champion before it stands by for rollback, and what stood by until now retires, unless
        its users were promised more time. What was compared with that champion is rolled back.
        """
        if row.state in (*OVER, "retiring"):
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
                self._change(other, actor, state="standby", reason=shown)
            elif other.state in COMPARED:
                shown = f"version {row.version} became champion meanwhile"
                self._change(other, actor, state="rolled_back", reason=shown, started_at=None)
            elif has_champion and other.sunset_at is None:
                self._change(other, actor, state="retiring", reason="two releases old")
        promoted = self._change(row, actor, state="champion", reason=reason)
        self._move_champion(row.name, row.version, actor, reason)
        return promoted

    def take_down(
        self,
        row: Deployment,
        state: Literal["rolled_back", "failed", "retiring"],
        reason: str,
        *,
        actor: str,
        successor: Deployment | None = None,
    ) -> Deployment:
        """Take a version's traffic and alias away, and mark its application for removal.

        Args:
            successor: who gets them in its place; without one, nobody has them.
        """
        was_up = state == "retiring" and row.state in SERVING
        started_at = row.started_at if was_up else None
        changed = self._change(row, actor, state=state, reason=reason, started_at=started_at)
        shown = f"version {row.version} {state}: {reason}"
        if successor is not None:
            self.promote(successor, actor=actor, reason=shown)
            return changed
        alias = read_alias(self.connection, row.name, CHAMPION)
        if row.state == "champion" and alias is not None and alias.version == row.version:
            self._move_champion(row.name, None, actor, shown)
        return changed

    def remove(self, row: Deployment) -> None:
        """Forget a deployment whose application is gone."""
        if self.connection.execute(sa.delete(deployments).where(_is_still(row))).rowcount != 1:
            raise _changed(row)

    def _forget_what_is_over(self, name: str) -> None:
        """What earlier releases have shown; of long ago also how they went."""
        forget_evidence(self.connection, name)
        has_ended = deployments.c.state.in_(("rolled_back", "failed"))
        is_old = sa.and_(has_ended, deployments.c.updated_at < later(-KEPT_S))
        self.connection.execute(sa.delete(deployments).where(deployments.c.name == name, is_old))
        forget_events(self.connection, name)

    def reroute(self, name: str) -> None:
        """Make the weights those that follow from the states."""
        weights = weights_of(self.deployments(name))
        if weights != read_weights(self.connection, name).get(name, {}):
            _write_route(self.connection, name, weights)

    def _change(self, row: Deployment, actor: str, **values: Any) -> Deployment:
        changed = replace(row, **values, revision=row.revision + 1, updated_at=now())
        noticed_at = (row.noticed_at or changed.updated_at) if changed.sunset_at else None
        changed = replace(changed, noticed_at=noticed_at)
        if changed.state not in COMPARED:
            changed = replace(changed, share=0.0, mirror_share=0.0)
        if changed.state not in (*STARTING, *COMPARED):
            changed = replace(changed, is_paused=False)
        done = self.connection.execute(
            sa.update(deployments).where(_is_still(row)).values(asdict(changed))
        )
        if done.rowcount != 1:
            raise _changed(row)
        if (changed.stage, changed.step, changed.sunset_at) != (row.stage, row.step, row.sunset_at):
            self._record(changed, actor)
        self.reroute(row.name)
        return changed

    def _record(self, row: Deployment, actor: str) -> None:
        event = ReleaseEvent(
            row.updated_at, row.name, row.version, row.release_id, row.stage, actor, row.reason
        )
        record_event(self.connection, event)

    def _move_champion(self, name: str, version: int | None, actor: str, reason: str) -> None:
        change = AliasChange(name, CHAMPION, None, version, actor, reason, now())
        move_alias(self.connection, change, None)


def read_deployments(connection: Connection, name: str | None) -> list[Deployment]:
    query = sa.select(deployments).order_by(deployments.c.name, deployments.c.version)
    if name is not None:
        query = query.where(deployments.c.name == name)
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def read_weights(
    connection: Connection, name: str | None = None
) -> dict[str, dict[int, float] | None]:
    """Every model's by name, or one's; None where somebody else has written what are no weights."""
    # As text: else one that is no JSON would keep the others from being read.
    query = sa.select(routes.c.name, sa.type_coerce(routes.c.weights, sa.Text))
    if name is not None:
        query = query.where(routes.c.name == name)
    return {name: _parse_weights(weights) for name, weights in connection.execute(query)}


def read_champion_history(connection: Connection, name: str) -> list[AliasChange]:
    return [change for change in read_history(connection, name) if change.alias == CHAMPION]


def _parse_weights(stored: Any) -> dict[int, float] | None:
    try:
        # PostgreSQL's driver has read it already.
        weights = json.loads(stored) if isinstance(stored, str) else stored
        return {int(version): float(weight) for version, weight in weights.items()}
    except (AttributeError, TypeError, ValueError):
        return None


def _new_release_id() -> str:
    return f"rel_{secrets.token_hex(8)}"


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
