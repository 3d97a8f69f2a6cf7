"""Elastic runs: every number of workers that may come about is checked before the start."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigError
from jobs.training.elastic import check_worker_counts
from tests.unit.jobs.training.conftest import MakeConfig

TEXT_MODEL = {"family": "causal_lm", "hidden_size": 32, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    "values",
    [
        {"num_workers": 3},
        {"num_workers": 2, "min_workers": 1},
        {"num_workers": 4, "min_workers": 1, "batch_size": 24, "micro_batch_size": 2},
        {"num_workers": 4, "min_workers": 4, "parallelism": {"tensor": 2}, "model": TEXT_MODEL},
    ],
)
def test_numbers_that_share_a_batch_pass(make_config: MakeConfig, values: dict[str, Any]) -> None:
    check_worker_counts(make_config(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_workers": 4, "min_workers": 1},
            "min_workers 1 allows 3 workers, who cannot share batch_size 16 with micro_batch_size "
            "unset; set min_workers to 4, or batch_size to a multiple of 12",
        ),
        (
            {"num_workers": 2, "min_workers": 3},
            "min_workers 3 exceeds num_workers 2; set min_workers to 2 or less",
        ),
        (
            {
                "num_workers": 4,
                "min_workers": 2,
                "parallelism": {"tensor": 2},
                "model": TEXT_MODEL,
            },
            "min_workers 2 cannot be combined with parallelism: 2 workers share a copy of the "
            "model, and Ray Train may place any number; leave min_workers out; lost workers are "
            "then replaced by as many",
        ),
    ],
)
def test_numbers_that_cannot_are_refused_with_the_nearest_that_can(
    make_config: MakeConfig, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_worker_counts(make_config(**values))
    assert str(caught.value) == message
