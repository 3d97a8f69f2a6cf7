"""Token ids of documents become the row files of every split, as they come.

It knows nothing about where tokens come from.

    with TokenWriter.open(directory, sequence_length=256, …) as writer:
        writer.add(arrays)
    writer.written.num_rows
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.data.encoding import CUT, NO_ANSWER, TOO_LONG
from jobs.data.execution import Arrays
from jobs.data.packing import ChatPacker, StreamPacker, token_columns, token_dtype
from jobs.data.rows import Array, RowWriter
from jobs.data.splits import SPLITS
from jobs.data.tokenizing import unigram_cross_entropy


@dataclass(frozen=True)
class Written:
    """By split, unless said otherwise."""

    num_rows: dict[str, int]
    num_documents: dict[str, int]
    num_tokens: dict[str, int]
    left_out: dict[str, int]
    """By reason: conversations of which nothing could be used."""
    num_cut: int
    unigram_entropy: float


class TokenWriter:
    """Open it with `TokenWriter.open`."""

    def __init__(
        self,
        writers: dict[str, RowWriter],
        packers: dict[str, StreamPacker] | dict[str, ChatPacker],
        vocab_size: int,
    ) -> None:
        self._writers = writers
        self._packers = packers
        self._token_counts = np.zeros((len(SPLITS), vocab_size), dtype=np.int64)
        self._num_documents = dict.fromkeys(SPLITS, 0)
        self._num_tokens = dict.fromkeys(SPLITS, 0)
        self._counts = np.zeros(3, dtype=np.int64)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, directory: Path, *, sequence_length: int, vocab_size: int, pad_id: int, is_chat: bool
    ) -> Iterator[TokenWriter]:
        """The files are whole once the block has ended well."""
        dtype = token_dtype(vocab_size)
        columns = token_columns(sequence_length, dtype, has_loss_mask=is_chat)
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(RowWriter.open(directory / f"{split}.arrow", columns))
                for split in SPLITS
            }
            if is_chat:
                chats = {split: ChatPacker(sequence_length, dtype, pad_id) for split in SPLITS}
                writer = cls(writers, chats, vocab_size)
            else:
                streams = {split: StreamPacker(sequence_length, dtype) for split in SPLITS}
                writer = cls(writers, streams, vocab_size)
            yield writer
            writer._finish()

    def add(self, arrays: Arrays) -> None:
        """What `encode_shard` gives."""
        self._counts += arrays["counts"]
        split_of_token = np.repeat(arrays["splits"], arrays["lengths"])
        for number, split in enumerate(SPLITS):
            here = arrays["splits"] == number
            if here.any():
                tokens_here = split_of_token == number
                mask = arrays["mask"][tokens_here] if len(arrays["mask"]) else None
                lengths = arrays["lengths"][here]
                self._add_to(split, arrays["tokens"][tokens_here], mask, lengths)

    def _add_to(self, split: str, tokens: Array, mask: Array | None, lengths: Array) -> None:
        packer = self._packers[split]
        if isinstance(packer, ChatPacker):
            assert mask is not None
            rows = packer.add(tokens, mask, lengths)
        else:
            rows = packer.add(tokens, lengths)
        self._writers[split].add(rows)
        predicted = tokens if mask is None else tokens[mask.astype(bool)]
        number = SPLITS.index(split)
        self._token_counts[number] += np.bincount(predicted, minlength=self._token_counts.shape[1])
        self._num_documents[split] += len(lengths)
        self._num_tokens[split] += len(tokens)

    def _finish(self) -> None:
        for split, packer in self._packers.items():
            if isinstance(packer, ChatPacker):
                self._writers[split].add(packer.finish())

    @property
    def written(self) -> Written:
        train, validation = (self._token_counts[SPLITS.index(s)] for s in ("train", "validation"))
        return Written(
            num_rows={split: writer.num_rows for split, writer in self._writers.items()},
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            left_out={
                "too_many_tokens": int(self._counts[TOO_LONG]),
                "no_answer": int(self._counts[NO_ANSWER]),
            },
            num_cut=int(self._counts[CUT]),
            unigram_entropy=unigram_cross_entropy(train, validation),
        )
