"""Muon: matrices go down the orthogonalised momentum of their gradients, all else by AdamW.

The mathematics is that of `torch.optim.Muon` (Jordan et al. 2024), in the form whose steps are as
long as AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate
and one decay serve both. Matrices of one shape are orthogonalised together. It needs whole
matrices, so nothing may have cut or flattened them.

    Muon([{"params": matrices, "muon": True}, {"params": others, "muon": False}], ...)
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

# Newton-Schulz iteration, as torch.optim.Muon has it.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# A step's root mean square is this share of the learning rate, like AdamW's (Liu et al., 2.2).
_STEP_SIZE = 0.2


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `muon` set."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        learning_rate: float,
        momentum: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        for group in groups:
            group["momentum"] = momentum
        super().__init__(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for shape, alike in itertools.groupby(
            sorted(matrices, key=lambda matrix: tuple(matrix.shape)), lambda matrix: matrix.shape
        ):
            same = list(alike)
            momenta = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in same])
            length = group["lr"] * _STEP_SIZE * max(shape) ** 0.5
            for matrix, step in zip(same, orthogonalise(momenta), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(step.to(matrix.dtype), alpha=-length)

    def _momentum(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient's moving mean, looked ahead (Nesterov)."""
        gradient = matrix.grad
        assert gradient is not None, "only matrices with a gradient are stepped"
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        ahead: torch.Tensor = gradient.lerp(mean, momentum)
        return ahead


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices [number, rows, columns] with all singular values brought near 1, in bfloat16."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = (matrices.mT if is_tall else matrices).bfloat16()
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_NUM_ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(
            found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a
        )
    return found.mT if is_tall else found
