"""Memory-mapped Arrow rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.data.rows import Column, Rows, RowWriter, rows_per_batch, write_rows

COLUMNS = {"image": Column("float32", (2, 3)), "label": Column("int64", ())}
ROWS_PER_BATCH = rows_per_batch(COLUMNS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    num_rows = 2 * ROWS_PER_BATCH + 17
    columns = {
        "image": np.arange(num_rows * 6, dtype=np.float32).reshape(num_rows, 2, 3),
        "label": np.arange(num_rows, dtype=np.int64),
    }
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    write_rows(path, columns)
    return path, columns


def test_rows_come_back_in_any_order_across_batches(
    written: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, columns = written
    rows = Rows.open(path)
    ids = np.array([2 * ROWS_PER_BATCH + 16, 0, ROWS_PER_BATCH, 3, 3])
    found = rows.read(ids)
    assert len(rows) == len(columns["label"])
    for name, values in columns.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values[ids])


def test_reading_a_row_allocates_no_more_than_the_row(
    written: tuple[Path, dict[str, np.ndarray]],
) -> None:
    rows = Rows.open(written[0])
    before = pa.total_allocated_bytes()
    rows.read(np.array([5]))
    assert pa.total_allocated_bytes() == before


def test_an_empty_split_can_be_written_and_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.arrow", {"tokens": np.zeros((0, 9), np.uint16)})
    rows = Rows.open(tmp_path / "test.arrow")
    assert len(rows) == 0
    assert rows.read(np.zeros(0, np.int64))["tokens"].shape == (0, 9)


def test_rows_may_be_written_in_pieces_of_any_size(
    written: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, columns = written
    pieces = tmp_path / "pieces.arrow"
    with RowWriter.open(pieces, COLUMNS) as writer:
        for start, end in itertools.pairwise([0, 1, 1, 700, 2000, len(columns["label"])]):
            writer.add({name: values[start:end] for name, values in columns.items()})
    assert writer.num_rows == len(columns["label"])
    assert pieces.read_bytes() == path.read_bytes()


def test_batches_of_long_rows_stay_small() -> None:
    assert rows_per_batch({"tokens": Column("uint32", (131_073,))}) == 63
