"""Table files: CSV, Parquet and whitespace matrices become named columns of cells.

It knows nothing of targets, features or splits.

    cells = read_cells(Path("houses.csv"))
    cells.names, cells.columns[0], cells.place(0)      # ('rooms', 'price'), ['3', '5'], 'line 2'
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError

Cells = list[str] | npt.NDArray[np.float64]
"""A column as read: text, or numbers with NaN where a cell is empty."""

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
_PARAM = "data.source.path"


@dataclass(frozen=True)
class CellTable:
    """Columns of equal length."""

    name: str
    """File name or other name, for messages."""
    names: tuple[str, ...]
    columns: tuple[Cells, ...]
    digest: str
    lines: tuple[int, ...] = ()
    """For text files: where in the file each row stands."""

    @property
    def num_rows(self) -> int:
        return len(self.columns[0])

    def place(self, row: int) -> str:
        """Where a user finds a row."""
        return f"line {self.lines[row]}" if self.lines else f"row {row + 1}"


def read_cells(path: Path, delimiter: str = ",") -> CellTable:
    """Raises InputError for a file that is missing, empty, ragged or of an unknown format."""
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"data file '{path}' ends in '{path.suffix}', expected one of: {', '.join(_READERS)}",
            hint="convert it",
            param=_PARAM,
        )
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(
                f"data file '{path}' is no plain file", hint="copy it to one", param=_PARAM
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"data file '{path}' does not exist (looked in {Path.cwd()})",
            hint="correct data.source.path",
            param=_PARAM,
        ) from None
    except OSError as error:
        raise InputError(
            f"data file '{path}' cannot be read: {error.strerror}",
            hint="check data.source.path and the file's permissions",
            param=_PARAM,
        ) from None
    table = read(str(path), data, delimiter)
    _check_names(str(path), table.names)
    return table


def _check_names(file: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or "" in names:
        problem = f"two columns named '{repeated[0]}'" if repeated else "a column without a name"
        raise InputError(f"data file '{file}' has {problem}", hint="rename it", param=_PARAM)


def is_number(cell: str) -> bool:
    """Whether a cell is written as a number; digits grouped by underscores are not."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _read_csv(name: str, data: bytes, delimiter: str) -> CellTable:
    reader = csv.reader(io.StringIO(_decode(name, data), newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise InputError(
            f"data file '{name}', line {reader.line_num}: {error}",
            hint="expected CSV; set data.source.delimiter if it is not a comma",
            param=_PARAM,
        ) from None
    return _from_rows(name, data, rows)


def _read_matrix(name: str, data: bytes, _delimiter: str) -> CellTable:
    """Lines that begin with # are comments."""
    rows = [
        (number, line.split())
        for number, line in enumerate(_decode(name, data).splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return _from_rows(name, data, rows)


def _from_rows(name: str, data: bytes, rows: list[tuple[int, list[str]]]) -> CellTable:
    has_header = bool(rows) and not any(is_number(cell) for cell in rows[0][1])
    body = rows[1:] if has_header else rows
    if not body:
        raise InputError(f"data file '{name}' has no rows", hint="check the file", param=_PARAM)
    width = len(rows[0][1])
    for line, row in body:
        if len(row) != width:
            raise InputError(
                f"data file '{name}', line {line} has {len(row)} cells, expected {width}",
                hint="correct the line, or data.source.delimiter",
                param=_PARAM,
            )
    return CellTable(
        name=name,
        names=tuple(rows[0][1]) if has_header else tuple(map(str, range(width))),
        columns=tuple(list(column) for column in zip(*(row for _, row in body), strict=True)),
        digest=hashlib.sha256(data).hexdigest(),
        lines=tuple(line for line, _ in body),
    )


def _read_parquet(name: str, data: bytes, _delimiter: str) -> CellTable:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(pa.BufferReader(data)).names
        _check_names(name, names)
        table = pyarrow.parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"data file '{name}' is not Parquet: {str(error).splitlines()[0]}",
            hint="check the file",
            param=_PARAM,
        ) from None
    if not table.num_rows or not table.num_columns:
        raise InputError(f"data file '{name}' has no rows", hint="check the file", param=_PARAM)
    return CellTable(
        name=name,
        names=tuple(table.column_names),
        columns=tuple(_parquet_cells(column) for column in table.columns),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _parquet_cells(column: Any) -> Cells:
    """Numbers as numbers; anything else as text, to be refused by name if it is a feature.

    Whole numbers of more than 53 bits are text too: labels must not be rounded into each other.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        with contextlib.suppress(pa.ArrowInvalid):
            values: npt.NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
            return values
    try:
        texts = column.cast(pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        texts = [str(kind)] * len(column)
    return ["" if text is None else text.strip() for text in texts]


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file '{name}' is not UTF-8 text (byte {error.start})",
            hint="convert it to UTF-8, e.g. with iconv",
            param=_PARAM,
        ) from None


_READERS: dict[str, Callable[[str, bytes, str], CellTable]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_matrix,
}
