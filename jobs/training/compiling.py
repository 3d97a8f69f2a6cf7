"""torch.compile, stack by stack: like layers share one compiled graph.

A whole decoder takes torch several times longer to compile than one of its layers, and inside a
whole graph transformers cannot see that a row holds a single document, and makes a mask of
tokens * tokens for it.

    keep_compiled(settings.home / "cache" / "inductor")
    compile_layers(model)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

BACKEND = "inductor"
"""Of torch.compile."""


def keep_compiled(directory: Path) -> None:
    """Keep what is compiled in a folder that all workers and later runs share."""
    import torch._inductor.config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
    # Helper processes cost seconds to start, and the workers already have the cores.
    torch._inductor.config.compile_threads = 1


def compile_layers(model: torch.nn.Module) -> None:
    """Compile on first use; the model's parameters keep their names."""
    for part in parts_to_compile(model):
        part.compile(backend=BACKEND)


def parts_to_compile(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """The longest list of modules of one class, or else the model as a whole."""
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    longest = max(stacks, key=len, default=[])
    return longest if len(longest) > 1 else [model]
