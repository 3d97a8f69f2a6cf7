"""What a deployment asks of Ray for each replica."""

from __future__ import annotations

from typing import Any

from serve_apps.llm.deployment import build_language_model
from serve_apps.options import read_options


def asked_of_ray(**options: Any) -> Any:
    return build_language_model("sha256:0", read_options(options))._bound_deployment._replica_config


def test_a_replica_reserves_its_own_resources() -> None:
    asked = asked_of_ray(num_gpus=1, num_cpus=2)
    assert asked.resource_dict == {"CPU": 2, "GPU": 1}
    assert asked.placement_group_bundles is None


def test_tensor_parallel_workers_have_a_gpu_each_on_one_machine() -> None:
    asked = asked_of_ray(
        engine="vllm", num_gpus=4, num_cpus=3, engine_arguments={"tensor_parallel_size": 4}
    )
    # The replica itself takes no GPU from its workers, nor CPUs beyond the first bundle's.
    assert asked.resource_dict == {"CPU": 3, "GPU": 0}
    assert asked.placement_group_bundles == [{"GPU": 1, "CPU": 3}, *[{"GPU": 1}] * 3]
    assert asked.placement_group_strategy == "STRICT_PACK"


def test_vllm_tells_nobody_that_it_runs() -> None:
    environment = asked_of_ray(engine="vllm").ray_actor_options["runtime_env"]["env_vars"]
    assert environment == {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    assert "runtime_env" not in asked_of_ray().ray_actor_options
