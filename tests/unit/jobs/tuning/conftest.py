"""Small sweeps over a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobs.tuning.config import TuneConfig

TRAIN: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "source": {"kind": "sklearn", "dataset": "digits"}},
    "model": {"family": "cnn", "channels": [4], "hidden_size": 16},
    "steps": 20,
    "batch_size": 16,
    "evaluate_every_steps": 5,
}

MakeSweep = Callable[..., TuneConfig]


@pytest.fixture(scope="session")
def make_sweep() -> MakeSweep:
    """Three draws of a learning rate; any field can be given."""

    def make(**values: Any) -> TuneConfig:
        defaults: dict[str, Any] = {
            "name": "sweep",
            "train": TRAIN,
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}},
        }
        if values.get("search") != "grid":
            defaults["num_trials"] = 3
        return TuneConfig.model_validate({**defaults, **values})

    return make
