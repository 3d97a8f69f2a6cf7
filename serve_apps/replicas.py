"""What the deployments of both kinds of models share: their package and their Serve options.

application = deploy_with(Predictor, "predictor", digest, options)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster.model_package import ModelPackage, open_version
from cluster.observability.logs import configure_logging
from cluster.settings import load_settings
from serve_apps.options import DeploymentOptions

SYSTEM_OPTIONS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    # A dead replica is noticed by its missing health check.
    "health_check_period_s": 1,
    "logging_config": {"enable_access_log": False},
}
"""Serve options of everything that serves."""


@dataclass(frozen=True)
class Description:
    """A replica's word that it serves this package."""

    digest: str


@dataclass(frozen=True)
class _Digest:
    digest: str


def open_package_of(digest: str) -> ModelPackage:
    """The verified package with this digest, in a replica that begins."""
    settings = load_settings()
    configure_logging(settings.log_format)
    return open_version(_Digest(digest), settings)


def deploy_with(
    replica: type, name: str, digest: str, options: DeploymentOptions
) -> serve.Application:
    """Bind a replica class to a package; Serve calls it with the digest and the options."""
    deployment = serve.deployment(
        name=name,
        num_replicas=options.num_replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        # A package that fails once fails again: report its reason instead of trying for minutes.
        max_constructor_retry_count=1,
        **SYSTEM_OPTIONS
        | {"ray_actor_options": {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}},
    )
    return deployment(replica).bind(digest, options.model_dump())
