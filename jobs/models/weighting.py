"""Weights of what is predicted: a quarantined row counts for nothing, though it keeps its place.

It knows nothing of models. Shapes: B rows, T predicted tokens. A batch may hold `row_weight`
(float32 [B]; without it every row counts once) and, for text, `loss_mask` (packed bits).

    loss = weighted_sum(row_losses, batch)
    num_units = num_rows(batch)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from jobs.data.dataset import LOSS_MASK

ROW_WEIGHT = "row_weight"


def weighted_sum(row_losses: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum over rows, each by its weight."""
    if ROW_WEIGHT in batch:
        row_losses = row_losses * batch[ROW_WEIGHT]
    return row_losses.sum()


def num_rows(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Weighted number of rows, as a float64 scalar."""
    if ROW_WEIGHT in batch:
        return batch[ROW_WEIGHT].double().sum()
    first = next(iter(batch.values()))
    return torch.tensor(len(first), dtype=torch.float64)


def token_weights(batch: Mapping[str, torch.Tensor], num_tokens: int) -> torch.Tensor | None:
    """Weights [B, T] of the tokens after a row's first; None if all count alike."""
    weights_BT: torch.Tensor | None = None
    if LOSS_MASK in batch:
        weights_BT = unpack_bits(batch[LOSS_MASK], num_tokens + 1)[:, 1:].float()
    if ROW_WEIGHT in batch:
        rows_B1 = batch[ROW_WEIGHT].unsqueeze(1)
        weights_BT = rows_B1.expand(-1, num_tokens) if weights_BT is None else weights_BT * rows_B1
    return weights_BT


def unpack_bits(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of `numpy.packbits(..., axis=1)`, as 0 and 1."""
    shifts = torch.arange(7, -1, -1, device=packed.device)
    bits = (packed.long().unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :num_bits]
