"""The profile of training data that goes into a package, to notice drift later.

profile = data_profile(dataset)     # {'pixels': {'mean': …, 'std': …, 'min': …, 'max': …}, …}
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.data.dataset import Dataset
from jobs.data.rows import Array
from jobs.data.table_info import FEATURES

_MAX_ROWS = 10_000


def data_profile(dataset: Dataset) -> dict[str, Any]:
    """Size and digest of the dataset, and simple statistics of numeric columns."""
    info = dataset.info
    profile: dict[str, Any] = {"dataset": info.name, "num_rows": dict(info.num_rows)}
    if info.text is not None:
        profile["unigram_entropy"] = info.text.unigram_entropy
        profile["num_tokens"] = dict(info.text.num_tokens)
        return profile
    if info.table is not None:
        # The order in which clients send features; objects in a manifest have none.
        profile["feature_names"] = list(info.table.feature_names)
        profile["target_name"] = info.table.target_name
        profile["class_names"] = list(info.class_names)
    rows = dataset.rows("train")
    sample = rows.read(np.arange(min(_MAX_ROWS, len(rows))))
    if info.table is not None:
        sample.update(zip(info.table.feature_names, sample.pop(FEATURES).T, strict=True))
    profile["columns"] = {name: _statistics(values) for name, values in sample.items()}
    return profile


def _statistics(values: Array) -> dict[str, float]:
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
