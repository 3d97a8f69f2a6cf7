"""Tensor parallelism behind the `Engine` Protocol: every layer's matrices are shared by workers.

DeepSpeed's AutoTP cuts the matrices of a whole model in place. Embeddings, norms and a tied head
stay whole at every worker.

    engine = start_tensor_parallel(model, family, config, deepspeed_config, group, layout)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from jobs.models.family import Family
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_engine import DeepSpeedEngine, import_deepspeed, initialize
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup


def start_tensor_parallel(
    model: torch.nn.Module,
    family: Family,
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    group: ProcessGroup,
    layout: Layout,
) -> TensorParallelEngine:
    """Keep this worker's share of a whole model; raises ConfigError as `initialize` does."""
    # Takes over the process group that has been started.
    import_deepspeed().init_distributed()
    from deepspeed.utils import groups

    # Made before the engine, which otherwise takes all workers for copies of the model.
    groups._init_tp_mesh_device(tensor_model_parallel_size=layout.tensor)
    engine = initialize(model, config, deepspeed_config, groups)
    return TensorParallelEngine(family, engine, config, deepspeed_config, group)


class TensorParallelEngine(DeepSpeedEngine):
    """See `jobs.training.engine.Engine`."""

    def __init__(self, family: Family, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._family = family

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[torch.nn.Module]:
        """A new model with the weights of all workers; after it, this engine trains no more."""
        whole = self._family.build()
        _gather_into(whole, self._engine.module)
        yield whole


@torch.no_grad()
def _gather_into(whole: torch.nn.Module, divided: torch.nn.Module) -> None:
    """Weights are gathered one module at a time, so that little memory is needed."""
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    for path, module in divided.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        with GatherReplacedLayerParams(list(parameters.values()), module):
            for name, parameter in parameters.items():
                whole.get_parameter(f"{path}.{name}").copy_(parameter)
