"""The shape of a raw `deepspeed:` section, as far as our own code reads it.

DeepSpeed checks the rest when it is given the whole.

    check_shape({"zero_optimization": {"stage": 2}})
    zero_stage({"zero_optimization": {"stage": 2}})                            # 2
    enabled({"bf16": {"enabled": True}}, "bf16", "fp16")                       # ['bf16']
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import JsonValue

_SECTIONS = (
    "zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast",
    "tensor_parallel", "activation_checkpointing",
)  # fmt: skip
_INNER = {
    "zero_optimization": ("offload_optimizer", "offload_param"),
    "optimizer": ("params",),
    "scheduler": ("params",),
}
_STAGES = (0, 1, 2, 3)
_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")
# The step alone decides on the rows, and models are called with nothing else.
_OTHER_BATCHES = ("curriculum_learning", "data_efficiency", "progressive_layer_drop")


def check_shape(section: Mapping[str, JsonValue]) -> None:
    """Raises ValueError naming a key whose value has the wrong form."""
    for name in _SECTIONS:
        value = section.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}, expected a mapping of keys")
        for inner in _INNER.get(name, ()):
            if not isinstance(value.get(inner, {}), dict):
                raise ValueError(f"{name}.{inner} is {value[inner]!r}, expected a mapping of keys")
    for name in ("optimizer", "scheduler"):
        kind = _mapping(section, name).get("type")
        if name in section and not isinstance(kind, str):
            raise ValueError(f"{name}.type is {kind!r}, expected a name")
    stage = _mapping(section, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in (*_STAGES, "auto"):
        raise ValueError(f"zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    _require_switches(section)
    _require_numbers(section)
    _refuse_what_cannot_work(section)


def _require_switches(section: Mapping[str, JsonValue], above: str = "") -> None:
    for key, value in section.items():
        name = f"{above}{key}"
        if key == "enabled" and not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{name} is {value!r}, expected true or false")
        if isinstance(value, dict):
            _require_switches(value, f"{name}.")


def _require_numbers(section: Mapping[str, JsonValue]) -> None:
    clipping = section.get("gradient_clipping", "auto")
    if clipping != "auto" and not (_is_number(clipping) and clipping >= 0):
        raise ValueError(f"gradient_clipping is {clipping!r}, expected a number from 0, or auto")
    bucket = _mapping(section, "zero_optimization").get("reduce_bucket_size", "auto")
    if bucket != "auto" and not (_is_number(bucket) and bucket >= 1 and bucket == int(bucket)):
        raise ValueError(
            f"zero_optimization.reduce_bucket_size is {bucket!r}, expected a whole number from 1, "
            "or auto"
        )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_what_cannot_work(section: Mapping[str, JsonValue]) -> None:
    for name in enabled(section, *_MONITORS):
        raise ValueError(f"{name}.enabled is True, and MLflow gets the metrics: remove {name}")
    for name in enabled(section, *_OTHER_BATCHES):
        raise ValueError(
            f"{name}.enabled is True, and it would change which rows a step sees: remove {name}"
        )
    offload = _mapping(section, "zero_optimization").get("offload_optimizer", {})
    assert isinstance(offload, dict), "checked before"
    if offload.get("device") == "cpu" and section.get("zero_force_ds_cpu_optimizer") is True:
        raise ValueError(
            "zero_force_ds_cpu_optimizer is True, and the optimizers here are torch's: remove it"
        )
    kind = _mapping(section, "optimizer").get("type")
    if str(kind).lower() == "muon":
        raise ValueError(
            f"optimizer.type is {kind!r}, and this is not DeepSpeed's here: remove the optimizer "
            "section and set optimizer.name to muon, with ZeRO stage 0"
        )


def zero_stage(deepspeed_config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a finished ds_config."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def enabled(deepspeed_config: Mapping[str, Any], *names: str) -> list[str]:
    """Those of the named sections that a finished ds_config switches on."""
    sections = {name: deepspeed_config.get(name) for name in names}
    return [
        name
        for name, section in sections.items()
        if isinstance(section, dict) and section.get("enabled") is True
    ]


def _mapping(section: Mapping[str, JsonValue], name: str) -> dict[str, JsonValue]:
    value = section.get(name, {})
    assert isinstance(value, dict), "checked before"
    return value
