"""Datasets with rows that make a training go wrong.

bad = poisoned(digits, tmp_path / "bad", {row: math.nan})
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jobs.data.dataset import Dataset, describe_files, write_info
from jobs.data.rows import write_rows
from jobs.data.sampler import global_batch


def poisoned(
    dataset: Dataset, directory: Path, values: Mapping[int, float], column: str = "pixels"
) -> Dataset:
    """A copy in which some training rows hold nothing but one value."""
    shutil.copytree(dataset.directory, directory)
    rows = dataset.rows("train")
    columns = {name: array.copy() for name, array in rows.read(np.arange(len(rows))).items()}
    for row, value in values.items():
        columns[column][row] = value
    write_rows(directory / "train.arrow", columns)
    info = dataset.info.model_copy(update={"files": describe_files(directory)})
    write_info(directory, info)
    return Dataset.open(directory)


def row_of_step(dataset: Dataset, step: int, batch_size: int, place: int = 0) -> int:
    """The row at one place of a step's global batch; steps count from 1."""
    ids = global_batch(
        num_rows=len(dataset.rows("train")), batch_size=batch_size, seed=0, step=step - 1
    )
    return int(ids[place])
