"""Keys and values of all layers, in blocks; which tokens are where is blocks.py's business.

cache = KeyValueCache(shape, num_blocks=1024, dtype=torch.bfloat16, device="cpu")
"""

from __future__ import annotations

import numpy as np
import torch

from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.native.blocks import BLOCK_TOKENS
from serve_apps.llm.native.shape import ModelShape


class KeyValueCache:
    """For each layer keys and values, one row per block and head, so that one head's tokens of a
    sequence lie one after the other once its rows are gathered."""

    def __init__(
        self, shape: ModelShape, num_blocks: int, *, dtype: torch.dtype, device: str
    ) -> None:
        self._head_size = shape.head_size
        self._rows = _zeros(
            shape.num_layers,
            2,
            num_blocks * shape.num_kv_heads,
            BLOCK_TOKENS * shape.head_size,
            dtype=dtype,
            device=device,
        )
        self._room = self._rows.new_empty(0)
        # One view for each layer, made once: making them costs as much as a small product.
        self._gathered = [(rows[0], rows[1]) for rows in self._rows]
        self._written = [
            (rows[0].view(-1, self._head_size), rows[1].view(-1, self._head_size))
            for rows in self._rows
        ]

    def write(
        self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values [tokens · heads, head size] at `places`."""
        into_keys, into_values = self._written[layer]
        into_keys.index_copy_(0, places, keys)
        into_values.index_copy_(0, places, values)

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [sequences · heads, tokens, head size] of rows [sequences · heads,
        blocks]; good until the next are gathered."""
        flat = rows.view(-1)
        into = self._room_for(len(flat))
        for source, target in zip(self._gathered[layer], into, strict=True):
            torch.index_select(source, 0, flat, out=target)
        keys, values = (target.view(rows.shape[0], -1, self._head_size) for target in into)
        return keys, values

    def _room_for(self, num_rows: int) -> torch.Tensor:
        """[2, num_rows, …], the same memory for every layer: fresh memory would be read in anew."""
        row_size = self._rows.shape[-1]
        if self._room.numel() < 2 * num_rows * row_size:
            self._room = self._rows.new_empty(2 * 2 * num_rows * row_size)
        return self._room[: 2 * num_rows * row_size].view(2, num_rows, row_size)


def _zeros(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros that cost memory only once they are written, on a CPU: most of a cache never is."""
    if device != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    as_bytes = np.zeros((*size[:-1], size[-1] * dtype.itemsize), np.uint8)
    return torch.from_numpy(as_bytes).view(dtype)


def count_blocks(shape: ModelShape, dtype: torch.dtype, budget: CacheBudget) -> int:
    """Blocks within the budget, but no more than all running sequences could fill."""
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * dtype.itemsize
    affordable = budget.max_cache_bytes // (token_bytes * BLOCK_TOKENS)
    useful = budget.max_running * -(-shape.max_context_tokens // BLOCK_TOKENS)
    return max(2, min(affordable, useful))
