"""Rows: Arrow IPC files of fixed-shape columns, written in batches and read by memory map.

A row is found by its number without reading those before it, so a step can ask for any rows. It
knows nothing about what the columns mean.

    write_rows(path, {"tokens": array})          # array[row, ...]
    with RowWriter.open(path, columns) as writer:
        writer.add({"tokens": array})            # any number of rows at a time
    rows = Rows.open(path)
    rows.read(np.array([7, 3]))["tokens"]        # shape (2, ...)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]

_SHAPES = b"shapes"
_BATCH_ROWS = b"rows_per_batch"
_MAX_BATCH_ROWS = 1024
_MAX_BATCH_BYTES = 32 * 1024**2


@dataclass(frozen=True)
class Column:
    """A column's element type (numpy's name) and the shape of one row."""

    dtype: str
    shape: tuple[int, ...]


def write_rows(path: Path, columns: dict[str, Array]) -> int:
    """Write columns of equal length; returns the number of rows."""
    specs = {
        name: Column(str(array.dtype), tuple(array.shape[1:])) for name, array in columns.items()
    }
    with RowWriter.open(path, specs) as writer:
        writer.add(columns)
    return writer.num_rows


class RowWriter:
    """Writes rows as they come, holding a batch at most; open it with `RowWriter.open`."""

    def __init__(self, writer: Any, columns: dict[str, Column]) -> None:
        self._writer = writer
        self._columns = columns
        self._batch_rows = rows_per_batch(columns)
        self._held: list[dict[str, Array]] = []
        self._num_held = 0
        self.num_rows = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, columns: dict[str, Column]) -> Iterator[RowWriter]:
        """The file is whole once the block has ended well."""
        with (
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, _schema(columns)) as arrow_writer,
        ):
            writer = cls(arrow_writer, columns)
            yield writer
            writer._write_held()

    def add(self, columns: dict[str, Array]) -> None:
        """Rows in the order given."""
        (count,) = {len(array) for array in columns.values()}
        start = 0
        while count - start + self._num_held >= self._batch_rows:
            end = start + self._batch_rows - self._num_held
            self._hold(columns, start, end)
            self._write_held()
            start = end
        if start < count:
            self._hold(columns, start, count)

    def _hold(self, columns: dict[str, Array], start: int, end: int) -> None:
        # Copied: a slice would keep the whole of what was given.
        self._held.append({name: columns[name][start:end].copy() for name in self._columns})
        self._num_held += end - start
        self.num_rows += end - start

    def _write_held(self) -> None:
        if not self._num_held:
            return
        schema = _schema(self._columns)
        arrays = [
            _to_arrow(np.concatenate([part[name] for part in self._held]), schema.field(name).type)
            for name in self._columns
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=schema))
        self._held, self._num_held = [], 0


def rows_per_batch(columns: dict[str, Column]) -> int:
    """Rows in all but the last batch of a file with these columns."""
    row_bytes = sum(
        np.dtype(column.dtype).itemsize * int(np.prod(column.shape, dtype=np.int64))
        for column in columns.values()
    )
    return max(1, min(_MAX_BATCH_ROWS, _MAX_BATCH_BYTES // max(1, row_bytes)))


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
    metadata = {
        _SHAPES: json.dumps(shapes).encode(),
        _BATCH_ROWS: str(rows_per_batch(columns)).encode(),
    }
    return pa.schema(fields, metadata=metadata)


def _to_arrow(array: Array, arrow_type: Any) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=arrow_type)


class Rows:
    """The rows of one file, mapped into memory and copied only where asked for."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._reader = reader
        shapes = json.loads(reader.schema.metadata[_SHAPES])
        self._batch_rows = int(reader.schema.metadata[_BATCH_ROWS])
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
        batch_ids, offsets = np.divmod(ids, self._batch_rows)
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
