"""The table of optimizers.

make_optimizer(OptimizerConfig(name="adamw"), model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jobs.training.config import OptimizerConfig


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
    return torch.optim.Adagrad(groups, lr=config.learning_rate, eps=config.epsilon)


def _sgd(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


_OPTIMIZERS: dict[str, Callable[[OptimizerConfig, list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "adagrad": _adagrad,
    "sgd": _sgd,
}
