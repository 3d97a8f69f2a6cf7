"""Families of tables: linear_regression, logistic_regression and mlp, exported as ONNX graphs.

A family is a network and a task. The network sees standardised features; standardising, and giving
a predicted number its unit back, are processing, stored in the package as data. Shapes: B rows,
F features, C classes.

    family = mlp(MlpConfig(family="mlp"), DataShape.of(dataset.info))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cluster.errors import InputError
from cluster.processing import (
    Cast,
    Labels,
    PostStep,
    Processing,
    Scale,
    Softmax,
    Standardize,
    TensorSpec,
)
from jobs.data.dataset import Dataset
from jobs.data.table_info import FEATURES, LABEL, TARGET, TableInfo
from jobs.models.config import (
    LinearRegressionConfig,
    LogisticRegressionConfig,
    Metric,
    MlpConfig,
)
from jobs.models.export_onnx import export_onnx, plain_copy
from jobs.models.family import Batch, DataShape, Exported
from jobs.models.measures import (
    CLASSIFICATION_METRICS,
    REGRESSION_METRICS,
    classification_sums,
    metrics_of_classification,
    metrics_of_regression,
    regression_sums,
)
from jobs.models.weighting import num_rows, weighted_sum

_NUM_GOLDEN_ROWS = 8
_MAX_OFFSET = 1000.0
"""Times a target's standard deviation; beyond it the 7 digits of 32 bits leave fewer than 4."""

MakeNetwork = Callable[[int, int], list[nn.Module]]
"""Layers from a number of features to a number of outputs."""


def linear_regression(_config: LinearRegressionConfig, shape: DataShape) -> Tabular:
    """Raises InputError if the data is no table, or its target a class."""
    table = _require_table("linear_regression", shape)
    if shape.class_names:
        raise _wrong_target("linear_regression", "numbers", table, "logistic_regression")
    return Tabular(_linear, Regression(table), table)


def logistic_regression(_config: LogisticRegressionConfig, shape: DataShape) -> Tabular:
    """Raises InputError if the data is no table, or its target a number."""
    table = _require_table("logistic_regression", shape)
    if not shape.class_names:
        raise _wrong_target("logistic_regression", "classes", table, "linear_regression")
    return Tabular(_linear, Classification(shape.class_names), table)


def mlp(config: MlpConfig, shape: DataShape) -> Tabular:
    """Raises InputError if the data is no table."""
    table = _require_table("mlp", shape)

    def layers(num_features: int, num_outputs: int) -> list[nn.Module]:
        found: list[nn.Module] = []
        for width in config.hidden_sizes:
            found += [nn.Linear(num_features, width), nn.ReLU(), nn.Dropout(config.dropout)]
            num_features = width
        return [*found, nn.Linear(num_features, num_outputs)]

    task = Classification(shape.class_names) if shape.class_names else Regression(table)
    return Tabular(layers, task, table)


def _linear(num_features: int, num_outputs: int) -> list[nn.Module]:
    return [nn.Linear(num_features, num_outputs)]


class Task(Protocol):
    """What is predicted, and how well."""

    output: str
    """Name of what the graph gives."""
    num_outputs: int
    metric_names: tuple[Metric, ...]

    def finish(self) -> list[nn.Module]:
        """Layers that give the outputs their shape."""

    def losses(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each row."""

    def measure(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A float64 vector that adds up over batches."""

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Metrics from such a sum."""

    def post(self) -> tuple[PostStep, ...]:
        """From the graph's output to the client's."""


class Regression:
    """A number; the network predicts it standardised."""

    output = "prediction"
    num_outputs = 1
    metric_names = REGRESSION_METRICS

    def __init__(self, table: TableInfo) -> None:
        self._mean, self._std = table.target_mean, table.target_std

    def finish(self) -> list[nn.Module]:
        return [nn.Flatten(start_dim=0)]

    def losses(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return functional.mse_loss(output, self._standardized(batch), reduction="none")

    def measure(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return regression_sums(output, self._standardized(batch))

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return metrics_of_regression(sums, self._std)

    def post(self) -> tuple[PostStep, ...]:
        scale = Scale(tensor=self.output, factor=self._std, offset=self._mean)
        if abs(self._mean) < _MAX_OFFSET * self._std:
            return (scale,)
        # 32 bits would round away what the network has learnt.
        return (Cast(tensor=self.output, datatype="FP64"), scale)

    def _standardized(self, batch: Batch) -> torch.Tensor:
        """In 64 bits until the mean is gone: dates, say, vary little for their size."""
        return ((batch[TARGET] - self._mean) / self._std).float()


class Classification:
    """One of several classes; the network gives a score for each."""

    output = "logits"
    metric_names = CLASSIFICATION_METRICS

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._class_names = class_names
        self.num_outputs = len(class_names)

    def finish(self) -> list[nn.Module]:
        return []

    def losses(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(output, batch[LABEL], reduction="none")

    def measure(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return classification_sums(output, batch[LABEL])

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return metrics_of_classification(sums)

    def post(self) -> tuple[PostStep, ...]:
        return (
            Labels(tensor=self.output, into="label", labels=self._class_names),
            Softmax(tensor=self.output, into="probabilities"),
        )


class Tabular:
    """See `jobs.models.family.Family`."""

    unit = "samples"
    units_per_row = 1

    def __init__(self, make_network: MakeNetwork, task: Task, table: TableInfo) -> None:
        self._make_network, self._task, self._table = make_network, task, table
        self.metric_names = task.metric_names

    def build(self) -> nn.Module:
        layers = self._make_network(len(self._table.feature_names), self._task.num_outputs)
        return nn.Sequential(*layers, *self._task.finish())

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return weighted_sum(self.row_losses(model, batch), batch)

    def num_units(self, batch: Batch) -> torch.Tensor:
        return num_rows(batch)

    def row_losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._task.losses(self._predict(model, batch), batch)

    def measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._task.measure(self._predict(model, batch), batch)

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return self._task.metrics(sums)

    def export(self, model: nn.Module, dataset: Dataset, directory: Path) -> Exported:
        example = torch.zeros(2, len(self._table.feature_names))
        export_onnx(
            plain_copy(model, self.build()),
            {FEATURES: example},
            [self._task.output],
            directory / "model.onnx",
        )
        rows = dataset.rows("train")
        golden = rows.read(np.arange(min(_NUM_GOLDEN_ROWS, len(rows))))[FEATURES]
        return Exported("graph", directory, {FEATURES: golden}, self._processing())

    def _processing(self) -> Processing:
        """Clients send raw features, in the order of the profile's `feature_names`."""
        shape = (-1, len(self._table.feature_names))
        return Processing(
            inputs=(TensorSpec(name=FEATURES, datatype="FP32", shape=shape),),
            pre=(Standardize(tensor=FEATURES, mean=self._table.mean, std=self._table.std),),
            post=self._task.post(),
        )

    def _predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        raw = batch[FEATURES]
        # As NumPy does it in the package: large values lose no digits.
        mean = raw.new_tensor(self._table.mean, dtype=torch.float64)
        std = raw.new_tensor(self._table.std, dtype=torch.float64)
        output: torch.Tensor = model(((raw - mean) / std).to(raw.dtype))
        return output.float()


def _require_table(family: str, shape: DataShape) -> TableInfo:
    if shape.table is None:
        raise InputError(
            f"model.family '{family}' needs a table, and the data has: "
            f"{', '.join(sorted(shape.columns))}",
            hint="choose a data.source of kind table, or another model.family",
            param="model.family",
        )
    return shape.table


def _wrong_target(family: str, predicted: str, table: TableInfo, other: str) -> InputError:
    found = "a number" if predicted == "classes" else "a class"
    return InputError(
        f"model.family '{family}' predicts {predicted}, and target '{table.target_name}' is "
        f"{found}",
        hint=f"choose model.family={other} or mlp, or correct data.source.task",
        param="model.family",
    )
