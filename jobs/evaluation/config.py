"""What to evaluate, and on what: what `jobs.evaluate` reads.

EvaluateConfig(model="digits@candidate", split="test")
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel
from jobs.data.config import DataConfig


class EvaluateConfig(StrictModel):
    """One evaluation of one model version."""

    model: str
    """NAME, NAME@ALIAS or NAME/VERSION."""
    data: DataConfig | None = None
    """None means the dataset that the version was trained on."""
    split: Literal["train", "validation", "test"] = "test"
    batch_size: int = Field(32, ge=1)
    """Rows at a time; no metric depends on it."""
    num_threads: int = Field(2, ge=1, le=256)
    label: str = ""
    """For graphs: the column that holds class numbers, or the numbers to predict; empty means
    `label` or `target`, whichever the data has."""
    output: str = ""
    """For graphs: the model's output that names a class, or gives a number; empty means `label` or
    `prediction`."""
    slice_by: str = ""
    """For graphs: a column, or a feature, by whose values (or the quarters of whose range) the
    metrics are also given."""
    experiment: str = "evaluate"
    """MLflow experiment, for versions that no run of this cluster made; else the run becomes a
    child of the version's own."""
