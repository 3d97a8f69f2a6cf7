"""What a prepared table is, and what was done to it: a part of `dataset.json`.

It knows nothing of how tables are read or cleaned.

    for line in info.lines(): print(line)      # missing cells 3 (age 3): mean imputed
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cluster.config import StrictModel

FEATURES, TARGET, LABEL = "features", "target", "label"
"""Columns of a prepared table: numbers, and a number or a class number."""


class TableInfo(StrictModel):
    """What is particular to a prepared table. Statistics are of the cleaned train split."""

    feature_names: tuple[str, ...]
    target_name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target_mean: float = 0.0
    target_std: float = Field(1.0, gt=0)
    """For regression."""
    missing: Literal["refuse", "drop", "impute_mean", "impute_median"]
    num_missing: dict[str, int] = Field(default_factory=dict)
    """Missing cells by column, over all splits."""
    num_dropped: dict[str, int] = Field(default_factory=dict)
    """Rows left out for a missing cell, by split."""
    outliers: Literal["keep", "drop", "clip"]
    num_outliers: dict[str, int] = Field(default_factory=dict)
    """Training cells beyond the fences, by feature."""
    num_outlier_rows: int = 0
    """Training rows with such a cell."""

    def lines(self) -> Iterator[str]:
        """What a user must know of the cleaning."""
        if self.num_missing:
            yield f"missing cells {_listed(self.num_missing)}: {'; '.join(self._treated())}"
        if self.num_outliers:
            done = {"keep": "kept", "drop": "rows dropped", "clip": "cells clipped"}[self.outliers]
            rows = f"{self.num_outlier_rows} training row" + "s" * (self.num_outlier_rows != 1)
            yield f"outliers in {rows}, {_listed(self.num_outliers)}: {done}"

    def _treated(self) -> Iterator[str]:
        if self.missing.startswith("impute"):
            yield f"{self.missing.removeprefix('impute_')} imputed"
        if self.num_dropped:
            which = "rows" if self.missing == "drop" else "rows without a target"
            by_split = ", ".join(f"{split} {n}" for split, n in self.num_dropped.items())
            yield f"{which} dropped: {by_split}"

    def counts(self) -> dict[str, float]:
        """The same as numbers, for the run's record."""
        return {
            "data/missing_cells": float(sum(self.num_missing.values())),
            "data/dropped_rows": float(sum(self.num_dropped.values())),
            "data/outlier_cells": float(sum(self.num_outliers.values())),
            "data/outlier_rows": float(self.num_outlier_rows),
        }


def _listed(counts: dict[str, int]) -> str:
    """The largest few."""
    largest = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count}" for name, count in largest[:4])
    more = f", {len(largest) - 4} more columns" if len(largest) > 4 else ""
    return f"{sum(counts.values())} ({shown}{more})"
