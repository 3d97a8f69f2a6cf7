"""Pipeline parallelism behind the `Engine` Protocol: each worker holds consecutive layers.

DeepSpeed's PipelineModule passes activations and gradients between the stages. The first stage
reads a batch's inputs; the last computes the loss or the measures and tells the others.

    engine = start_pipeline(model, family, config, deepspeed_config, group, layout)
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed

from jobs.models.family import Batch, Family
from jobs.models.pipeline import Answered, DecoderLayer, Recipe, cut, inputs
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_engine import (
    DeepSpeedEngine,
    import_deepspeed,
    initialize,
    precision,
)
from jobs.training.engine import LossFunction, MeasureFunction
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup


def start_pipeline(
    model: torch.nn.Module,
    family: Family,
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    group: ProcessGroup,
    layout: Layout,
) -> PipelineEngine:
    """Keep this worker's layers of a whole model; raises ConfigError as `initialize` does."""
    recipes = cut(model, functools.partial(precision, config, deepspeed_config, group))
    stages = _make_stages(recipes, layout.pipeline)
    engine = initialize(stages, config, deepspeed_config)
    names = [recipe.name for recipe in recipes]
    return PipelineEngine(family, names, engine, config, deepspeed_config, group)


class PipelineEngine(DeepSpeedEngine):
    """See `jobs.training.engine.Engine`."""

    def __init__(self, family: Family, names: Sequence[str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._family = family
        self._names = names
        self._shape: torch.Size | None = None

    def train_step(
        self, loss: LossFunction, micro_batches: Sequence[Batch], learning_rate: float
    ) -> torch.Tensor:
        self._set_learning_rate(learning_rate)
        names = tuple(micro_batches[0])

        def loss_of(logits: torch.Tensor, columns: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return loss(Answered(logits), dict(zip(names, columns, strict=True)))

        self._engine.module.loss_fn = loss_of
        self._expect(micro_batches[0])
        # Forward and backward passes of several micro-batches are under way at once.
        with self.clock.measure("pipeline"):
            value: torch.Tensor = self._engine.train_batch(map(_as_pair, micro_batches))
        return value.detach().float()

    def measure(self, measure: MeasureFunction, batch: Batch) -> torch.Tensor:
        self._expect(batch)
        # It would add the logits to the losses of the last step.
        self._engine.total_loss = None
        logits = self._engine.eval_batch(
            iter([_as_pair(batch)]), compute_loss=False, reduce_output=None, num_micro_batches=1
        )
        with torch.no_grad():
            box = [measure(Answered(logits[0]), batch) if self._engine.is_last_stage() else None]
        grid = self._engine.grid
        last = grid.stage_to_global(grid.pipe_parallel_size - 1)
        distributed.broadcast_object_list(box, src=last, group=grid.get_pipe_parallel_group())
        sums = box[0]
        assert sums is not None, "the last stage measures"
        return sums

    def _expect(self, batch: Batch) -> None:
        """Stages agree on the shape of what they exchange once, until told that it changes."""
        shape = inputs(batch).shape
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[torch.nn.Module]:
        """A new model; at the first worker it gets the weights of all stages."""
        whole = self._family.build()
        for index, name in enumerate(self._names):
            # A tied head is the embedding, which the first stage has.
            if name not in self._names[:index]:
                self._move(index, whole.get_submodule(name))
        yield whole

    @torch.no_grad()
    def _move(self, index: int, target: torch.nn.Module) -> None:
        """Bring a layer of the first copy of the model to the first worker."""
        stages, grid, device = self._engine.module, self._engine.grid, self._group.device
        stage = stages.stage_owner(index)
        owner = grid.stage_to_global(stage, data=0)
        layer: Any = None
        if stage == grid.get_stage_id():
            layer = stages.forward_funcs[index - stages.parts[stage]].part
        for name, parameter in target.named_parameters():
            if self._group.rank == owner == 0:
                parameter.copy_(layer.get_parameter(name))
            elif self._group.rank == owner:
                distributed.send(layer.get_parameter(name).contiguous(), dst=0)
            elif self._group.is_first:
                received = torch.empty_like(parameter, device=device)
                distributed.recv(received, src=owner)
                parameter.copy_(received)


def _as_pair(batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What DeepSpeed hands to the first stage, and to the loss."""
    return inputs(batch), tuple(batch.values())


def _make_stages(recipes: Sequence[Recipe], num_stages: int) -> Any:
    """A PipelineModule holding this worker's share: every stage has decoder layers."""
    # Takes over the process group that has been started.
    import_deepspeed().init_distributed()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    names = [recipe.name for recipe in recipes]
    specs = [
        TiedLayerSpec("tied", recipe.kind, *recipe.arguments, tied_weight_attr="part.weight")
        if names.count(recipe.name) > 1
        else LayerSpec(recipe.kind, *recipe.arguments)
        for recipe in recipes
    ]
    # It prints how it cuts.
    with contextlib.redirect_stdout(io.StringIO()):
        stages = PipelineModule(
            specs, num_stages=num_stages, partition_method=f"type:{DecoderLayer.__name__}"
        )
    for spec in specs:
        # Other workers' layers are no longer needed here.
        spec.module_args = ()
    for parameter in stages.parameters():
        # Without ZeRO, gradient clipping counts only what is marked so, and the first stage's.
        parameter.model_parallel = not parameter.ds_pipe_replicated
    return stages
