"""What the deployments of both kinds of models share: their package and their Serve options.

application = deploy_with(Predictor, "predictor", digest, options)
"""

from __future__ import annotations

from dataclasses import dataclass

from ray import serve

from cluster.model_package import ModelPackage, open_version
from cluster.settings import Settings
from serve_apps.options import DeploymentOptions

_HEALTH_CHECK_PERIOD_S = 2
_HEALTH_CHECK_TIMEOUT_S = 30


@dataclass(frozen=True)
class Description:
    """A replica's word that it serves this package."""

    digest: str


@dataclass(frozen=True)
class _Digest:
    digest: str


def open_package_of(digest: str, settings: Settings) -> ModelPackage:
    """The verified package with this digest."""
    return open_version(_Digest(digest), settings)


def deploy_with(
    replica: type, name: str, digest: str, options: DeploymentOptions
) -> serve.Application:
    """Bind a replica class to a package; Serve calls it with the digest and the options."""
    deployment = serve.deployment(
        name=name,
        num_replicas=options.num_replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        # A package that fails once fails again: report its reason instead of trying for minutes.
        max_constructor_retry_count=1,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=_HEALTH_CHECK_TIMEOUT_S,
        logging_config={"enable_access_log": False},
    )
    return deployment(replica).bind(digest, options.model_dump())
