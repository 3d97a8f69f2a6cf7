"""Operations that training a token takes, by the model's shape.

Per token, 4 N + 2 M + 12 L H Q T. N numbers in matrices that are multiplied (the embedding only
where it is also the head): 2 N forward, and 2 N backward for what goes on to earlier layers; and
2 M for the gradients of the M of them that are trained. L layers of H heads of width Q over rows of
T tokens attend with 12 H Q T, forward and backward (Chowdhery et al. 2022, PaLM, appendix B). What
is computed a second time, for activation checkpointing, does not count: it is the price of memory.

    flops_per_token(model, sequence_length=512) * tokens_per_s / (peak * num_workers)    # MFU
"""

from __future__ import annotations

from typing import Any

import torch


def flops_per_token(model: torch.nn.Module, sequence_length: int) -> float | None:
    """None for what is not a language model of transformers."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        return None
    matrices = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    }
    num_all = sum(weight.numel() for weight in matrices.values())
    num_trained = sum(weight.numel() for weight in matrices.values() if weight.requires_grad)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12 * config.num_hidden_layers * heads * width * sequence_length
    return float(4 * num_all + 2 * num_trained + attention)
