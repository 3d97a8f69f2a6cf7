"""A language model becomes an ONNX graph: `input_ids` [B, T] to `logits` [B, T, V], both free.

No mask and no cache: what follows a token does not change its logits, so shorter texts of a batch
are padded on the right with any token. Shapes: B texts, T tokens, V tokens in the vocabulary.

    derived = export_language_model(package, directory, opset=None, relative_tolerance=1e-4)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import PackageError
from cluster.model_package import ModelPackage
from cluster.model_package.files import GRAPH
from cluster.model_package.language_model import load_reference, one_line, quiet
from cluster.model_package.parity import certify, golden_prompts, name_logits, token_logits
from cluster.processing import Array, Processing
from cluster.runtimes.onnx import OnnxRuntime
from jobs.exporting.derived import Derived
from jobs.models.export_onnx import export_onnx

INPUT, OUTPUT = "input_ids", "logits"

# protobuf allows no file of more than 2 GiB; 32-bit weights.
_MAX_INLINE_PARAMETERS = 2**28
_JOINED_TOKENS = 128
# Logits in the manifest: a vocabulary of 150,000 leaves room for one token of two prompts.
_MAX_GOLDEN_LOGITS = 300_000


class _Logits(torch.nn.Module):
    """A transformers model as a function of token ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self._model(input_ids=input_ids, use_cache=False).logits


def export_language_model(
    parent: ModelPackage, directory: Path, *, opset: int | None, relative_tolerance: float
) -> Derived:
    """Write the graph to `directory`.

    Raises:
        PackageError: torch cannot export this architecture.
        ParityError: the graph's logits are not the model's.
    """
    model = load_reference(parent.model_dir)
    prompts = golden_prompts(parent.manifest)
    # Replayed alone at their own lengths, joined, and as a batch: both sizes must be free.
    alone = [*prompts, _joined(parent, prompts)]
    batch = _as_batch(prompts, model.config.get_text_config().vocab_size)
    expected = token_logits(model, [*alone, *batch.tolist()])
    graph = directory / GRAPH
    with one_line("the model cannot be exported to ONNX", hint="try another opset"), quiet():
        export_onnx(
            _Logits(model),
            {INPUT: torch.tensor(batch).repeat(1, 2)[:, :2].contiguous()},
            [OUTPUT],
            graph,
            free_sizes=("batch", "tokens"),
            opset=opset,
            external_data=model.num_parameters() > _MAX_INLINE_PARAMETERS,
        )
    del model
    runtime = _open(graph, opset)
    rows = [_run(runtime, np.array([prompt], np.int64))[0] for prompt in alone]
    found = name_logits([*rows, *_run(runtime, batch)])
    return Derived(
        kind="graph",
        parity=certify(expected, found, relative_tolerance),
        golden_inputs={INPUT: batch},
        processing=Processing(),
        what="exported to ONNX",
    )


def _joined(parent: ModelPackage, prompts: list[list[int]]) -> list[int]:
    """A text long enough for what only shows at length: positions, sliding windows."""
    info = parent.manifest.language_model
    assert info is not None, "a verified language model says how long its context is"
    ids = [token for prompt in prompts for token in prompt]
    length = min(_JOINED_TOKENS, info.max_context_tokens)
    return (ids * length)[:length]


def _as_batch(prompts: list[list[int]], vocab_size: int) -> Array:
    """The first two prompts, [2, T], cut to the length of the shorter and to what a manifest
    holds."""
    chosen = prompts[:2] if len(prompts) > 1 else [prompts[0], prompts[0]]
    room = max(1, _MAX_GOLDEN_LOGITS // (2 * vocab_size))
    length = min(*map(len, chosen), room)
    return np.array([prompt[:length] for prompt in chosen], dtype=np.int64)


def _open(graph: Path, opset: int | None) -> OnnxRuntime:
    try:
        return OnnxRuntime(graph, use_gpu=False)
    except PackageError as error:
        if opset is None:
            raise
        # The exporter writes what it can, and leaves the rest as it was.
        raise PackageError(
            f"the model cannot be written at opset {opset}: {error.message[:200]}",
            hint="leave opset out, which takes the exporter's own",
        ) from None


def _run(runtime: OnnxRuntime, ids: Array) -> Array:
    return runtime.run({INPUT: ids})[OUTPUT]
