"""Evidence for and against a release: sums of observations in [0, 1], which gateways add to.

0 is good and 1 is bad: an error, an answer later than the champion's, a label that differs. Each
phase of a release (`step`) has sums of its own, so that what is compared happened side by side.

    add_evidence(connection, [EvidenceDelta(row.release_id, row.step, "digits", 3,
                                            "candidate", "errors", num=20, total=1.0)])
    read_evidence(connection, row.release_id, row.step)["candidate", "errors"].num
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.database import later, now, release_evidence
from cluster.errors import InputError
from cluster.statistics.sequential import Sample

Arm = Literal["candidate", "champion", "pair"]
"""Who was observed; pair: both, answering the same request."""
Metric = Literal[
    "errors",
    "slow",
    "slow_first_token",
    "slow_token",
    "label_disagreement",
    "score_distance",
    "token_disagreement",
    "logprob_divergence",
]

ARMS: tuple[Arm, ...] = get_args(Arm)
METRICS: tuple[Metric, ...] = get_args(Metric)
_KEPT_S = 60.0


Evidence = Mapping[tuple[Arm, Metric], Sample]
"""What one phase of a release has shown so far."""


@dataclass(frozen=True)
class EvidenceDelta:
    """What a gateway has observed since it last said so."""

    release_id: str
    step: int
    name: str
    version: int
    """Of the candidate, also for the champion's observations."""
    arm: Arm
    metric: Metric
    num: int
    total: float


def add_evidence(connection: Connection, deltas: Iterable[EvidenceDelta]) -> None:
    """Add to the sums; several gateways may do so at once.

    Raises:
        InputError: a delta's observations are not in [0, 1].
    """
    # Everybody in the same order, so that no two wait for each other.
    rows = [_as_row(delta) for delta in sorted(deltas, key=_key)]
    if not rows:
        return
    dialect = importlib.import_module(f"sqlalchemy.dialects.{connection.dialect.name}")
    statement = dialect.insert(release_evidence)
    new = statement.excluded
    added = {
        "num": release_evidence.c.num + new.num,
        "total": release_evidence.c.total + new.total,
        "updated_at": new.updated_at,
    }
    primary = list(release_evidence.primary_key.columns)
    for row in rows:
        connection.execute(
            statement.values(row).on_conflict_do_update(index_elements=primary, set_=added)
        )


def forget_evidence(connection: Connection, name: str) -> None:
    """Remove what a model's earlier releases have shown; the timeline has what came of it."""
    # What a gateway may be adding to at this moment is left for the next time.
    is_old = release_evidence.c.updated_at < later(-_KEPT_S)
    connection.execute(sa.delete(release_evidence).where(release_evidence.c.name == name, is_old))


def read_evidence(
    connection: Connection, release_id: str, step: int
) -> dict[tuple[Arm, Metric], Sample]:
    """The sums of one phase by arm and metric; those that nobody added to are not there."""
    table = release_evidence.c
    query = sa.select(table.arm, table.metric, table.num, table.total).where(
        table.release_id == release_id, table.step == step
    )
    return {(row.arm, row.metric): Sample(row.num, row.total) for row in connection.execute(query)}


def _key(delta: EvidenceDelta) -> tuple[str, int, str, str]:
    return delta.release_id, delta.step, delta.arm, delta.metric


def _as_row(delta: EvidenceDelta) -> dict[str, Any]:
    is_known = delta.arm in ARMS and delta.metric in METRICS
    if not is_known or not (math.isfinite(delta.total) and 0 <= delta.total <= delta.num):
        raise InputError(
            f"evidence on {delta.name}/{delta.version} is not observations in [0, 1]: "
            f"{delta.arm} {delta.metric}, num {delta.num}, total {delta.total}",
            hint="clip each observation to [0, 1] and count it once",
        )
    return {**asdict(delta), "updated_at": now()}
