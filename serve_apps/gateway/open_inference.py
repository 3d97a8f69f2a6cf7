"""The Open Inference Protocol, version 2, over HTTP with JSON tensors.

Specification: https://github.com/kserve/open-inference-protocol. Binary tensors and gRPC are not
here. Raw inputs travel as BYTES: base64 text where the package declares an image.

    routes = build_routes(models)
"""

from __future__ import annotations

import base64
import binascii
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import InputError, NotFoundError, NotRunningError, UpstreamFailedError
from cluster.processing import Array, Datatype, TensorSpec, public_inputs, public_outputs
from serve_apps.gateway import open_inference_answers as answers
from serve_apps.gateway.authentication import require_any
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai import MODEL_VERSION_HEADER
from serve_apps.gateway.openapi import describes
from serve_apps.gateway.requests import off_loop_if_large, parse_object, validate


class _Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    datatype: str
    shape: list[int] = Field(max_length=16)
    data: list[Any]
    parameters: dict[str, Any] | None = None


class _WantedOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: dict[str, Any] | None = None


class _InferRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    inputs: list[_Tensor] = Field(min_length=1)
    outputs: list[_WantedOutput] | None = None
    parameters: dict[str, Any] | None = None


def build_routes(models: Models) -> list[Route]:
    """The routes below /v2; only the two health routes are public."""

    @describes("Whether the gateway is up", answer=answers.Live)
    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    @describes("Whether the gateway knows what is served", answer=answers.Ready)
    async def ready(_request: Request) -> Response:
        if not models.is_ready:
            raise NotRunningError(
                "the gateway has not read its routes yet", hint="try again in a moment"
            )
        return JSONResponse({"ready": True})

    @describes("The server", scopes=("models:read", "infer"), answer=answers.ServerMetadata)
    async def server_metadata(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        return JSONResponse({"name": "heliostat", "version": _version(), "extensions": []})

    @describes(
        "Inputs and outputs of a model",
        scopes=("models:read", "infer"),
        answer=answers.ModelMetadata,
    )
    async def metadata(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        return JSONResponse(_metadata(models, await _find(models, request)))

    @describes(
        "Whether a model is served", scopes=("models:read", "infer"), answer=answers.ModelReady
    )
    async def model_ready(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        model = await _find(models, request)
        return JSONResponse({"name": model.served.name, "ready": True})

    @describes(
        "Tensors in, tensors out",
        scopes=("infer",),
        body=_InferRequest,
        answer=answers.Inference,
    )
    async def infer(request: Request) -> Response:
        require_any(request, "infer")
        model = await _find(models, request)
        model.require_graph()
        body = await request.body()
        asked, inputs = await off_loop_if_large(len(body), lambda: _read(body, model))
        outputs = await models.infer(model, inputs)
        headers = {MODEL_VERSION_HEADER: str(model.served)}
        return JSONResponse(_answer(asked, model, outputs), headers=headers)

    name, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    return [
        Route(f"{name}/infer", infer, methods=["POST"]),
        Route(f"{version}/infer", infer, methods=["POST"]),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route(f"{name}/ready", model_ready),
        Route(f"{version}/ready", model_ready),
        Route(name, metadata),
        Route(version, metadata),
        Route("/v2", server_metadata),
    ]


async def _find(models: Models, request: Request) -> ServedModel:
    """The model that a path names."""
    name, version = request.path_params["name"], request.path_params.get("version")
    if version is None:
        return await models.find(name)
    if "@" in name or "/" in name:
        raise NotFoundError(f"model '{name}' has a version already", param="model")
    return await models.find(f"{name}/{version}")


def _metadata(models: Models, model: ServedModel) -> dict[str, Any]:
    manifest, name = model.manifest, model.served.name
    is_graph = manifest.kind == "graph"
    return {
        "name": name,
        "versions": [str(v) for v in models.routes.versions(name)],
        "platform": "onnx" if is_graph else "heliostat_language_model",
        "inputs": [_describe(spec) for spec in public_inputs(manifest)] if is_graph else [],
        "outputs": [_describe(spec) for spec in public_outputs(manifest)] if is_graph else [],
    }


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _read(body: bytes, model: ServedModel) -> tuple[_InferRequest, Arrays]:
    """A request with its tensors as arrays.

    Raises:
        InputError: `param` names the tensor at fault.
    """
    asked = validate(_InferRequest, parse_object(body))
    raw_inputs = model.manifest.processing.raw_inputs
    inputs: Arrays = {}
    for tensor in asked.inputs:
        if tensor.name in inputs:
            raise InputError(f"input '{tensor.name}' is given twice", param=tensor.name)
        inputs[tensor.name] = _to_array(tensor, is_base64=tensor.name in raw_inputs)
    return asked, inputs


def _to_array(tensor: _Tensor, *, is_base64: bool) -> Array:
    shape, name = tuple(tensor.shape), tensor.name
    try:
        spec = TensorSpec(name=name, datatype=tensor.datatype, shape=shape)
    except ValueError:
        raise InputError(
            f"input '{name}' has datatype '{tensor.datatype}', which does not exist",
            hint="use the protocol's words, e.g. FP32, INT64, BYTES",
            param=name,
        ) from None
    array = _elements(spec, tensor.data, is_base64)
    try:
        if any(size < 0 for size in shape):
            raise ValueError
        return array.reshape(shape)
    # Beside a size of 0, the others may be larger than any array.
    except (ValueError, OverflowError):
        raise InputError(
            f"input '{name}' has shape {list(shape)} but {array.size} elements",
            hint="the shape must match the data",
            param=name,
        ) from None


def _elements(spec: TensorSpec, data: list[Any], is_base64: bool) -> Array:
    if spec.datatype == "BYTES":
        values = _flat(data)
        elements = np.empty(len(values), dtype=object)
        elements[:] = [_to_bytes(spec.name, value, is_base64) for value in values]
        return elements
    try:
        found = np.asarray(data)
        if found.dtype.kind not in "biuf" or not _holds(spec.datatype, found):
            raise ValueError
        with np.errstate(over="ignore"):  # infinity is refused with the other values
            return found.astype(spec.numpy_dtype)
    except (ValueError, OverflowError, TypeError):
        raise InputError(
            f"input '{spec.name}' holds values that are no {spec.datatype}, or lists of unequal "
            "length",
            hint=f"expected numbers for {spec.datatype}, flat or nested like the shape",
            param=spec.name,
        ) from None


def _holds(datatype: Datatype, found: Array) -> bool:
    """Whether numbers can become this datatype without changing their meaning."""
    if datatype == "BOOL":
        return found.dtype.kind == "b" or bool(np.isin(found, (0, 1)).all())
    if datatype.startswith("FP"):
        return found.dtype.kind in "iuf"
    if found.dtype.kind not in "iu":
        return False
    limits = np.iinfo(np.dtype(datatype.lower()))
    return found.size == 0 or bool(limits.min <= found.min() and found.max() <= limits.max)


def _flat(data: list[Any]) -> list[Any]:
    while data and isinstance(data[0], list):
        data = [value for part in data if isinstance(part, list) for value in part]
    return data


def _to_bytes(name: str, value: Any, is_base64: bool) -> bytes:
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


def _answer(asked: _InferRequest, model: ServedModel, outputs: Arrays) -> dict[str, Any]:
    specs = {spec.name: spec for spec in public_outputs(model.manifest)}
    names = list(specs) if asked.outputs is None else [wanted.name for wanted in asked.outputs]
    for name in names:
        if name not in specs:
            raise InputError(
                f"unknown output '{name}'", hint=f"there are: {', '.join(specs)}", param=name
            )
    answer: dict[str, Any] = {
        "model_name": model.served.name,
        "model_version": str(model.served.version),
        "outputs": [_to_tensor(specs[name], outputs[name]) for name in names],
    }
    return answer if asked.id is None else {"id": asked.id, **answer}


def _to_tensor(spec: TensorSpec, array: Array) -> dict[str, Any]:
    if spec.datatype == "BYTES":
        data = [value.decode("utf-8", errors="replace") for value in array.reshape(-1).tolist()]
    else:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UpstreamFailedError(f"output '{spec.name}' holds NaN or infinity")
        data = array.reshape(-1).tolist()
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape), "data": data}


def _version() -> str:
    try:
        return version_of("heliostat")
    except PackageNotFoundError:
        return "0"
