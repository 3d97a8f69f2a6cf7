"""Sources of tables and arrays, with a digest of what was read.

It knows nothing about splits or storage.

    read_arrays(SklearnSource(kind="sklearn", dataset="digits"))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.data.config import SklearnSource, TableConfig, TableSource
from jobs.data.table_files import CellTable, read_cells
from jobs.data.tables import Table, make_table


@dataclass(frozen=True)
class Arrays:
    """Columns of equal length (first dimension = row), and what the labels are called."""

    columns: dict[str, npt.NDArray[Any]]
    class_names: tuple[str, ...]
    digest: str


def read_table_file(source: TableSource, config: TableConfig) -> Table:
    """Raises InputError for a file that is missing or does not hold what `source` says."""
    return make_table(
        read_cells(Path(source.path), source.delimiter),
        config,
        target=source.target,
        is_classification=source.task == "classification",
        classes=source.classes,
    )


def read_bundled_table(source: SklearnSource, config: TableConfig) -> Table:
    """One of scikit-learn's tables, in the units it was measured in."""
    bunch = _load_sklearn(source.dataset)
    class_names = getattr(bunch, "target_names", None)
    target = (
        bunch.target.astype(np.float64)
        if class_names is None
        else [str(class_names[i]) for i in bunch.target]
    )
    features = np.asarray(bunch.data, dtype=np.float64)
    cells = CellTable(
        name=source.dataset,
        names=(*(str(name) for name in bunch.feature_names), "target"),
        columns=(*features.T, target),
        digest=_digest([features.tobytes(), bunch.target.tobytes()]),
    )
    return make_table(cells, config, target="target", is_classification=class_names is not None)


def read_arrays(source: SklearnSource) -> Arrays:
    """The images of one of scikit-learn's bundled sets."""
    bunch = _load_sklearn(source.dataset)
    columns: dict[str, npt.NDArray[Any]] = {
        "pixels": bunch.images.astype(np.float32),
        "label": bunch.target.astype(np.int64),
    }
    parts = [name.encode() + array.tobytes() for name, array in columns.items()]
    return Arrays(columns, tuple(str(name) for name in bunch.target_names), _digest(parts))


def _load_sklearn(dataset: str) -> Any:
    from sklearn import datasets

    # As published: scaling it is the model package's task.
    options = {"scaled": False} if dataset == "diabetes" else {}
    return getattr(datasets, f"load_{dataset}")(**options)


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        # Each part's own digest, so that moving a boundary changes the total.
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
