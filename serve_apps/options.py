"""`DeploymentOptions`: how one model version is served; the type of `configs/serve/*.yaml`.

options = load_config(Path("configs/serve/digits.yaml"), DeploymentOptions)
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from cluster.config import StrictModel
from cluster.errors import InputError, UsageError

_PLANNED_STRATEGIES = ("canary", "shadow")


class DeploymentOptions(StrictModel):
    """Options of a deployment. They are kept with it, and every gateway reads them from there."""

    num_replicas: int = Field(1, ge=1, le=256)
    num_gpus: float = Field(0, ge=0)
    """GPUs reserved for each replica; fractions share one."""
    num_cpus: float = Field(0, ge=0)
    """CPUs reserved for each replica; 0 leaves them all to training beside it."""
    num_threads: int = Field(1, ge=1, le=512)
    """CPU threads that a replica computes with."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Calls that a replica works on at once: batches of arrays, or streams of tokens."""
    max_queued_requests: int = Field(1024, ge=0)
    """Requests that wait in each gateway replica; more are answered 503 at once."""
    max_batch_size: int = Field(64, ge=1)
    """Most samples a gateway joins into one call (graphs)."""
    request_timeout_s: float = Field(30.0, gt=0)
    """Longest wait for a graph's answer, or for the next token of a language model."""
    max_cache_bytes: int = Field(512 * 1024**2, ge=1024**2)
    """Memory for a language model's key-value cache, per replica."""
    max_running: int = Field(32, ge=1)
    """Sequences a language model decodes together, per replica."""


def read_options(values: dict[str, Any]) -> DeploymentOptions:
    """Options as a request sends them.

    Raises:
        InputError: naming the option that is unknown or wrong.
    """
    try:
        return DeploymentOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            what = "is not known"
        else:
            what = f"is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        known = ", ".join(sorted(DeploymentOptions.model_fields))
        raise InputError(
            f"option '{name}' {what}", hint=f"options are: {known}", param=f"options.{name}"
        ) from None


def check_strategy(strategy: str) -> None:
    """Raises UsageError for a strategy that is planned, InputError for one that is not."""
    if strategy in _PLANNED_STRATEGIES:
        raise UsageError(
            f"strategy '{strategy}' is not there yet",
            hint="use --strategy direct",
            param="strategy",
        )
    if strategy != "direct":
        raise InputError(
            f"strategy '{strategy}' does not exist", hint="use --strategy direct", param="strategy"
        )
