"""The second pass over a corpus: documents become token ids, shard by shard.

Every function here is a task for an executor. It knows nothing about rows.

    for arrays in execute(functools.partial(encode_shard, job), tasks): packer.add(arrays["tokens"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from jobs.data.chat import make_chat_encoder
from jobs.data.config import ConversationSource, LanguageSource, SplitConfig
from jobs.data.documents import Document, batched, measure
from jobs.data.execution import Arrays
from jobs.data.index import IN_PARTS, LEFT_OUT, Fates, shard_digest
from jobs.data.packing import token_dtype
from jobs.data.shards import Shard, read_shard
from jobs.data.splits import SPLITS, cut_by_position
from jobs.data.tokenizer_files import TokenizerFiles
from jobs.data.tokenizing import Ids, make_encoder

CUT, TOO_LONG, NO_ANSWER = range(3)
"""Places in "counts": conversations that were cut, were too long, or have nothing to learn."""


@dataclass(frozen=True)
class EncodeJob:
    """What is the same for every shard."""

    source: LanguageSource
    splits: SplitConfig
    files: TokenizerFiles
    vocab_size: int
    by_character: bool
    max_tokens: int
    """Of a conversation."""
    long_conversations: Literal["cut", "drop"]


@dataclass(frozen=True)
class EncodeTask:
    shard: Shard
    fates: Fates
    digest: bytes
    """Of the shard's documents as they were indexed."""


@dataclass(frozen=True)
class Piece:
    """A document, or its part in one split."""

    split: int
    document: Document


def encode_shard(job: EncodeJob, task: EncodeTask) -> Iterator[Arrays]:
    """For a few pieces at a time: "splits" and "lengths" of each, and all their "tokens", "mask"
    (for conversations) and "counts".

    Raises:
        InputError: a document cannot be encoded, or is not what it was when it was indexed.
    """
    encode = _encode_chats if isinstance(job.source, ConversationSource) else _encode_texts
    for batch in batched(_pieces(job, task), lambda piece: piece.document.num_characters):
        yield encode(job, batch)


def split_pieces(document: Document, fate: int, config: SplitConfig) -> Iterator[Piece]:
    """What of a document goes where."""
    if fate < IN_PARTS:
        yield Piece(fate, document)
    elif fate == IN_PARTS:
        parts = cut_by_position(document.text, config)
        for number, split in enumerate(SPLITS):
            if parts[split]:
                yield Piece(number, Document(parts[split], document.locate))


def _pieces(job: EncodeJob, task: EncodeTask) -> Iterator[Piece]:
    digests = bytearray()
    for number, document in enumerate(read_shard(job.source, task.shard)):
        digests += measure(document).digest
        if number < len(task.fates) and task.fates[number] != LEFT_OUT:
            yield from split_pieces(document, int(task.fates[number]), job.splits)
    if shard_digest(bytes(digests)) != task.digest:
        (first, *_) = task.shard.parts
        raise InputError(
            f"data file '{first.file.name}', or one after it, changed while it was prepared",
            hint="run the same command again once nothing writes to it",
            param="data.source.paths",
        )


def _encode_texts(job: EncodeJob, pieces: Sequence[Piece]) -> Arrays:
    encoder = make_encoder(job.files, by_character=job.by_character)
    try:
        ids = encoder.encode([piece.document.text for piece in pieces])
    except InputError:
        for piece in pieces:
            _encode_or_name(job, piece)
        raise
    return _arrays(job, [piece.split for piece in pieces], ids, [], [0, 0, 0], _size_bytes(pieces))


def _encode_or_name(job: EncodeJob, piece: Piece) -> None:
    try:
        make_encoder(job.files, by_character=job.by_character).encode([piece.document.text])
    except InputError as error:
        message = f"'{piece.document.locate()}': {error.message}"
        raise InputError(message, hint=error.hint, param=error.param) from None


def _encode_chats(job: EncodeJob, pieces: Sequence[Piece]) -> Arrays:
    encoder = make_chat_encoder(job.files)
    counts = [0, 0, 0]
    splits: list[int] = []
    kept: list[Ids] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for piece in pieces:
        assert not isinstance(piece.document.content, str)
        ids, mask = encoder.encode(piece.document.content, piece.document.locate)
        if len(ids) > job.max_tokens:
            if job.long_conversations == "drop":
                counts[TOO_LONG] += 1
                continue
            counts[CUT] += 1
            ids, mask = ids[: job.max_tokens], mask[: job.max_tokens]
        if not mask.any():
            counts[NO_ANSWER] += 1
            continue
        splits.append(piece.split)
        kept.append(ids)
        masks.append(mask)
    return _arrays(job, splits, kept, masks, counts, _size_bytes(pieces))


def _size_bytes(pieces: Sequence[Piece]) -> int:
    return sum(measure(piece.document).size_bytes for piece in pieces)


def _arrays(
    job: EncodeJob,
    splits: Sequence[int],
    ids: Sequence[Ids],
    masks: Sequence[npt.NDArray[np.bool_]],
    counts: Sequence[int],
    size_bytes: int,
) -> Arrays:
    dtype = token_dtype(job.vocab_size)
    return {
        "splits": np.array(splits, dtype=np.uint8),
        "lengths": np.array([len(of_one) for of_one in ids], dtype=np.int64),
        "tokens": np.concatenate([np.zeros(0, dtype), *(one.astype(dtype) for one in ids)]),
        "mask": np.concatenate([np.zeros(0, np.uint8), *(one.astype(np.uint8) for one in masks)]),
        "counts": np.array(counts, dtype=np.int64),
        "bytes": np.array([size_bytes], dtype=np.int64),
    }
