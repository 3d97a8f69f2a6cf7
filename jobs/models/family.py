"""The seam between training and models: what a model family must be able to do.

A family knows its architecture, its loss, its metrics and how it is exported; it knows nothing of
optimisers, workers, checkpoints or packages.

    family = make_family(config.model, DataShape.of(dataset.info))
    model = family.build()
    loss = family.loss(model, batch)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from cluster.processing import Array, Processing
from jobs.data.dataset import ColumnInfo, Dataset, DatasetInfo
from jobs.data.table_info import TableInfo
from jobs.models.config import Metric

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class DataShape:
    """What of a dataset decides a model's shape."""

    columns: dict[str, ColumnInfo]
    class_names: tuple[str, ...] = ()
    vocab_size: int = 0
    sequence_length: int = 0
    end_id: int = 0
    """Token that ends a document."""
    table: TableInfo | None = None

    @classmethod
    def of(cls, info: DatasetInfo) -> DataShape:
        return cls(
            columns=info.columns,
            class_names=info.class_names,
            vocab_size=info.text.vocab_size if info.text else 0,
            sequence_length=info.text.sequence_length if info.text else 0,
            end_id=info.text.end_id if info.text else 0,
            table=info.table,
        )


@dataclass(frozen=True)
class Exported:
    """A model in its public form, in `directory`, and what its package must say of it."""

    kind: Literal["language_model", "graph", "adapter"]
    directory: Path
    golden_inputs: Mapping[str, Array] | Sequence[str]
    """What clients might send, arrays by name or prompts; every replica must answer it alike."""
    processing: Processing = field(default_factory=Processing)


class Family(Protocol):
    """One kind of model, for one config and one shape of data."""

    unit: str
    """What a row consists of, for speeds: 'tokens' or 'samples'."""
    units_per_row: int
    metric_names: tuple[Metric, ...]
    """What `metrics` gives, in its order."""

    def build(self) -> torch.nn.Module:
        """A model with fresh weights, drawn from torch's current random state."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of the losses of all that is predicted, each by its row's weight, as a scalar."""

    def num_units(self, batch: Batch) -> torch.Tensor:
        """What `loss` is to be divided by for a mean: how many tokens or samples are predicted, by
        the same weights, as a float64 scalar. Without weights, `units_per_row` for each row."""

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss of each row, whatever its weight, to find those that do harm."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """A float64 vector whose sum over all batches and workers gives the metrics."""

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Metrics from summed `measure` vectors; 'loss' is always one of them."""

    def export(self, model: torch.nn.Module, dataset: Dataset, directory: Path) -> Exported:
        """Write the model's public form into an empty directory."""
