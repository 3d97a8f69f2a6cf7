"""A model's weights as the native engine holds them, from a Hugging Face directory.

weights = prepare_weights(read_tensors(model_dir), shape, dtype=torch.bfloat16, device="cpu")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import PackageError
from serve_apps.llm.native.linear import Linear, make_linear
from serve_apps.llm.native.quantised import Int8Linear
from serve_apps.llm.native.shape import ModelShape

Tensors = Mapping[str, torch.Tensor]
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; queries, keys and values are one matrix."""

    attention_norm: torch.Tensor
    query_key_value: Linear
    head_norm: torch.Tensor | None
    """Of queries and keys, [heads, head size]; None where they have none."""
    output: Linear
    mlp_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear


def read_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of a *verified* directory, mapped into memory."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def computed_dtype(tensors: Tensors) -> torch.dtype:
    """What a model is computed in unless its user says otherwise: bfloat16 where most of its
    parameters are stored so."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    stored = max(counts, key=lambda dtype: counts[dtype])
    return stored if stored == torch.bfloat16 else torch.float32


def prepare_weights(
    tensors: Tensors,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: str,
    is_int8: bool = False,
) -> ModelWeights:
    """Weights joined and laid out.

    Args:
        is_int8: round the matrices of the layers; the embedding and the head stay what they are.

    Raises:
        PackageError: one is missing or has another shape than its configuration says.
    """
    reader = _Reader(tensors, dtype, device, Int8Linear if is_int8 else make_linear)
    embedding = reader.tensor("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
    if "lm_head.weight" in tensors:
        head_weight = reader.tensor("lm_head.weight", shape.vocab_size, shape.hidden_size)
    else:
        head_weight = embedding  # tied
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_layer(reader, f"model.layers.{i}.", shape) for i in range(shape.num_layers)),
        norm=reader.tensor("model.norm.weight", shape.hidden_size),
        head=make_linear(head_weight, None),
    )


class _Reader:
    """Takes tensors by name, in the type and on the device where they are to be."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype, device: str, make: MakeLinear) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        self._make = make

    def tensor(self, name: str, *expected: int) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None:
            raise PackageError(
                f"the model's weights lack '{name}'", hint="copy all safetensors shards"
            )
        if expected and tuple(found.shape) != expected:
            raise PackageError(
                f"the model's weight '{name}' has shape {list(found.shape)}, and its config.json "
                f"says {list(expected)}",
                hint="copy config.json and the weights from the same model",
            )
        return found.detach().to(self._device, self._dtype)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def linear(self, names: list[str], num_columns: int) -> Linear:
        """One matrix of several with the same input, below each other."""
        matrices = [self.tensor(f"{name}.weight") for name in names]
        for name, matrix in zip(names, matrices, strict=True):
            if matrix.shape[-1] != num_columns:
                self.tensor(f"{name}.weight", matrix.shape[0], num_columns)
        biases = [self.tensor(f"{name}.bias") for name in names if self.has(f"{name}.bias")]
        return self._make(torch.cat(matrices), torch.cat(biases) if biases else None)


def _layer(reader: _Reader, prefix: str, shape: ModelShape) -> LayerWeights:
    attention = prefix + "self_attn."
    head_norm = None
    if reader.has(attention + "q_norm.weight"):
        query = reader.tensor(attention + "q_norm.weight", shape.head_size)
        key = reader.tensor(attention + "k_norm.weight", shape.head_size)
        head_norm = torch.cat(
            (query.expand(shape.num_heads, -1), key.expand(shape.num_kv_heads, -1))
        )
    hidden = shape.hidden_size
    mlp = prefix + "mlp."
    down = reader.tensor(mlp + "down_proj.weight")
    return LayerWeights(
        attention_norm=reader.tensor(prefix + "input_layernorm.weight", hidden),
        query_key_value=reader.linear([attention + f"{name}_proj" for name in "qkv"], hidden),
        head_norm=head_norm,
        output=reader.linear([attention + "o_proj"], shape.num_heads * shape.head_size),
        mlp_norm=reader.tensor(prefix + "post_attention_layernorm.weight", hidden),
        gate=reader.linear([mlp + "gate_proj"], hidden),
        up=reader.linear([mlp + "up_proj"], hidden),
        down=reader.linear([mlp + "down_proj"], down.shape[-1]),
    )
