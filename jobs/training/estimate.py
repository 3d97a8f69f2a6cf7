"""What a run will take, from its config alone: parameters, bytes per worker, steps.

Weights are never allocated. Activations are not counted: they depend on the kernels.

    for line in estimate(config).lines(): print(line)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from jobs.data.cleaning import clean
from jobs.data.config import DataConfig
from jobs.data.corpus import plan_corpus
from jobs.data.dataset import ColumnInfo
from jobs.data.inspection import expected_vocab_size
from jobs.data.packing import token_columns, token_dtype
from jobs.data.preparation import read_numbers
from jobs.data.tables import Table
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config, zero_stage
from jobs.training.monitor import check_metrics
from jobs.training.parallelism import Layout

_FP32_BYTES = 4
# Numbers that an optimizer keeps per parameter.
_OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "adagrad": 1, "sgd": 1, "muon": 2}


@dataclass(frozen=True)
class Estimate:
    """Sizes are per worker."""

    num_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    zero_stage: int
    plan: BatchPlan
    layout: Layout
    steps: int
    unit: str
    units_per_step: int

    def lines(self) -> Iterator[str]:
        parts = self.layout.num_parts
        sharers = "workers" if parts == 1 else f"groups of {parts} workers"
        total = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        yield f"parameters  {self.num_parameters:,}"
        yield (
            f"per worker  {_megabytes(total)}: weights {_megabytes(self.weight_bytes)}, gradients "
            f"{_megabytes(self.gradient_bytes)}, optimizer {_megabytes(self.optimizer_bytes)} "
            f"(ZeRO {self.zero_stage} over {self.plan.world_size}); activations not counted"
        )
        yield (
            f"per step    {self.plan.batch_size} rows ({self.units_per_step:,} {self.unit}) = "
            f"{self.plan.world_size} {sharers} * {self.plan.accumulation_steps} * "
            f"{self.plan.micro_batch_size} rows"
        )
        yield (
            f"in all      {self.steps:,} steps, {self.steps * self.units_per_step:,} {self.unit}"
        )


def estimate(config: TrainConfig, world_size: int) -> Estimate:
    """Raises what the run itself would raise for a wrong config or a missing source."""
    layout = Layout.of(config, world_size)
    plan = BatchPlan.make(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        world_size=layout.num_copies,
    )
    stage = zero_stage(make_deepspeed_config(config, plan))
    family = make_family(config.model, expected_shape(config.data))
    check_metrics(config, family)
    with torch.device("meta"):
        model = family.build()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    states = _OPTIMIZER_STATES[config.optimizer.name]
    held = _num_held(model, layout) * _FP32_BYTES
    return Estimate(
        num_parameters=num_parameters,
        weight_bytes=_share(held, plan, sharded=stage >= 3),
        gradient_bytes=_share(held, plan, sharded=stage >= 2),
        optimizer_bytes=_share(held * states, plan, sharded=stage >= 1),
        zero_stage=stage,
        plan=plan,
        layout=layout,
        steps=config.steps,
        unit=family.unit,
        units_per_step=plan.batch_size * family.units_per_row,
    )


def expected_shape(config: DataConfig) -> DataShape:
    """The shape that a dataset will have once it is prepared; reads no more of a text source than
    its beginning."""
    if config.kind == "text":
        return _expected_text(config)
    content = read_numbers(config)
    if isinstance(content, Table):
        cleaned = clean(content, config)
        columns = {
            name: ColumnInfo(dtype=str(array.dtype), shape=tuple(array.shape[1:]))
            for name, array in cleaned.rows["train"].items()
        }
        return DataShape(columns, class_names=content.class_names, table=cleaned.info)
    columns = {
        name: ColumnInfo(dtype=str(array.dtype), shape=tuple(array.shape[1:]))
        for name, array in content.columns.items()
    }
    return DataShape(columns, class_names=content.class_names)


def _expected_text(config: DataConfig) -> DataShape:
    plan_corpus(config)
    vocab_size = expected_vocab_size(config)
    length = config.text.sequence_length
    found = token_columns(length, token_dtype(vocab_size), has_loss_mask=config.is_chat)
    columns = {name: ColumnInfo(dtype=c.dtype, shape=c.shape) for name, c in found.items()}
    return DataShape(columns, vocab_size=vocab_size, sequence_length=length)


def _num_held(model: torch.nn.Module, layout: Layout) -> int:
    """Parameters at the worker that holds the most of a copy of the model."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if layout.tensor > 1:
        return sum(
            size // layout.tensor if name.endswith("_proj.weight") or "lm_head" in name else size
            for name, size in sizes.items()
        )
    if layout.pipeline > 1:
        layers = [name for name in sizes if ".layers." in name]
        num_layers = len({name.split(".")[2] for name in layers})
        per_layer = sum(sizes[name] for name in layers) // num_layers
        # The first stage has the embedding; the last one the norm, and a head of the same size.
        return -(-num_layers // layout.pipeline) * per_layer + sum(
            size for name, size in sizes.items() if name not in layers and "lm_head" not in name
        )
    return sum(sizes.values())


def _share(total_bytes: int, plan: BatchPlan, *, sharded: bool) -> int:
    return -(-total_bytes // plan.world_size) if sharded else total_bytes


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
