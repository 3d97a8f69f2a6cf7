"""Causal attention for training in bfloat16 on a CPU, where torch's own is slow.

torch's flash kernel computes bfloat16 on a CPU at about a tenth of the speed of its matrix
products: 85 ms for 4 rows of 512 tokens and 8 heads of 64, forward and backward, against 30 ms here
(one core with AVX512-BF16, torch 2.13). Scores are products of whole blocks of queries, rounded to
bfloat16 as transformers' own `eager` attention does. Everything else is left to
`scaled_dot_product_attention`.

Shapes: B rows, H heads, G key-value heads, T tokens, Q queries of a block, D width of a head.

    register()
    model.set_attn_implementation(NAME)
"""

from __future__ import annotations

import functools
from typing import Any

import torch

NAME = "heliostat_blocks"
_BLOCK_TOKENS = 256
# Beyond this, probabilities kept for the backward pass take more memory than speed is worth.
_MAX_TOKENS = 2048


@functools.cache
def register() -> None:
    """Make the name known to transformers, with the masks of `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; answers [B, T, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _suits(query_BHTD, value_BGTD, dropout):
        answer: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query_BHTD,
            key_BGTD,
            value_BGTD,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **options,
        )
        return answer
    # Rotary positions leave queries and keys in float32 under autocast.
    dtype = value_BGTD.dtype
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query_BHTD.shape[1] // key_BGTD.shape[1]
    if shared > 1:
        key_BGTD = key_BGTD.repeat_interleave(shared, 1)
        value_BGTD = value_BGTD.repeat_interleave(shared, 1)
    attended_BHTD = attend_in_blocks(
        (query_BHTD * scale).to(dtype), key_BGTD.to(dtype), value_BGTD, attention_mask
    )
    return attended_BHTD.transpose(1, 2).contiguous(), None


def _suits(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    return (
        query.device.type == "cpu"
        and value.dtype == torch.bfloat16
        and dropout == 0.0
        and 1 < query.shape[2] <= _MAX_TOKENS
        and query.shape[2] == value.shape[2]
    )


def attend_in_blocks(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    mask_B1TT: torch.Tensor | None,
    *,
    block_tokens: int = _BLOCK_TOKENS,
) -> torch.Tensor:
    """Causal attention of scaled queries; `mask` holds true where a token may be seen."""
    num_tokens = query_BHTD.shape[2]
    blocks = []
    for start in range(0, num_tokens, block_tokens):
        end = min(start + block_tokens, num_tokens)
        queries_BHQD = query_BHTD[:, :, start:end]
        scores_BHQT = queries_BHQD @ key_BHTD[:, :, :end].transpose(2, 3)
        if mask_B1TT is None:
            hidden_QT = torch.ones(
                end - start, end, dtype=torch.bool, device=scores_BHQT.device
            ).triu(start + 1)
        else:
            hidden_QT = mask_B1TT[:, :, start:end, :end].logical_not()
        scores_BHQT = scores_BHQT.masked_fill(hidden_QT, -torch.inf)
        blocks.append(scores_BHQT.softmax(-1) @ value_BHTD[:, :, :end])
    return torch.cat(blocks, 2)
