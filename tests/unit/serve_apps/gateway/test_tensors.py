"""Tensors out of JSON values and raw bytes, and back, for every datatype; and what is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cluster.errors import InputError, UpstreamFailedError
from cluster.processing import TensorSpec
from serve_apps.gateway import tensors
from serve_apps.gateway.http.responses import write_json
from serve_apps.gateway.tensors import declare, from_bytes, from_values, to_bytes, to_values

NUMBERS = sorted(tensors.DATATYPES - {"BYTES"})


def spec_of(datatype: str, *shape: int) -> TensorSpec:
    return declare("x", datatype, shape)


@pytest.mark.parametrize("datatype", NUMBERS)
@given(data=st.data())
def test_numbers_survive_both_ways(datatype: str, data: st.DataObject) -> None:
    dtype = spec_of(datatype).numpy_dtype
    elements = (
        st.floats(width=dtype.itemsize * 8, allow_nan=False, allow_infinity=False)
        if dtype.kind == "f"
        else None
    )
    shapes = npst.array_shapes(min_dims=0, max_dims=3, max_side=4, min_side=0)
    array = data.draw(npst.arrays(dtype, shapes, elements=elements))
    spec = spec_of(datatype, *array.shape)
    raw = from_bytes(spec, to_bytes(spec, array))
    values = from_values(spec, json.loads(write_json(to_values(spec, array))))
    for found in (raw, values):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_bytes_survive_as_raw_bytes(values: list[bytes]) -> None:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    spec = spec_of("BYTES", len(values))
    assert from_bytes(spec, to_bytes(spec, array)).tolist() == values


@given(st.binary(max_size=40), st.lists(st.integers(0, 5), max_size=2))
def test_any_bytes_are_elements_or_refused(data: bytes, shape: list[int]) -> None:
    spec = spec_of("BYTES", *shape)
    with contextlib.suppress(InputError):
        assert to_bytes(spec, from_bytes(spec, data)) == data


def test_raw_numbers_are_a_view_where_they_can_be() -> None:
    data = bytes(range(64))
    assert np.shares_memory(from_bytes(spec_of("FP32", 2, 8), data), np.frombuffer(data, np.uint8))
    odd = from_bytes(spec_of("INT32", 2), memoryview(b"_" + data[:8])[1:])
    assert odd.flags.aligned
    assert odd.tolist() == np.frombuffer(data[:8], np.int32).tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "words"),
    [
        ("BF16", [1], "'BF16', which does not exist here"),
        ("FP32", [2**40, 2**40], "too many elements"),
        ("FP32", [tensors.MAX_ELEMENTS + 1], "send at most"),
        ("BYTES", [tensors.MAX_TEXT_ELEMENTS + 1], "send at most"),
        ("INT8", [1, -1], "none below 0"),
        ("INT8", [1] * 17, "at most 16 sizes"),
    ],
)
def test_what_cannot_be_is_refused_before_its_data(
    datatype: str, shape: list[int], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        declare("x", datatype, shape)
    assert caught.value.param == "x"


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP32", [2], b"\0" * 7, "7 bytes of data, its shape"),
        ("FP32", [0, 10**30], b"", "has shape"),
        ("BOOL", [2], b"\0\2", "no BOOL"),
        ("BYTES", [1], b"\1\0\0", "ends before element 0"),
        ("BYTES", [1], b"\xff\xff\xff\xff", "ends inside element 0"),
        ("BYTES", [1], b"\0\0\0\0\0", "1 bytes after its last"),
    ],
)
def test_raw_bytes_must_be_what_the_shape_says(
    datatype: str, shape: list[int], data: bytes, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        from_bytes(declare("x", datatype, shape), data)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("BYTES", [["a", "b"], "c"]), ("BYTES", ["a", 1]), ("INT64", [1.5, 2]), ("INT64", [2**70, 1]),
     ("UINT8", [-1, 0]),
     ("UINT64", [2**63, 0.5]), ("UINT64", [2**63, -1]), ("UINT64", [1.0, 2.0]),
     ("BOOL", [0, 2]), ("FP32", ["1", "2"]), ("FP32", [{}, {}])],
)  # fmt: skip
def test_values_of_another_kind_are_refused(datatype: str, data: list[Any]) -> None:
    with pytest.raises(InputError) as caught:
        from_values(spec_of(datatype, 2), data)
    assert caught.value.param == "x"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_without_a_finite_value_is_the_models_fault(value: float) -> None:
    array = np.array([value], dtype=np.float32)
    for write in (to_bytes, to_values):
        with pytest.raises(UpstreamFailedError, match="NaN or infinity"):
            write(spec_of("FP32", 1), array)
