"""Measures of predictions, as vectors that add up over batches and workers, and their metrics.

It knows nothing of models.

    sums = classification_sums(logits, labels) + classification_sums(…)
    metrics_of_classification(sums)        # {'loss': …, 'accuracy': …, …}
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from jobs.models.config import Metric

CLASSIFICATION_METRICS: tuple[Metric, ...] = ("loss", "accuracy", "precision", "recall", "f1")
REGRESSION_METRICS: tuple[Metric, ...] = ("loss", "mse", "rmse", "mae", "r2")


def classification_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss, then the confusion matrix; logits are [row, class]."""
    num_classes = logits.shape[-1]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    cells = labels * num_classes + logits.argmax(-1)
    confusion = torch.bincount(cells, minlength=num_classes**2)
    return torch.cat([loss.reshape(1).double().cpu(), confusion.double().cpu()])


def metrics_of_classification(sums: torch.Tensor) -> dict[str, float]:
    num_classes = math.isqrt(len(sums) - 1)
    confusion = sums[1:].reshape(num_classes, num_classes)
    return {
        "loss": float(sums[0]) / float(confusion.sum()),
        **classification_metrics(confusion),
    }


def classification_metrics(confusion: torch.Tensor) -> dict[str, float]:
    """Accuracy and macro-averaged precision, recall and F1; rows are true classes."""
    correct = confusion.diagonal()
    precision = correct / confusion.sum(0).clamp(min=1)
    recall = correct / confusion.sum(1).clamp(min=1)
    f1 = 2 * correct / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    return {
        "accuracy": float(correct.sum() / confusion.sum()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
    }


def regression_sums(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of standardised values, so that sums of squares lose no digits."""
    target = target.double()
    error = predicted.double() - target
    ones = torch.ones_like(target)
    values = [ones, error.square(), error.abs(), target, target.square()]
    return torch.stack([value.sum() for value in values]).cpu()


def metrics_of_regression(sums: torch.Tensor, target_std: float) -> dict[str, float]:
    """The loss in standardised units, the others in the target's own."""
    count, squared, absolute, total, total_squared = sums.tolist()
    spread = total_squared - total**2 / count
    mse = squared / count
    return {
        "loss": mse,
        "mse": mse * target_std**2,
        "rmse": math.sqrt(mse) * target_std,
        "mae": absolute / count * target_std,
        # Nothing can be explained where nothing varies.
        "r2": 1 - squared / spread if spread > 0 else 0.0,
    }
