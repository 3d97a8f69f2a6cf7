"""The table of optimizers.

make_optimizer(OptimizerConfig(name="adamw"), model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jobs.training.config import OptimizerConfig


class Adagrad(torch.optim.Optimizer):
    """torch's Adagrad without decay of the rate, its state made at the first step.

    torch's own makes it at once, for which DeepSpeed's ZeRO replaces it and loses its groups
    (0.19: an IndexError in the first step).
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, learning_rate: float, epsilon: float
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "eps": epsilon, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if not state:
                    state["sum"] = torch.zeros_like(parameter)
                state["sum"].addcmul_(gradient, gradient)
                scale = state["sum"].sqrt().add_(group["eps"])
                parameter.addcdiv_(gradient, scale, value=-group["lr"])


def make_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    return _OPTIMIZERS[config.name](config, _groups(config, model))


def _groups(config: OptimizerConfig, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
    )


def _adam(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
    )


def _adagrad(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return Adagrad(groups, learning_rate=config.learning_rate, epsilon=config.epsilon)


def _sgd(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


_OPTIMIZERS: dict[str, Callable[[OptimizerConfig, list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "adagrad": _adagrad,
    "sgd": _sgd,
}
