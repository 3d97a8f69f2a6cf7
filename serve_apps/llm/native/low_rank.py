"""LoRA adapters beside the weights: what each adds, and only to the rows of those who ask for it.

Several adapters work in one batch; the base's matrices are read once for all rows (Hu et al. 2021,
"LoRA"; Chen et al. 2023, "Punica").

    adapter = read_adapter(package.model_dir, shape, dtype=torch.float32, device="cpu")
    layer = adapted(layer, 3, [AdaptedRows(adapter, rows)])
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cluster.errors import PackageError
from cluster.model_package.adapter import check_adapter
from cluster.model_package.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from serve_apps.llm.native.linear import Linear, UnfusedLinear
from serve_apps.llm.native.shape import ModelShape
from serve_apps.llm.native.weights import LayerWeights

_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.([a-z]+)_proj\.lora_([AB])\.weight"
)
_JOINED = ("q", "k", "v")
_FIELDS = {"o": "output", "gate": "gate", "up": "up", "down": "down"}
# What else peft may do, with the values at which it does not.
_OTHERWISE: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "use_dora": (None, False),
}
_HINT = "deploy it without shares_base: then it is merged into its base"


@dataclass(frozen=True)
class LowRank:
    """x @ down.T @ up.T, the scaling included."""

    down: torch.Tensor
    up: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.down), self.up)


@dataclass(frozen=True)
class Adapter:
    """For each layer what is added to which of `LayerWeights`' matrices, by the field's name."""

    layers: tuple[Mapping[str, LowRank], ...]


@dataclass(frozen=True)
class AdaptedRows:
    """Rows of a batch whose sequences ask for an adapter."""

    adapter: Adapter
    rows: torch.Tensor


class AdaptedLinear(UnfusedLinear):
    """A matrix with what adapters add to some rows of its result."""

    def __init__(self, base: Linear, terms: Sequence[tuple[LowRank, torch.Tensor]]) -> None:
        self._base = base
        self._terms = terms

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._base(x)
        for term, rows in self._terms:
            y.index_add_(0, rows, term(x[rows]))
        return y


def adapted(layer: LayerWeights, number: int, parts: Sequence[AdaptedRows]) -> LayerWeights:
    """The layer with every adapter's terms; itself where there are none."""
    terms: dict[str, list[tuple[LowRank, torch.Tensor]]] = {}
    for part in parts:
        for name, term in part.adapter.layers[number].items():
            terms.setdefault(name, []).append((term, part.rows))
    changed: Any = {name: AdaptedLinear(getattr(layer, name), t) for name, t in terms.items()}
    return dataclasses.replace(layer, **changed) if changed else layer


def read_adapter(
    adapter_dir: Path, shape: ModelShape, *, dtype: torch.dtype, device: str
) -> Adapter:
    """An adapter from a *verified* peft directory.

    Raises:
        PackageError: it is no LoRA adapter, not one of this model, or changes more than the
            layers' projections.
    """
    from safetensors.torch import load_file

    check_adapter(adapter_dir)
    config = json.loads((adapter_dir / ADAPTER_CONFIG).read_bytes())
    for name, harmless in _OTHERWISE.items():
        if config.get(name) not in harmless:
            raise PackageError(
                f"the adapter's {name} is {config[name]!r}, which is not supported beside others",
                hint=_HINT,
            )
    found: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(shape.num_layers)]
    for name, tensor in load_file(adapter_dir / ADAPTER_WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in (*_JOINED, *_FIELDS):
            raise PackageError(
                f"the adapter changes '{name}', which is not supported beside others", hint=_HINT
            )
        if int(match[1]) >= shape.num_layers:
            raise _another_base(name)
        found[int(match[1])].setdefault(match[2], {})[match[3]] = tensor
    return Adapter(tuple(_layer(parts, config, shape, dtype, device) for parts in found))


def _layer(
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    config: Mapping[str, Any],
    shape: ModelShape,
    dtype: torch.dtype,
    device: str,
) -> dict[str, LowRank]:
    terms = {name: _term(name, pair, config, dtype, device) for name, pair in parts.items()}
    layer = {field: terms[name] for name, field in _FIELDS.items() if name in terms}
    if joined := [name for name in _JOINED if name in terms]:
        layer["query_key_value"] = _join({name: terms[name] for name in joined}, shape)
    return layer


def _term(
    name: str,
    pair: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> LowRank:
    if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        raise PackageError(f"the adapter's matrices of '{name}_proj' do not fit", hint=_HINT)
    rank = pair["A"].shape[0]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    up = pair["B"].float() * scaling
    return LowRank(pair["A"].to(device, dtype), up.to(device, dtype))


def _join(terms: Mapping[str, LowRank], shape: ModelShape) -> LowRank:
    """Queries, keys and values in one matrix, as the base has them; a part may be missing."""
    key_size = shape.num_kv_heads * shape.head_size
    sizes = {"q": shape.num_heads * shape.head_size, "k": key_size, "v": key_size}
    for name, term in terms.items():
        if term.up.shape[0] != sizes[name]:
            raise _another_base(f"{name}_proj")
    some = next(iter(terms.values()))
    blocks = [
        terms[name].up if name in terms else some.up.new_zeros(sizes[name], 0) for name in _JOINED
    ]
    up: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return LowRank(torch.cat([term.down for term in terms.values()]), up)


def _another_base(name: str) -> PackageError:
    return PackageError(
        f"the adapter's '{name}' does not fit its base", hint="use the base that it was trained on"
    )
