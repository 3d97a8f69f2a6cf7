"""Run an ONNX graph with ONNX Runtime, and read what it takes and gives.

The only module that loads onnxruntime. Knows nothing of packages and processing: give it files that
were verified before.

    runtime = OnnxRuntime(package.path / "model/model.onnx", num_threads=1)
    outputs = runtime.run({"pixels": pixels_BCHW})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from pydantic import ValidationError

from cluster.errors import InputError, PackageError, first_line
from cluster.processing import Array, Datatype, TensorSpec

_DATATYPES: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class RunStop:
    """Ends a run from another thread, after the operator that it is at."""

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()

    def set(self) -> None:
        self.options.terminate = True


class OnnxRuntime:
    """One loaded graph.

    Args:
        path: the `.onnx` file; external data lies beside it.
        num_threads: threads that one `run` may use.
        use_gpu: whether to take a GPU if this build of ONNX Runtime finds one.
    """

    def __init__(self, path: Path, num_threads: int = 1, *, use_gpu: bool = True) -> None:
        self._session = _open_session(path, num_threads, use_gpu)
        self.inputs = tuple(_spec(path, node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(path, node) for node in self._session.get_outputs())
        self._bytes = {s.name for s in (*self.inputs, *self.outputs) if s.datatype == "BYTES"}

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if _CUDA in self._session.get_providers() else "cpu"

    def run(self, inputs: Mapping[str, Array], stop: RunStop | None = None) -> dict[str, Array]:
        """All outputs by name.

        Raises:
            InputError: the graph cannot work on these inputs, or it was stopped.
        """
        fed = {n: _to_text(x) if n in self._bytes else x for n, x in inputs.items()}
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, fed, None if stop is None else stop.options)
        # Whatever type ONNX Runtime raises here, it is about these inputs: the graph was loaded.
        except Exception as error:
            raise InputError(
                f"the graph cannot run on these inputs: {first_line(error)}",
                hint="expected " + ", ".join(str(spec) for spec in self.inputs),
            ) from None
        found = dict(zip(names, values, strict=True))
        return {n: _to_bytes(x) if n in self._bytes else np.asarray(x) for n, x in found.items()}


def describe_graph(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What the graph takes and what it gives.

    Raises:
        PackageError: not a graph of tensors.
    """
    runtime = OnnxRuntime(path)
    return runtime.inputs, runtime.outputs


def _open_session(path: Path, num_threads: int, use_gpu: bool) -> Any:
    if not path.is_file():
        raise PackageError(f"graph '{path}' does not exist", hint="check the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # What goes wrong is raised; it need not be told a second time on stderr.
    options.log_severity_level = 4
    # Spinning threads burn the cores that other replicas share.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    is_built_for_cuda = _CUDA in onnxruntime.get_available_providers()
    providers = [_CUDA, _CPU] if use_gpu and is_built_for_cuda else [_CPU]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    # ONNX Runtime has a dozen unrelated exception types, all meaning that it cannot load the file.
    except Exception as error:
        raise PackageError(
            f"'{path.name}' is not a graph that ONNX Runtime can load: {first_line(error)}",
            hint="export it again; check it with onnx.checker",
        ) from None


def _spec(path: Path, node: Any) -> TensorSpec:
    if node.type not in _DATATYPES:
        raise PackageError(
            f"'{path.name}': {node.name[:80]!r} is a {node.type}, expected a tensor",
            hint="export without maps and sequences (scikit-learn: options={'zipmap': False}) "
            "and with numbers of at least 8 bits other than bfloat16",
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    try:
        return TensorSpec(name=node.name, datatype=_DATATYPES[node.type], shape=shape)
    except ValidationError:
        raise PackageError(
            f"'{path.name}': {node.name[:80]!r} with {len(shape)} dimensions is no tensor that can "
            "be described",
            hint="expected a name of 1 to 256 characters without control characters, and at most "
            "16 dimensions; rename it and export it again",
        ) from None


def _to_text(values: Array) -> Array:
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.flat]
    return np.array(texts, dtype=object).reshape(values.shape)


def _to_bytes(values: Array) -> Array:
    return np.array([str(v).encode() for v in values.flat], dtype=object).reshape(values.shape)
