"""LoRA on a language model: matrices of low rank beside the base's own, which stay as they are.

The model keeps its class and its shape; `peft` puts its layers in place of those it adapts. It
knows nothing of workers and packages.

    add_lora(model, LoraConfig(rank=8))          # only the added matrices are trained now
    save_adapter(model, directory)               # a plain peft directory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigError
from jobs.models.config import LoraConfig

_NAME = "default"
# Under which peft looks for a model's parameters in an adapter's file.
_PREFIX = "base_model.model."


def add_lora(model: torch.nn.Module, config: LoraConfig) -> None:
    """Freeze a model and add matrices to train, drawn from torch's current random state.

    Raises:
        ConfigError: `target_modules` names a matrix that the model does not have.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = config.target_modules
    _check_targets(model, targets)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if targets == "all-linear" else sorted(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(peft_config, model, adapter_name=_NAME)
    # peft writes out every path; what they end with says the same.
    peft_config.target_modules = {path.rpartition(".")[2] for path in peft_config.target_modules}


def save_adapter(model: Any, directory: Path) -> None:
    """Write the matrices of `add_lora` and their configuration, as peft does."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, adapter_name=_NAME)
    tensors = {_PREFIX + name: value.float().contiguous() for name, value in weights.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[_NAME]
    config.inference_mode = True
    config.save_pretrained(directory)


def _check_targets(model: torch.nn.Module, targets: str | tuple[str, ...]) -> None:
    if isinstance(targets, str):
        return
    known = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in path
    }
    for name in targets:
        if name not in known:
            raise ConfigError(
                f"model.lora.target_modules: the base has no matrices '{name}'",
                hint=f"expected some of: {', '.join(sorted(known))}",
                param="model.lora.target_modules",
            )
