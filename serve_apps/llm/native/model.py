"""The decoder's forward pass over one step of many sequences.

model = NativeModel.load(package.model_dir, budget, dtype=None, device="cpu")
logits = model.forward(batch).logits              # [wanted rows, vocabulary]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cluster.errors import PackageError
from cluster.model_package.language_model import hugging_face_config
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.native.batch import Batch, DecodeRows, PromptRows
from serve_apps.llm.native.blocks import BLOCK_TOKENS
from serve_apps.llm.native.cache import KeyValueCache, count_blocks
from serve_apps.llm.native.low_rank import AdaptedRows, Adapter, adapted
from serve_apps.llm.native.rotary import rotary_tables, rotate
from serve_apps.llm.native.shape import ModelShape, why_unreadable
from serve_apps.llm.native.weights import (
    LayerWeights,
    Tensors,
    computed_dtype,
    prepare_weights,
    read_tensors,
)


@dataclass(frozen=True)
class Computed:
    """What one step came to."""

    logits: torch.Tensor
    """[wanted rows, vocabulary]"""
    broken_rows: list[int]
    """Rows that came to what is no number, where not all have logits to show it."""


class NativeModel:
    """Weights and cache of one model on one device."""

    def __init__(
        self,
        config: Any,
        tensors: Tensors,
        budget: CacheBudget,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        is_int8: bool = False,
    ) -> None:
        """
        Args:
            dtype: of weights, cache and activations; None takes what the weights are stored as.
            is_int8: keep the layers' matrices as 8-bit integers; on a CPU only.

        Raises:
            PackageError: the architecture is another one, or a weight is missing.
        """
        reason = why_unreadable(config)
        if reason is not None:
            raise PackageError(
                f"the native engine cannot run this model: {reason}",
                hint="deploy it with engine 'transformers'",
            )
        dtype = dtype or computed_dtype(tensors)
        self.shape = ModelShape.of(config)
        self.dtype = dtype
        self.device = device
        self._is_int8 = is_int8
        self._weights = prepare_weights(
            tensors, self.shape, dtype=dtype, device=device, is_int8=is_int8
        )
        self.num_blocks = count_blocks(self.shape, dtype, budget)
        self.max_context_tokens = min(self.shape.max_context_tokens, self.num_blocks * BLOCK_TOKENS)
        self._cache = KeyValueCache(self.shape, self.num_blocks, dtype=dtype, device=device)
        self._cos, self._sin = rotary_tables(
            config,
            num_positions=self.max_context_tokens,
            head_size=self.shape.head_size,
            dtype=dtype,
            device=device,
        )

    @classmethod
    def load(
        cls,
        model_dir: Path,
        budget: CacheBudget,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        is_int8: bool = False,
    ) -> NativeModel:
        """Read a *verified* Hugging Face directory; arguments are those of the constructor."""
        config, tensors = hugging_face_config(model_dir), read_tensors(model_dir)
        return cls(config, tensors, budget, dtype=dtype, device=device, is_int8=is_int8)

    @property
    def precision(self) -> str:
        """The name of its number type, or of its weights' where they have another."""
        return "int8" if self._is_int8 else str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Computed:
        """One step; the cache holds the batch's tokens afterwards."""
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        x = functional.embedding(batch.token_ids, self._weights.embedding)
        for number, plain in enumerate(self._weights.layers):
            layer = adapted(plain, number, batch.adapted) if batch.adapted else plain
            normed = self._norm(x, layer.attention_norm)
            attended = self._attend(number, layer, normed, cos, sin, batch)
            x = layer.output.plus(attended, x)
            normed = self._norm(x, layer.mlp_norm)
            gated = layer.up.times(normed, layer.gate.silu(normed))
            x = layer.down.plus(gated, x)
        logits = self._weights.head(self._norm(x[batch.output_rows], self._weights.norm))
        broken_rows: list[int] = []
        if len(batch.output_rows) < len(x):
            broken_rows = x.sum(dim=-1).isnan().nonzero().flatten().tolist()
        return Computed(logits, broken_rows)

    @torch.inference_mode()
    def check_fits(self, adapter: Adapter) -> None:
        """Raises PackageError unless an adapter's matrices have the sizes of the model's."""
        shape, device, dtype = self.shape, self.device, self.dtype
        x = torch.zeros(1, shape.hidden_size, device=device, dtype=dtype)
        attended = torch.zeros(1, shape.num_heads * shape.head_size, device=device, dtype=dtype)
        part = AdaptedRows(adapter, torch.zeros(1, device=device, dtype=torch.long))
        try:
            for number, plain in enumerate(self._weights.layers):
                layer = adapted(plain, number, [part])
                layer.query_key_value(x)
                layer.output(attended)
                layer.down(layer.up.times(x, layer.gate.silu(x)))
        except (RuntimeError, IndexError) as error:
            raise PackageError(
                f"the adapter does not fit its base: {str(error).splitlines()[0]}",
                hint="use the base that it was trained on",
            ) from None

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.shape.norm_epsilon)

    def _attend(
        self,
        number: int,
        layer: LayerWeights,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """[rows, heads · head size]"""
        shape = self.shape
        num_rows, num_rotated = x.shape[0], shape.num_heads + shape.num_kv_heads
        heads = layer.query_key_value(x).view(num_rows, -1, shape.head_size)
        # Once in the cache, what is no number would reach others through blocks that they mask.
        heads[:, shape.num_heads :].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        rotated, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.head_norm is not None:
            rotated = functional.rms_norm(
                rotated, (shape.head_size,), None, shape.norm_epsilon
            ).mul_(layer.head_norm)
        rotated = rotate(rotated, cos, sin)
        queries, keys = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :]
        self._cache.write(
            number,
            batch.write_places,
            keys.reshape(-1, shape.head_size),
            values.reshape(-1, shape.head_size),
        )
        window = shape.windows[number]
        parts = [self._attend_decode(number, queries, part, window) for part in batch.decodes]
        parts += [self._attend_prompt(number, queries, part, window) for part in batch.prompts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decode(
        self, number: int, queries: torch.Tensor, decode: DecodeRows, window: int | None
    ) -> torch.Tensor:
        """Query heads that share keys are the rows of one product for each sequence."""
        shape, num_rows = self.shape, decode.rows.stop - decode.rows.start
        keys, values = self._cache.gather(number, decode.cache_rows)
        grouped = queries[decode.rows].reshape(-1, shape.group_size, shape.head_size)
        mask = decode.masks[window]
        if num_rows == 1:  # one kernel is quicker than three; for many sequences it is not
            found = functional.scaled_dot_product_attention(
                grouped[None], keys[None], values[None], attn_mask=mask[None]
            )
        else:
            scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), alpha=shape.head_size**-0.5)
            found = torch.bmm(torch.softmax(scores, dim=-1), values)
        return found.view(num_rows, -1)

    def _attend_prompt(
        self, number: int, queries: torch.Tensor, prompt: PromptRows, window: int | None
    ) -> torch.Tensor:
        shape = self.shape
        keys, values = self._cache.gather(number, prompt.cache_rows)
        # [group, kv heads, rows, head size]: the group's heads read the same keys.
        grouped = (
            queries[prompt.rows]
            .view(-1, shape.num_kv_heads, shape.group_size, shape.head_size)
            .permute(2, 1, 0, 3)
        )
        found = functional.scaled_dot_product_attention(
            grouped,
            keys.expand(shape.group_size, -1, -1, -1),
            values.expand(shape.group_size, -1, -1, -1),
            attn_mask=prompt.masks[window],
        )
        return found.permute(2, 1, 0, 3).reshape(grouped.shape[2], -1)
