"""A graph becomes another: at another operator set, and with a free batch where it was fixed.

derived = export_graph(package, directory, opset=21, relative_tolerance=1e-4)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InputError, PackageError
from cluster.model_package import ModelPackage, golden
from cluster.model_package.files import GRAPH
from cluster.model_package.language_model import one_line
from cluster.model_package.parity import Outputs, certify
from cluster.processing import Processing, TensorSpec, preprocess
from cluster.runtimes.onnx import OnnxRuntime
from jobs.exporting.derived import Derived

_MAX_INLINE_BYTES = 2**30


def export_graph(
    parent: ModelPackage, directory: Path, *, opset: int | None, relative_tolerance: float
) -> Derived:
    """Write the graph to `directory`.

    Raises:
        InputError: it is so already.
        PackageError: ONNX cannot convert it, or its batch is fixed in its middle.
        ParityError: it gives something else.
    """
    import onnx

    model = onnx.load(parent.graph_path)
    found = opset_of(model)
    fixed = _fixed_batch(parent)
    if opset in (None, found) and fixed is None:
        raise InputError(
            f"the graph has opset {found} and a free batch already",
            hint="set another opset",
            param="opset",
        )
    if opset not in (None, found):
        with one_line(f"ONNX cannot convert it from opset {found} to {opset}", hint="try another"):
            model = onnx.version_converter.convert_version(model, opset)
    if fixed is not None:
        _free_batch(model)
    onnx.save_model(
        model,
        directory / GRAPH,
        save_as_external_data=model.ByteSize() > _MAX_INLINE_BYTES,
        location=f"{GRAPH}.data",
    )
    before, after = _outputs(parent, directory / GRAPH, fixed)
    processing = parent.manifest.processing
    return Derived(
        kind="graph",
        parity=certify(before, after, relative_tolerance),
        golden_inputs=golden.graph_inputs(parent.manifest),
        processing=processing if fixed is None else _freed(processing),
        what=f"exported with opset {opset_of(model)}" + (" and a free batch" if fixed else ""),
    )


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators that a graph is written in."""
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def _fixed_batch(parent: ModelPackage) -> int | None:
    """The batch that all inputs and outputs have, if it is a number."""
    specs = (*parent.manifest.inputs, *parent.manifest.outputs)
    sizes = {spec.shape[0] if spec.shape else 0 for spec in specs}
    size = sizes.pop()
    return size if not sizes and size > 0 else None


def _free_batch(model: Any) -> None:
    # They would state the old batch.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        size = value.type.tensor_type.shape.dim[0]
        size.Clear()
        size.dim_param = "batch"


def _freed(processing: Processing) -> Processing:
    inputs = tuple(
        TensorSpec(name=spec.name, datatype=spec.datatype, shape=(-1, *spec.shape[1:]))
        for spec in processing.inputs
    )
    return processing.model_copy(update={"inputs": inputs})


def _outputs(parent: ModelPackage, graph: Path, fixed: int | None) -> tuple[Outputs, Outputs]:
    """What parent and graph give for the golden inputs; with a freed batch, for two of them too."""
    inputs = preprocess(parent.manifest, golden.graph_inputs(parent.manifest))
    derived = OnnxRuntime(graph, use_gpu=False)
    before = OnnxRuntime(parent.graph_path, use_gpu=False).run(inputs)
    after = derived.run(inputs)
    if fixed is None:
        return before, after
    try:
        two = derived.run({name: np.concatenate([x, x]) for name, x in inputs.items()})
    except InputError as error:
        raise PackageError(
            f"its batch of {fixed} cannot be freed: {error.message}",
            hint="export it from its framework with a free batch, and import that",
        ) from None
    expected = {f"{n} of two batches": np.concatenate([x, x]) for n, x in before.items()}
    return {**before, **expected}, {**after, **{f"{n} of two batches": x for n, x in two.items()}}
