"""The Open Inference Protocol over gRPC: the methods, and tensors out of messages and into them.

Raw contents are what clients send and what they get; typed contents are taken too.

    handlers = InferenceService(models).handlers()
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.errors import (
    AuthenticationError,
    GoneError,
    InputError,
    NotFoundError,
    PermissionDeniedError,
)
from cluster.processing import Array
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.errors import as_heliostat_error
from serve_apps.gateway.http.requests import off_loop_if_large
from serve_apps.gateway.models import Models
from serve_apps.gateway.open_inference import messages
from serve_apps.gateway.open_inference.grpc_calls import (
    OK,
    Call,
    answering,
    message_of,
    streaming,
)
from serve_apps.gateway.open_inference.requests import (
    InferenceRequest,
    Output,
    WantedOutput,
    add_input,
    answer,
    check_parameters,
    find_model,
    read_timeout_s,
    reference,
)
from serve_apps.gateway.open_inference.routes import (
    SERVER_NAME,
    describe_model,
    server_version,
)
from serve_apps.gateway.telemetry.telemetry import note_error
from serve_apps.gateway.tensors import declare, from_bytes, from_values, to_bytes

_SERVING, _NOT_SERVING = 1, 2
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field that holds each datatype; FP16 travels raw only."""


class InferenceService:
    """`inference.GRPCInferenceService` and `grpc.health.v1.Health` over the gateway's models."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def handlers(self) -> tuple[Any, ...]:
        """What a gRPC server is given, one for each service."""
        m = messages
        inference = {
            "ServerLive": _unary(self._server_live, m.ServerLiveRequest),
            "ServerReady": _unary(self._server_ready, m.ServerReadyRequest),
            "ServerMetadata": _unary(self._server_metadata, m.ServerMetadataRequest),
            "ModelReady": _unary(self._model_ready, m.ModelReadyRequest),
            "ModelMetadata": _unary(self._model_metadata, m.ModelMetadataRequest),
            "ModelInfer": grpc.stream_unary_rpc_method_handler(
                answering(self._model_infer), response_serializer=_serialize
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                streaming(self._model_stream_infer), response_serializer=_serialize
            ),
        }
        health = {"Check": _unary(self._check, m.HealthCheckRequest)}
        return (
            grpc.method_handlers_generic_handler(m.INFERENCE_SERVICE, inference),
            grpc.method_handlers_generic_handler(m.HEALTH_SERVICE, health),
        )

    async def _server_live(self, _request: Any, _call: Call) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def _server_ready(self, _request: Any, _call: Call) -> Any:
        return messages.ServerReadyResponse(ready=self._models.is_ready)

    async def _check(self, request: Any, _call: Call) -> Any:
        if request.service not in ("", messages.INFERENCE_SERVICE):
            raise NotFoundError(f"there is no service '{request.service:.200}' here")
        status = _SERVING if self._models.is_ready else _NOT_SERVING
        return messages.HealthCheckResponse(status=status)

    async def _server_metadata(self, _request: Any, call: Call) -> Any:
        async with call.entered("models:read", "infer"):
            return messages.ServerMetadataResponse(name=SERVER_NAME, version=server_version())

    async def _model_ready(self, request: Any, call: Call) -> Any:
        async with call.entered("models:read", "infer"):
            try:
                await find_model(self._models, request.name, request.version)
            except (NotFoundError, GoneError):
                return messages.ModelReadyResponse(ready=False)
            return messages.ModelReadyResponse(ready=True)

    async def _model_metadata(self, request: Any, call: Call) -> Any:
        async with call.entered("models:read", "infer"):
            model = await find_model(self._models, request.name, request.version)
            return messages.ModelMetadataResponse(**describe_model(self._models, model))

    async def _model_infer(self, data: bytes, call: Call) -> Any:
        async with call.entered("infer", counts=True):
            request = await off_loop_if_large(
                len(data), lambda: _parse(messages.ModelInferRequest, data)
            )
            return await self._infer(request, len(data))

    async def _model_stream_infer(
        self, stream: AsyncIterator[bytes], call: Call
    ) -> AsyncGenerator[Any, None]:
        """One answer to each request, in order; an error answers its own request only, but a key
        that is not good any more ends the stream."""
        number = 0
        async for data in stream:
            number += 1
            with call.recorded(number) as record:
                call.record = record
                request = _parse(messages.ModelInferRequest, data)
                told = ""
                try:
                    async with call.entered("infer", counts=True):
                        response = await self._infer(request, len(data))
                except (AuthenticationError, PermissionDeniedError):
                    raise
                except Exception as error:
                    note_error(as_heliostat_error(error))
                    told = message_of(error)
                    # The client knows by the id which of its requests failed.
                    response = messages.ModelInferResponse(id=request.id)
                yield messages.ModelStreamInferResponse(error_message=told, infer_response=response)
                record.status, record.is_complete = OK, True

    async def _infer(self, request: Any, size_bytes: int) -> Any:
        async def work(model: ServedModel) -> Any:
            model.require_graph()
            asked = await off_loop_if_large(size_bytes, lambda: read_request(request))
            return write_response(asked, model, await answer(self._models, model, asked))

        text = reference(request.model_name, request.model_version)
        return await self._models.answer(text, work)


def read_request(request: Any) -> InferenceRequest:
    """A message with its tensors as arrays.

    Raises:
        InputError: `param` names the tensor or the parameter at fault.
    """
    parameters = _values(request.parameters)
    check_parameters(parameters, ("timeout",), "the request")
    timeout_s = read_timeout_s(parameters)
    outputs = [_wanted(output) for output in request.outputs]
    return InferenceRequest(
        id=request.id or None,
        inputs=_read_inputs(request),
        outputs=outputs or None,
        timeout_s=timeout_s,
    )


def write_response(asked: InferenceRequest, model: ServedModel, outputs: list[Output]) -> Any:
    """The answer as a message, its tensors raw.

    Raises:
        UpstreamFailedError: an output holds NaN or infinity.
    """
    response = messages.ModelInferResponse(
        id=asked.id or "",
        model_name=model.served.name,
        model_version=str(model.served.version),
    )
    for output in outputs:
        spec, array = output.spec, output.array
        response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        response.raw_output_contents.append(to_bytes(spec, array))
    return response


def _unary(work: Callable[[Any, Call], Awaitable[Any]], request_type: Any) -> Any:
    async def parse_and_work(data: bytes, call: Call) -> Any:
        return await work(_parse(request_type, data), call)

    return grpc.stream_unary_rpc_method_handler(
        answering(parse_and_work), response_serializer=_serialize
    )


def _parse(request_type: Any, data: bytes) -> Any:
    """gRPC itself would call what cannot be read an unknown error."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise InputError(
            f"the message is no {request_type.DESCRIPTOR.name}",
            hint="it is described at https://github.com/kserve/open-inference-protocol",
        ) from None


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _read_inputs(request: Any) -> Arrays:
    raw = request.raw_input_contents
    if not request.inputs:
        raise InputError("the request has no inputs", param="inputs")
    if raw and len(raw) != len(request.inputs):
        raise InputError(
            f"the request has {len(raw)} raw contents for {len(request.inputs)} inputs",
            hint="send one for each, or none and typed contents",
            param="raw_input_contents",
        )
    inputs: Arrays = {}
    for index, tensor in enumerate(request.inputs):
        check_parameters(tensor.parameters, (), f"input '{tensor.name}'")
        add_input(inputs, tensor.name, _read_tensor(tensor, raw[index] if raw else None))
    return inputs


def _read_tensor(tensor: Any, raw: bytes | None) -> Array:
    spec = declare(tensor.name, tensor.datatype, tensor.shape)
    if raw is None:
        field = _CONTENTS.get(spec.datatype, "raw_input_contents")
    else:
        field = "raw_input_contents"
    sent = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if any(name != field for name in sent) or (raw is None and field == "raw_input_contents"):
        raise InputError(
            f"input '{spec.name}' of {spec.datatype} has its values in "
            f"{' and '.join(sent) or 'nothing'}",
            hint=f"send them in {field}",
            param=spec.name,
        )
    if raw is not None:
        return from_bytes(spec, raw)
    return from_values(spec, list(getattr(tensor.contents, field)))


def _wanted(output: Any) -> WantedOutput:
    check_parameters(output.parameters, (), f"output '{output.name}'")
    return WantedOutput(output.name)


def _values(parameters: Any) -> dict[str, Any]:
    """Each parameter's value; None for one that has none."""
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = None if choice is None else getattr(parameter, choice)
    return values
