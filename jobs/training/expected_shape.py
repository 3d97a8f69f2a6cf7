"""The shape that a dataset will have, before it is prepared.

expected_shape(config.data).vocab_size
"""

from __future__ import annotations

from jobs.data.cleaning import clean
from jobs.data.config import DataConfig
from jobs.data.corpus import plan_corpus
from jobs.data.dataset import ColumnInfo
from jobs.data.inspection import expected_vocab_size
from jobs.data.packing import token_columns, token_dtype
from jobs.data.preparation import read_numbers
from jobs.data.tables import Table
from jobs.models.family import DataShape


def expected_shape(config: DataConfig) -> DataShape:
    """The shape that a dataset will have once it is prepared; reads no more of a text source than
    its beginning."""
    if config.kind == "text":
        return _expected_text(config)
    content = read_numbers(config)
    if isinstance(content, Table):
        cleaned = clean(content, config)
        columns = {
            name: ColumnInfo(dtype=str(array.dtype), shape=tuple(array.shape[1:]))
            for name, array in cleaned.rows["train"].items()
        }
        return DataShape(columns, class_names=content.class_names, table=cleaned.info)
    columns = {
        name: ColumnInfo(dtype=str(array.dtype), shape=tuple(array.shape[1:]))
        for name, array in content.columns.items()
    }
    return DataShape(columns, class_names=content.class_names)


def _expected_text(config: DataConfig) -> DataShape:
    plan_corpus(config)
    vocab_size = expected_vocab_size(config)
    length = config.text.sequence_length
    found = token_columns(length, token_dtype(vocab_size), has_loss_mask=config.is_chat)
    columns = {name: ColumnInfo(dtype=c.dtype, shape=c.shape) for name, c in found.items()}
    return DataShape(columns, vocab_size=vocab_size, sequence_length=length)
