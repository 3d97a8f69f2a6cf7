"""A client's tensors as arrays, and a model's arrays as tensors: JSON values or raw bytes.

The words are the Open Inference Protocol's; every protocol of tensors stands on these. What is
wrong is refused before anything of its size is allocated. Whether a tensor fits the model is
`cluster.processing`'s question.

    spec = declare("pixels", "FP32", [1, 64])
    pixels = from_bytes(spec, body[offset:])        # no copy, no value touched by Python
    pixels = from_values(spec, [[0.0, 0.5, …]])
    to_bytes(spec, pixels), to_values(spec, pixels)
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from contextvars import copy_context
from typing import Any, NamedTuple, NoReturn, cast, get_args

import numpy as np

from cluster.errors import InputError, UpstreamFailedError
from cluster.processing import Array, Datatype, TensorSpec, numpy_dtype_of

DATATYPES = frozenset(get_args(Datatype))
MAX_ELEMENTS = 32 * 1024**2
"""Numbers in one tensor."""
MAX_TEXT_ELEMENTS = 64 * 1024
"""Elements of one BYTES tensor, each of which is a Python object."""
_MAX_DIMENSIONS = 16
_LENGTH = struct.Struct("<I")
_SILENT = copy_context()
"""NumPy keeps in the context what to say of an overflow; entering one costs a tenth of errstate."""
_SILENT.run(np.seterr, over="ignore")


class Declared(NamedTuple):
    """What a client says a tensor is: checked as a TensorSpec is, at a tenth of the cost."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """As TensorSpec has it."""
        return numpy_dtype_of(self.datatype)


Described = TensorSpec | Declared


def declare(name: str, datatype: str, shape: Sequence[int]) -> Declared:
    """What a client says a tensor is, if there can be such a tensor.

    Raises:
        InputError: `param` names the tensor.
    """
    if datatype not in DATATYPES:
        raise InputError(
            f"input '{name}' has datatype '{datatype}', which does not exist here",
            hint=f"use one of {', '.join(get_args(Datatype))}",
            param=name,
        )
    if len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise InputError(
            f"input '{name}' has shape {_show(shape)}",
            hint=f"send at most {_MAX_DIMENSIONS} sizes, none below 0",
            param=name,
        )
    _check_count(name, datatype, math.prod(shape))
    return Declared(name, cast(Datatype, datatype), tuple(shape))


def from_values(spec: Described, data: Any, *, is_base64: bool = False) -> Array:
    """The array of JSON values, flat or nested; `is_base64` for files sent as text.

    Raises:
        InputError: values that are no such datatype, or not as many as the shape says.
    """
    if spec.datatype == "BYTES":
        values = _flat(data)
        _check_count(spec.name, spec.datatype, len(values))
        elements = np.empty(len(values), dtype=object)
        elements[:] = [_to_bytes(spec.name, value, is_base64) for value in values]
    else:
        elements = _numbers(spec, data)
    return _shaped(spec, elements)


def from_bytes(spec: Described, data: bytes | memoryview) -> Array:
    """The array of raw bytes: little-endian values in row-major order, BYTES each after its length
    in four bytes. The numbers are a read-only view.

    Raises:
        InputError: not as many bytes as the shape says.
    """
    if spec.datatype == "BYTES":
        return _shaped(spec, _texts(spec, data))
    expected = math.prod(spec.shape) * spec.numpy_dtype.itemsize
    if len(data) != expected:
        raise InputError(
            f"input '{spec.name}' has {len(data)} bytes of data, its shape {_show(spec.shape)} of "
            f"{spec.datatype} has {expected}",
            hint="the shape must match the data",
            param=spec.name,
        )
    array: Array = np.frombuffer(data, dtype=spec.numpy_dtype)
    if spec.datatype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
        raise InputError(f"input '{spec.name}' holds bytes that are no BOOL", param=spec.name)
    # After a header of odd length the values stand across the machine's words.
    return _shaped(spec, np.require(array, requirements="A"))


def to_values(spec: Described, array: Array) -> list[str] | Array:
    """An output's values for `write_json`, flat; bytes that are no UTF-8 are replaced.

    Raises:
        UpstreamFailedError: it holds NaN or infinity.
    """
    if spec.datatype == "BYTES":
        return [value.decode(errors="replace") for value in array.reshape(-1).tolist()]
    check_finite(spec, array)
    return np.ascontiguousarray(array, dtype=spec.numpy_dtype).reshape(-1)


def to_bytes(spec: Described, array: Array) -> bytes:
    """An output's raw bytes, as `from_bytes` takes them.

    Raises:
        UpstreamFailedError: it holds NaN or infinity, which half of the protocols cannot say.
    """
    if spec.datatype == "BYTES":
        parts: list[bytes] = []
        for value in array.reshape(-1).tolist():
            parts += _LENGTH.pack(len(value)), value
        return b"".join(parts)
    check_finite(spec, array)
    return array.astype(spec.numpy_dtype, copy=False).tobytes()


def check_finite(spec: Described, array: Array) -> None:
    """Raises UpstreamFailedError if an output holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UpstreamFailedError(f"output '{spec.name}' holds NaN or infinity")


def _numbers(spec: Described, data: Any) -> Array:
    try:
        found = np.asarray(data)
        if spec.datatype == "UINT64" and found.dtype.kind == "f":
            found = _whole(data)
        if found.dtype.kind not in "biuf" or not _holds(spec.datatype, found):
            raise ValueError
        # Infinity is refused with the other values.
        return _SILENT.copy().run(found.astype, spec.numpy_dtype)
    except (ValueError, OverflowError, TypeError):
        raise InputError(
            f"input '{spec.name}' holds values that are no {spec.datatype}, or lists of unequal "
            "length",
            hint=f"expected numbers for {spec.datatype}, flat or nested like the shape",
            param=spec.name,
        ) from None


def _whole(data: Any) -> Array:
    """NumPy takes numbers for floating point of which some need all 64 bits and others do not."""
    found = np.asarray(data, dtype=object)
    if any(type(value) is not int for value in found.flat):
        raise ValueError
    return found.astype(np.uint64)


def _holds(datatype: Datatype, found: Array) -> bool:
    """Whether numbers can become this datatype without changing their meaning."""
    if found.size == 0:
        return True
    if datatype == "BOOL":
        return found.dtype.kind == "b" or bool(np.isin(found, (0, 1)).all())
    if datatype.startswith("FP"):
        return found.dtype.kind in "iuf"
    if found.dtype.kind not in "iu":
        return False
    limits = np.iinfo(np.dtype(datatype.lower()))
    return bool(limits.min <= found.min() and found.max() <= limits.max)


def _texts(spec: Described, data: bytes | memoryview) -> Array:
    """Exactly as many elements as the shape says, so that no length is believed."""
    elements = np.empty(math.prod(spec.shape), dtype=object)
    offset = 0
    for index in range(len(elements)):
        start = offset + _LENGTH.size
        if start > len(data):
            _refuse_texts(spec, f"ends before element {index}")
        offset = start + _LENGTH.unpack_from(data, start - _LENGTH.size)[0]
        if offset > len(data):
            _refuse_texts(spec, f"ends inside element {index}")
        elements[index] = bytes(data[start:offset])
    if offset != len(data):
        _refuse_texts(spec, f"has {len(data) - offset} bytes after its last element")
    return elements


def _refuse_texts(spec: Described, what: str) -> NoReturn:
    raise InputError(
        f"input '{spec.name}' has shape {_show(spec.shape)}, its data {what}",
        hint="each element of BYTES stands after its length, four bytes little-endian",
        param=spec.name,
    )


def _flat(data: Any) -> list[Any]:
    values = data if isinstance(data, list) else [data]
    while values and all(isinstance(part, list) for part in values):
        values = [value for part in values for value in part]
    return values


def _to_bytes(name: str, value: Any, is_base64: bool) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"input '{name}' is BYTES, expected strings in its data", param=name)
    try:
        return base64.b64decode(value, validate=True) if is_base64 else value.encode()
    except (binascii.Error, ValueError):
        raise InputError(
            f"input '{name}' is not base64 text",
            hint="encode the file's bytes, e.g. with `base64 -w0 FILE`",
            param=name,
        ) from None


def _shaped(spec: Described, elements: Array) -> Array:
    try:
        return elements.reshape(spec.shape)
    # Beside a size of 0, the others may be larger than any array.
    except (ValueError, OverflowError):
        raise InputError(
            f"input '{spec.name}' has shape {_show(spec.shape)} but {elements.size} elements",
            hint="the shape must match the data",
            param=spec.name,
        ) from None


def _check_count(name: str, datatype: str, count: int) -> None:
    most = MAX_TEXT_ELEMENTS if datatype == "BYTES" else MAX_ELEMENTS
    if count > most:
        raise InputError(
            f"input '{name}' has {_show_count(count)} elements",
            hint=f"send at most {most} of {datatype} in one tensor",
            param=name,
        )


def _show(shape: Sequence[int]) -> str:
    text = str(list(shape))
    return text if len(text) <= 200 else f"{text[:200]}…"


def _show_count(count: int) -> str:
    return str(count) if count < 10**18 else "too many"
