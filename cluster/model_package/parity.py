"""Parity certificate: how far is a derived package from its parent, on the parent's golden inputs.

The parent's golden inputs are run through both. The largest difference of any output, and the
tolerance it was held to, go into the derived package's `parity`; beyond it there is no package.

    before = graph_outputs(parent.manifest, OnnxRuntime(parent.graph_path).run)
    after = graph_outputs(parent.manifest, OnnxRuntime(stage / "model.onnx").run)
    parity = certify(before, after, RELATIVE_TOLERANCES["int8"])
    write_package(stage, parity=parity, lineage=Lineage(parent_digest=parent.digest), …)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.errors import ParityError
from cluster.model_package.golden import RunGraph, graph_inputs
from cluster.model_package.manifest import Manifest
from cluster.processing import Array, preprocess

if TYPE_CHECKING:
    from cluster.model_package.reader import ModelPackage

Outputs = Mapping[str, Array]
"""What a model gave for the golden inputs, by a name that tells a reader which output it is."""

Derivation = Literal["export", "merge", "int8", "int4"]

RELATIVE_TOLERANCES: Mapping[Derivation, float] = {
    # The same arithmetic in fp32, summed in another order.
    "export": 1e-4,
    # (W + BA)x in place of Wx + BAx.
    "merge": 1e-3,
    # 8 bits leave 1/256 of a tensor's range per weight or activation, which layers add up.
    "int8": 0.1,
    "int4": 0.5,
}
"""Where a config states none: the largest difference, relative to the parent's largest output."""

_HINT = "nothing was packaged; if that is good enough, state a larger relative_tolerance"


def certify(
    parent: Outputs, derived: Outputs, relative_tolerance: float, *, hint: str = _HINT
) -> dict[str, float]:
    """The certificate, for `manifest.parity`: both numbers in the outputs' own unit.

    Args:
        relative_tolerance: of the parent's largest output; what is no float must be equal.
        hint: what to do if it is further off.

    Raises:
        ParityError: the derived model is further off, naming the output. Package nothing then.
    """
    if parent.keys() != derived.keys():
        raise _refusal(f"it gives {_names(derived)}", _names(parent), hint)
    for name, expected in parent.items():
        if expected.shape != derived[name].shape:
            shape = f"'{name}' has shape {list(derived[name].shape)}"
            raise _refusal(shape, f"{list(expected.shape)}", hint)
    tolerance = relative_tolerance * max(map(_largest, parent.values()), default=0.0)
    differences = {name: _difference(parent[name], derived[name]) for name in parent}
    for name, difference in differences.items():
        # Written so that a difference of NaN is refused.
        if not difference <= tolerance:
            found = f"'{name}' differs by {difference:.3g}"
            raise _refusal(found, f"at most {tolerance:.3g}", hint)
    return {"largest_difference": max(differences.values(), default=0.0), "tolerance": tolerance}


def graph_outputs(parent: Manifest, run: RunGraph) -> Outputs:
    """What a graph gives, before post-processing, for the golden inputs of its parent."""
    return run(preprocess(parent, graph_inputs(parent)))


def token_logits(model: Any, prompts: Sequence[Sequence[int]]) -> Outputs:
    """Logits after every token of each prompt, [T, V] in fp32, from a transformers model."""
    import torch

    with torch.inference_mode():
        rows = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]
    return name_logits([row.float().numpy() for row in rows])


def name_logits(logits: Sequence[Array]) -> Outputs:
    """Logits of each prompt, [T, V], by the name that `token_logits` gives them."""
    return {f"logits of prompt {number}": row for number, row in enumerate(logits)}


def golden_prompts(parent: Manifest) -> list[list[int]]:
    """Token ids of a language model's golden prompts."""
    prompts: Any = parent.golden.inputs["prompts"]
    return [list(prompt) for prompt in prompts]


def golden_texts(parent: ModelPackage) -> list[str]:
    """A language model's golden prompts as `write_package` takes them, for its children."""
    from cluster.processing.text import TextProcessor

    text = TextProcessor.load(parent.model_dir)
    return [text.decode(prompt) for prompt in golden_prompts(parent.manifest)]


def _difference(expected: Array, found: Array) -> float:
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(expected, found) else np.inf
    wide, reference = found.astype(np.float64), expected.astype(np.float64)
    same = (wide == reference) | (np.isnan(wide) & np.isnan(reference))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.abs(wide - reference)).max(initial=0.0))


def _largest(array: Array) -> float:
    if array.dtype.kind != "f":
        return 0.0
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max(initial=0.0))


def _names(outputs: Outputs) -> str:
    return ", ".join(sorted(outputs)) or "nothing"


def _refusal(found: str, expected: str, hint: str) -> ParityError:
    return ParityError(
        f"on the golden inputs the derived model is another: {found}, expected {expected}",
        hint=hint,
    )
