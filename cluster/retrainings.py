"""Training that drift has led to: what was asked for, why, and how far it has come.

store = RetrainingStore(open_database(settings.database))
row = store.request("digits", 3, "PSI 0.61 of inputs pixels[20]", cool_down_s=86_400)
store.enter(row, "training", "job retrain-digits-4f1c")
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import begin_alone, retrainings
from cluster.release_events import KEPT_S

_LOCK = 7233548

RetrainingState = Literal[
    "requested", "training", "gating", "releasing", "trained", "released", "failed"
]
"""Written down; the job runs; the gate compares; what passed is to be deployed; then one of three
ends. `trained`: there is a new version, and somebody is to decide about it."""
UNDER_WAY: tuple[RetrainingState, ...] = ("requested", "training", "gating", "releasing")


@dataclass(frozen=True)
class Retraining:
    """One row; times are ISO 8601 in UTC."""

    job_id: str
    """Of the training; the gate's is `gate_job_id`."""
    name: str
    version: int
    """The version that drifted."""
    state: RetrainingState
    reason: str
    requested_at: str
    updated_at: str
    candidate: int | None = None
    """The version that the gate decides on; None before there is one."""

    @property
    def gate_job_id(self) -> str:
        return f"{self.job_id}-gate"


class RetrainingStore:
    """The `retrainings` table."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def request(
        self, name: str, version: int, reason: str, *, cool_down_s: float
    ) -> Retraining | None:
        """Write down that a model is to be trained again; None where somebody has just done so.

        What became of it long ago is forgotten.
        """
        with begin_alone(self._engine, _LOCK) as connection:
            since = _text(self._clock() - cool_down_s)
            newer = sa.select(retrainings.c.job_id).where(
                retrainings.c.name == name,
                sa.or_(retrainings.c.requested_at > since, retrainings.c.state.in_(UNDER_WAY)),
            )
            if connection.execute(newer).first() is not None:
                return None
            at = _text(self._clock())
            row = Retraining(
                job_id=f"retrain-{name}-{secrets.token_hex(4)}",
                name=name,
                version=version,
                state="requested",
                reason=reason,
                requested_at=at,
                updated_at=at,
            )
            connection.execute(sa.insert(retrainings).values(vars(row)))
            is_old = retrainings.c.requested_at < _text(self._clock() - KEPT_S)
            connection.execute(sa.delete(retrainings).where(retrainings.c.name == name, is_old))
        return row

    def name_candidate(self, row: Retraining, version: int) -> Retraining | None:
        """Write down which version the gate is to decide on; None where somebody has done so."""
        at = _text(self._clock())
        change = (
            sa.update(retrainings)
            .where(retrainings.c.job_id == row.job_id, retrainings.c.candidate.is_(None))
            .values(candidate=version, updated_at=at)
        )
        with self._engine.begin() as connection:
            if connection.execute(change).rowcount != 1:
                return None
        return replace(row, candidate=version, updated_at=at)

    def enter(self, row: Retraining, state: RetrainingState, reason: str) -> Retraining | None:
        """Move a row on; None where another controller has done so meanwhile."""
        at = _text(self._clock())
        change = (
            sa.update(retrainings)
            .where(retrainings.c.job_id == row.job_id, retrainings.c.state == row.state)
            .values(state=state, reason=reason, updated_at=at)
        )
        with self._engine.begin() as connection:
            if connection.execute(change).rowcount != 1:
                return None
        return replace(row, state=state, reason=reason, updated_at=at)

    def list(self, name: str | None = None) -> Sequence[Retraining]:
        """Every one, or a model's, oldest first."""
        query = sa.select(retrainings).order_by(retrainings.c.requested_at)
        if name is not None:
            query = query.where(retrainings.c.name == name)
        with self._engine.connect() as connection:
            return [Retraining(**row._mapping) for row in connection.execute(query)]

    def seconds_since(self, text: str) -> float:
        """Since a time that a row holds."""
        return self._clock() - datetime.fromisoformat(text).timestamp()


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
