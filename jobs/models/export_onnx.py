"""A torch module becomes one ONNX file with named tensors and a free batch dimension.

export_onnx(model, {"pixels": torch.zeros(2, 1, 8, 8)}, ["logits"], Path("model.onnx"))
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def export_onnx(
    model: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    output_names: Sequence[str],
    path: Path,
) -> None:
    """`example` names the inputs in call order; its batch must be at least 2, lest torch take the
    size 1 for a constant."""
    model = model.eval()
    batch = torch.export.Dim("batch")
    # The exporter reports each optional library that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=list(output_names),
            dynamic_shapes=tuple({0: batch} for _ in example),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def plain_copy(model: torch.nn.Module, fresh: torch.nn.Module) -> torch.nn.Module:
    """`fresh` with the weights of `model`, in 32 bits as clients send them: what an engine has
    taken over has hooks that cannot be exported, and may be in half precision."""
    fresh.load_state_dict(
        {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    )
    return fresh
