"""What the machine must have before DeepSpeed compiles an operator, or torch a model.

require_compiler({"optimizer": {"type": "Adam", "params": {"torch_adam": False}}})
require_torch_compiler()
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from cluster.errors import MissingToolError

_TOOLS = {"g++": "g++", "ninja": "ninja-build"}
_COMPILED_TYPES = ("lion", "lamb", "cpuadam", "fusedadam", "onebitadam", "zerooneadam")


def require_compiler(
    deepspeed_config: dict[str, Any], *, which: Callable[[str], str | None] = shutil.which
) -> None:
    """Raises MissingToolError if the configuration compiles an operator and a tool is missing."""
    reason = compiled_part(deepspeed_config)
    if reason is None:
        return
    missing = [tool for tool in _TOOLS if which(tool) is None]
    if missing:
        packages = " ".join(_TOOLS[tool] for tool in missing)
        raise MissingToolError(
            f"{reason} is compiled on first use, and there is no {' and no '.join(missing)} here",
            hint=f"run: apt-get install -y {packages}",
            param=reason,
        )


def require_torch_compiler(*, which: Callable[[str], str | None] = shutil.which) -> None:
    """Raises MissingToolError if torch.compile would find no C++ compiler."""
    if which("g++") is None and which("clang++") is None:
        raise MissingToolError(
            "compile is true, torch.compile needs a C++ compiler, and there is no g++ here",
            hint="run: apt-get install -y g++, or set compile=false",
            param="compile",
        )


def compiled_part(deepspeed_config: dict[str, Any]) -> str | None:
    """The key that makes DeepSpeed compile an operator, if there is one."""
    optimizer = deepspeed_config.get("optimizer", {})
    kind = str(optimizer.get("type", "")).lower()
    if kind in ("adam", "adamw") and not optimizer.get("params", {}).get("torch_adam"):
        return "deepspeed.optimizer.params.torch_adam=false"
    if kind in _COMPILED_TYPES:
        return f"deepspeed.optimizer.type={optimizer['type']}"
    return None
