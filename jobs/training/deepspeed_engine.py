"""DeepSpeed behind the `Engine` Protocol: every worker holds, or can gather, the whole model.

engine = initialize(model, config, deepspeed_config)
DeepSpeedEngine(engine, config, deepspeed_config, group)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import ValidationError

from cluster.config import first_problem
from cluster.errors import ConfigError, HeliostatError
from jobs.models.family import Batch
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_section import enabled
from jobs.training.deepspeed_state import check_common, common_of, set_common, state_of
from jobs.training.engine import LossFunction, MeasureFunction
from jobs.training.optimizers import make_optimizer
from jobs.training.process_group import ProcessGroup
from jobs.training.sharded_state import ShardedState
from jobs.training.timing import Stopwatch

# Raw keys under which DeepSpeed builds its own optimizer or sets the learning rate itself.
_THEIR_OPTIMIZER, _THEIR_SCHEDULER = "optimizer", "scheduler"
# Lost peers and exhausted memory are torch's RuntimeErrors.
_NOT_OF_THE_CONFIG = (HeliostatError, OSError, MemoryError, RuntimeError)


def import_deepspeed() -> Any:
    # Told, it neither searches for an accelerator nor warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch has renamed collectives that DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    # A pipeline's stages send activations by broadcast, which leaves the sender's as they are.
    warnings.filterwarnings("ignore", message=r"c10d::broadcast_: an autograd kernel")
    # The shared-memory extension serves `inference_all_reduce` alone. Without it nothing is
    # compiled, which saves 30-50 s on a new machine, and the need for a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(
    model: torch.nn.Module,
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    groups: Any = None,
) -> Any:
    """DeepSpeed's engine around a model, with our optimizer unless theirs is configured.

    Args:
        groups: which workers share a copy of the model, if any do (DeepSpeed's `mpu`).

    Raises:
        ConfigError: DeepSpeed refuses the configuration, in its own words.
    """
    deepspeed = import_deepspeed()
    optimizer = None
    if _THEIR_OPTIMIZER not in deepspeed_config:
        optimizer = make_optimizer(config.optimizer, model)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=None if optimizer else list(model.parameters()),
            config=deepspeed_config,
            mpu=groups,
        )
    except Exception as error:
        if isinstance(error, _NOT_OF_THE_CONFIG) and not isinstance(error, NotImplementedError):
            raise
        raise ConfigError(
            f"DeepSpeed refuses the configuration: {_reason(error)}",
            hint="correct the deepspeed section",
            param="deepspeed",
        ) from error
    engine.clip_fp32_gradients = functools.partial(_clip, engine)
    return engine


def _clip(engine: Any) -> None:
    """What DeepSpeed does without ZeRO, keeping the norm, which it would drop."""
    from deepspeed.runtime.utils import clip_grad_norm_

    engine._global_grad_norm = clip_grad_norm_(
        parameters=list(engine.module.parameters()),
        max_norm=engine.gradient_clipping(),
        mpu=engine.mpu,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return first_problem(error)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def precision(
    config: TrainConfig, deepspeed_config: dict[str, Any], group: ProcessGroup
) -> AbstractContextManager[None]:
    """Context in which a forward pass has the run's precision."""
    in_bf16 = config.precision == "bf16" or bool(enabled(deepspeed_config, "bf16"))
    return torch.autocast(group.device.type, torch.bfloat16, enabled=in_bf16)


class DeepSpeedEngine:
    """See `jobs.training.engine.Engine`."""

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        deepspeed_config: dict[str, Any],
        group: ProcessGroup,
    ) -> None:
        self._engine = engine
        self._config = config
        self._deepspeed_config = deepspeed_config
        self._group = group
        self._learning_rate = 0.0
        self.clock = Stopwatch(group.device)

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._engine
        return model

    def train_step(
        self, loss: LossFunction, micro_batches: Sequence[Batch], learning_rate: float
    ) -> torch.Tensor:
        self._set_learning_rate(learning_rate)
        losses = [self._micro_step(loss, batch) for batch in micro_batches]
        return torch.stack(losses).mean()

    def _set_learning_rate(self, learning_rate: float) -> None:
        groups = self._engine.optimizer.param_groups
        if _THEIR_SCHEDULER not in self._deepspeed_config:
            for group in groups:
                group["lr"] = learning_rate
        self._learning_rate = float(groups[0]["lr"])

    def _micro_step(self, loss: LossFunction, batch: Batch) -> torch.Tensor:
        with self.clock.measure("forward"), self._precision():
            value = loss(self._engine, batch)
        with self.clock.measure("backward"):
            self._engine.backward(value)
        with self.clock.measure("step"):
            self._engine.step()
        return value.detach().float()

    def learning_rate(self) -> float:
        return self._learning_rate

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        if norm is None or self._engine.fp16_enabled():
            # With fp16 an overflow is part of finding the loss scale.
            return None
        return float(norm)

    def measure(self, measure: MeasureFunction, batch: Batch) -> torch.Tensor:
        # Evaluations are seldom, and their last batch is smaller: neither is worth compiling for.
        with (
            torch.no_grad(),
            self._precision(),
            torch.compiler.set_stance("eager_on_recompile"),
        ):
            return measure(self._engine, batch)

    def _precision(self) -> AbstractContextManager[None]:
        return precision(self._config, self._deepspeed_config, self._group)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[torch.nn.Module]:
        module: torch.nn.Module = self._engine.module
        if self._engine.zero_optimization_stage() < 3:
            yield module
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield module

    def state(self) -> ShardedState:
        return state_of(self._engine)

    def common(self) -> dict[str, Any]:
        return common_of(self._engine)

    def check_common(self, values: dict[str, Any]) -> None:
        check_common(self._engine, values)

    def set_common(self, values: dict[str, Any]) -> None:
        set_common(self._engine, values)
