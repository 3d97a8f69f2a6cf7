"""A language model as consecutive layers, each taking what the one before gives.

It knows nothing of workers. Shapes: B rows, T tokens, D hidden size, V vocabulary.

    layers = [recipe.make() for recipe in cut(model)]     # embedding, decoder layers, norm, head
    logits_BTV = functools.reduce(lambda x, layer: layer(x), layers, inputs(batch))
    loss = family.loss(Answered(logits_BTV), batch)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from jobs.data.dataset import TOKENS
from jobs.models.family import Batch

Precision = Callable[[], AbstractContextManager[None]]


class Layer(nn.Module):
    """One submodule of the whole model, called with one tensor."""

    def __init__(self, part: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.part = part
        self._precision = precision

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return self._answer(inputs)

    def _answer(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.part(inputs)
        return outputs


class DecoderLayer(Layer):
    """Attention and feed-forward; positions are counted from 0, as in a training row."""

    def __init__(self, part: nn.Module, precision: Precision, rotary: nn.Module) -> None:
        super().__init__(part, precision)
        self.rotary = rotary

    def _answer(self, inputs: torch.Tensor) -> torch.Tensor:
        positions_1T = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
        # Without a mask, attention is causal.
        outputs_BTD: torch.Tensor = self.part(
            inputs,
            position_ids=positions_1T,
            position_embeddings=self.rotary(inputs, position_ids=positions_1T),
        )
        return outputs_BTD


class TiedHead(Layer):
    """The embedding, read the other way."""

    def _answer(self, inputs: torch.Tensor) -> torch.Tensor:
        weight: Any = self.part.weight
        return functional.linear(inputs, weight)


class Answered(nn.Module):
    """Stands for a model whose answer is already known."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, **_inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits)


@dataclass(frozen=True)
class Recipe:
    """How to make a layer; what is not made holds no memory once its recipe is gone."""

    kind: type[Layer]
    name: str
    """Of its submodule in the whole model; two layers of one name share their weights."""
    arguments: tuple[Any, ...]

    def make(self) -> Layer:
        return self.kind(*self.arguments)


def cut(model: Any, precision: Precision = contextlib.nullcontext) -> list[Recipe]:
    """The layers of a `LlamaForCausalLM`, which share its weights."""
    inner = model.model
    embedding = "model.embed_tokens"
    tied = model.lm_head.weight is inner.embed_tokens.weight
    decoder = (
        Recipe(DecoderLayer, f"model.layers.{number}", (layer, precision, inner.rotary_emb))
        for number, layer in enumerate(inner.layers)
    )
    return [
        Recipe(Layer, embedding, (inner.embed_tokens, precision)),
        *decoder,
        Recipe(Layer, "model.norm", (inner.norm, precision)),
        Recipe(TiedHead, embedding, (inner.embed_tokens, precision))
        if tied
        else Recipe(Layer, "lm_head", (model.lm_head, precision)),
    ]


def inputs(batch: Batch) -> torch.Tensor:
    """What the first layer takes."""
    return batch[TOKENS].long()[:, :-1]
