"""Documents packed in a row of tokens: where each begins, and the positions within it.

Attention between documents is kept out by the positions alone: transformers takes tokens whose
positions do not follow on for the beginning of another text. It knows nothing of models.

Shapes: B rows, T tokens.

    model(input_ids=tokens_BT, position_ids=document_positions(starts_BT))
"""

from __future__ import annotations

import torch


def document_positions(starts_BT: torch.Tensor) -> torch.Tensor:
    """Distance of each token from the first of its document; a row's first token begins one."""
    indices_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    begun_BT = torch.where(starts_BT.bool(), indices_T, 0).cummax(1).values
    return indices_T - begun_BT
