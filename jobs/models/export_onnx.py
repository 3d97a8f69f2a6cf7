"""A torch module becomes an ONNX graph with named tensors and a free batch dimension.

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
    *,
    free_sizes: Sequence[str] = ("batch",),
    opset: int | None = None,
    external_data: bool = False,
) -> None:
    """Write the graph.

    Args:
        example: the inputs by name, in call order. Their free sizes must be at least 2, lest torch
            take the size 1 for a constant.
        free_sizes: what the first dimensions of each input are called, and may be any number.
        opset: None takes torch's own choice.
        external_data: keep the weights beside the graph, which holds no more than 2 GiB.
    """
    model = model.eval()
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(free_sizes)}
    # They report each optional library that they do without, and failures that are raised later.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=list(output_names),
            dynamic_shapes=tuple(sizes for _ in example),
            dynamo=True,
            opset_version=opset,
            external_data=external_data,
            verbose=False,
        )


def plain_copy(model: torch.nn.Module, fresh: torch.nn.Module) -> torch.nn.Module:
    """`fresh` with the weights of `model`, in 32 bits as clients send them: what an engine has
    taken over has hooks that cannot be exported, and may be in half precision."""
    fresh.load_state_dict(
        {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    )
    return fresh
