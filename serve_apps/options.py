"""`DeploymentOptions`: how one model version is served; the type of `configs/serve/*.yaml`.

options = load_config(Path("configs/serve/digits.yaml"), DeploymentOptions)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from cluster.config import StrictModel
from cluster.deployments import STRATEGIES, Strategy
from cluster.errors import InputError
from serve_apps.release.options import Margins, ReleaseOptions
from serve_apps.vllm_arguments import VllmArguments

_DAY_S = 86_400
_MAX_CALLS = 100_000
_RESOURCE_STEP = 1e-4
"""Ray counts fractions of CPUs and GPUs in this unit."""
_MAX_SHOWN = 100


class AutoscalingOptions(StrictModel):
    """How many replicas there are, following the calls under way.

    A call is a stream of tokens or a batch of arrays. Each gateway holds up to `max_replicas *
    target_ongoing_requests` batches under way and joins only what exceeds that: below it a call is
    about one request, so calls measure the demand; at it, Serve wants `max_replicas` already.
    """

    min_replicas: int = Field(1, ge=0, le=256)
    """Replicas at rest; with 0 the last one ends too, and the next request waits for a new one."""
    max_replicas: int = Field(ge=1, le=256)
    """Replicas under the heaviest load."""
    target_ongoing_requests: float = Field(2, ge=0.01, le=_MAX_CALLS)
    """Calls per replica, running and waiting, that Serve aims at."""
    upscale_delay_s: float = Field(2, ge=0, le=_DAY_S)
    """How long more replicas must be wanted before they are started; from zero it is at once."""
    downscale_delay_s: float = Field(60, ge=0, le=_DAY_S)
    """How long fewer replicas must be wanted before one is ended."""
    look_back_s: float = Field(5, ge=0.5, le=3600)
    """Calls are averaged over this time."""
    start_timeout_s: float = Field(120, ge=0, le=_DAY_S)
    """With min_replicas 0: how much longer than request_timeout_s a request waits, so that a first
    replica can load its model."""

    @field_validator("max_replicas")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min_replicas", 0):
            raise ValueError(f"is {value}, less than min_replicas {info.data['min_replicas']}")
        return value


class RetrainOptions(StrictModel):
    """Train again when what is served drifts from what the version was trained on."""

    config: str = Field(pattern=r"^configs/train/[A-Za-z0-9_][A-Za-z0-9_.-]*\.yaml$")
    """What `jobs.train` is given, in the checkout."""
    service: str | None = Field(
        None, pattern=r"^configs/services/[A-Za-z0-9_][A-Za-z0-9_.-]*\.yaml$"
    )
    """The gate that decides on the new version; without one it stays a candidate."""
    strategy: Literal["direct", "canary", "shadow"] = "shadow"
    """How a version that passes the gate is released."""
    psi: float = Field(0.25, gt=0, le=100)
    """Population stability index of any feature that is too much."""
    min_rows: int = Field(1000, ge=30, le=1_000_000)
    """Rows that must have been counted; gateways let older ones fade, so beyond some 5,000 for
    each gateway it is never reached."""
    cool_down_s: float = Field(_DAY_S, ge=60, le=366 * _DAY_S)
    """From one training for drift to the next."""


class DeploymentOptions(StrictModel):
    """Options of a deployment. They are kept with it, and every gateway reads them from there."""

    num_replicas: int = Field(1, ge=1, le=256)
    """Replicas, always the same number."""
    autoscaling: AutoscalingOptions | None = None
    """A changing number of replicas, in place of num_replicas."""
    num_gpus: float = Field(0, ge=0, le=1024)
    """GPUs reserved for each replica; fractions share one."""
    num_cpus: float = Field(0, ge=0, le=4096)
    """CPUs reserved for each replica; 0 leaves them all to training beside it."""
    num_threads: int = Field(1, ge=1, le=512)
    """CPU threads that a replica computes with."""
    max_ongoing_requests: int = Field(64, ge=1, le=_MAX_CALLS)
    """Calls that a replica works on at once: batches of arrays, or streams of tokens."""
    max_queued_requests: int = Field(1024, ge=0, le=1_000_000)
    """Requests that wait in each gateway replica; more are answered 503 at once."""
    max_queue_wait_s: float = Field(0.1, ge=0, le=_DAY_S)
    """Wait that a burst may cause, or a full call's where that is longer; once more is asked than
    the model can answer, the rest is answered 503 at once."""
    max_batch_size: int = Field(64, ge=1, le=65_536)
    """Most samples a gateway joins into one call (graphs)."""
    request_timeout_s: float = Field(30.0, ge=0.001, le=_DAY_S)
    """Longest wait for a graph's answer, or for the next token of a language model."""
    drain_s: float = Field(60.0, ge=0, le=_DAY_S)
    """How long a replica that has to go may end what it is at; streams of tokens that take longer
    go on at another one."""
    max_cache_bytes: int = Field(512 * 1024**2, ge=1024**2, le=1024**5)
    """Memory for a language model's key-value cache, per replica."""
    shares_base: bool = Field(False, strict=True)
    """An adapter is answered for by the replicas that serve its base, beside others, instead of by
    replicas of its own that it is merged into."""
    max_adapters: int = Field(8, ge=0, le=1024)
    """Adapters that a replica of a language model holds beside it; the one asked for longest ago
    makes room."""
    max_running: int = Field(32, ge=1, le=65_536)
    """Sequences a language model decodes together, per replica."""
    engine: Literal["auto", "native", "transformers", "vllm"] = "auto"
    """What generates a language model's tokens; 'auto' is native where it can read the model, and
    transformers elsewhere."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type that engines native and vllm compute in; 'auto' is what the weights are stored
    as."""
    weights: Literal["int8"] | None = None
    """Round the layers' matrices to 8 bits when the native engine loads them: on a CPU, a stream by
    itself is quicker and the model takes half the memory, and many at once are slower."""
    engine_arguments: VllmArguments | None = None
    """More to say to engine 'vllm'."""
    release: ReleaseOptions = ReleaseOptions()
    """How it is compared with the champion, for the strategies canary and shadow."""
    retrain: RetrainOptions | None = None
    """Whether, and how, drift leads to training."""

    @field_validator("num_gpus", "num_cpus")
    @classmethod
    def _what_ray_can_count(cls, value: float, info: ValidationInfo) -> float:
        if abs(value / _RESOURCE_STEP - round(value / _RESOURCE_STEP)) > 1e-6:
            raise ValueError(f"is {value:g}, expected a multiple of {_RESOURCE_STEP:g}")
        if info.field_name == "num_gpus" and value > 1 and not value.is_integer():
            raise ValueError(f"is {value:g}, expected a whole number where it is more than 1")
        return value

    @field_validator("autoscaling")
    @classmethod
    def _instead_of_num_replicas(
        cls, value: AutoscalingOptions | None, info: ValidationInfo
    ) -> AutoscalingOptions | None:
        if value is not None and info.data.get("num_replicas", 1) != 1:
            raise ValueError("takes the place of num_replicas; give one of the two")
        return value

    @field_validator("weights")
    @classmethod
    def _where_they_can_be_multiplied(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("num_gpus", 0) > 0:
            raise ValueError(f"is {value!r}, which is for replicas without GPUs")
        if value is not None and info.data.get("engine", "auto") not in ("auto", "native"):
            raise ValueError(f"is {value!r}, which is for engine 'native'")
        return value

    @field_validator("engine_arguments")
    @classmethod
    def _for_vllm_on_its_gpus(
        cls, value: VllmArguments | None, info: ValidationInfo
    ) -> VllmArguments | None:
        if value is None:
            return None
        if info.data.get("engine") != "vllm":
            raise ValueError("is for engine 'vllm' alone")
        num_gpus, wanted = info.data.get("num_gpus", 0), value.tensor_parallel_size
        if wanted > 1 and num_gpus != wanted:
            raise ValueError(f"tensor_parallel_size is {wanted}, but num_gpus is {num_gpus:g}")
        return value

    @property
    def vllm_arguments(self) -> VllmArguments:
        return self.engine_arguments or VllmArguments()

    @property
    def min_replicas(self) -> int:
        """Replicas that are always up."""
        return self.autoscaling.min_replicas if self.autoscaling else self.num_replicas

    @property
    def initial_replicas(self) -> int:
        """Replicas to start with: at least the one that shows that the model works."""
        return max(1, self.min_replicas)

    @property
    def max_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas

    @property
    def max_batches_in_flight(self) -> int:
        """Batches that one gateway has under way at once; see AutoscalingOptions."""
        if self.autoscaling is None:
            return self.num_replicas
        return math.ceil(self.max_replicas * self.autoscaling.target_ongoing_requests)

    @property
    def max_streams(self) -> int:
        """Streams of tokens that all replicas generate at once."""
        return min(self.max_running, self.max_ongoing_requests) * self.max_replicas

    @property
    def answer_timeout_s(self) -> float:
        """request_timeout_s, and the start of a replica where there may be none."""
        if self.autoscaling is None or self.autoscaling.min_replicas > 0:
            return self.request_timeout_s
        return self.request_timeout_s + self.autoscaling.start_timeout_s


def read_options(values: dict[str, Any]) -> DeploymentOptions:
    """Options as a request sends them.

    Raises:
        InputError: naming the option that is unknown or wrong.
    """
    try:
        return DeploymentOptions.model_validate(values)
    except ValidationError as error:
        raise _input_error(error) from None


def read_stored_options(values: Mapping[str, Any]) -> DeploymentOptions:
    """Options from the table; defaults where another release of this code allowed other ones."""
    try:
        return DeploymentOptions.model_validate(values)
    except ValidationError:
        return DeploymentOptions()


def of_replicas(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may change while replicas go on: how a version is compared and watched."""
    return {name: value for name, value in values.items() if name not in ("release", "retrain")}


_SECTIONS: dict[str, type[StrictModel]] = {
    "autoscaling": AutoscalingOptions,
    "engine_arguments": VllmArguments,
    "release": ReleaseOptions,
    "release.margins": Margins,
    "retrain": RetrainOptions,
}


def _input_error(error: ValidationError) -> InputError:
    """The first thing wrong, by its name."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])[:_MAX_SHOWN]
    match first["type"]:
        case "extra_forbidden":
            what = "is not known"
        case "missing":
            what = "is missing"
        case "value_error":
            what = str(first["ctx"]["error"])
        case _:
            found = f"{first['input']!r}"
            shown = found if len(found) <= _MAX_SHOWN else found[:_MAX_SHOWN] + "…"
            what = f"is {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    section = _SECTIONS.get(name.rpartition(".")[0], DeploymentOptions)
    known = ", ".join(sorted(section.model_fields))
    return InputError(
        f"option '{name}' {what}" if name else f"option {what}",
        hint=f"options are: {known}",
        param=f"options.{name}" if name else "options",
    )


def read_strategy(text: str) -> Strategy:
    """Raises InputError for a strategy that there is not."""
    for strategy in STRATEGIES:
        if text == strategy:
            return strategy
    raise InputError(
        f"strategy '{text}' does not exist",
        hint=f"use --strategy {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}",
        param="strategy",
    )
