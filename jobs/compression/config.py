"""What to compress, in which ways, and what it may cost: what `jobs.compress` reads.

It loads no torch.

    CompressConfig(
        model="pydoc-lm@candidate",
        candidates=[{"method": "int4_weights", "group_size": 32}, {"method": "int8_weights"}],
        max_loss_increase=0.01,
    )
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel
from cluster.errors import InputError
from cluster.model_package import Kind
from cluster.model_package.parity import RELATIVE_TOLERANCES
from jobs.data.config import DataConfig, Name
from jobs.models.config import AnyLmConfig, CausalLmConfig
from jobs.training.config import CosineSchedule, OptimizerConfig, ScheduleConfig, TrainConfig

QualityMetric = Literal["loss", "log_loss", "error_rate", "mse"]
"""Lower is better; error_rate is 1 - accuracy."""

_TRAINED_TOLERANCE = 2.0


class _Candidate(StrictModel):
    """What every way to compress has."""

    relative_tolerance: float | None = Field(None, gt=0)
    """Largest difference of an output from the parent's on its golden inputs, as a share of the
    parent's largest; what is further off is not packaged. None means 0.1 for 8 bits, 0.5 for 4, and
    2 for what was trained, which is another model: of that, the budget is the judge."""


class TrainedCandidate(_Candidate):
    """What holds for candidates that are trained, by jobs.train's own loop."""

    steps: int = Field(ge=1)
    batch_size: int = Field(8, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule(kind="cosine")
    precision: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = Field(2, ge=1)
    threads_per_worker: int = Field(1, ge=1)
    launcher: Literal["ray", "local"] = "ray"
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds steps {self.steps}"
            )
        return self

    @property
    def tolerance(self) -> float:
        return self.relative_tolerance or _TRAINED_TOLERANCE

    def training(self, data: DataConfig, model: AnyLmConfig) -> TrainConfig:
        """The run that trains `model`, on a dataset made from `data`."""
        return TrainConfig(
            name=self.label,
            experiment="compress",
            data=data,
            model=model,
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
            num_workers=self.num_workers,
            threads_per_worker=self.threads_per_worker,
            launcher=self.launcher,
            seed=self.seed,
        )

    @property
    def label(self) -> str:
        raise NotImplementedError


class _Int8GraphConfig(_Candidate):
    method: Literal["int8_dynamic", "int8_static"]
    per_channel: bool = False
    """One scale for each output channel instead of one for each matrix."""

    @property
    def label(self) -> str:
        return f"{self.method}{'-per_channel' if self.per_channel else ''}"

    @property
    def tolerance(self) -> float:
        return self.relative_tolerance or RELATIVE_TOLERANCES["int8"]


class DynamicInt8Config(_Int8GraphConfig):
    """A graph's weights in 8 bits; activations are scaled as they come."""

    method: Literal["int8_dynamic"]


class StaticInt8Config(_Int8GraphConfig):
    """A graph's weights and activations in 8 bits, scaled by what the training rows gave."""

    method: Literal["int8_static"]
    calibration_rows: int = Field(256, ge=1)
    """First rows of the train split that ranges of activations are taken from."""


class WeightOnlyConfig(_Candidate):
    """A language model's matrices in 8 or 4 bits, stored as compressed-tensors; the embeddings and
    the head stay as they are."""

    method: Literal["int8_weights", "int4_weights"]
    group_size: Literal[32, 64, 128] | None = 128
    """Neighbouring weights that share a scale; None means a whole row."""

    @property
    def num_bits(self) -> int:
        return 8 if self.method == "int8_weights" else 4

    @property
    def label(self) -> str:
        return f"{self.method}-{f'g{self.group_size}' if self.group_size else 'rows'}"

    @property
    def tolerance(self) -> float:
        default = RELATIVE_TOLERANCES["int8" if self.num_bits == 8 else "int4"]
        return self.relative_tolerance or default


class PruneConfig(TrainedCandidate):
    """A language model without the weights that matter least, fine-tuned afterwards."""

    method: Literal["prune"]
    structure: Literal["unstructured", "neurons"]
    """unstructured: the smallest weights of each matrix of the layers become zero and stay so; the
    files keep their size. neurons: the feed-forward layers become narrower."""
    sparsity: float = Field(gt=0, lt=1)
    """Share of the weights, or of the neurons, that go."""

    @model_validator(mode="after")
    def _zeros_stay(self) -> PruneConfig:
        if self.structure == "unstructured" and self.optimizer.name == "muon":
            raise ValueError(
                "optimizer.name 'muon' fills the zeros of an unstructured pruning: set it to adamw"
            )
        return self

    @property
    def label(self) -> str:
        return f"prune-{self.structure}-{self.sparsity:g}"


class DistillConfig(TrainedCandidate):
    """A smaller language model, trained from scratch with this one as its teacher."""

    method: Literal["distill"]
    model: CausalLmConfig
    """The smaller one."""
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss that the teacher has; the rest is the text's own cross-entropy."""

    @model_validator(mode="after")
    def _it_has_its_teacher(self) -> DistillConfig:
        if self.model.distillation is not None:
            raise ValueError(
                "model.distillation is the candidate's own: give temperature and weight beside it"
            )
        return self

    @property
    def label(self) -> str:
        return f"distill-{self.model.num_layers}x{self.model.hidden_size}"


CandidateConfig = Annotated[
    DynamicInt8Config | StaticInt8Config | WeightOnlyConfig | PruneConfig | DistillConfig,
    Field(discriminator="method"),
]

_KINDS: dict[str, Kind] = {
    "int8_dynamic": "graph",
    "int8_static": "graph",
    "int8_weights": "language_model",
    "int4_weights": "language_model",
    "prune": "language_model",
    "distill": "language_model",
}


class CompressConfig(StrictModel):
    """One search for the smallest version that is still good enough."""

    model: str = Field(min_length=1)
    """NAME, NAME@ALIAS or NAME/VERSION of a graph or a language model."""
    name: Name | Literal[""] = ""
    """Name the compressed version is registered under; empty means the model's own."""
    candidates: tuple[CandidateConfig, ...] = Field(min_length=1)
    """What is tried, in this order; the smallest that stays within the budget is registered."""
    max_loss_increase: float = Field(0.01, ge=0)
    """The budget: how much `metric` may grow, as a share of the model's own."""
    metric: QualityMetric | None = None
    """None means loss for a language model, log_loss for a classifier, mse for a regression."""
    data: DataConfig | None = None
    """None means the dataset that the version was trained on."""
    split: Literal["train", "validation", "test"] = "validation"
    """What `metric` is measured on."""
    batch_size: int = Field(32, ge=1)
    num_threads: int = Field(2, ge=1, le=256)
    speed_rounds: int = Field(5, ge=1)
    """Turns that the model and a candidate take at being timed; the median counts."""
    experiment: str = "compress"
    """MLflow experiment, for versions that no run of this cluster made; else the run becomes a
    child of the version's own."""


def check_candidates(config: CompressConfig, kind: str, shown: str) -> None:
    """Refuse what makes no sense, before anything is loaded.

    Args:
        kind: of the version, shown as `shown`.

    Raises:
        InputError: naming the first candidate that does not go with it, or that stands there twice.
    """
    fitting = [method for method, wanted in _KINDS.items() if wanted == kind]
    if not fitting:
        raise InputError(
            f"{shown} is of kind '{kind}', and an adapter is compressed with its base",
            hint="merge it into its base with jobs.export, and compress the merged version",
            param="model",
        )
    if kind == "language_model" and config.metric not in (None, "loss"):
        raise InputError(
            f"metric '{config.metric}' is not measured on a language model",
            hint="set it to loss, or leave it out",
            param="metric",
        )
    labels: set[str] = set()
    for number, candidate in enumerate(config.candidates):
        param = f"candidates.{number}"
        if _KINDS[candidate.method] != kind:
            raise InputError(
                f"{param}: '{candidate.method}' is for a package of kind "
                f"'{_KINDS[candidate.method]}', and {shown} is of kind '{kind}'",
                hint=f"expected one of: {', '.join(fitting)}",
                param=param,
            )
        if candidate.label in labels:
            raise InputError(
                f"{param}: '{candidate.label}' stands there twice", hint="remove one", param=param
            )
        labels.add(candidate.label)
