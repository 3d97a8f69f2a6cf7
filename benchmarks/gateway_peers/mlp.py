"""The model that all of them serve."""

from __future__ import annotations

import torch

NUM_FEATURES = 100


def make_mlp() -> torch.nn.Module:
    """100-64-64-1, always with the same weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(NUM_FEATURES, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    ).eval()
