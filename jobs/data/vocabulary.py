"""The tokenizer of a dataset: learnt from the train split, or taken as it is.

It knows nothing about rows.

    files = make_tokenizer(config, plan, index, fates, in_process, progress)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.data.config import (
    BpeTokenizer,
    CharacterTokenizer,
    DataConfig,
    LanguageSource,
    SplitConfig,
)
from jobs.data.documents import Document, batched
from jobs.data.encoding import split_pieces
from jobs.data.execution import Arrays, Executor, join_texts, split_texts
from jobs.data.index import IN_PARTS, Fates, Index
from jobs.data.progress import Progress
from jobs.data.shards import Plan, Shard, read_shard
from jobs.data.tokenizer_files import TokenizerFiles
from jobs.data.tokenizing import character_tokenizer, code_points, cut_at_lines, train_bpe

_TRAIN = 0
_PIECE_CHARACTERS = 65_536
"""Texts that merges are learnt from are fed in pieces: the trainer holds a few hundred of them."""
_NUM_CODE_POINTS = 0x110000

NewProgress = Callable[[str, int], Progress]
"""Progress of a pass, by what it does and of how many bytes."""


@dataclass(frozen=True)
class TrainText:
    """How the train split's text is read, the same for every shard."""

    source: LanguageSource
    splits: SplitConfig
    share: float
    """Of each document's text."""


@dataclass(frozen=True)
class TrainTask:
    shard: Shard
    fates: Fates
    chosen: npt.NDArray[np.bool_]
    """Which documents to read, all of them of the train split or with a part in it."""


def make_tokenizer(
    config: DataConfig,
    plan: Plan,
    index: Index,
    fates: Fates,
    execute: Executor,
    new_progress: NewProgress,
) -> TokenizerFiles:
    """Learn a tokenizer from the train split."""
    tokenizer = config.text.tokenizer
    is_train = (fates == _TRAIN) | (fates == IN_PARTS)
    if isinstance(tokenizer, BpeTokenizer):
        chosen, share = _draw(config, index, is_train, tokenizer.train_bytes)
        text = TrainText(config.source_of_text, config.splits, share)
        progress = new_progress("learning merges", int(index.size_bytes[chosen].sum() * share))
        tasks = _tasks(plan, index, fates, chosen)
        found = execute(functools.partial(_texts, text), tasks)
        return train_bpe(_said(found, progress), tokenizer.vocab_size)
    assert isinstance(tokenizer, CharacterTokenizer)
    text = TrainText(config.source_of_text, config.splits, 1.0)
    progress = new_progress("collecting characters", int(index.size_bytes[is_train].sum()))
    seen = np.zeros(_NUM_CODE_POINTS, dtype=bool)
    tasks = _tasks(plan, index, fates, is_train)
    for arrays in execute(functools.partial(_characters, text), tasks):
        seen[arrays["codes"]] = True
        progress.add(documents=int(arrays["documents"][0]), size_bytes=int(arrays["bytes"][0]))
    return character_tokenizer("".join(map(chr, np.flatnonzero(seen))) + tokenizer.more)


def _draw(
    config: DataConfig, index: Index, is_train: npt.NDArray[np.bool_], max_bytes: int
) -> tuple[npt.NDArray[np.bool_], float]:
    """Documents that hold about `max_bytes`, drawn by the seed, and the share to take of each."""
    splits = config.splits
    share = 1 - splits.validation - splits.test if splits.by == "position" else 1.0
    ids = np.flatnonzero(is_train)
    order = np.random.Generator(np.random.Philox(key=splits.seed)).permutation(ids)
    ends = np.cumsum(index.size_bytes[order] * share)
    if not len(ends) or ends[-1] <= max_bytes:
        return is_train, 1.0
    chosen = np.zeros(len(index), dtype=bool)
    count = max(1, int(np.searchsorted(ends, max_bytes, side="right")))
    chosen[order[:count]] = True
    return chosen, min(1.0, max_bytes / float(ends[count - 1]))


def _tasks(
    plan: Plan, index: Index, fates: Fates, chosen: npt.NDArray[np.bool_]
) -> list[TrainTask]:
    """Shards without a chosen document are not read."""
    of_shard = [index.of_shard(number) for number in range(len(plan.shards))]
    return [
        TrainTask(shard, fates[part], chosen[part])
        for shard, part in zip(plan.shards, of_shard, strict=True)
        if chosen[part].any()
    ]


def _said(found: Iterator[Arrays], progress: Progress) -> Iterator[str]:
    for arrays in found:
        yield from split_texts(arrays)
        progress.add(documents=int(arrays["documents"][0]), size_bytes=len(arrays["utf8"]))


def _texts(text: TrainText, task: TrainTask) -> Iterator[Arrays]:
    for batch in batched(_train_documents(text, task), lambda document: document.num_characters):
        pieces = [piece for document in batch for piece in _thinned(document.text, text.share)]
        yield {**join_texts(pieces), "documents": np.array([len(batch)])}


def _characters(text: TrainText, task: TrainTask) -> Iterator[Arrays]:
    for batch in batched(_train_documents(text, task), lambda document: document.num_characters):
        joined = "".join(document.text for document in batch)
        yield {
            "codes": np.unique(code_points(joined)),
            "documents": np.array([len(batch)]),
            "bytes": np.array([len(joined.encode("utf-8"))]),
        }


def _train_documents(text: TrainText, task: TrainTask) -> Iterator[Document]:
    for number, document in enumerate(read_shard(text.source, task.shard)):
        if number < len(task.chosen) and task.chosen[number]:
            for piece in split_pieces(document, int(task.fates[number]), text.splits):
                if piece.split == _TRAIN:
                    yield piece.document


def _thinned(text: str, share: float) -> Sequence[str]:
    """That share of a text's pieces, evenly from its beginning to its end."""
    pieces = list(cut_at_lines(text, _PIECE_CHARACTERS))
    count = max(1, round(len(pieces) * share)) if pieces else 0
    return [pieces[number * len(pieces) // count] for number in range(count)]
