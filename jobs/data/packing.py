"""Packing: a stream of token ids becomes rows of equal length, with nothing padded.

Rows overlap by one token, so that every token but the stream's first is predicted exactly once. It
knows nothing about tokenisers or files.

    pack(np.arange(7), sequence_length=3)        # [[0 1 2 3] [3 4 5 6]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pack(
    ids: npt.NDArray[np.int64], sequence_length: int, vocab_size: int = 2**16
) -> npt.NDArray[Any]:
    """Rows of `sequence_length + 1` ids; a tail too short for a row is dropped."""
    num_rows = max(0, (len(ids) - 1) // sequence_length)
    starts = np.arange(num_rows)[:, None] * sequence_length
    rows: npt.NDArray[Any] = ids[starts + np.arange(sequence_length + 1)]
    return rows.astype(token_dtype(vocab_size))


def pack_starts(lengths: Sequence[int], num_rows: int, sequence_length: int) -> npt.NDArray[Any]:
    """Bits of the tokens of packed rows that a document of these lengths begins with."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    starts = np.zeros(max(int(ends[-1]) if len(ends) else 0, 1), dtype=np.uint8)
    starts[0] = 1
    starts[ends[:-1]] = 1
    firsts = np.arange(num_rows)[:, None] * sequence_length
    return np.packbits(starts[firsts + np.arange(sequence_length + 1)], axis=1)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32
