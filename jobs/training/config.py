"""The whole of a training run, as one config: what `jobs.train` reads.

Defaults live here and nowhere else; a YAML file states what deviates. It loads no torch.

    config = load_config("configs/train/digits.yaml", TrainConfig, ["steps=200"])
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from cluster.config import StrictModel
from cluster.storage import OBJECT_STORES
from jobs.data.config import DataConfig, Name, refuse_credentials
from jobs.models.config import Metric, ModelConfig
from jobs.training.deepspeed_section import check_shape

Beta = Annotated[float, Field(ge=0, lt=1)]


def _default_weight_decay(values: dict[str, Any]) -> float:
    # As L2 in the gradient, 0.1 keeps adam and adagrad from learning: measured on digits with
    # adagrad, 150 steps, accuracy of chance.
    return 0.1 if values.get("name") in ("adamw", "muon") else 0.0


def _default_momentum(values: dict[str, Any]) -> float:
    return 0.95 if values.get("name") == "muon" else 0.9


class OptimizerConfig(StrictModel):
    """How gradients change weights."""

    name: Literal["adamw", "adam", "adagrad", "sgd", "muon"] = "adamw"
    """muon: the inner matrices' momentum is orthogonalised, all else is adamw's; ZeRO stage 0."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak value; the schedule scales it."""
    weight_decay: float = Field(default_factory=_default_weight_decay, ge=0)
    """Decoupled for adamw and muon (default 0.1), L2, added to the gradient, for the others
    (default 0); matrices only, never biases or norms."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """adamw, adam, and muon's part that is adamw's."""
    epsilon: float = Field(1e-8, gt=0)
    """All but sgd."""
    momentum: float = Field(default_factory=_default_momentum, ge=0, lt=1)
    """sgd (default 0.9) and muon (default 0.95)."""

    @model_validator(mode="after")
    def _fields_fit_the_optimizer(self) -> OptimizerConfig:
        for field, users in _USERS.items():
            if field in self.model_fields_set and self.name not in users:
                raise ValueError(
                    f"{field} is not for optimizer '{self.name}', only for {', '.join(users)}"
                )
        return self


_USERS = {
    "betas": ("adamw", "adam", "muon"),
    "epsilon": ("adamw", "adam", "adagrad", "muon"),
    "momentum": ("sgd", "muon"),
}
"""Fields that only some optimizers have."""


class ConstantSchedule(StrictModel):
    """The peak learning rate throughout."""

    kind: Literal["constant"]
    warmup_steps: int = Field(0, ge=0)
    """Steps over which it first rises in a straight line."""


class CosineSchedule(StrictModel):
    """Half a cosine, from the peak to `final_ratio` of it at the last step."""

    kind: Literal["cosine"]
    warmup_steps: int = Field(0, ge=0)
    final_ratio: float = Field(0.1, ge=0, le=1)


class LinearSchedule(StrictModel):
    """A straight line from the peak to `final_ratio` of it at the last step."""

    kind: Literal["linear"]
    warmup_steps: int = Field(0, ge=0)
    final_ratio: float = Field(0.0, ge=0, le=1)


class WsdSchedule(StrictModel):
    """Warm-up, stable, decay: the peak, then a straight line to `final_ratio` of it at the end."""

    kind: Literal["wsd"]
    warmup_steps: int = Field(0, ge=0)
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the steps after warm-up in which it falls."""
    final_ratio: float = Field(0.0, ge=0, le=1)


class ReduceOnPlateauSchedule(StrictModel):
    """The peak, multiplied by `factor` each time a validation metric has stopped improving."""

    kind: Literal["reduce_on_plateau"]
    warmup_steps: int = Field(0, ge=0)
    factor: float = Field(0.5, gt=0, lt=1)
    patience: int = Field(3, ge=1)
    """Evaluations in a row without improvement after which it acts."""
    metric: Metric = "loss"
    min_ratio: float = Field(0.0, ge=0, le=1)
    """It never falls below this share of the peak."""


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | WsdSchedule | ReduceOnPlateauSchedule,
    Field(discriminator="kind"),
]


class EarlyStoppingConfig(StrictModel):
    """End a run that has stopped improving, and package its best weights instead of its last."""

    metric: Metric = "loss"
    """Of the validation split."""
    patience: int = Field(5, ge=1)
    """Evaluations in a row without improvement after which it ends; an improvement is saved as a
    checkpoint."""
    min_improvement: float = Field(0.0, ge=0)
    """A smaller gain than this counts as none."""


class CheckpointConfig(StrictModel):
    """When a run's state is saved, and how many states are kept."""

    every_steps: int = Field(100, ge=1)
    """The last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept, beside the best; others are deleted after a newer one is safe."""
    location: str = ""
    """Where they lie: a folder that all workers share, s3://bucket/prefix or gs://bucket/prefix;
    empty means the run's own directory. A run whose home is lost goes on from there."""
    blocking: bool = False
    """Wait until a checkpoint is written, instead of writing it while training goes on."""

    @field_validator("location")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        refuse_credentials(value)
        scheme, separator, _ = value.partition("://")
        if separator and scheme not in ("file", *OBJECT_STORES):
            raise ValueError(
                f"it has scheme '{scheme}', expected a folder, s3://BUCKET/PREFIX or "
                "gs://BUCKET/PREFIX"
            )
        return value


class RecoveryConfig(StrictModel):
    """What counts as a step gone wrong, and how often a run goes back to its last checkpoint to
    mask the rows at fault; `jobs.training.recovery` gives the reasons for the defaults."""

    max_rollbacks: int = Field(3, ge=0)
    """Of the same step; 0 ends the run at the first loss that is no number."""
    max_quarantined_share: float = Field(0.01, ge=0, le=1)
    """Of the training rows; but always as many as one batch."""
    first_steps: int = Field(32, ge=4)
    """No step counts as a spike before so many have been committed."""
    window_steps: int = Field(64, ge=4)
    """Committed steps that a spike is measured against."""
    spike_factor: float = Field(1.5, ge=1)
    """A spike is above this many times the median, and"""
    spike_deviations: float = Field(10.0, ge=0)
    """above the median by so many robust standard deviations, and"""
    spike_rise: float = Field(1.0, ge=0)
    """above the median by so much."""

    @model_validator(mode="after")
    def _window_holds_the_first(self) -> RecoveryConfig:
        if self.first_steps > self.window_steps:
            raise ValueError(
                f"first_steps {self.first_steps} exceeds window_steps {self.window_steps}"
            )
        return self


class ParallelismConfig(StrictModel):
    """How one copy of the model is divided; num_workers / (tensor * pipeline) copies share a batch.

    causal_lm only, and one of the two at a time.
    """

    tensor: int = Field(1, ge=1)
    """Workers that share every layer's matrices."""
    pipeline: int = Field(1, ge=1)
    """Workers that hold consecutive layers; give micro_batch_size, so that they work at once."""


def _as_text(value: Any) -> Any:
    # YAML takes 4090 for a number; it is answered with the names that there are.
    return str(value) if isinstance(value, int) else value


class PlannerConfig(StrictModel):
    """What `--check` plans for."""

    device: Annotated[str, BeforeValidator(_as_text)] = ""
    """What each worker has: a name (h100-80g, laptop-16g, …) or a size (24GiB, a GPU's); empty
    means this machine."""


class TrainConfig(StrictModel):
    """One training run."""

    name: Name
    """Name the model is registered under."""
    run_name: Name | Literal[""] = ""
    """Name of the run; empty means `name`."""
    experiment: str = Field("train", min_length=1)
    """MLflow experiment."""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule(kind="cosine")
    early_stopping: EarlyStoppingConfig | None = None
    steps: int = Field(ge=1)
    """Optimizer steps, at most."""
    batch_size: int = Field(ge=1, le=2**31)
    """Rows per step over all workers; what a step sees never depends on their number."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per worker at a time; None means a worker's whole share at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 (autocast), weights and optimizer in float32."""
    compile: bool = False
    """torch.compile, layer by layer; what was compiled is kept in the home for later runs."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute the rest again in the backward pass: less
    memory, about a third more computing. causal_lm only."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 leaves gradients alone."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of weights, order of rows and dropout."""
    num_workers: int = Field(2, ge=1)
    """Processes that share a batch, or, by `parallelism`, the model."""
    parallelism: ParallelismConfig = ParallelismConfig()
    threads_per_worker: int = Field(1, ge=1, le=1024)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: one GPU per worker where the cluster has that many, else CPUs."""
    launcher: Literal["ray", "local"] = "ray"
    """ray: Ray Train places the workers. local: this process is the worker, or one of those that
    torchrun started; num_workers is then not used."""
    log_every_steps: int = Field(10, ge=1)
    evaluate_every_steps: int = Field(100, ge=1)
    """Steps between measurements on the validation split; the last step is always measured."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: Literal["auto", "reuse", "never"] = "auto"
    """auto: continue this config's run if it was interrupted. reuse: also answer with the version
    of its finished run instead of training again. never: start anew."""
    max_failures: int = Field(3, ge=0)
    """How often Ray Train replaces lost workers, from the last checkpoint, before giving up."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with so few of `num_workers` where no more can be placed, and with more when they can
    be; None means never with less. A copy of the model stays whole."""
    hang_timeout_s: float = Field(600.0, ge=1)
    """A worker that shows no sign of life (a step, a batch of an evaluation) for so long has hung:
    it and its peers are replaced, or, with launcher local, ended. Longer than the slowest step, its
    compilation included."""
    recovery: RecoveryConfig = RecoveryConfig()
    planner: PlannerConfig = PlannerConfig()
    tenant: Name = "local"
    """Whose account the seconds of CPU and GPU go to (`heliostat usage`)."""
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)
    """An ordinary ds_config, passed on to DeepSpeed; only keys that other fields here decide are
    refused when they differ."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_has_its_shape(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        check_shape(value)
        return value

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds steps {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _validation_exists(self) -> TrainConfig:
        if self.data.splits.validation == 0:
            raise ValueError(
                "data.splits.validation is 0, and a model is only registered with its loss on "
                "unseen data: give it a share, e.g. 0.1"
            )
        return self

    @property
    def identity(self) -> str:
        """Hexadecimal digest of all that decides the result; the same identity is the same run."""
        values = self.model_dump(mode="json", exclude=set(_NO_PART_OF_IDENTITY))
        values["deepspeed"] = {
            key: value for key, value in self.deepspeed.items() if key not in _NO_PART_IN_DEEPSPEED
        }
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_NO_PART_OF_IDENTITY = (
    "launcher",
    "resume",
    "max_failures",
    "min_workers",
    "hang_timeout_s",
    "recovery",
    "planner",
    "device",
    "log_every_steps",
    "num_workers",
    "parallelism",
    "threads_per_worker",
    "micro_batch_size",
    "checkpoint",
    "compile",
    "activation_checkpointing",
)
# How the same mathematics is divided among workers, and what is printed about it.
_NO_PART_IN_DEEPSPEED = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "tensor_parallel",
)
