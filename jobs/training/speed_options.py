"""What makes training faster or smaller, and what each option cannot be combined with. No torch.

Every refusal names the nearest choice that is possible.

    check_speed_options(deepspeed_config, config)
"""

from __future__ import annotations

from typing import Any

from cluster.errors import ConfigError
from jobs.models.config import LanguageModelConfig, PretrainedLmConfig
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_section import enabled, zero_stage


def check_speed_options(deepspeed_config: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError for a combination that does not work."""
    stage = zero_stage(deepspeed_config)
    if config.optimizer.name == "muon":
        _check_muon(deepspeed_config, config, stage)
    if config.compile:
        _check_compile(config, stage)
    if config.activation_checkpointing:
        _check_activation_checkpointing(config)
    if isinstance(config.model, LanguageModelConfig) and config.model.mask_documents:
        _refuse_parallelism(config, "model.mask_documents")
    if isinstance(config.model, LanguageModelConfig) and config.model.distillation:
        _refuse_parallelism(config, "model.distillation")
    if isinstance(config.model, PretrainedLmConfig) and config.model.keep_zeros:
        _check_keep_zeros(config, stage)


def _check_activation_checkpointing(config: TrainConfig) -> None:
    if not isinstance(config.model, LanguageModelConfig):
        raise _refusal(
            f"activation_checkpointing works on a stack of layers, and model.family "
            f"'{config.model.family}' has none",
            "activation_checkpointing",
            "set it to false, or micro_batch_size lower",
        )
    _refuse_parallelism(config, "activation_checkpointing")


def _check_keep_zeros(config: TrainConfig, stage: int) -> None:
    if config.optimizer.name == "muon":
        raise _refusal(
            "model.keep_zeros cannot be combined with optimizer.name 'muon', whose updates are "
            "orthogonalised and fill the zeros",
            "optimizer.name",
            "set it to adamw",
        )
    if stage == 3:
        raise _refusal(
            "model.keep_zeros needs whole matrices, and ZeRO stage 3 gives each worker slices",
            "model.keep_zeros",
            "set deepspeed.zero_optimization.stage to 2",
        )
    _refuse_parallelism(config, "model.keep_zeros")


def _check_muon(deepspeed_config: dict[str, Any], config: TrainConfig, stage: int) -> None:
    if stage > 0:
        raise _refusal(
            f"optimizer.name 'muon' needs whole matrices, and ZeRO stage {stage} gives each worker "
            "slices",
            "optimizer.name",
            "set deepspeed.zero_optimization.stage to 0, or optimizer.name to adamw",
        )
    for key in enabled(deepspeed_config, "bf16", "fp16"):
        raise _refusal(
            f"optimizer.name 'muon' cannot be combined with deepspeed.{key}",
            "optimizer.name",
            "remove that section and set precision to bf16",
        )
    _refuse_parallelism(config, "optimizer.name 'muon'")


def _check_compile(config: TrainConfig, stage: int) -> None:
    _refuse_parallelism(config, "compile")
    if stage == 3:
        raise _refusal(
            "compile cannot be combined with ZeRO stage 3, which gathers weights inside each layer",
            "compile",
            "set deepspeed.zero_optimization.stage to 2, or compile to false",
        )


def _refuse_parallelism(config: TrainConfig, what: str) -> None:
    for kind in ("tensor", "pipeline"):
        if getattr(config.parallelism, kind) > 1:
            raise _refusal(
                f"{what} cannot be combined with parallelism.{kind}",
                f"parallelism.{kind}",
                f"set parallelism.{kind} to 1; num_workers then share each batch",
            )


def _refusal(message: str, param: str, hint: str) -> ConfigError:
    return ConfigError(message, hint=hint, param=param)
