"""The table of engines: which one a layout of workers needs.

engine = start_deepspeed(model, family, config, deepspeed_config, group, layout)
"""

from __future__ import annotations

from typing import Any

import torch

from jobs.models.family import Family
from jobs.training.compiling import compile_layers
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_engine import DeepSpeedEngine, initialize
from jobs.training.engine import Engine
from jobs.training.parallelism import Layout
from jobs.training.pipeline_engine import start_pipeline
from jobs.training.process_group import ProcessGroup
from jobs.training.tensor_engine import start_tensor_parallel


def start_deepspeed(
    model: torch.nn.Module,
    family: Family,
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    group: ProcessGroup,
    layout: Layout,
) -> Engine:
    """Wrap a whole model, the same at every worker; the process group must have been started.

    Raises:
        ConfigError: DeepSpeed refuses the configuration, in its own words.
    """
    if config.activation_checkpointing:
        # Models of transformers have it; `check_speed_options` has refused others.
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if layout.pipeline > 1:
        return start_pipeline(model, family, config, deepspeed_config, group, layout)
    if layout.tensor > 1:
        return start_tensor_parallel(model, family, config, deepspeed_config, group, layout)
    if config.compile:
        compile_layers(model)
    engine = initialize(model, config, deepspeed_config)
    return DeepSpeedEngine(engine, config, deepspeed_config, group)
