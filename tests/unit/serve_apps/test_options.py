"""Options say what is wrong with them, and what autoscaling means to the gateway and to Serve."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InputError
from serve_apps.options import DeploymentOptions, read_options


def scaled(**values: Any) -> DeploymentOptions:
    return read_options({"autoscaling": {"max_replicas": 4, **values}})


@pytest.mark.parametrize(
    ("autoscaling", "words"),
    [
        ({"min_replicas": 1}, "'autoscaling.max_replicas' is missing"),
        ({"max_replicas": 1, "min_replicas": 2}, "max_replicas' is 1, less than min_replicas 2"),
        ({"max_replicas": 2, "min_replicas": -1}, "min_replicas' is -1: "),
        ({"max_replicas": 2, "target": 3}, "'autoscaling.target' is not known; .* look_back_s"),
        ({"max_replicas": 2, "look_back_s": 0.1}, "look_back_s' is 0.1: "),
        (3, "'autoscaling' is 3: "),
    ],
)
def test_wrong_autoscaling_is_named(autoscaling: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_options({"autoscaling": autoscaling})


def test_a_fixed_and_a_changing_number_of_replicas_exclude_each_other() -> None:
    with pytest.raises(InputError, match="takes the place of num_replicas"):
        read_options({"num_replicas": 2, "autoscaling": {"max_replicas": 2}})


def test_stored_options_can_be_read_again() -> None:
    options = scaled(min_replicas=0)
    assert read_options(options.model_dump()) == options


def test_a_full_gateway_asks_for_every_replica() -> None:
    for target in (0.5, 1, 1.5, 2, 7):
        options = scaled(target_ongoing_requests=target)
        assert options.max_batches_in_flight / target >= options.max_replicas
    assert read_options({"num_replicas": 3}).max_batches_in_flight == 3


def test_requests_wait_for_a_replica_only_where_there_may_be_none() -> None:
    assert scaled(min_replicas=0, start_timeout_s=100).answer_timeout_s == 130
    assert scaled(min_replicas=1, start_timeout_s=100).answer_timeout_s == 30


def test_a_deployment_at_rest_still_starts_with_one_replica() -> None:
    assert (scaled(min_replicas=0).initial_replicas, scaled(min_replicas=3).initial_replicas) == (
        1,
        3,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_takes_the_options() -> None:
    from serve_apps.predictor.deployment import build_predictor

    application = build_predictor("sha256:0", scaled(min_replicas=0, look_back_s=1))
    config = application._bound_deployment._deployment_config.autoscaling_config
    assert config is not None
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 4)
    assert config.metrics_interval_s < config.look_back_period_s == 1
