"""Figures of an evaluation, drawn without a display and without matplotlib's global state.

It knows nothing of models and datasets.

    figure = confusion_figure(expected, predicted, class_names)
    figure.savefig("confusion.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.data.rows import Array

_MAX_CLASSES_NAMED = 20


def confusion_figure(confusion: Array, class_names: Sequence[str]) -> Any:
    """Counts of [true class, predicted class]; colours are shares of a true class."""
    figure, axes = _figure("predicted", "true")
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= _MAX_CLASSES_NAMED:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90)
        axes.set_yticks(range(len(class_names)), class_names)
        for (i, j), count in np.ndenumerate(confusion):
            axes.text(j, i, int(count), ha="center", va="center", fontsize=7)
    return figure


def calibration_figure(confidence: Array, accuracy: Array, counts: Array) -> Any:
    """How often answers of a confidence are right; on the diagonal they are as sure as right."""
    figure, axes = _figure("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey")
    filled = counts > 0
    sizes = 20 + 180 * counts[filled] / counts.max()
    axes.scatter(confidence[filled], accuracy[filled], s=sizes)
    return figure


def residual_figure(expected: Array, predicted: Array) -> Any:
    """Errors over what was predicted; a pattern is something the model has not learnt."""
    figure, axes = _figure("predicted", "true - predicted")
    axes.axhline(0, linestyle="--", color="grey")
    axes.scatter(predicted, expected - predicted, s=8, alpha=0.6)
    return figure


def row_loss_figure(losses: Array) -> Any:
    """How the rows' losses are spread."""
    figure, axes = _figure("loss of a row, nats per token", "rows")
    axes.hist(losses, bins=40)
    return figure


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes
