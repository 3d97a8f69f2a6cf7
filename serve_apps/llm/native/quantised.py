"""Matrices as 8-bit integers, one scale per row: half of what a token has to read.

Weights alone are rounded; what goes in and comes out keeps its number type.

    project = Int8Linear(weight, bias)
"""

from __future__ import annotations

import torch
from torch.nn import functional

from serve_apps.llm.native.linear import UnfusedLinear

_LARGEST = 127
_MAX_ROWS = 64
"""From here on it is quicker to make floats of the matrix once than to do so for each row."""


class Int8Linear(UnfusedLinear):
    """A Linear on the CPU whose weight is rounded to 255 levels in each row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        exact = weight.float()
        scales = exact.abs().amax(dim=1).div_(_LARGEST).clamp_(min=torch.finfo(weight.dtype).tiny)
        # As it is stored, so that the levels are those that are multiplied with.
        self._scales = scales.to(weight.dtype)
        levels = (exact / self._scales.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        self._weight = levels.to(torch.int8)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > _MAX_ROWS:
            weight = self._weight.to(x.dtype).mul_(self._scales[:, None])
            return functional.linear(x, weight, self._bias)
        product = torch._weight_int8pack_mm(x, self._weight, self._scales)
        return product if self._bias is None else product.add_(self._bias)
