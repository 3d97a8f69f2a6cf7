"""Tensor descriptions in the Open Inference Protocol's words, and their NumPy counterparts.

Knows nothing of models, packages or HTTP.

    TensorSpec(name="pixels", datatype="FP32", shape=(-1, 64)).numpy_dtype   # dtype('float32')
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster.config import StrictModel

Array = NDArray[Any]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip

TensorName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\P{Cc}*$")]
"""Names are shown in errors and tables, so they hold no control characters."""

_NUMPY: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
_DATATYPES = {dtype: name for name, dtype in _NUMPY.items()}


class TensorSpec(StrictModel):
    """A named tensor in the Open Inference Protocol's words."""

    name: TensorName
    datatype: Datatype
    shape: tuple[int, ...] = Field(max_length=16)
    """Sizes; -1 is free. The first dimension is the batch."""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The array type that holds it; BYTES are object arrays of `bytes`."""
        return numpy_dtype_of(self.datatype)

    def __str__(self) -> str:
        sizes = ", ".join("any" if size == -1 else str(size) for size in self.shape)
        return f"{self.name}: {self.datatype} [{sizes}]"


def numpy_dtype_of(datatype: Datatype) -> np.dtype[Any]:
    """The array type that holds a datatype; BYTES are object arrays of `bytes`."""
    return _NUMPY[datatype]


def datatype_of(array: Array) -> Datatype | None:
    """The protocol's word for an array's type, None if it has none."""
    if array.dtype.kind in "SU":
        return "BYTES"
    return _DATATYPES.get(array.dtype)
