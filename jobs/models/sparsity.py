"""Zeros in a model's matrices: how many there are, and how they stay there while it trains.

It knows nothing of how they came to be there.

    keep_zeros(model)                # before an optimizer sees it
    density_of(model_dir)            # 0.5 where half of the weights are zero
"""

from __future__ import annotations

from pathlib import Path

import torch


def keep_zeros(model: torch.nn.Module) -> None:
    """Matrices' weights that are zero now get no gradient, so that no optimizer moves them."""
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.requires_grad and parameter.device.type != "meta":
            zeros = parameter.detach() == 0
            if zeros.any():
                parameter.register_hook(_Masked(zeros))  # type: ignore[no-untyped-call]


def density_of(model_dir: Path) -> float:
    """Share of the weights of all matrices that are not zero; packed ones are not counted."""
    from safetensors import safe_open

    num_weights = num_there = 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                weight = tensors.get_tensor(name)
                if weight.ndim == 2 and weight.is_floating_point():
                    num_weights += weight.numel()
                    num_there += int(weight.count_nonzero())
    return num_there / num_weights if num_weights else 1.0


class _Masked:
    """A gradient without what would change the zeros."""

    def __init__(self, zeros: torch.Tensor) -> None:
        self._zeros = zeros

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self._zeros = self._zeros.to(gradient.device)
        return gradient.masked_fill(self._zeros, 0)
