"""The bodies of the Open Inference Protocol over HTTP: JSON, or JSON with raw bytes after it.

Binary tensors are the extension that `tritonclient.http` speaks: a header says how long the JSON
is, `binary_data_size` in each tensor's parameters how many of the bytes after it are its own.

    asked = read_body(body, headers.get(JSON_LENGTH_HEADER), model)
    content, headers = write_body(asked, model, outputs)
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InputError
from cluster.processing import Array
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.requests import parse_object, validate
from serve_apps.gateway.http.responses import write_json
from serve_apps.gateway.open_inference.requests import (
    InferenceRequest,
    Output,
    WantedOutput,
    add_input,
    check_parameters,
    read_flag,
    read_timeout_s,
)
from serve_apps.gateway.tensors import declare, from_bytes, from_values, to_bytes, to_values

BINARY = "application/octet-stream"
JSON_LENGTH_HEADER = "inference-header-content-length"
_SIZE, _IS_BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"


class _Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class _WantedOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferenceBody(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    inputs: list[_Tensor] = Field(min_length=1)
    outputs: list[_WantedOutput] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


def read_body(body: bytes, json_length: str | None, model: ServedModel) -> InferenceRequest:
    """A request with its tensors as arrays.

    Args:
        json_length: the header that says how much of the body is JSON; None if all of it is.

    Raises:
        InputError: `param` names the tensor or the parameter at fault.
    """
    end = _json_end(json_length, len(body))
    request = validate(InferenceBody, parse_object(body[:end]))
    check_parameters(request.parameters, (_ALL_BINARY, "timeout"), "the request")
    is_binary = read_flag(request.parameters, _ALL_BINARY, False)
    outputs = None
    if request.outputs is not None:
        outputs = [_wanted(output, is_binary) for output in request.outputs]
    return InferenceRequest(
        id=request.id,
        inputs=_read_inputs(request.inputs, memoryview(body)[end:], model),
        outputs=outputs,
        is_binary=is_binary,
        timeout_s=read_timeout_s(request.parameters),
    )


def write_body(
    asked: InferenceRequest, model: ServedModel, outputs: list[Output]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer with the headers that describe it.

    Raises:
        UpstreamFailedError: an output holds NaN or infinity.
    """
    chunks: list[bytes] = []
    tensors = [_write(output, chunks) for output in outputs]
    values: dict[str, Any] = {} if asked.id is None else {"id": asked.id}
    values |= {
        "model_name": model.served.name,
        "model_version": str(model.served.version),
        "outputs": tensors,
    }
    text = write_json(values)
    if not any(output.is_binary for output in outputs):
        return text, {"content-type": "application/json"}
    headers = {"content-type": BINARY, JSON_LENGTH_HEADER: str(len(text))}
    return b"".join([text, *chunks]), headers


def _json_end(json_length: str | None, body_bytes: int) -> int:
    if json_length is None:
        return body_bytes
    is_number = json_length.isascii() and json_length.isdigit() and len(json_length) <= 20
    if not is_number or not 0 < int(json_length) <= body_bytes:
        raise InputError(
            f"the header 'Inference-Header-Content-Length' is '{json_length:.100}' for a body of "
            f"{body_bytes} bytes",
            hint="it says how many bytes at the body's beginning are JSON",
            param="Inference-Header-Content-Length",
        )
    return int(json_length)


def _read_inputs(tensors: list[_Tensor], rest: memoryview, model: ServedModel) -> Arrays:
    inputs: Arrays = {}
    start = 0
    for tensor in tensors:
        check_parameters(tensor.parameters, (_SIZE,), f"input '{tensor.name}'")
        size = _binary_size(tensor, len(rest) - start)
        add_input(inputs, tensor.name, _read_tensor(tensor, rest[start : start + size], model))
        start += size
    if start != len(rest):
        raise InputError(
            f"the body has {len(rest) - start} bytes that are no input's",
            hint="the inputs' 'binary_data_size' must add up to what stands after the JSON",
            param=_SIZE,
        )
    return inputs


def _binary_size(tensor: _Tensor, left: int) -> int:
    size = tensor.parameters.get(_SIZE, 0)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= left:
        raise InputError(
            f"input '{tensor.name}' has a 'binary_data_size' of {size!r:.100}, {left} bytes are "
            "left",
            hint="send the header 'Inference-Header-Content-Length', and the bytes after the JSON",
            param=tensor.name,
        )
    return size


def _read_tensor(tensor: _Tensor, data: memoryview, model: ServedModel) -> Array:
    spec = declare(tensor.name, tensor.datatype, tensor.shape)
    is_binary = _SIZE in tensor.parameters
    if is_binary == (tensor.data is not None):
        raise InputError(
            f"input '{tensor.name}' has {'both' if is_binary else 'neither'} 'data' "
            f"{'and' if is_binary else 'nor'} 'binary_data_size'",
            hint="send one of them",
            param=tensor.name,
        )
    if is_binary:
        return from_bytes(spec, data)
    is_file = tensor.name in model.manifest.processing.raw_inputs
    return from_values(spec, tensor.data, is_base64=is_file)


def _wanted(output: _WantedOutput, default: bool) -> WantedOutput:
    check_parameters(output.parameters, (_IS_BINARY,), f"output '{output.name}'")
    return WantedOutput(output.name, read_flag(output.parameters, _IS_BINARY, default))


def _write(output: Output, chunks: list[bytes]) -> dict[str, Any]:
    spec, array = output.spec, output.array
    tensor: dict[str, Any] = {
        "name": spec.name,
        "datatype": spec.datatype,
        "shape": list(array.shape),
    }
    if output.is_binary:
        chunks.append(to_bytes(spec, array))
        return tensor | {"parameters": {_SIZE: len(chunks[-1])}}
    return tensor | {"data": to_values(spec, array)}
