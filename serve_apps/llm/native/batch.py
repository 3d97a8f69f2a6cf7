"""One step as index tensors: made once per step and used by every layer.

Rows come in the order of the chunks: first the sequences that get their next token, all together;
then each prompt's chunk by itself.

    tables = BlockTables(shape, max_running=32, max_context_tokens=2048)
    batch = make_batch(chunks, tables, shape, dtype=torch.bfloat16, device="cpu")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from serve_apps.llm.native.blocks import BLOCK_TOKENS
from serve_apps.llm.native.low_rank import AdaptedRows, Adapter
from serve_apps.llm.native.scheduler import Chunk
from serve_apps.llm.native.shape import ModelShape

Masks = dict[int | None, torch.Tensor]
"""What is added to scores, for each window among the layers."""


@dataclass(frozen=True)
class DecodeRows:
    """Rows of sequences of about the same length that get their next token."""

    rows: slice
    cache_rows: torch.Tensor
    """[rows · kv heads, blocks]"""
    masks: Masks
    """[rows · kv heads, 1, tokens]"""


@dataclass(frozen=True)
class PromptRows:
    """Rows of one prompt's chunk."""

    rows: slice
    cache_rows: torch.Tensor
    """[kv heads, blocks]"""
    masks: Masks
    """[rows, tokens]"""


@dataclass(frozen=True)
class Batch:
    """What the model's forward pass takes."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    write_places: torch.Tensor
    """[rows · kv heads] where the cache keeps each row's keys and values."""
    decodes: tuple[DecodeRows, ...]
    prompts: tuple[PromptRows, ...]
    output_rows: torch.Tensor
    """Rows whose logits are wanted."""
    adapted: tuple[AdaptedRows, ...] = ()
    """Rows of sequences that ask for adapters."""


class BlockTables:
    """The blocks of each running sequence, as rows that numpy can index all at once."""

    def __init__(self, max_running: int, max_context_tokens: int) -> None:
        self._blocks = np.zeros((max_running, -(-max_context_tokens // BLOCK_TOKENS)), np.int64)
        self._owners: list[object] = [None] * max_running
        self._num_known = [0] * max_running

    def of(self, chunks: Series[Chunk], num_blocks: int) -> np.ndarray[tuple[int, ...], np.dtype]:
        """[chunks, num_blocks]; what a sequence does not have is any block."""
        for chunk in chunks:
            sequence = chunk.sequence
            place, blocks = sequence.place, sequence.blocks
            if self._owners[place] is not blocks:
                self._owners[place], self._num_known[place] = blocks, 0
            known = self._num_known[place]
            if known < len(blocks):
                self._blocks[place, known : len(blocks)] = blocks[known:]
                self._num_known[place] = len(blocks)
        return self._blocks[[chunk.sequence.place for chunk in chunks], :num_blocks]


def make_batch(
    chunks: Series[Chunk],
    tables: BlockTables,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: str,
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
) -> Batch:
    """Index tensors for the chunks of one step, those of one token that is the newest first."""
    num_decode = 0
    while num_decode < len(chunks) and chunks[num_decode].num_tokens == 1:
        num_decode += 1
    tokens, positions, places = [], [], []
    decodes: list[DecodeRows] = []
    prompts: list[PromptRows] = []
    windows = set(shape.windows)
    heads = np.arange(shape.num_kv_heads)
    first_row = 0
    for ready in _of_like_length(chunks[:num_decode]):
        last = np.array([chunk.sequence.num_computed for chunk in ready])
        blocks = tables.of(ready, int(last.max()) // BLOCK_TOKENS + 1)
        tokens.append(
            np.array(
                [chunk.sequence.tokens[place] for chunk, place in zip(ready, last, strict=True)]
            )
        )
        positions.append(last)
        last_blocks = blocks[np.arange(len(ready)), last // BLOCK_TOKENS]
        places.append(_write_places(last_blocks, last, heads))
        decodes.append(
            DecodeRows(
                rows=slice(first_row, first_row + len(ready)),
                cache_rows=_cache_rows(blocks, heads).to(device),
                masks={
                    window: _mask(last, blocks.shape[1], window, dtype)
                    .repeat_interleave(shape.num_kv_heads, dim=0)
                    .unsqueeze(1)
                    .to(device)
                    for window in windows
                },
            )
        )
        first_row += len(ready)
    for chunk in chunks[num_decode:]:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        end = start + chunk.num_tokens
        blocks = tables.of([chunk], -(-end // BLOCK_TOKENS))
        span = np.arange(start, end)
        tokens.append(np.array(sequence.tokens[start:end]))
        positions.append(span)
        places.append(_write_places(blocks[0, span // BLOCK_TOKENS], span, heads))
        prompts.append(
            PromptRows(
                rows=slice(first_row, first_row + chunk.num_tokens),
                cache_rows=_cache_rows(blocks, heads).to(device),
                masks={
                    window: _mask(span, blocks.shape[1], window, dtype).to(device)
                    for window in windows
                },
            )
        )
        first_row += chunk.num_tokens
    ends = np.cumsum([chunk.num_tokens for chunk in chunks]) - 1
    wanted = [chunk.gives_token for chunk in chunks]
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(tokens)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        write_places=torch.from_numpy(np.concatenate(places)).to(device),
        decodes=tuple(decodes),
        prompts=tuple(prompts),
        output_rows=torch.from_numpy(ends[wanted]).to(device),
        adapted=_adapted_rows(chunks, adapters, device),
    )


def _adapted_rows(
    chunks: Series[Chunk], adapters: Mapping[str, Adapter], device: str
) -> tuple[AdaptedRows, ...]:
    rows: dict[str, list[int]] = {}
    first = 0
    for chunk in chunks:
        digest = chunk.sequence.request.adapter
        if digest is not None:
            rows.setdefault(digest, []).extend(range(first, first + chunk.num_tokens))
        first += chunk.num_tokens
    return tuple(
        AdaptedRows(adapters[digest], torch.tensor(found, device=device))
        for digest, found in rows.items()
    )


def _of_like_length(chunks: Series[Chunk]) -> Iterator[Series[Chunk]]:
    """Runs of neighbours none of which has half the blocks of its first, or more than that has."""
    start = 0
    for end, chunk in enumerate(chunks):
        most = chunks[start].sequence.num_computed // BLOCK_TOKENS + 1
        own = chunk.sequence.num_computed // BLOCK_TOKENS + 1
        if not most < 2 * own <= 2 * most:
            yield chunks[start:end]
            start = end
    if chunks:
        yield chunks[start:]


IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _write_places(blocks: IntArray, positions: IntArray, heads: IntArray) -> IntArray:
    """[tokens · heads]: rows of the cache where each holds one head of one token."""
    rows = blocks[:, None] * len(heads) + heads
    places: IntArray = (rows * BLOCK_TOKENS + (positions % BLOCK_TOKENS)[:, None]).reshape(-1)
    return places


def _cache_rows(blocks: IntArray, heads: IntArray) -> torch.Tensor:
    """[sequences · heads, blocks]: rows of the cache where each holds one head of one block."""
    rows = blocks[:, None, :] * len(heads) + heads[:, None]
    return torch.from_numpy(rows.reshape(-1, blocks.shape[1]))


def _mask(
    positions: IntArray, num_blocks: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[positions, tokens]: 0 where a token at a position sees another, else minus infinity."""
    others = np.arange(num_blocks * BLOCK_TOKENS)
    hidden = others > positions[:, None]
    if window is not None:
        hidden |= others <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
