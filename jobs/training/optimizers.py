"""The table of optimizers; those of torch are its fused ones, where it has them.

make_optimizer(OptimizerConfig(name="adamw"), model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jobs.training.config import OptimizerConfig
from jobs.training.muon import Muon


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
    if config.name == "muon":
        return make_muon(config, model)
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


def make_muon(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Muon for the matrices between a model's first and last; embeddings and heads are tables of
    vectors, one per token or class, and go with the vectors."""
    matrices = inner_matrices(model)
    groups = [
        {**group, "params": part, "muon": is_muon}
        for group in _groups(config, model)
        for is_muon in (True, False)
        if (part := [p for p in group["params"] if (id(p) in matrices) is is_muon])
    ]
    return Muon(
        groups,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        betas=config.betas,
        epsilon=config.epsilon,
    )


def inner_matrices(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters of linear layers, but for the last one, which predicts."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    outer = {id(module.weight) for module in (*tables, *linear[-1:])}
    return {id(module.weight) for module in linear} - outer


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
