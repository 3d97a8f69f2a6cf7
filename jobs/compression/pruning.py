"""Weights that matter least are taken out of a language model, by `torch.nn.utils.prune`.

unstructured: the smallest weights of each matrix become zero. neurons: the inner neurons of each
feed-forward layer with the smallest way out are removed, so that its matrices are smaller. What is
left is to be fine-tuned. It knows nothing of training.

    prune_model(model_dir, stage, PruneConfig(method="prune", structure="neurons", sparsity=0.5, …))
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import prune as torch_prune

from cluster.errors import InputError
from cluster.model_package.language_model import (
    hugging_face_config,
    load_reference,
    one_line,
    quiet,
)
from jobs.compression.config import PruneConfig

prune: Any = torch_prune  # it has no types

# Widths that kernels and quantisation groups divide.
_MULTIPLE = 32
_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def check_prunable(model_dir: Path, candidate: PruneConfig) -> None:
    """Raises InputError, without loading weights, if there is nothing to remove."""
    config = hugging_face_config(model_dir).get_text_config()
    if candidate.structure == "unstructured":
        return
    if config.model_type not in _GATED:
        raise InputError(
            f"structure 'neurons' knows the feed-forward layers of {', '.join(sorted(_GATED))}, "
            f"and this model is of type '{config.model_type}'",
            hint="set structure to unstructured",
            param="structure",
        )
    if _num_kept(config.intermediate_size, candidate.sparsity) == config.intermediate_size:
        raise InputError(
            f"sparsity {candidate.sparsity:g} of {config.intermediate_size} neurons, in steps of "
            f"{_MULTIPLE}, removes none",
            hint="raise it",
            param="sparsity",
        )


def prune_model(model_dir: Path, target: Path, candidate: PruneConfig) -> None:
    """Write the pruned model, a plain Hugging Face directory, to an empty one.

    Raises:
        PackageError: the model cannot be loaded.
    """
    model = load_reference(model_dir)
    if candidate.structure == "unstructured":
        _zero_smallest(model, candidate.sparsity)
    else:
        _remove_neurons(model, candidate.sparsity)
    with one_line("the pruned model cannot be saved"), quiet():
        model.save_pretrained(target)
    for path in sorted(model_dir.iterdir()):
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copyfile(path, target / path.name)


def _zero_smallest(model: torch.nn.Module, sparsity: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            prune.l1_unstructured(module, "weight", amount=sparsity)
            prune.remove(module, "weight")


def _remove_neurons(model: Any, sparsity: float) -> None:
    config = model.config.get_text_config()
    num_kept = _num_kept(config.intermediate_size, sparsity)
    for layer in _feed_forward_layers(model):
        width = layer.down_proj.in_features
        prune.ln_structured(layer.down_proj, "weight", amount=width - num_kept, n=2, dim=1)
        kept = layer.down_proj.weight_mask[0].nonzero().squeeze(1)
        prune.remove(layer.down_proj, "weight")
        for module in (layer.gate_proj, layer.up_proj):
            _narrow(module, kept, dim=0)
        _narrow(layer.down_proj, kept, dim=1)
    config.intermediate_size = num_kept


def _feed_forward_layers(model: torch.nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            yield module


def _narrow(module: torch.nn.Linear, kept: torch.Tensor, dim: int) -> None:
    module.weight = torch.nn.Parameter(module.weight.detach().index_select(dim, kept))
    if dim == 0:
        module.out_features = len(kept)
        if module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias.detach()[kept])
    else:
        module.in_features = len(kept)


def _num_kept(width: int, sparsity: float) -> int:
    return min(width, max(_MULTIPLE, round(width * (1 - sparsity) / _MULTIPLE) * _MULTIPLE))
