"""What the deployments of both kinds of models share: package, device and Serve options.

application = deploy_with(Predictor, "predictor", digest, options)
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from cluster.errors import MachineError
from cluster.model_package import ModelPackage, open_base, open_digest
from cluster.observability.logs import configure_logging
from cluster.settings import load_settings
from serve_apps.description import Description
from serve_apps.options import AutoscalingOptions, DeploymentOptions

logger = logging.getLogger(__name__)

SYSTEM_OPTIONS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    # A dead replica is noticed by its missing health check.
    "health_check_period_s": 1,
    # One that has to go ends what it is at: a stream of tokens may take this long, an idle one goes
    # at the first look.
    "graceful_shutdown_timeout_s": 120,
    "graceful_shutdown_wait_loop_s": 0.5,
    # Serve makes a record of every request at level INFO, and drops it where its access log is off.
    "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
}
"""Serve options of everything that serves."""
_HAND_OVER_S = 60.0
"""What is still under way after its time to end has so long to go on elsewhere."""

_VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""It reports its use to its makers unless told not to; nothing is fetched where all is packaged."""


def open_package_of(digest: str) -> ModelPackage:
    """The verified package with this digest, in a replica that begins."""
    settings = load_settings()
    configure_logging(settings.log_format, in_replica=True)
    return open_digest(digest, settings)


def open_base_of(adapter: ModelPackage) -> ModelPackage:
    """The verified package that an adapter was trained on, in a replica that begins."""
    return open_base(adapter, load_settings())


def describe_replica(package: ModelPackage, options: DeploymentOptions, device: str) -> Description:
    """What a replica serves and where, logged once.

    Raises:
        MachineError: it holds a GPU that its libraries cannot use.
    """
    if options.num_gpus > 0 and device == "cpu":
        raise MachineError(
            "this replica has a GPU, but its libraries compute on the CPU alone",
            hint="install CUDA builds of torch and onnxruntime-gpu there, or set num_gpus: 0",
        )
    logger.info("serving %s on %s", package.digest, device)
    return Description(package.digest, device)


def deploy_with(
    replica: type, name: str, digest: str, options: DeploymentOptions, **more: Any
) -> serve.Application:
    """Bind a replica class to a package; Serve calls it with the digest and the options.

    Args:
        more: Serve options of this kind of model alone.
    """
    deployment = serve.deployment(
        name=name,
        **_scale(options),
        max_ongoing_requests=options.max_ongoing_requests,
        # A package that fails once fails again: report its reason instead of trying for minutes.
        max_constructor_retry_count=1,
        **SYSTEM_OPTIONS
        | _resources(options)
        | {"graceful_shutdown_timeout_s": options.drain_s + _HAND_OVER_S}
        | more,
    )
    return deployment(replica).bind(digest, options.model_dump())


def _resources(options: DeploymentOptions) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    if options.engine == "vllm":
        actor["runtime_env"] = {"env_vars": _VLLM_ENVIRONMENT}
    num_workers = options.vllm_arguments.tensor_parallel_size
    if num_workers == 1:
        return {"ray_actor_options": actor}
    # One GPU for each of vLLM's workers; the replica itself computes nothing and sits beside the
    # first of them.
    bundles = [{"GPU": 1.0} for _ in range(num_workers)]
    bundles[0]["CPU"] = options.num_cpus
    return {
        "ray_actor_options": actor | {"num_gpus": 0},
        "placement_group_bundles": bundles,
        "placement_group_strategy": "STRICT_PACK",
    }


def _scale(options: DeploymentOptions) -> dict[str, Any]:
    if options.autoscaling is None:
        return {"num_replicas": options.num_replicas}
    return {"autoscaling_config": _autoscaling_config(options.autoscaling, options)}


def _autoscaling_config(
    scaling: AutoscalingOptions, options: DeploymentOptions
) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # metrics_interval_s is deprecated, but the variables named in its place do nothing in Ray
        # 2.60, and its default of 10 s would hide any load shorter than that.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=options.initial_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            look_back_period_s=scaling.look_back_s,
            metrics_interval_s=scaling.look_back_s / 10,
        )
