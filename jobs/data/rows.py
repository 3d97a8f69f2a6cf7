"""Rows: Arrow IPC files of fixed-shape columns, written in batches and read by memory map.

A row is found by its number without reading those before it, so a step can ask for any rows. It
knows nothing about what the columns mean.

    write_rows(path, {"tokens": array})          # array[row, ...]
    rows = Rows.open(path)
    rows.read(np.array([7, 3]))["tokens"]        # shape (2, ...)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]

_SHAPES = b"shapes"
ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Column:
    """A column's element type (numpy's name) and the shape of one row."""

    dtype: str
    shape: tuple[int, ...]


def write_rows(path: Path, columns: dict[str, Array]) -> int:
    """Write columns of equal length; returns the number of rows."""
    (num_rows,) = {len(array) for array in columns.values()}
    starts = range(0, num_rows, ROWS_PER_BATCH)
    batches = (
        {name: array[start : start + ROWS_PER_BATCH] for name, array in columns.items()}
        for start in starts
    )
    specs = {
        name: Column(str(array.dtype), tuple(array.shape[1:])) for name, array in columns.items()
    }
    write_batches(path, specs, batches)
    return num_rows


def write_batches(
    path: Path, columns: dict[str, Column], batches: Iterable[dict[str, Array]]
) -> None:
    """Write batch after batch; all but the last must have `ROWS_PER_BATCH` rows."""
    schema = _schema(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            arrays = [_to_arrow(batch[name], schema.field(name).type) for name in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _schema(columns: dict[str, Column]) -> Any:
    fields = [
        pa.field(
            name,
            pa.list_(
                pa.from_numpy_dtype(np.dtype(column.dtype)),
                int(np.prod(column.shape, dtype=np.int64)),
            ),
        )
        for name, column in columns.items()
    ]
    shapes = {name: list(column.shape) for name, column in columns.items()}
    return pa.schema(fields, metadata={_SHAPES: json.dumps(shapes).encode()})


def _to_arrow(array: Array, arrow_type: Any) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=arrow_type)


class Rows:
    """The rows of one file, mapped into memory and copied only where asked for."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._reader = reader
        shapes = json.loads(reader.schema.metadata[_SHAPES])
        self.columns = {
            field.name: Column(
                str(np.dtype(field.type.value_type.to_pandas_dtype())),
                tuple(shapes[field.name]),
            )
            for field in reader.schema
        }

    @classmethod
    def open(cls, path: Path) -> Rows:
        return cls(path, pa.ipc.open_file(pa.memory_map(str(path))))

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def read(self, ids: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Copy the rows `ids`, in that order, one array per column."""
        batch_ids, offsets = np.divmod(ids, ROWS_PER_BATCH)
        out = {
            name: np.empty((len(ids), *column.shape), dtype=column.dtype)
            for name, column in self.columns.items()
        }
        for batch_id in np.unique(batch_ids):
            here = batch_ids == batch_id
            for name, column in self.columns.items():
                view = self._view(int(batch_id), name, column)
                out[name][here] = view[offsets[here]]
        return out

    def _view(self, batch_id: int, name: str, column: Column) -> Array:
        values = self._batches[batch_id].column(name).flatten()
        view: Array = values.to_numpy(zero_copy_only=True)
        return view.reshape(-1, *column.shape)

    @cached_property
    def _batches(self) -> list[Any]:
        # Mapped, not read: a record batch holds addresses into the file.
        return [self._reader.get_batch(i) for i in range(self._reader.num_record_batches)]
