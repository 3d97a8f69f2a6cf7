"""Families of tables against their counterparts in scikit-learn: same split, mean of five seeds.

Ours may be at most 2 % worse. Seeds choose splits, weights and the order of rows, so each number is
the same in every run of this test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cluster.config import parse_config, read_mapping
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.worker import WorkerJob, run_worker

CONFIGS = Path(__file__).parents[4] / "configs" / "train"
SEEDS = range(5)
ALLOWED = 0.02
DIABETES_MLP: dict[str, Any] = {
    **read_mapping(CONFIGS / "diabetes.yaml"),
    "model": {"family": "mlp", "hidden_sizes": [32]},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "early_stopping": {"patience": 5},
    "evaluate_every_steps": 10,
}


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting has tests of its own, and takes a second."""
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)


def seeded(values: dict[str, Any], seed: int) -> TrainConfig:
    data = values["data"]
    splits = {**data["splits"], "seed": seed}
    changes = {
        "seed": seed,
        "data": {**data, "splits": splits},
        "log_every_steps": 1000,
        "checkpoint": {"every_steps": 1000, "keep": 1},
    }
    return parse_config({**values, **changes}, TrainConfig, source="test")


def train(config: TrainConfig, root: Path) -> tuple[dict[str, float], Dataset]:
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    dataset, _ = catalog.ensure(config.data)
    job = WorkerJob(config, dataset.directory, root / f"run-{config.seed}")
    return run_worker(job, lambda event: None).metrics, dataset


def columns(dataset: Dataset, split: str, target: str) -> tuple[Any, Any]:
    rows = dataset.rows(split)
    found = rows.read(np.arange(len(rows)))
    return found["features"], found[target]


def mlp_options(seed: int, hidden_size: int) -> dict[str, Any]:
    return {"hidden_layer_sizes": (hidden_size,), "max_iter": 300, "random_state": seed}


def regressor(name: str, seed: int) -> Any:
    return (
        LinearRegression()
        if name == "linear"
        else MLPRegressor(**mlp_options(seed, 32), early_stopping=True, learning_rate_init=1e-2)
    )


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_regressions_err_as_little_as_scikit_learns(name: str, tmp_path: Path) -> None:
    values = read_mapping(CONFIGS / "diabetes.yaml") if name == "linear" else DIABETES_MLP
    ours, theirs = [], []
    for seed in SEEDS:
        metrics, dataset = train(seeded(values, seed), tmp_path)
        ours.append(metrics["test/rmse"])
        inputs, target = columns(dataset, "train", "target")
        mean, std = target.mean(), target.std()
        model = make_pipeline(StandardScaler(), regressor(name, seed))
        model.fit(inputs, (target - mean) / std)
        inputs, target = columns(dataset, "test", "target")
        theirs.append(mean_squared_error(target, model.predict(inputs) * std + mean) ** 0.5)
    assert np.mean(ours) <= np.mean(theirs) * (1 + ALLOWED)


@pytest.mark.parametrize(
    ("file", "make_reference"),
    [
        ("breast_cancer.yaml", lambda seed: LogisticRegression(max_iter=1000)),
        ("breast_cancer_mlp.yaml", lambda seed: MLPClassifier(**mlp_options(seed, 64))),
    ],
)
def test_classifiers_are_as_accurate_as_scikit_learns(
    file: str, make_reference: Any, tmp_path: Path
) -> None:
    ours, theirs = [], []
    for seed in SEEDS:
        metrics, dataset = train(seeded(read_mapping(CONFIGS / file), seed), tmp_path)
        ours.append(metrics["test/accuracy"])
        model = make_pipeline(StandardScaler(), make_reference(seed))
        model.fit(*columns(dataset, "train", "label"))
        inputs, labels = columns(dataset, "test", "label")
        theirs.append(accuracy_score(labels, model.predict(inputs)))
    assert np.mean(ours) >= np.mean(theirs) * (1 - ALLOWED)
