"""Matrices of the model, laid out for the machine that multiplies with them.

On a CPU a token costs what it costs to read the weights, and oneDNN reads its own layout two to
three times as fast as rows (82 M parameters, bf16, 2 cores: 56 GB/s against 20); sums, products
and activations of the result cost nothing there. All matrices of the model go through here.

    project = make_linear(weight, bias)
    y = project.plus(x, residual)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch.nn import functional

_PACKED_FOR_ROWS = 32


class Linear(Protocol):
    """x @ weight.T + bias, alone or with what follows it; x is [rows, columns]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Followed by the activation."""

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiplied element by element."""

    def plus(self, x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """With a tensor of its shape added."""


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The quickest kind for a matrix where it lies."""
    if weight.device.type == "cpu" and _can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class UnfusedLinear(ABC):
    """What follows is computed after the product, in its place."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(self(x), inplace=True)

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(factor)

    def plus(self, x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return self(x).add_(addend)


class PlainLinear(UnfusedLinear):
    """torch's own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN's, in its own layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._bias = bias
        self._pointwise = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "none")

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "swish")

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._binary(x, factor, self._weight, self._bias, "mul")
        return product

    def plus(self, x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._binary(x, addend, self._weight, self._bias, "add")
        return total

    def _unary(self, x: torch.Tensor, name: str) -> torch.Tensor:
        result: torch.Tensor = self._pointwise(x, self._weight, self._bias, name, [], "")
        return result


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
