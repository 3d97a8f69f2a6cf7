"""Options say what is wrong with them, and what autoscaling means to the gateway and to Serve."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InputError
from serve_apps.options import (
    AutoscalingOptions,
    DeploymentOptions,
    read_options,
    read_stored_options,
)


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_cpus": 1e-9}, "'num_cpus' is 1e-09, expected a multiple of 0.0001"),
        ({"num_cpus": 0.00005}, "'num_cpus' is 5e-05, expected a multiple of 0.0001"),
        ({"num_gpus": 1.5}, "'num_gpus' is 1.5, expected a whole number"),
        ({"num_cpus": 1e308}, "'num_cpus' is 1e\\+308"),
        ({"num_cpus": float("nan")}, "'num_cpus' is nan"),
        ({"max_ongoing_requests": 10**24}, "less than or equal to 100000"),
        ({"max_queued_requests": 10**24}, "'max_queued_requests'"),
        ({"max_batch_size": 10**24}, "'max_batch_size'"),
        ({"max_cache_bytes": 10**24}, "'max_cache_bytes'"),
        ({"max_running": 10**24}, "'max_running'"),
        ({"num_replicas": 10**4000}, "'num_replicas' is 10*…: "),
        ({"request_timeout_s": float("inf")}, "'request_timeout_s' is inf"),
        ({"request_timeout_s": 1e-300}, "'request_timeout_s'"),
        ({"num_threads": "9" * 10_000}, "'num_threads' is '9*…: "),
        ({"x" * 10_000: 1}, "option 'x{100}' is not known"),
        ({"num_cpus": True}, "option 'num_cpus' is true, expected a number"),
        ({"weights": "int8", "num_gpus": 1}, "'weights' is 'int8', which is for replicas without"),
        ({"weights": "int8", "engine": "transformers"}, "'weights' is 'int8', which is for engine"),
    ],
)
def test_numbers_that_ray_or_arithmetic_cannot_take_are_refused(values: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_options(values)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", sorted(AutoscalingOptions.model_fields))
@pytest.mark.parametrize("value", [1e308, -1, float("nan"), float("inf")])
def test_every_number_of_autoscaling_has_bounds(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"'autoscaling.{name}' is"):
        read_options({"autoscaling": {"max_replicas": 2, name: value}})


def test_the_largest_options_are_still_numbers() -> None:
    most = scaled(max_replicas=256, target_ongoing_requests=100_000)
    assert most.max_batches_in_flight == 25_600_000
    assert scaled(max_replicas=1, target_ongoing_requests=0.01).max_batches_in_flight == 1


@pytest.mark.parametrize("num_cpus", [0, 0.0001, 0.1 + 0.2, 2.5, 63.9999])
def test_fractions_of_cpus_are_taken(num_cpus: float) -> None:
    assert read_options({"num_cpus": num_cpus}).num_cpus == num_cpus


def test_stored_options_that_are_not_allowed_any_more_are_defaults() -> None:
    stored = {"autoscaling": {"max_replicas": 2, "target_ongoing_requests": 1e308}}
    assert read_stored_options(stored) == DeploymentOptions()
    assert read_stored_options({"max_running": 3}).max_running == 3


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "llama.cpp"}, "'engine' is 'llama.cpp': "),
        ({"engine": "native", "engine_arguments": {}}, "'engine_arguments' is for engine 'vllm'"),
        ({"engine_arguments": {"kv_cache_dtype": 8}}, "'engine_arguments.kv_cache_dtype' is 8: "),
        ({"engine_arguments": {"max_model_len": 10**24}}, "'engine_arguments.max_model_len' is 1"),
        ({"engine_arguments": {"tensor_parallel_size": 2}}, "size is 2, but num_gpus is 1"),
    ],
)
def test_wrong_engine_arguments_are_named(values: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_options({"engine": "vllm", "num_gpus": 1, **values})


@pytest.mark.parametrize(
    "name",
    ["trust_remote_code", "model", "tokenizer", "download_dir", "host", "port", "master_port",
     "worker_cls", "hf_overrides", "logits_processors", "speculative_config", "served_model_name"],
)  # fmt: skip
def test_vllm_is_told_of_no_code_path_or_port(name: str) -> None:
    with pytest.raises(
        InputError, match=f"'engine_arguments.{name}' is not known; .* max_model_len, "
    ):
        read_options({"engine": "vllm", "engine_arguments": {name: "x"}})
