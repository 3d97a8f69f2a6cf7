"""A service and what it asks of its models: what `jobs.promote` reads.

ServiceConfig(service="digits", model="digits", owner="…", purpose="…", metric="accuracy",
              objective=0.95)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from cluster.config import StrictModel
from jobs.data.config import DataConfig, Name

PromotionMetric = Literal["accuracy", "next_token_accuracy", "loss", "mse", "mae"]
"""Metrics that are means over rows, so that two models can be compared row by row."""


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("expected one line without control characters")
    return value


Line = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_one_line)
]


class BudgetConfig(StrictModel):
    """What a new version may cost."""

    max_regression: float = Field(ge=0)
    """How much worse than the champion it may be, in the metric's unit; a candidate that is worse
    by this much or more passes with probability `alpha` at most."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    max_package_mb: float | None = Field(None, gt=0)
    max_ms_per_row: float | None = Field(None, gt=0)
    """Median over batches of the evaluation, on the machine that runs it."""


class ServiceConfig(StrictModel):
    """What a service is for, who answers for it, and when a version is good enough for it."""

    service: Name
    model: Name
    """The registered name whose versions serve it."""
    owner: Line
    """Whom to ask."""
    purpose: Line
    metric: PromotionMetric
    objective: float
    """What a version must reach: at least this where higher is better, at most this elsewhere."""
    budget: BudgetConfig
    data: DataConfig | None = None
    """None means the dataset that the candidate was trained on."""
    split: Literal["validation", "test"] = "test"
    batch_size: int = Field(32, ge=1)
    num_threads: int = Field(2, ge=1, le=256)
    candidate: str = ""
    """NAME/VERSION or NAME@ALIAS; empty means the newest version of `model`."""
    force: Line | None = None
    """Why to promote whatever the comparison says; recorded."""
    actor: Line = Field("jobs.promote", max_length=128)
    """Who asks, for the alias history."""
    experiment: str = "promote"
    """MLflow experiment."""
