"""Golden outputs: compute them when a package is written, replay them before it takes traffic.

A graph is run through its whole processing, as a client would see it. A language model continues
short prompts greedily; another engine may round differently, so where the two largest logits are
closer than the tolerance it may choose either.

    replay(package)                                            # with the reference runtime
    check_graph(package.manifest, replica_runtime.run)         # with another one
    check_language_model(package.manifest, engine_completions)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import InputError, PackageError, ParityError
from cluster.model_package.golden_text import check_text_of
from cluster.model_package.manifest import Golden, Manifest
from cluster.processing import (
    Array,
    TensorSpec,
    check_processing,
    postprocess,
    preprocess,
    public_inputs,
    public_outputs,
)
from cluster.processing.pipeline import Described

if TYPE_CHECKING:
    from cluster.model_package.reader import ModelPackage

RunGraph = Callable[[dict[str, Array]], dict[str, Array]]

MAX_PROMPT_TOKENS = 8
MAX_NEW_TOKENS = 8
NUM_TOP_LOGITS = 5
# Largest difference seen as the same, relative to the largest output: fp32 sums in another order.
_RELATIVE_TOLERANCE = 1e-4
# The last bit of such a sum decides to which of 256 levels an activation is rounded.
_RELATIVE_QUANTISED_TOLERANCE = 1e-2
_RELATIVE_LOGIT_TOLERANCE = 1e-3


def replay(package: ModelPackage, base: ModelPackage | None = None) -> None:
    """Run the golden inputs with the reference runtime and compare.

    Args:
        base: of an adapter, see `open_base`.

    Raises:
        ParityError: an output differs by more than the tolerance.
    """
    manifest = package.manifest
    if manifest.kind == "graph":
        from cluster.runtimes.onnx import OnnxRuntime

        check_graph(manifest, OnnxRuntime(package.graph_path).run)
        return
    check_text_of(package)
    prompts: Any = manifest.golden.inputs["prompts"]
    found = continue_prompts(_load_language_model(package, base), prompts, end_tokens(manifest))
    check_language_model(manifest, found.completions, found.first_logits)


def _load_language_model(package: ModelPackage, base: ModelPackage | None) -> Any:
    from cluster.model_package.adapter import load_adapted
    from cluster.model_package.language_model import load_reference

    if package.manifest.kind != "adapter":
        return load_reference(package.model_dir)
    if base is None:
        raise PackageError("an adapter computes nothing without its base", hint="open that too")
    return load_adapted(base.model_dir, package.model_dir)


def compute_graph(
    model: Described,
    run: RunGraph,
    inputs: Mapping[str, Array],
    *,
    is_quantised: bool = False,
    require_finite: bool = False,
) -> Golden:
    """Golden outputs of a graph for what a client might send.

    Raises:
        PackageError: with `require_finite`, an output is not.
    """
    relative = _RELATIVE_QUANTISED_TOLERANCE if is_quantised else _RELATIVE_TOLERANCE
    outputs = postprocess(model, run(preprocess(model, inputs)))
    for name, array in outputs.items():
        if require_finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PackageError(
                f"output '{name}' is not finite (NaN or infinite) for the golden inputs",
                hint="the model's weights are broken, or it works on no values in 0 to 1; "
                "check it and export it again",
            )
    largest = max((_largest(array) for array in outputs.values()), default=0.0)
    return Golden(
        inputs={name: _to_json(array) for name, array in inputs.items()},
        outputs={name: _to_json(array) for name, array in outputs.items()},
        tolerance=relative * max(1.0, largest),
    )


def check_graph(manifest: Manifest, run: RunGraph) -> None:
    """Replay a graph's golden inputs with `run`, which takes and gives the graph's own tensors.

    Raises:
        ParityError: an output differs by more than the tolerance.
        PackageError: the processing does not fit the graph.
    """
    check_processing(manifest)
    with _misfit_named():
        outputs = postprocess(manifest, run(preprocess(manifest, graph_inputs(manifest))))
        for spec in public_outputs(manifest):
            expected = _from_json(spec, manifest.golden.outputs[spec.name])
            _compare(spec.name, expected, outputs[spec.name], manifest.golden.tolerance)


def graph_inputs(manifest: Manifest) -> dict[str, Array]:
    """A graph's golden inputs, as clients send them."""
    specs = {spec.name: spec for spec in public_inputs(manifest)}
    return {
        name: _from_json(specs[name], values) for name, values in manifest.golden.inputs.items()
    }


class Continuation:
    """What a language model said after each prompt."""

    def __init__(self) -> None:
        self.completions: list[list[int]] = []
        self.margins: list[list[float]] = []
        self.first_logits: list[Array] = []
        """All logits after each prompt, [V]."""


def continue_prompts(
    model: Any, prompts: Sequence[Sequence[int]], end_tokens: Sequence[int]
) -> Continuation:
    """Greedy continuations by a transformers model, without its cache or generation settings."""
    import torch

    found = Continuation()
    for prompt in prompts:
        ids, completion, margins = list(prompt), [], []
        for step in range(MAX_NEW_TOKENS):
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().numpy()
            if step == 0:
                found.first_logits.append(logits)
            token = int(logits.argmax())
            margins.append(float(logits[token] - np.delete(logits, token).max(initial=-math.inf)))
            completion.append(token)
            ids.append(token)
            if token in end_tokens:
                break
        found.completions.append(completion)
        found.margins.append(margins)
    return found


def compute_language_model(
    model: Any, prompts: Sequence[Sequence[int]], end_tokens: Sequence[int]
) -> Golden:
    """Golden outputs of a language model, from its fp32 reference."""
    found = continue_prompts(model, prompts, end_tokens)
    top = [np.argsort(-logits)[:NUM_TOP_LOGITS] for logits in found.first_logits]
    tolerance = _RELATIVE_LOGIT_TOLERANCE * max(map(_largest, found.first_logits))
    if not math.isfinite(tolerance) or any(math.isnan(m) for row in found.margins for m in row):
        raise PackageError(
            "the model's logits are not finite", hint="its weights are broken; train it again"
        )
    return Golden(
        inputs={"prompts": [list(p) for p in prompts], "max_new_tokens": MAX_NEW_TOKENS},
        outputs={
            "completions": [list(c) for c in found.completions],
            "margins": [[min(m, 1e9) for m in row] for row in found.margins],
            "first_logits": [
                {"ids": ids.tolist(), "values": logits[ids].tolist()}
                for ids, logits in zip(top, found.first_logits, strict=True)
            ],
        },
        tolerance=tolerance,
    )


def check_language_model(
    manifest: Manifest,
    completions: Sequence[Sequence[int]],
    first_logits: Sequence[Array] | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Hold an engine's greedy answers to the golden prompts against the golden ones.

    Args:
        completions: token ids per prompt, with or without the end token.
        first_logits: all logits after each prompt, [V] each, where the engine shows them.
        tolerance: allowed difference of a logit, for engines of lower precision than fp32.

    Raises:
        ParityError: naming the prompt and the token.
    """
    golden: Any = manifest.golden.outputs
    allowed = manifest.golden.tolerance if tolerance is None else tolerance
    if len(completions) != len(golden["completions"]):
        raise _parity(f"{len(completions)} answers", f"{len(golden['completions'])}")
    ends = end_tokens(manifest)
    with _misfit_named():
        for number, found in enumerate(completions):
            expected = _without_end(golden["completions"][number], ends)
            _compare_tokens(
                number, expected, _without_end(found, ends), golden["margins"][number], allowed
            )
        for number, logits in enumerate(first_logits or ()):
            top = golden["first_logits"][number]
            values = np.asarray(top["values"], dtype=np.float64)
            _compare(f"logits after prompt {number}", values, logits[top["ids"]], allowed)


def end_tokens(manifest: Manifest) -> tuple[int, ...]:
    """Token ids that end a completion."""
    return manifest.language_model.eos_token_ids if manifest.language_model else ()


@contextlib.contextmanager
def _misfit_named() -> Iterator[None]:
    """Golden values are whatever the signer wrote: those of another model are no bug of ours."""
    try:
        yield
    except (InputError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        name = f" '{error.args[0]}'"[:100] if isinstance(error, KeyError) else ""
        raise ParityError(
            f"golden inputs and outputs do not fit the model ({type(error).__name__}{name})",
            hint="publish the package again",
        ) from None


def _compare_tokens(
    number: int,
    expected: Sequence[int],
    found: Sequence[int],
    margins: Sequence[float],
    tolerance: float,
) -> None:
    for step in range(max(len(expected), len(found))):
        wanted = expected[step] if step < len(expected) else None
        got = found[step] if step < len(found) else None
        if wanted == got:
            continue
        # Each of the two logits may be off by the tolerance.
        if step < len(margins) and margins[step] <= 2 * tolerance:
            return
        raise _parity(f"prompt {number}, token {step} is {got}", f"{wanted}")


def _compare(name: str, expected: Array, found: Array, tolerance: float) -> None:
    if expected.shape != found.shape:
        raise _parity(f"'{name}' has shape {list(found.shape)}", f"{list(expected.shape)}")
    if expected.dtype.kind != "f":
        if not np.array_equal(expected, found):
            raise _parity(f"'{name}' is {found.tolist()!r:.80}", f"{expected.tolist()!r:.80}")
        return
    wide = found.astype(np.float64)
    if not np.allclose(wide, expected, rtol=0, atol=tolerance, equal_nan=True):
        with np.errstate(invalid="ignore"):
            largest = np.abs(wide - expected).max()
        raise _parity(f"'{name}' differs by {largest:.3g}", f"at most {tolerance:.3g}")


def _parity(found: str, expected: str) -> ParityError:
    return ParityError(
        f"golden outputs are not reproduced: {found}, expected {expected}",
        hint="the runtime computes something else than the package's author saw; do not serve it",
    )


def _without_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids


def _largest(array: Array) -> float:
    if array.dtype.kind != "f" or not array.size:
        return 0.0
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max(initial=0.0))


def _to_json(array: Array) -> Any:
    """Nested lists; bytes as UTF-8 text and what JSON has no number for as text."""
    if array.dtype.kind == "O":
        return np.vectorize(lambda v: v.decode("utf-8", "replace"), otypes=[object])(array).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return np.vectorize(lambda v: float(v) if math.isfinite(v) else str(v), [object])(
            array
        ).tolist()
    return array.tolist()


def _from_json(spec: TensorSpec, values: Any) -> Array:
    if spec.datatype == "BYTES":
        texts = np.array(values, dtype=object)
        encoded: Array = np.vectorize(lambda v: str(v).encode(), otypes=[object])(texts)
        return encoded
    # What is too large for the type is infinite, and compared as that.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=object).astype(spec.numpy_dtype)
