"""Optimizers: what each makes of weight decay, and that ours is torch's Adagrad."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.training.config import OptimizerConfig
from jobs.training.muon import orthogonalise
from jobs.training.optimizers import make_optimizer

REFERENCES: dict[str, Any] = {
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=decay),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.95), weight_decay=decay),
    "adagrad": lambda p, decay: torch.optim.Adagrad(p, lr=0.1, eps=1e-8, weight_decay=decay),
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=decay),
}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for step in range(4):
        torch.manual_seed(step)
        loss = model(torch.randn(8, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("name", REFERENCES)
def test_matrices_decay_as_in_torch_and_biases_do_not(name: str) -> None:
    config = OptimizerConfig.model_validate(
        {"name": name, "learning_rate": 0.1, "weight_decay": 0.3}
    )
    ours, theirs = linear(), linear()
    groups = [
        {"params": [theirs.weight]},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    expected = train(theirs, REFERENCES[name](groups, 0.3))
    assert torch.allclose(train(ours, make_optimizer(config, ours)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 0.1), ("adam", 0), ("adagrad", 0), ("sgd", 0)]
)
def test_only_decoupled_decay_is_on_by_default(name: str, expected: float) -> None:
    assert OptimizerConfig.model_validate({"name": name}).weight_decay == expected
    explicit = OptimizerConfig.model_validate({"name": name, "weight_decay": 0.3})
    assert explicit.weight_decay == 0.3


def test_muon_is_that_of_torch_for_inner_matrices_and_adamw_for_the_rest() -> None:
    config = OptimizerConfig.model_validate(
        {"name": "muon", "learning_rate": 0.1, "weight_decay": 0.3}
    )
    ours, theirs = stack(), stack()
    inner = [theirs[1].weight, theirs[2].weight]
    outer = [theirs[0].weight, theirs[3].weight]
    muon = torch.optim.Muon(inner, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": outer}, {"params": [theirs[1].bias], "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.3,
    )
    optimizer = make_optimizer(config, ours)
    for step in range(3):
        tokens = torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
            model.zero_grad()
            model(tokens).square().mean().backward()
            for one in optimizers:
                one.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Both orthogonalise in bfloat16, ours several matrices at a time.
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.005)
    assert len(optimizer.param_groups) == 3


def stack() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(7, 8),
        torch.nn.Linear(8, 8),
        torch.nn.Linear(8, 8, bias=False),
        torch.nn.Linear(8, 3, bias=False),
    )


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.shape == (3, 8)
    assert values.min() > 0.5
    assert values.max() < 1.4
