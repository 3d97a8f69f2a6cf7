"""Small datasets and configs to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig

DIGITS: dict[str, Any] = {
    "name": "digits",
    "source": {"kind": "sklearn", "dataset": "digits"},
    "splits": {"test": 0.2},
}

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A few seconds of training at most; any field can be given."""

    def make(**values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "name": "tiny",
            "data": DIGITS,
            "model": {"family": "cnn", "channels": [4], "hidden_size": 16},
            "steps": 8,
            "batch_size": 16,
            "log_every_steps": 1,
        }
        return TrainConfig.model_validate({**defaults, **values})

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Dataset:
    root = tmp_path_factory.mktemp("data")
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    return catalog.ensure(make_config().data)[0]


@pytest.fixture
def text_data(tmp_path: Path) -> dict[str, Any]:
    """A data section of a small text."""
    lines = [f"{n} squared is {n * n}, and 定日镜 number {n} turns\n" for n in range(400)]
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    return {
        "name": "text",
        "source": {"kind": "text", "paths": [str(tmp_path / "text.txt")]},
        "splits": {"by": "position"},
        "text": {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 16},
    }
