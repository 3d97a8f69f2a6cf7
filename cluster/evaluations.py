"""Evaluations in SQL: what packages were measured to be, on which data and by which run.

A package never changes, so its results stand beside it. Knows nothing of packages and MLflow;
`registry.py` is the face of it.

    write_evaluation(connection, EvaluationRecord(digest, dataset, "test", {"accuracy": 0.97}, run))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.database import evaluations, now


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of one package."""

    digest: str
    """Of the package."""
    dataset_digest: str
    split: str
    metrics: dict[str, float]
    run_id: str
    """MLflow run with its slices and figures."""
    at: str = field(default_factory=now)


def write_evaluation(connection: Connection, record: EvaluationRecord) -> None:
    """Add one."""
    connection.execute(sa.insert(evaluations).values(asdict(record)))


def read_evaluations(connection: Connection, digest: str) -> list[EvaluationRecord]:
    """The newest of each dataset and split, oldest first."""
    query = sa.select(evaluations).where(evaluations.c.digest == digest)
    rows = connection.execute(query.order_by(evaluations.c.id)).mappings()
    newest = {
        (row["dataset_digest"], row["split"]): EvaluationRecord(
            **{name: value for name, value in row.items() if name != "id"}
        )
        for row in rows
    }
    return sorted(newest.values(), key=lambda record: record.at)
