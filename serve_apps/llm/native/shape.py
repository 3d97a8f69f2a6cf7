"""What the native engine must know of a model's architecture, from its Hugging Face configuration.

reason = why_unreadable(config)
shape = ModelShape.of(config)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

READABLE_TYPES = ("llama", "mistral", "qwen2", "qwen3")
READABLE_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")
_DEFAULT_CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Llama's family: grouped-query attention, rotary positions, gated layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_context_tokens: int
    norm_epsilon: float
    windows: tuple[int | None, ...]
    """For each layer, how many tokens up to its own a token sees; None sees all."""

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Of a configuration that is readable."""
        num_heads = int(config.num_attention_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(
            num_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            num_heads=num_heads,
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
            head_size=int(head_size),
            vocab_size=int(config.vocab_size),
            max_context_tokens=int(
                getattr(config, "max_position_embeddings", 0) or _DEFAULT_CONTEXT_TOKENS
            ),
            norm_epsilon=float(config.rms_norm_eps),
            windows=_windows(config),
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads


def why_unreadable(config: Any) -> str | None:
    """Why the native engine cannot run a model with this configuration; None if it can."""
    if config.model_type not in READABLE_TYPES:
        return f"models of type '{config.model_type}' are not among {', '.join(READABLE_TYPES)}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are stored quantised"
    if config.hidden_act != "silu":
        return f"its activation is '{config.hidden_act}', expected 'silu'"
    rope = config.rope_parameters
    if rope["rope_type"] not in READABLE_ROPES:
        return f"its positions are scaled by '{rope['rope_type']}'"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head only"
    return None


def _windows(config: Any) -> tuple[int | None, ...]:
    num_layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama" or window is None:
        return (None,) * num_layers
    if config.model_type == "mistral":
        return (int(window),) * num_layers
    return tuple(
        int(window) if kind == "sliding_attention" else None for kind in config.layer_types
    )
