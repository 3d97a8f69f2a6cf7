"""From our config and a raw `deepspeed:` section to the ds_config that DeepSpeed gets.

A key that one of our fields decides may be absent, "auto" or equal; another value is refused,
naming both. Every other key passes through. It imports no DeepSpeed.

    make_deepspeed_config(config, plan)      # {'train_batch_size': 32, ...}
"""

from __future__ import annotations

import copy
from typing import Any

from cluster.errors import ConfigError
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.parallelism import settle_parallelism
from jobs.training.speed_options import check_speed_options

_AUTO = "auto"
_DEFAULT_ZERO_STAGE = 1


def make_deepspeed_config(config: TrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """Raises ConfigError for a key that contradicts one of our fields."""
    raw: dict[str, Any] = copy.deepcopy(dict(config.deepspeed))
    _settle_owned_keys(raw, config, plan)
    _settle_optimizer(raw, config)
    _settle_scheduler(raw, config)
    _drop_auto(raw)
    # Muon's matrices must stay whole.
    stage = 0 if config.optimizer.name == "muon" else _DEFAULT_ZERO_STAGE
    zero = raw.setdefault("zero_optimization", {"stage": stage})
    if "offload_optimizer" in zero:
        # Our optimizers are torch's; DeepSpeed's own would have to be compiled.
        raw.setdefault("zero_force_ds_cpu_optimizer", False)
    # Ours are torch's element-wise optimizers, which ZeRO may shard whatever their type.
    raw.setdefault("zero_allow_untested_optimizer", True)
    raw.setdefault("steps_per_print", 2**31)
    settle_parallelism(raw, config)
    check_speed_options(raw, config)
    _refuse_what_cannot_be_saved(raw)
    return raw


def _settle_owned_keys(raw: dict[str, Any], config: TrainConfig, plan: BatchPlan) -> None:
    # key → (our value, the field that decides it)
    always = {
        "train_batch_size": (plan.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch_size, "micro_batch_size"),
        "gradient_accumulation_steps": (
            plan.accumulation_steps,
            "batch_size, micro_batch_size and num_workers",
        ),
    }
    for key, (ours, field) in always.items():
        theirs = raw.get(key, _AUTO)
        if theirs not in (_AUTO, ours):
            raise _contradiction(key, theirs, field, ours)
        raw[key] = ours
    if _adopts(raw, "gradient_clipping", config, "gradient_clipping"):
        raw["gradient_clipping"] = config.gradient_clipping
    _settle_precision(raw, config)


def _adopts(raw: dict[str, Any], key: str, config: TrainConfig, field: str) -> bool:
    """Whether our value goes into `raw[key]`; theirs stays if our field was left at its default."""
    theirs, ours = raw.get(key, _AUTO), getattr(config, field)
    if theirs in (_AUTO, ours):
        return True
    if field in config.model_fields_set:
        raise _contradiction(key, theirs, field, ours)
    return False


def _settle_precision(raw: dict[str, Any], config: TrainConfig) -> None:
    for key, ours in (("bf16", config.precision == "bf16"), ("fp16", False)):
        section = raw.get(key, {})
        if section.get("enabled") == _AUTO:
            section["enabled"] = ours
        elif section.get("enabled") and not ours and "precision" in config.model_fields_set:
            raise _contradiction(f"{key}.enabled", True, "precision", config.precision)


def _settle_optimizer(raw: dict[str, Any], config: TrainConfig) -> None:
    if "optimizer" not in raw:
        return
    section = raw["optimizer"]
    ours = config.optimizer
    parameters: dict[str, Any] = section.setdefault("params", {})
    values = {
        "lr": ours.learning_rate,
        "betas": list(ours.betas),
        "eps": ours.epsilon,
        "weight_decay": ours.weight_decay,
    }
    fields = {"lr": "learning_rate", "eps": "epsilon"}
    for key, value in values.items():
        theirs = parameters.get(key)
        field = fields.get(key, key)
        if theirs == _AUTO:
            parameters[key] = value
        elif theirs is not None and theirs != value and field in ours.model_fields_set:
            raise _contradiction(f"optimizer.params.{key}", theirs, f"optimizer.{field}", value)
    if "name" in ours.model_fields_set and section["type"].lower() != ours.name:
        raise _contradiction("optimizer.type", section["type"], "optimizer.name", ours.name)
    if section["type"].lower() in ("adam", "adamw"):
        # The fused variants are compiled on first use.
        parameters.setdefault("torch_adam", True)


def _settle_scheduler(raw: dict[str, Any], config: TrainConfig) -> None:
    if "scheduler" not in raw:
        return
    section = raw["scheduler"]
    if "schedule" in config.model_fields_set:
        raise _contradiction("scheduler", section["type"], "schedule", config.schedule.kind)
    parameters: dict[str, Any] = section.setdefault("params", {})
    values = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": config.optimizer.learning_rate,
        "warmup_num_steps": config.schedule.warmup_steps,
        "total_num_steps": config.steps,
    }
    for key, value in values.items():
        if parameters.get(key) == _AUTO:
            parameters[key] = value


def _refuse_what_cannot_be_saved(raw: dict[str, Any]) -> None:
    """Checkpoints hold what lies in memory, and is stepped by one optimizer."""
    for part in ("offload_optimizer", "offload_param"):
        section = raw["zero_optimization"].get(part, {})
        for key, only in (("device", ("cpu", "none")), ("ratio", (1, 1.0))):
            if section.get(key, only[0]) not in only:
                name = f"deepspeed.zero_optimization.{part}.{key}"
                raise ConfigError(
                    f"{name} is {section[key]!r}, and such a state cannot be saved",
                    hint=f"set it to {only[0]}",
                    param=name,
                )


def _drop_auto(section: dict[str, Any]) -> None:
    """What is still "auto" is left to DeepSpeed's defaults."""
    for key in [key for key, value in section.items() if value == _AUTO]:
        del section[key]
    for value in section.values():
        if isinstance(value, dict):
            _drop_auto(value)


def _contradiction(key: str, theirs: object, field: str, ours: object) -> ConfigError:
    return ConfigError(
        f"deepspeed.{key} is {theirs!r}, and {field} makes it {ours!r}",
        hint=f"remove deepspeed.{key} (or write auto) and set {field.split(',')[0]}",
        param=f"deepspeed.{key}",
    )
