"""The profile of training data that goes into a package, to notice drift later.

profile = data_profile(dataset)     # {'pixels': {'mean': …, 'std': …, 'min': …, 'max': …}, …}
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.data.dataset import Dataset

_MAX_ROWS = 10_000


def data_profile(dataset: Dataset) -> dict[str, Any]:
    """Size and digest of the dataset, and simple statistics of numeric columns."""
    info = dataset.info
    profile: dict[str, Any] = {"dataset": info.name, "num_rows": dict(info.num_rows)}
    if info.text is not None:
        profile["unigram_entropy"] = info.text.unigram_entropy
        profile["num_tokens"] = dict(info.text.num_tokens)
        return profile
    rows = dataset.rows("train")
    sample = rows.read(np.arange(min(_MAX_ROWS, len(rows))))
    profile["columns"] = {
        name: {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values.min()),
            "max": float(values.max()),
        }
        for name, values in sample.items()
    }
    return profile
