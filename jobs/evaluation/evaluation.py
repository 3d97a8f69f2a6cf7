"""What an evaluation gives: metrics of a split, what they are means of, metrics by slice, figures.

It knows nothing of models.

    evaluation.metrics["accuracy"] == evaluation.row_values["accuracy"].mean()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError, NotFiniteError
from jobs.data.dataset import Dataset
from jobs.data.rows import Array
from jobs.data.table_info import FEATURES, LABEL

Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_MAX_SLICES = 10
_NUM_RANGES = 4


@dataclass(frozen=True)
class Evaluation:
    """One model on one split."""

    metrics: dict[str, float]
    row_values: dict[str, Values]
    """By metric, the values that it is the mean of, in the order of the split's rows."""
    ms_per_row: float
    """Median over batches, processing included."""
    rows_digest: str = ""
    """Of what the rows are to this model: values can be paired where it is the same."""
    slices: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of parts of the split, by what the rows have in common."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Matplotlib figures, by file name."""


def require_finite(what: str, values: Array) -> None:
    """Raises NotFiniteError if a row of `values` holds something that is no number.

    Args:
        what: its name, for the error.
    """
    rows = values.reshape(len(values), -1)
    if values.dtype.kind == "f" and not (is_finite := np.isfinite(rows).all(axis=1)).all():
        row = int(np.flatnonzero(~is_finite)[0])
        raise NotFiniteError(
            f"the model's '{what}' of row {row} is no finite number",
            hint="mend the model, or leave such rows out",
        )


class BatchClock:
    """Times batches of known size; the median is not moved by the first, which loads code."""

    def __init__(self) -> None:
        self._ms_per_row: list[float] = []

    @contextmanager
    def batch(self, num_rows: int) -> Iterator[None]:
        begun_at = time.perf_counter()
        yield
        self._ms_per_row.append((time.perf_counter() - begun_at) * 1e3 / num_rows)

    @property
    def ms_per_row(self) -> float:
        return float(np.median(self._ms_per_row)) if self._ms_per_row else 0.0


def slice_metrics(
    masks: Mapping[str, Mask], measure: Callable[[Mask], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """`measure` of each part of the rows that has any, and how many those are."""
    return {
        name: {"num_rows": float(mask.sum()), **measure(mask)}
        for name, mask in masks.items()
        if mask.any()
    }


def row_slices(dataset: Dataset, split: str, column: str) -> dict[str, Mask]:
    """The rows of each value of a column; of each quarter of its range if it has many values.

    Raises:
        InputError: the dataset has no such column, or it holds no single value per row.
    """
    if not column:
        return {}
    values = _column(dataset, split, column)
    distinct = np.unique(values)
    if len(distinct) <= _MAX_SLICES:
        names = dataset.info.class_names if column == LABEL else ()
        return {
            f"{column}={names[int(value)] if names else format(value, 'g')}": values == value
            for value in distinct
        }
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _NUM_RANGES + 1)))
    last = len(edges) - 2
    ranges = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, last)
    shown = _distinct_texts(edges)
    return {f"{column} from {shown[i]} to {shown[i + 1]}": ranges == i for i in range(last + 1)}


def _distinct_texts(numbers: Array) -> list[str]:
    """Numbers in as few digits as tell them apart."""
    texts: list[str] = []
    for digits in (4, 8, 17):
        texts = [format(float(number), f".{digits}g") for number in numbers]
        if len(set(texts)) == len(texts):
            break
    return texts


def _column(dataset: Dataset, split: str, column: str) -> Array:
    rows = dataset.rows(split)
    columns = rows.read(np.arange(len(rows)))
    features = dataset.info.table.feature_names if dataset.info.table is not None else ()
    if column in features:
        values: Array = columns[FEATURES][:, features.index(column)]
        return values
    plain = [name for name, values in columns.items() if values.ndim == 1]
    if column in plain:
        return columns[column]
    raise InputError(
        f"slice_by names '{column}', and dataset '{dataset.info.name}' has no such column of "
        "single values",
        hint=f"expected one of: {', '.join([*plain, *features]) or '(none)'}",
        param="slice_by",
    )
