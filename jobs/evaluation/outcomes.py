"""Predictions beside the truth: the metrics and figures of classifiers and of regressions.

It knows nothing of models and datasets.

    outcome = Classification(expected, predicted, probabilities, ("cat", "dog"))
    outcome.metrics()["accuracy"]
    outcome.where(mask).metrics()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.data.rows import Array
from jobs.evaluation.evaluation import Mask, Values
from jobs.evaluation.figures import calibration_figure, confusion_figure, residual_figure

_NUM_CONFIDENCE_BINS = 15


@dataclass(frozen=True)
class Classification:
    """Class numbers of N rows; a predicted class that does not exist is -1."""

    expected: Array
    predicted: Array
    probabilities: Array | None
    """[N, class], if the model gives them."""
    class_names: tuple[str, ...]

    @property
    def correct(self) -> Values:
        """1 where the class is right, else 0."""
        right: Values = (self.expected == self.predicted).astype(np.float64)
        return right

    def where(self, mask: Mask) -> Classification:
        """Some of the rows."""
        probabilities = None if self.probabilities is None else self.probabilities[mask]
        return Classification(
            self.expected[mask], self.predicted[mask], probabilities, self.class_names
        )

    def metrics(self) -> dict[str, float]:
        """Accuracy; macro-averaged precision, recall and F1; with probabilities also the area under
        the ROC curve (one against the rest), the log loss, and the expected calibration error."""
        from sklearn.metrics import precision_recall_fscore_support

        precision, recall, f1, _ = precision_recall_fscore_support(
            self.expected,
            self.predicted,
            labels=np.unique(np.concatenate([self.expected, self.predicted[self.predicted >= 0]])),
            average="macro",
            zero_division=0,
        )
        return {
            "accuracy": float(self.correct.mean()),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            **self._metrics_of_probabilities(),
        }

    def _metrics_of_probabilities(self) -> dict[str, float]:
        if self.probabilities is None:
            return {}
        chosen = self.probabilities[np.arange(len(self.expected)), self.expected]
        confidence, accuracy, counts = self._calibration()
        error = np.abs(confidence - accuracy) @ counts / counts.sum()
        area = self._area_under_roc(self.probabilities)
        return {
            **({} if area is None else {"auc": area}),
            "log_loss": float(-np.log(np.maximum(chosen.astype(np.float64), 1e-15)).mean()),
            "calibration_error": float(error),
        }

    def _area_under_roc(self, probabilities: Array) -> float | None:
        """Averaged over the classes that some rows have and others do not; None without any."""
        from sklearn.metrics import roc_auc_score

        areas = [
            roc_auc_score(self.expected == number, probabilities[:, number])
            for number in np.unique(self.expected)
            if (self.expected != number).any()
        ]
        return float(np.mean(areas)) if areas else None

    def _calibration(self) -> tuple[Array, Array, Array]:
        """Mean confidence, accuracy and number of rows of each bin of confidence."""
        assert self.probabilities is not None
        top = self.probabilities.max(axis=1).astype(np.float64)
        right = (self.probabilities.argmax(axis=1) == self.expected).astype(np.float64)
        bins = np.minimum((top * _NUM_CONFIDENCE_BINS).astype(int), _NUM_CONFIDENCE_BINS - 1)
        counts = np.bincount(bins, minlength=_NUM_CONFIDENCE_BINS)
        sums = (
            np.bincount(bins, weights=values, minlength=_NUM_CONFIDENCE_BINS)
            for values in (top, right)
        )
        confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
        return confidence, accuracy, counts

    def figures(self) -> dict[str, Any]:
        num_classes = len(self.class_names)
        known = self.predicted >= 0
        cells = self.expected[known] * num_classes + self.predicted[known]
        confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
        found = {"confusion.png": confusion_figure(confusion, self.class_names)}
        if self.probabilities is not None:
            found["calibration.png"] = calibration_figure(*self._calibration())
        return found


@dataclass(frozen=True)
class Regression:
    """Numbers of N rows."""

    expected: Values
    predicted: Values

    def where(self, mask: Mask) -> Regression:
        """Some of the rows."""
        return Regression(self.expected[mask], self.predicted[mask])

    def row_values(self) -> dict[str, Values]:
        """What two of the metrics are means of."""
        errors = self.predicted - self.expected
        return {"mse": errors**2, "mae": np.abs(errors)}

    def metrics(self) -> dict[str, float]:
        """Mean squared error and its root, mean absolute error, share of variance explained."""
        from sklearn.metrics import r2_score

        means = {name: float(values.mean()) for name, values in self.row_values().items()}
        # A single row has no variance to explain.
        r2 = float(r2_score(self.expected, self.predicted)) if len(self.expected) > 1 else 0.0
        return {"mse": means["mse"], "rmse": means["mse"] ** 0.5, "mae": means["mae"], "r2": r2}

    def figures(self) -> dict[str, Any]:
        return {"residuals.png": residual_figure(self.expected, self.predicted)}
