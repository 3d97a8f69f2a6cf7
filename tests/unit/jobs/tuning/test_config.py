"""What a sweep's config refuses by itself."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import parse_config
from cluster.errors import ConfigError
from jobs.tuning.config import TuneConfig
from tests.unit.jobs.tuning.conftest import TRAIN, MakeSweep


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"choice": []}, "nothing to choose from"),
        ({"grid": []}, "nothing to choose from"),
        ({"uniform": [2, 1]}, "low 2 is not below high 1"),
        ({"int": [3, 3]}, "low 3 is not below high 3"),
        ({"int": [1.5, 3]}, "valid integer"),
        ({"loguniform": [0, 1]}, "low 0 has no logarithm"),
        ({"uniform": ["a", 1]}, "valid number"),
        ({"lognormal": [0, 1]}, "expected exactly one of choice, grid, uniform, loguniform, int"),
        ({"choice": [1], "int": [1, 2]}, "found choice, int"),
        ({}, "found nothing"),
        ([1, 2], "expected exactly one of"),
        ({"int": [True, 3]}, "truth value for a bound"),
    ],
)
def test_a_wrong_dimension_is_one_line_that_names_its_field(dimension: Any, message: str) -> None:
    values = {"name": "sweep", "train": TRAIN, "num_trials": 2, "space": {"steps": dimension}}
    with pytest.raises(ConfigError) as caught:
        parse_config(values, TuneConfig, source="sweep.yaml")
    assert "space.steps" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_trials": None}, "search random needs num_trials"),
        ({"search": "grid", "num_trials": 3}, "leave num_trials out"),
        ({"search": "grid"}, "cannot try every value of space.optimizer.learning_rate"),
        ({"space": {}}, "at least 1 item"),
        ({"scheduler": {"kind": "asha"}}, "grace_steps"),
        ({"metric": "acuracy"}, "metric"),
        ({"max_concurrent": 0}, "max_concurrent"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    make_sweep: MakeSweep, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_sweep(**values)


def test_better_is_what_is_better_for_the_metric_unless_told(make_sweep: MakeSweep) -> None:
    assert not make_sweep().is_maximised
    assert make_sweep(metric="accuracy").is_maximised
    assert not make_sweep(metric="accuracy", mode="min").is_maximised
