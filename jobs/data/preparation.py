"""Preparation: a source becomes a dataset directory. Same config and same source, same bytes.

It knows nothing about storage; `jobs.data.catalog` publishes and finds what is made here.

    info = prepare_into(directory, config, read_source(config))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.errors import InputError
from jobs.data import sources
from jobs.data.cleaning import clean
from jobs.data.config import DataConfig, SklearnSource, TableSource
from jobs.data.dataset import (
    DOCUMENT_STARTS,
    TOKENIZER_DIR,
    TOKENS,
    ColumnInfo,
    DatasetInfo,
    TextInfo,
    describe_files,
    write_info,
)
from jobs.data.packing import pack, pack_starts
from jobs.data.rows import Array, write_rows
from jobs.data.sources import Arrays, Documents
from jobs.data.splits import SPLITS, split_documents, split_rows
from jobs.data.table_info import FEATURES, TableInfo
from jobs.data.tables import Table
from jobs.data.tokenizing import (
    END_OF_TEXT,
    encode_documents,
    save_tokenizer,
    train_tokenizer,
    unigram_cross_entropy,
)

Content = Documents | Arrays | Table


def read_source(config: DataConfig) -> Content:
    """Raises InputError for files that are missing or hold the wrong thing."""
    source = config.source
    if isinstance(source, TableSource):
        return sources.read_table_file(source, config.table)
    if not isinstance(source, SklearnSource):
        return sources.read_documents(source)
    if config.kind == "table":
        return sources.read_bundled_table(source, config.table)
    return sources.read_arrays(source)


def prepare_into(directory: Path, config: DataConfig, content: Content) -> DatasetInfo:
    """Fill an existing, empty directory.

    Raises:
        InputError: a split that was asked for has no row.
    """
    if isinstance(content, Documents):
        info = _prepare_text(directory, config, content)
    elif isinstance(content, Table):
        info = _prepare_table(directory, config, content)
    else:
        info = _prepare_arrays(directory, config, content)
    write_info(directory, info)
    return info


def _prepare_text(directory: Path, config: DataConfig, documents: Documents) -> DatasetInfo:
    texts = split_documents(documents.texts, config.splits)
    _check_split_texts(texts, config)
    tokenizer = train_tokenizer(texts["train"], config.text.tokenizer.vocab_size)
    save_tokenizer(tokenizer, directory / TOKENIZER_DIR)
    vocab_size = tokenizer.get_vocab_size()
    encoded = {split: encode_documents(tokenizer, texts[split]) for split in SPLITS}
    ids = {split: np.concatenate([np.zeros(0, np.int64), *encoded[split]]) for split in SPLITS}
    packed = {split: pack(ids[split], config.text.sequence_length, vocab_size) for split in SPLITS}
    for split in _wanted_splits(config):
        if not len(packed[split]):
            raise InputError(
                f"split '{split}' holds {len(ids[split])} tokens, fewer than one row of "
                f"sequence_length + 1 = {config.text.sequence_length + 1}",
                hint="lower data.text.sequence_length or give more text",
                param="data.text.sequence_length",
            )
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    text = TextInfo(
        vocab_size=vocab_size,
        end_id=end_id,
        pad_id=end_id,
        sequence_length=config.text.sequence_length,
        num_documents={split: len(encoded[split]) for split in SPLITS},
        num_tokens={split: len(ids[split]) for split in SPLITS},
        unigram_entropy=(
            unigram_cross_entropy(ids["train"], ids["validation"], vocab_size)
            if len(ids["validation"])
            else 0.0
        ),
    )
    rows: dict[str, dict[str, Array]] = {
        split: {
            TOKENS: packed[split],
            DOCUMENT_STARTS: pack_starts(
                [len(document) for document in encoded[split]],
                len(packed[split]),
                config.text.sequence_length,
            ),
        }
        for split in SPLITS
    }
    return _write(directory, config, documents.digest, rows, text=text)


def _check_split_texts(texts: dict[str, list[str]], config: DataConfig) -> None:
    for split in _wanted_splits(config):
        if not texts[split]:
            count = sum(len(documents) for documents in texts.values())
            raise InputError(
                f"split '{split}' is empty: {count} document(s) cannot be shared out whole",
                hint="set data.splits.by=position, or change data.splits",
                param="data.splits",
            )


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
    for split in _wanted_splits(config):
        if not sizes[split]:
            raise InputError(
                f"split '{split}' is empty: its share of {sum(sizes.values())} rows is less than "
                "one",
                hint="raise its share in data.splits",
                param="data.splits",
            )


def _wanted_splits(config: DataConfig) -> list[str]:
    shares = {"train": 1.0, "validation": config.splits.validation, "test": config.splits.test}
    return [split for split in SPLITS if shares[split] > 0]


def _write(
    directory: Path,
    config: DataConfig,
    source_digest: str,
    rows: dict[str, dict[str, Array]],
    *,
    text: TextInfo | None = None,
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
