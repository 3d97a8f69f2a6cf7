"""The shape of a raw `deepspeed:` section, as far as our own code reads it.

DeepSpeed checks the rest when it is given the whole.

    check_shape({"zero_optimization": {"stage": 2}})
    zero_stage({"zero_optimization": {"stage": 2}})                            # 2
    enabled({"bf16": {"enabled": True}}, "bf16", "fp16")                       # ['bf16']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def zero_stage(deepspeed_config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a finished ds_config."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def enabled(deepspeed_config: Mapping[str, Any], *names: str) -> list[str]:
    """Those of the named sections that a finished ds_config switches on."""
    return [name for name in names if deepspeed_config.get(name, {}).get("enabled")]


def _mapping(section: Mapping[str, JsonValue], name: str) -> dict[str, JsonValue]:
    value = section.get(name, {})
    assert isinstance(value, dict), "checked before"
    return value
