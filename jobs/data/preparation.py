"""Preparation: a source becomes a dataset directory. Same config and same source, same bytes.

It knows nothing about storage; `jobs.data.catalog` publishes and finds what is made here.

    info = prepare_into(directory, config, read_source(config))
"""

from __future__ import annotations

from pathlib import Path

from cluster.errors import InputError
from jobs.data import sources
from jobs.data.cleaning import clean
from jobs.data.config import DataConfig, SklearnSource, TableSource
from jobs.data.corpus import Corpus, Say, plan_corpus, read_corpus
from jobs.data.dataset import ColumnInfo, DatasetInfo, TextInfo, describe_files, write_info
from jobs.data.execution import Executor, in_process
from jobs.data.rows import Array, Rows, write_rows
from jobs.data.shards import Plan
from jobs.data.sources import Arrays
from jobs.data.splits import SPLITS, split_rows
from jobs.data.table_info import FEATURES, TableInfo
from jobs.data.tables import Table

Content = Corpus | Arrays | Table


def read_source(
    config: DataConfig,
    *,
    plan: Plan | None = None,
    execute: Executor = in_process,
    say: Say = lambda _line: None,
) -> Content:
    """A table or arrays whole, of text an index.

    Args:
        plan: of a text source, if it has been listed already.
        execute: where to read text.
        say: takes lines of progress.

    Raises:
        InputError: files are missing or hold the wrong thing.
    """
    if config.kind == "text":
        return read_corpus(config, plan or plan_corpus(config), execute, say)
    return read_numbers(config)


def read_numbers(config: DataConfig) -> Arrays | Table:
    """As `read_source`, for all but text."""
    source = config.source
    if isinstance(source, TableSource):
        return sources.read_table_file(source, config.table)
    assert isinstance(source, SklearnSource)
    if config.kind == "table":
        return sources.read_bundled_table(source, config.table)
    return sources.read_arrays(source)


def prepare_into(directory: Path, config: DataConfig, content: Content) -> DatasetInfo:
    """Fill an existing, empty directory.

    Raises:
        InputError: a split that was asked for has no row.
    """
    if isinstance(content, Corpus):
        info = _prepare_text(directory, config, content)
    elif isinstance(content, Table):
        info = _prepare_table(directory, config, content)
    else:
        info = _prepare_arrays(directory, config, content)
    write_info(directory, info)
    return info


def _prepare_text(directory: Path, config: DataConfig, corpus: Corpus) -> DatasetInfo:
    text = corpus.write(directory)
    rows = {split: Rows.open(directory / f"{split}.arrow") for split in SPLITS}
    columns = {
        name: ColumnInfo(dtype=column.dtype, shape=column.shape)
        for name, column in rows["train"].columns.items()
    }
    num_rows = {split: len(found) for split, found in rows.items()}
    return _describe(directory, config, corpus.digest, num_rows, columns, text=text)


def _prepare_table(directory: Path, config: DataConfig, table: Table) -> DatasetInfo:
    cleaned = clean(table, config)
    sizes = {split: len(columns[FEATURES]) for split, columns in cleaned.rows.items()}
    _check_split_sizes(sizes, config)
    return _write(
        directory,
        config,
        table.digest,
        cleaned.rows,
        table=cleaned.info,
        class_names=table.class_names,
    )


def _prepare_arrays(directory: Path, config: DataConfig, arrays: Arrays) -> DatasetInfo:
    (num_rows,) = {len(column) for column in arrays.columns.values()}
    ids = split_rows(num_rows, config.splits)
    _check_split_sizes({split: len(ids[split]) for split in SPLITS}, config)
    rows = {
        split: {name: column[ids[split]] for name, column in arrays.columns.items()}
        for split in SPLITS
    }
    return _write(directory, config, arrays.digest, rows, class_names=arrays.class_names)


def _check_split_sizes(sizes: dict[str, int], config: DataConfig) -> None:
    for split in config.splits.wanted:
        if not sizes[split]:
            raise InputError(
                f"split '{split}' is empty: its share of {sum(sizes.values())} rows is less than "
                "one",
                hint="raise its share in data.splits",
                param="data.splits",
            )


def _write(
    directory: Path,
    config: DataConfig,
    source_digest: str,
    rows: dict[str, dict[str, Array]],
    *,
    table: TableInfo | None = None,
    class_names: tuple[str, ...] = (),
) -> DatasetInfo:
    num_rows = {
        split: write_rows(directory / f"{split}.arrow", columns) for split, columns in rows.items()
    }
    columns = {
        name: ColumnInfo(dtype=str(array.dtype), shape=tuple(array.shape[1:]))
        for name, array in rows["train"].items()
    }
    return _describe(
        directory, config, source_digest, num_rows, columns, table=table, class_names=class_names
    )


def _describe(
    directory: Path,
    config: DataConfig,
    source_digest: str,
    num_rows: dict[str, int],
    columns: dict[str, ColumnInfo],
    *,
    text: TextInfo | None = None,
    table: TableInfo | None = None,
    class_names: tuple[str, ...] = (),
) -> DatasetInfo:
    return DatasetInfo(
        name=config.name,
        kind="tokens" if text else "arrays",
        config=config,
        source_digest=source_digest,
        num_rows=num_rows,
        columns=columns,
        text=text,
        table=table,
        class_names=class_names,
        files=describe_files(directory),
    )
