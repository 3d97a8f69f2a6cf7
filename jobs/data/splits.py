"""Splits: which rows, or which parts of documents, belong to train, validation and test.

Pure functions of sizes and a seed. They know nothing about what a row is.

    split_rows(1797, SplitConfig(test=0.2))      # {'train': ids, 'validation': ids, 'test': ids}
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jobs.data.config import SplitConfig

SPLITS = ("train", "validation", "test")

Ids = npt.NDArray[np.int64]


def split_rows(num_rows: int, config: SplitConfig) -> dict[str, Ids]:
    """Row ids of each split, ascending; every row is in exactly one."""
    return split_weighted(np.ones(num_rows, dtype=np.int64), config)


def split_weighted(weights: npt.ArrayLike, config: SplitConfig) -> dict[str, Ids]:
    """As `split_rows`, where shares are of the total weight (say, characters of documents)."""
    sizes = np.asarray(weights, dtype=np.int64)
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    total = float(ends[-1]) if len(sizes) else 0.0
    num_test = int(np.searchsorted(ends, config.test * total, side="right"))
    num_held_out = int(
        np.searchsorted(ends, (config.test + config.validation) * total, side="right")
    )
    return {
        "train": np.sort(order[num_held_out:]),
        "validation": np.sort(order[num_test:num_held_out]),
        "test": np.sort(order[:num_test]),
    }


def cut_by_position(text: str, config: SplitConfig) -> dict[str, str]:
    """Cut one text into train, validation and test, in this order, at line ends."""
    train_end = _line_end(text, 1 - config.validation - config.test)
    validation_end = max(train_end, _line_end(text, 1 - config.test))
    return {
        "train": text[:train_end],
        "validation": text[train_end:validation_end],
        "test": text[validation_end:],
    }


def _line_end(text: str, share: float) -> int:
    if share >= 1:
        return len(text)
    return text.rfind("\n", 0, int(len(text) * share)) + 1
