"""How workers are arranged: copies of the model, and workers that share one copy. No torch here.

A run of 4 workers with parallelism.tensor = 2 trains 2 copies of the model on different rows, each
copy cut in 2. What cannot be arranged is refused with the nearest choice that can.

    layout = Layout.of(config, world_size=4)
    layout.num_copies, layout.copy_of(rank=3), layout.part_of(rank=3)      # 2, 1, 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from jobs.models.config import CausalLmConfig, PretrainedLmConfig
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_section import enabled, zero_stage

_MAX_STAGE = {"tensor": 2, "pipeline": 1}


@dataclass(frozen=True)
class Layout:
    """world_size = num_copies * tensor * pipeline."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """Raises ConfigError if the model or the workers cannot be divided so."""
        layout = cls(world_size, config.parallelism.tensor, config.parallelism.pipeline)
        if layout.num_parts > 1:
            _refuse_both(layout)
            model = _require_causal_lm(config)
            _refuse_workers_left_over(layout, config)
            if layout.tensor > 1:
                _refuse_undivided_widths(layout, model)
            if layout.pipeline > model.num_layers:
                raise _refusal(
                    f"parallelism.pipeline {layout.pipeline} needs as many layers, and "
                    f"model.num_layers is {model.num_layers}",
                    "pipeline",
                    f"set parallelism.pipeline to {model.num_layers} or less",
                )
        return layout

    @property
    def num_parts(self) -> int:
        """Workers that share one copy of the model, and see the same rows."""
        return self.tensor * self.pipeline

    @property
    def num_copies(self) -> int:
        """Copies of the model, each trained on its own share of a batch."""
        return self.world_size // self.num_parts

    def copy_of(self, rank: int) -> int:
        """The copy that a worker belongs to, as DeepSpeed counts: the parts of a layer lie side by
        side, the stages of a pipeline far apart."""
        return rank % self.num_copies if self.pipeline > 1 else rank // self.num_parts

    def part_of(self, rank: int) -> int:
        """The part of that copy that it holds."""
        return rank // self.num_copies if self.pipeline > 1 else rank % self.num_parts


def settle_parallelism(deepspeed_config: dict[str, Any], config: TrainConfig) -> None:
    """Complete a ds_config; raises ConfigError for what DeepSpeed cannot combine with it."""
    tensor = config.parallelism.tensor
    _refuse_their_tensor_size(deepspeed_config, tensor)
    for kind, size in (("tensor", tensor), ("pipeline", config.parallelism.pipeline)):
        if size > 1:
            _refuse_zero_stage(deepspeed_config, kind)
            _refuse_half_precision(deepspeed_config, kind)
    if tensor > 1:
        section = deepspeed_config.setdefault("tensor_parallel", {})
        # A whole row of logits at every worker is what `Family.loss` computes from.
        section.update(autotp_size=tensor, vocab_parallel_lm_head=False)


def _refuse_both(layout: Layout) -> None:
    if layout.tensor > 1 and layout.pipeline > 1:
        raise _refusal(
            f"parallelism.tensor {layout.tensor} and parallelism.pipeline {layout.pipeline} cannot "
            "be combined",
            "tensor",
            f"set parallelism.pipeline to 1, or parallelism.tensor to 1 and parallelism.pipeline "
            f"to {layout.num_parts}",
        )


def _require_causal_lm(config: TrainConfig) -> CausalLmConfig:
    kind = "tensor" if config.parallelism.tensor > 1 else "pipeline"
    if isinstance(config.model, PretrainedLmConfig):
        raise _refusal(
            f"a model that goes on from model.base cannot be divided among workers by "
            f"parallelism.{kind}",
            kind,
            f"set parallelism.{kind} to 1; num_workers then share each batch",
        )
    if not isinstance(config.model, CausalLmConfig):
        raise _refusal(
            f"model.family '{config.model.family}' cannot be divided among workers by "
            f"parallelism.{kind}, only 'causal_lm' can",
            kind,
            f"set parallelism.{kind} to 1; num_workers then share each batch",
        )
    return config.model


def _refuse_workers_left_over(layout: Layout, config: TrainConfig) -> None:
    kind = "tensor" if layout.tensor > 1 else "pipeline"
    if layout.world_size % layout.num_parts == 0:
        return
    nearest = max(1, round(layout.world_size / layout.num_parts)) * layout.num_parts
    if config.launcher == "local":
        hint = f"start it with torchrun --nproc-per-node {nearest}"
    else:
        hint = f"set num_workers to {nearest}"
    raise _refusal(
        f"parallelism.{kind} {layout.num_parts} does not divide {layout.world_size} worker(s)",
        kind,
        hint,
    )


def _refuse_undivided_widths(layout: Layout, model: CausalLmConfig) -> None:
    widths = {
        "num_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_heads,
        "intermediate_size": model.feed_forward_size,
    }
    for name, width in widths.items():
        if width % layout.tensor:
            divisors = [
                size
                for size in range(1, layout.tensor)
                if all(value % size == 0 for value in (layout.world_size, *widths.values()))
            ]
            nearest = -(-width // layout.tensor) * layout.tensor
            raise _refusal(
                f"parallelism.tensor {layout.tensor} does not divide model.{name} {width}",
                "tensor",
                f"set parallelism.tensor to {divisors[-1]}, or model.{name} to {nearest}",
            )


def _refuse_their_tensor_size(deepspeed_config: dict[str, Any], tensor: int) -> None:
    section = deepspeed_config.get("tensor_parallel", {})
    theirs = section.get("autotp_size", tensor) if isinstance(section, dict) else section
    if theirs != tensor and not (theirs == 0 and tensor == 1):
        raise ConfigError(
            f"deepspeed.tensor_parallel.autotp_size is {theirs!r}, and parallelism.tensor makes it "
            f"{tensor}",
            hint="remove it from the deepspeed section and set parallelism.tensor",
            param="deepspeed.tensor_parallel",
        )


def _refuse_zero_stage(deepspeed_config: dict[str, Any], kind: str) -> None:
    zero = deepspeed_config.get("zero_optimization", {})
    stage, largest = zero_stage(deepspeed_config), _MAX_STAGE[kind]
    if stage > largest:
        raise _refusal(
            f"parallelism.{kind} cannot be combined with ZeRO stage {stage}",
            kind,
            f"set deepspeed.zero_optimization.stage to {largest}",
        )
    for part in ("offload_optimizer", "offload_param"):
        if str(zero.get(part, {}).get("device", "none")) != "none":
            raise _refusal(
                f"parallelism.{kind} cannot be combined with deepspeed.zero_optimization.{part}",
                kind,
                f"remove {part}, or set parallelism.{kind} to 1",
            )


def _refuse_half_precision(deepspeed_config: dict[str, Any], kind: str) -> None:
    for key in enabled(deepspeed_config, "bf16", "fp16", "torch_autocast"):
        raise _refusal(
            f"parallelism.{kind} cannot be combined with deepspeed.{key}",
            kind,
            "remove that section and set precision to bf16",
        )


def _refusal(message: str, kind: str, hint: str) -> ConfigError:
    return ConfigError(message, hint=hint, param=f"parallelism.{kind}")
