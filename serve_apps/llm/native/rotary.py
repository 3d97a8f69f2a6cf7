"""Rotary positions as tables: every scaling that transformers computes, none of it twice.

cos, sin = rotary_tables(config, num_positions=2048, dtype=torch.float32, device="cpu")
"""

from __future__ import annotations

from typing import Any

import torch


def rotary_tables(
    config: Any, *, num_positions: int, head_size: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines, [num_positions, 1, head_size] each; see `rotate`."""
    frequencies, attention_factor = _frequencies(config, head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies.float())
    cos = torch.cat((angles, angles), dim=-1).cos() * attention_factor
    sin = torch.cat((-angles, angles), dim=-1).sin() * attention_factor
    return cos.unsqueeze(1).to(device, dtype), sin.unsqueeze(1).to(device, dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads [tokens, heads, head_size] to their positions: cos and sin are [tokens, 1, ...].

    The halves change places and one changes its sign, which the sines carry.
    """
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sin)


def _frequencies(config: Any, head_size: int) -> tuple[torch.Tensor, float]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # 'dynamic' changes beyond the positions that the model declares; no request goes there.
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return frequencies, float(attention_factor)
