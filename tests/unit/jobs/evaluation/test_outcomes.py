from io import BytesIO
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from jobs.evaluation.outcomes import Classification, Regression

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def outcome() -> Classification:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet((1, 1, 1), size=200)
    expected = np.array([random.choice(3, p=row) for row in probabilities])
    return Classification(expected, probabilities.argmax(axis=1), probabilities, NAMES)


def test_metrics_of_classes_are_scikit_learns(outcome: Classification) -> None:
    expected, predicted = outcome.expected, outcome.predicted
    found = outcome.metrics()
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(expected, predicted))
    for name, score in (
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
        ("f1", reference.f1_score),
    ):
        assert found[name] == pytest.approx(score(expected, predicted, average="macro"))
    area = reference.roc_auc_score(expected, outcome.probabilities, multi_class="ovr")
    assert found["auc"] == pytest.approx(area)
    assert found["log_loss"] == pytest.approx(reference.log_loss(expected, outcome.probabilities))


def test_calibration_tells_the_honest_from_the_overconfident(outcome: Classification) -> None:
    honest = outcome.metrics()["calibration_error"]
    sure = np.eye(3)[outcome.predicted] * 0.97 + 0.01
    overconfident = Classification(outcome.expected, outcome.predicted, sure, NAMES)
    assert honest < 0.15
    accuracy = outcome.metrics()["accuracy"]
    assert overconfident.metrics()["calibration_error"] == pytest.approx(0.98 - accuracy)


def test_an_answer_that_is_no_class_counts_as_wrong() -> None:
    outcome = Classification(np.array([0, 1, 1]), np.array([0, 1, -1]), None, NAMES)
    found = outcome.metrics()
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert "auc" not in found


def test_a_slice_of_one_class_has_no_area_under_its_curve(outcome: Classification) -> None:
    found = outcome.where(outcome.expected == 1).metrics()
    assert "auc" not in found
    assert found["accuracy"] == (outcome.predicted[outcome.expected == 1] == 1).mean()


def test_metrics_of_numbers_are_scikit_learns() -> None:
    random = np.random.default_rng(1)
    expected = random.normal(size=100)
    predicted = expected + random.normal(scale=0.3, size=100)
    found = Regression(expected, predicted).metrics()
    assert found["mse"] == pytest.approx(reference.mean_squared_error(expected, predicted))
    assert found["rmse"] == pytest.approx(found["mse"] ** 0.5)
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(expected, predicted))
    assert found["r2"] == pytest.approx(reference.r2_score(expected, predicted))


def test_figures_can_be_drawn(outcome: Classification) -> None:
    figures: dict[str, Any] = {
        **outcome.figures(),
        **Regression(np.arange(5.0), np.arange(5.0)).figures(),
    }
    assert set(figures) == {"confusion.png", "calibration.png", "residuals.png"}
    for figure in figures.values():
        drawn = BytesIO()
        figure.savefig(drawn)
        assert drawn.getvalue().startswith(b"\x89PNG")
