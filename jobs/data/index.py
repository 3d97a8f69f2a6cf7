"""The index of a corpus: digest and length of every document, and what becomes of each.

It is all that is held of a corpus: about 60 bytes a document while it is made. It knows nothing of
tokens.

    index = make_index(source, plan.shards, in_process, progress)
    fates, left_out = choose(index, config)
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from jobs.data.config import DataConfig, LanguageSource, TextConfig
from jobs.data.dataset import shown_reasons
from jobs.data.documents import measure
from jobs.data.execution import Arrays, Executor
from jobs.data.progress import Progress
from jobs.data.shards import Shard, read_shard
from jobs.data.splits import SPLITS, split_weighted

Fates = npt.NDArray[np.uint8]
"""Of each document: the number of its split in `SPLITS`, or one of the two below."""

IN_PARTS = len(SPLITS)
"""Cut by position into a part for every split."""
LEFT_OUT = 255

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Index:
    """One entry per document, in the corpus's order."""

    digests: npt.NDArray[np.uint64]
    """[document, 2]"""
    characters: npt.NDArray[np.int64]
    size_bytes: npt.NDArray[np.int64]
    shard_ends: npt.NDArray[np.int64]
    """Of each shard: the number of documents up to its end."""
    shard_digests: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def digest(self) -> str:
        """Of the documents and their order, however files or shards divide them."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    def of_shard(self, shard: int) -> slice:
        return slice(int(self.shard_ends[shard - 1]) if shard else 0, int(self.shard_ends[shard]))


def make_index(
    source: LanguageSource, shards: Sequence[Shard], execute: Executor, progress: Progress
) -> Index:
    """Read everything once.

    Raises:
        InputError: a document cannot be read.
    """
    found: list[Arrays] = []
    for arrays in execute(functools.partial(_scan, source), shards):
        progress.add(documents=len(arrays["characters"]), size_bytes=shards[len(found)].size_bytes)
        found.append(arrays)
    return Index(
        digests=_joined(found, "digests", np.uint64).reshape(-1, 2),
        characters=_joined(found, "characters", np.int64),
        size_bytes=_joined(found, "bytes", np.int64),
        shard_ends=np.cumsum([len(arrays["characters"]) for arrays in found], dtype=np.int64),
        shard_digests=tuple(shard_digest(arrays["digests"].tobytes()) for arrays in found),
    )


def _joined(found: Sequence[Arrays], name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(arrays[name] for arrays in found)]).astype(dtype)


def shard_digest(digests: bytes) -> bytes:
    """Of a shard's documents, from theirs one after the other."""
    return hashlib.blake2b(digests, digest_size=_DIGEST_BYTES).digest()


def choose(index: Index, config: DataConfig) -> tuple[Fates, dict[str, int]]:
    """What becomes of each document, and how many are left out for which reason.

    Raises:
        InputError: nothing is left.
    """
    reasons = _reasons(index, config.text)
    kept = np.flatnonzero(~np.any([*reasons.values()], axis=0))
    left_out = {reason: int(found.sum()) for reason, found in reasons.items()}
    if not len(kept):
        shown = shown_reasons(left_out)
        raise InputError(
            f"source '{config.source.kind}' of dataset '{config.name}' holds no document"
            + (f": {shown}" if shown else ""),
            hint="check data.source, data.text.min_characters and data.text.max_characters",
            param="data.source",
        )
    fates = np.full(len(index), LEFT_OUT, dtype=np.uint8)
    if config.splits.by == "position":
        fates[kept] = IN_PARTS
    else:
        ids = split_weighted(index.characters[kept], config.splits)
        for number, split in enumerate(SPLITS):
            fates[kept[ids[split]]] = number
    return fates, left_out


def _reasons(index: Index, text: TextConfig) -> dict[str, npt.NDArray[np.bool_]]:
    """For each reason to leave documents out: which; no document has two."""
    too_short = index.characters < text.min_characters
    too_long = (
        index.characters > text.max_characters
        if text.max_characters is not None
        else np.zeros(len(index), dtype=bool)
    )
    duplicate = np.zeros(len(index), dtype=bool)
    if text.deduplicate:
        duplicate = _repeated(index.digests) & ~too_short & ~too_long
    return {"duplicate": duplicate, "too_short": too_short, "too_long": too_long}


def _repeated(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of them came before."""
    # Stable: of equal ones, the first in the corpus stays first.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    repeated = np.zeros(len(digests), dtype=bool)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(1)
    return repeated


def _scan(source: LanguageSource, shard: Shard) -> Iterator[Arrays]:
    digests, characters, size_bytes = bytearray(), array("L"), array("L")
    for document in read_shard(source, shard):
        found = measure(document)
        digests += found.digest
        characters.append(found.characters)
        size_bytes.append(found.size_bytes)
    yield {
        "digests": np.frombuffer(digests, dtype=np.uint64),
        "characters": np.array(characters, dtype=np.uint32),
        "bytes": np.array(size_bytes, dtype=np.uint32),
    }
