"""Cleaning: a table becomes splits without gaps, and a report of all that was changed.

Rows are assigned to splits first; every statistic is of the train split alone. It knows nothing of
files.

    cleaned = clean(table, config)
    cleaned.rows["train"]["features"], cleaned.info.mean
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from jobs.data.config import DataConfig, TableConfig
from jobs.data.rows import Array
from jobs.data.splits import SPLITS, Ids, split_rows
from jobs.data.table_info import FEATURES, LABEL, TARGET, TableInfo
from jobs.data.tables import Numbers, Table


@dataclass(frozen=True)
class Cleaned:
    """Columns by split, and how they came about."""

    rows: dict[str, dict[str, Array]]
    info: TableInfo


def clean(table: Table, config: DataConfig) -> Cleaned:
    """Raises InputError for missing cells that are not allowed, a constant feature, or a class that
    the train split has no row of."""
    splits = split_rows(len(table.features), config.splits)
    filled, splits, num_dropped = _without_gaps(table, config.table, splits)
    features, splits, beyond = _without_outliers(filled, config.table, splits)
    # What is stored, and so what every statistic is of.
    features = features.astype(np.float32)
    train = splits["train"]
    _check_variety(table, features[train], table.target[train])
    is_regression = not table.class_names
    info = TableInfo(
        feature_names=table.feature_names,
        target_name=table.target_name,
        mean=tuple(features[train].mean(0, dtype=np.float64).tolist()),
        std=tuple(features[train].std(0, dtype=np.float64).tolist()),
        target_mean=float(table.target[train].mean()) if is_regression else 0.0,
        target_std=float(table.target[train].std()) if is_regression else 1.0,
        missing=config.table.missing,
        num_missing=_num_missing(table),
        num_dropped=num_dropped,
        outliers=config.table.outliers,
        num_outliers=_positive(table.feature_names, beyond.sum(0)),
        num_outlier_rows=int(beyond.any(1).sum()),
    )
    target: dict[str, Array] = (
        {TARGET: table.target}
        if is_regression
        else {LABEL: np.nan_to_num(table.target).astype(np.int64)}
    )
    columns = {FEATURES: features, **target}
    rows = {
        split: {name: column[ids] for name, column in columns.items()}
        for split, ids in splits.items()
    }
    return Cleaned(rows, info)


def _without_gaps(
    table: Table, config: TableConfig, splits: dict[str, Ids]
) -> tuple[Numbers, dict[str, Ids], dict[str, int]]:
    """Features with every gap filled, the rows that stay, and how many of each split did not."""
    gaps = np.isnan(table.features)
    no_target = np.isnan(table.target)
    unusable = no_target | (gaps.any(1) if config.missing == "drop" else False)
    if no_target.any() and "drop" not in (config.missing, config.missing_target):
        raise _missing(table, int(no_target.argmax()), table.target_name)
    kept = {split: ids[~unusable[ids]] for split, ids in splits.items()}
    dropped = {split: len(splits[split]) - len(kept[split]) for split in SPLITS}
    if config.missing == "refuse" and gaps[~unusable].any():
        row, column = (int(i) for i in np.argwhere(gaps & ~unusable[:, None])[0])
        raise _missing(table, row, table.feature_names[column])
    features = table.features
    if config.missing.startswith("impute"):
        features = _imputed(table, config, kept["train"])
    return features, kept, dropped if any(dropped.values()) else {}


def _imputed(table: Table, config: TableConfig, train: Ids) -> Numbers:
    gaps = np.isnan(table.features)
    if not gaps.any():
        return table.features
    empty = gaps[train].all(0)
    if empty.any():
        raise InputError(
            f"'{table.source.name}', column '{table.feature_names[int(empty.argmax())]}' has no "
            "value in the train split",
            hint="leave it out with data.table.exclude",
            param="data.table.missing",
        )
    average = np.nanmedian if config.missing == "impute_median" else np.nanmean
    return np.where(gaps, average(table.features[train], axis=0), table.features)


def _without_outliers(
    features: Numbers, config: TableConfig, splits: dict[str, Ids]
) -> tuple[Numbers, dict[str, Ids], npt.NDArray[np.bool_]]:
    """Features, the rows that stay, and which training cells lay beyond the fences."""
    train = splits["train"]
    if not len(train):
        return features, splits, np.zeros((0, features.shape[1]), dtype=bool)
    first, third = np.quantile(features[train], [0.25, 0.75], axis=0)
    reach = np.where(third > first, config.outlier_iqr * (third - first), np.inf)
    lower, upper = first - reach, third + reach
    beyond: npt.NDArray[np.bool_] = (features[train] < lower) | (features[train] > upper)
    if config.outliers == "drop":
        splits = {**splits, "train": train[~beyond.any(1)]}
    if config.outliers == "clip":
        features = features.copy()
        features[train] = features[train].clip(lower, upper)
    return features, splits, beyond


def _check_variety(table: Table, features: Array, target: Array) -> None:
    """What does not vary in the train split cannot be learnt from, or learnt."""
    if not len(features):
        raise InputError(
            f"'{table.source.name}' leaves no row to train on",
            hint="check data.splits, data.table.missing and data.table.outliers",
            param="data",
        )
    constant = np.ptp(features, axis=0) == 0
    if constant.any():
        column = int(constant.argmax())
        raise InputError(
            f"'{table.source.name}', column '{table.feature_names[column]}' is "
            f"{features[0, column]:g} in every training row",
            hint="leave it out with data.table.exclude",
            param="data.table.exclude",
        )
    if not table.class_names and target.std() == 0:
        raise InputError(
            f"'{table.source.name}', target '{table.target_name}' is {target[0]:g} in every "
            "training row, or varies by less than numbers can tell",
            hint="choose another data.source.target, or another unit for it",
            param="data.source.target",
        )
    absent = [name for i, name in enumerate(table.class_names) if not (target == i).any()]
    if absent:
        raise InputError(
            f"'{table.source.name}', target '{table.target_name}': no training row has class "
            f"'{absent[0]}'",
            hint="correct its labels, change data.splits.seed, or is it task: regression?",
            param="data.source.target",
        )


def _missing(table: Table, row: int, column: str) -> InputError:
    is_target = column == table.target_name
    missing = _num_missing(table)
    total = missing[column] if is_target else sum(missing.values())
    return InputError(
        f"'{table.source.name}', {table.source.place(row)}, column '{column}' is empty "
        f"({total} missing in all)",
        hint="set data.table.missing_target=drop"
        if is_target
        else "set data.table.missing=drop, or impute_mean or impute_median",
        param="data.table.missing_target" if is_target else "data.table.missing",
    )


def _num_missing(table: Table) -> dict[str, int]:
    names = (*table.feature_names, table.target_name)
    gaps = np.isnan(np.column_stack([table.features, table.target]))
    return _positive(names, gaps.sum(0))


def _positive(names: tuple[str, ...], counts: Array) -> dict[str, int]:
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
