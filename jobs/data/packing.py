"""Packing: tokens become rows of equal length as they come.

A stream is cut into rows that overlap by one token, so that every token but the first is predicted
exactly once; conversations are put whole into rows that are filled up. It knows nothing about
tokenisers or files.

    packer = StreamPacker(sequence_length=3, dtype=np.uint16)
    packer.add(np.arange(7), lengths=np.array([4, 3]))   # → {"tokens": [[0 1 2 3] [3 4 5 6]], …}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.data.dataset import DOCUMENT_STARTS, LOSS_MASK, TOKENS
from jobs.data.rows import Array, Column

TokenType = type[np.unsignedinteger[Any]]

# More rows open at a time waste fewer tokens: conversations are put where they fit best.
_OPEN_ROWS = 64


def token_dtype(vocab_size: int) -> TokenType:
    """The narrowest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def token_columns(
    sequence_length: int, dtype: TokenType, *, has_loss_mask: bool = False
) -> dict[str, Column]:
    """Columns of a row of `sequence_length` + 1 tokens."""
    bits = Column("uint8", (-(-(sequence_length + 1) // 8),))
    columns = {TOKENS: Column(np.dtype(dtype).name, (sequence_length + 1,)), DOCUMENT_STARTS: bits}
    return {**columns, LOSS_MASK: bits} if has_loss_mask else columns


def pack(
    ids: npt.NDArray[np.int64], sequence_length: int, vocab_size: int = 2**16
) -> npt.NDArray[Any]:
    """Rows of `sequence_length` + 1 ids; a tail too short for a row is dropped."""
    num_rows = max(0, (len(ids) - 1) // sequence_length)
    starts = np.arange(num_rows)[:, None] * sequence_length
    rows: npt.NDArray[Any] = ids[starts + np.arange(sequence_length + 1)]
    return rows.astype(token_dtype(vocab_size))


class StreamPacker:
    """Documents one after the other; one may cross into the next row."""

    def __init__(self, sequence_length: int, dtype: TokenType) -> None:
        self._length = sequence_length
        self._tokens: Array = np.zeros(0, dtype)
        self._starts: Array = np.zeros(0, np.uint8)

    def add(self, tokens: Array, lengths: Array) -> dict[str, Array]:
        """Rows that documents of these lengths complete; what is too short for one is kept."""
        starts = np.zeros(len(tokens), np.uint8)
        starts[np.cumsum(lengths) - lengths] = 1
        self._tokens = np.concatenate([self._tokens, tokens.astype(self._tokens.dtype)])
        self._starts = np.concatenate([self._starts, starts])
        num_rows = max(0, (len(self._tokens) - 1) // self._length)
        places = np.arange(num_rows)[:, None] * self._length + np.arange(self._length + 1)
        rows = {
            TOKENS: self._tokens[places],
            DOCUMENT_STARTS: np.packbits(self._starts[places], axis=1),
        }
        self._tokens = self._tokens[num_rows * self._length :]
        self._starts = self._starts[num_rows * self._length :]
        return rows


class ChatPacker:
    """Whole conversations, each into the open row that it fills best."""

    def __init__(self, sequence_length: int, dtype: TokenType, pad_id: int) -> None:
        self._size = sequence_length + 1
        self._dtype = dtype
        self._pad_id = pad_id
        self._open: list[list[tuple[Array, Array]]] = []
        self._room: list[int] = []

    def add(self, tokens: Array, mask: Array, lengths: Array) -> dict[str, Array]:
        """Rows that are closed by these conversations, none of which is longer than a row."""
        closed: list[list[tuple[Array, Array]]] = []
        end = 0
        for length in lengths:
            start, end = end, end + int(length)
            self._place(tokens[start:end], mask[start:end])
            closed += self._take_closed()
        return self._rows(closed)

    def finish(self) -> dict[str, Array]:
        """The rows that are still open."""
        rows = self._rows(self._open)
        self._open, self._room = [], []
        return rows

    def _place(self, tokens: Array, mask: Array) -> None:
        fitting = [row for row, room in enumerate(self._room) if room >= len(tokens)]
        if fitting:
            row = min(fitting, key=lambda number: self._room[number])
        else:
            row = len(self._open)
            self._open.append([])
            self._room.append(self._size)
        self._open[row].append((tokens, mask))
        self._room[row] -= len(tokens)

    def _take_closed(self) -> list[list[tuple[Array, Array]]]:
        """Full rows, and the fullest one when there are too many."""
        closed = [row for row, room in enumerate(self._room) if room == 0]
        if not closed and len(self._open) > _OPEN_ROWS:
            closed = [min(range(len(self._room)), key=lambda number: self._room[number])]
        for row in reversed(closed):
            self._room.pop(row)
        return [self._open.pop(row) for row in reversed(closed)]

    def _rows(self, rows: Sequence[Sequence[tuple[Array, Array]]]) -> dict[str, Array]:
        tokens = np.full((len(rows), self._size), self._pad_id, self._dtype)
        starts = np.zeros((len(rows), self._size), np.uint8)
        masks = np.zeros((len(rows), self._size), np.uint8)
        for number, row in enumerate(rows):
            end = 0
            for conversation, mask in row:
                start, end = end, end + len(conversation)
                tokens[number, start:end] = conversation
                masks[number, start:end] = mask
                starts[number, start] = 1
            if end < self._size:
                # What fills the row up is no part of the last conversation.
                starts[number, end] = 1
        return {
            TOKENS: tokens,
            DOCUMENT_STARTS: np.packbits(starts, axis=1),
            LOSS_MASK: np.packbits(masks, axis=1),
        }
