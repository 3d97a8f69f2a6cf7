"""Tables: columns of cells become features and a target, as numbers.

A cell that is no number where one is expected is named by row and column. It knows nothing of
splits, or of what to do with missing values: they become NaN.

    table = make_table(read_cells(Path("houses.csv")), TableConfig(), target="price")
    table.features, table.target
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from jobs.data.config import Column, TableConfig
from jobs.data.table_files import MISSING, Cells, CellTable, is_number

Numbers = npt.NDArray[np.float64]

_WHOLE = re.compile(r"[0-9]+", re.ASCII)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Table:
    """Numbers, NaN where a cell is missing."""

    source: CellTable
    """Where messages find names and places."""
    feature_names: tuple[str, ...]
    features: Numbers
    """[row, feature]"""
    target_name: str
    target: Numbers
    """[row]; for classification the number of the class."""
    class_names: tuple[str, ...] = ()
    """Empty for regression."""

    @property
    def digest(self) -> str:
        return self.source.digest


def make_table(
    cells: CellTable,
    config: TableConfig,
    *,
    target: Column,
    is_classification: bool,
    classes: Sequence[str] = (),
) -> Table:
    """Raises InputError for a missing column, a cell that is no number, or an unexpected label."""
    target_id = _find(cells, target, "data.source.target")
    excluded = {target_id, *(_find(cells, name, "data.table.exclude") for name in config.exclude)}
    wanted = [_find(cells, name, "data.table.features") for name in config.features]
    if target_id in wanted:
        raise InputError(
            f"column '{cells.names[target_id]}' is the target and cannot be a feature too",
            hint="remove it from data.table.features",
            param="data.table.features",
        )
    _refuse_ambiguous(cells, wanted, excluded)
    ids = [i for i in wanted or range(len(cells.names)) if i not in excluded]
    if not ids:
        raise InputError(
            f"'{cells.name}' has no column to predict from", hint="check data.table", param="data"
        )
    class_names: tuple[str, ...] = ()
    if is_classification:
        class_names, values = _classes(cells, target_id, classes)
    else:
        values = _numbers(cells, target_id)
    return Table(
        source=cells,
        feature_names=tuple(cells.names[i] for i in ids),
        features=np.stack([_numbers(cells, i) for i in ids], axis=1),
        target_name=cells.names[target_id],
        target=values,
        class_names=class_names,
    )


def _refuse_ambiguous(cells: CellTable, wanted: Sequence[int], excluded: set[int]) -> None:
    for place, column in enumerate(wanted):
        problem = "twice" if column in wanted[:place] else ""
        problem = "in data.table.exclude too" if column in excluded else problem
        if problem:
            raise InputError(
                f"data.table.features names column '{cells.names[column]}', which stands there "
                f"{problem}",
                hint="name each column once",
                param="data.table.features",
            )


def _find(cells: CellTable, column: Column, param: str) -> int:
    """Number of a column."""
    if isinstance(column, int):
        if -len(cells.names) <= column < len(cells.names):
            return column % len(cells.names)
        shown = f"no column number {column}, it has {len(cells.names)}"
    elif column in cells.names:
        return cells.names.index(column)
    else:
        shown = f"no column '{column}', it has: {', '.join(cells.names)}"
    raise InputError(f"'{cells.name}' has {shown}", hint=f"correct {param}", param=param)


def _numbers(cells: CellTable, column: int) -> Numbers:
    """Finite numbers, and NaN for what is missing."""
    found = cells.columns[column]
    values = found if isinstance(found, np.ndarray) else _parse(cells, column, found)
    bad = np.flatnonzero(np.abs(values) > _LARGEST)
    if bad.size:
        raise _bad_cell(cells, column, int(bad[0]), "is not a finite 32-bit number")
    return values


def _parse(cells: CellTable, column: int, texts: Sequence[str]) -> Numbers:
    values = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        if text.lower() in MISSING:
            continue
        if not is_number(text):
            raise _bad_cell(cells, column, row, "is not a number")
        values[row] = float(text)
    return values


def _classes(
    cells: CellTable, column: int, expected: Sequence[str]
) -> tuple[tuple[str, ...], Numbers]:
    """Class names in order, and each row's class number."""
    labels = _labels(cells, column)
    names = tuple(expected) or _in_order({label for label in labels if label})
    if len(names) < 2:
        raise InputError(
            f"'{cells.name}', column '{cells.names[column]}' has {len(names)} class(es), "
            "expected at least 2",
            hint="choose another data.source.target",
            param="data.source.target",
        )
    numbers = {"": np.nan, **{name: float(i) for i, name in enumerate(names)}}
    for row, label in enumerate(labels):
        if label not in numbers:
            raise _bad_cell(cells, column, row, f"is not one of: {', '.join(names)}")
    return names, np.array([numbers[label] for label in labels])


def _labels(cells: CellTable, column: int) -> list[str]:
    """Labels as they are written, empty where missing; numbers that are whole but written as
    fractions (1.0) lose their decimal point."""
    found: Cells = cells.columns[column]
    labels: list[str] = []
    for row, cell in enumerate(found):
        text = str(cell)
        if text.lower() in MISSING:
            labels.append("")
        elif not is_number(text) or _WHOLE.fullmatch(text):
            labels.append(text)
        elif (whole := Decimal(text)).is_finite() and whole == whole.to_integral_value():
            labels.append(f"{whole:.0f}")
        else:
            raise _bad_cell(
                cells, column, row, "is no class but a fraction", hint="is it task: regression?"
            )
    return labels


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by size, anything else by the alphabet."""
    if all(is_number(label) for label in labels):
        return tuple(sorted(labels, key=float))
    return tuple(sorted(labels))


def _bad_cell(
    cells: CellTable,
    column: int,
    row: int,
    problem: str,
    hint: str = "correct it, or leave the column out with data.table.exclude",
) -> InputError:
    found = cells.columns[column][row]
    return InputError(
        f"'{cells.name}', {cells.place(row)}, column '{cells.names[column]}': '{found}' {problem}",
        hint=hint,
        param="data.source",
    )
