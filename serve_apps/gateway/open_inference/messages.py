"""The messages of the Open Inference Protocol over gRPC, and of gRPC's own health check.

Made from the tables below in a pool of their own, so that a process which also imports somebody
else's messages of these names (a client's, say) has both. What follows `=` is the number on the
wire, which never changes: https://github.com/kserve/open-inference-protocol.

    request = ModelInferRequest.FromString(data)
    ModelInferResponse(model_name="digits").SerializeToString()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE_SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"

_TENSOR = "string name = 1; string datatype = 2; repeated int64 shape = 3"
_INFER_TENSOR = f"{_TENSOR}; map InferParameter parameters = 4; InferTensorContents contents = 5"
_INFERENCE = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelMetadataResponse": (
        "string name = 1; repeated string versions = 2; string platform = 3;"
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4;"
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5"
    ),
    "InferParameter": (
        "oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3;"
        "oneof double double_param = 4; oneof uint64 uint64_param = 5"
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1; repeated int32 int_contents = 2;"
        "repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4;"
        "repeated uint64 uint64_contents = 5; repeated float fp32_contents = 6;"
        "repeated double fp64_contents = 7; repeated bytes bytes_contents = 8"
    ),
    "ModelInferRequest.InferInputTensor": _INFER_TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": (
        "string name = 1; map InferParameter parameters = 2"
    ),
    "ModelInferRequest": (
        "string model_name = 1; string model_version = 2; string id = 3;"
        "map InferParameter parameters = 4;"
        "repeated ModelInferRequest.InferInputTensor inputs = 5;"
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6;"
        "repeated bytes raw_input_contents = 7"
    ),
    "ModelInferResponse.InferOutputTensor": _INFER_TENSOR,
    "ModelInferResponse": (
        "string model_name = 1; string model_version = 2; string id = 3;"
        "map InferParameter parameters = 4;"
        "repeated ModelInferResponse.InferOutputTensor outputs = 5;"
        "repeated bytes raw_output_contents = 6"
    ),
    "ModelStreamInferResponse": "string error_message = 1; ModelInferResponse infer_response = 2",
}
# The status is an enumeration, which has the same form on the wire as a number.
_HEALTH = {"HealthCheckRequest": "string service = 1", "HealthCheckResponse": "int32 status = 1"}

_Field = descriptor_pb2.FieldDescriptorProto


def _build(package: str, tables: Mapping[str, str]) -> dict[str, Any]:
    """Classes by name; a name with a dot is a message inside another."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    inner: dict[str, list[Any]] = {}
    for name, table in tables.items():
        outer, _, own = name.rpartition(".")
        message = descriptor_pb2.DescriptorProto(name=own, nested_type=inner.pop(name, ()))
        for declaration in filter(None, table.split(";")):
            _add_field(message, declaration, f".{package}", f".{package}.{name}")
        if outer:
            inner.setdefault(outer, []).append(message)
        else:
            file.message_type.append(message)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in tables
    }


def _add_field(message: Any, declaration: str, package: str, path: str) -> None:
    """`[repeated|map|oneof] TYPE NAME = NUMBER`; a map's keys are strings."""
    *kind, type_name, name, _, number = declaration.split()
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind == ["repeated"]:
        field.label = _Field.LABEL_REPEATED
    elif kind == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    elif kind == ["map"]:
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "string key = 1", package, path)
        _add_field(entry, f"{type_name} value = 2", package, path)
        field.label, field.type = _Field.LABEL_REPEATED, _Field.TYPE_MESSAGE
        field.type_name = f"{path}.{entry.name}"
        return
    if type_name[0].isupper():
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{package}.{type_name}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{type_name.upper()}")


_MESSAGES = _build("inference", _INFERENCE) | _build("grpc.health.v1", _HEALTH)

ServerLiveRequest: Any = _MESSAGES["ServerLiveRequest"]
ServerLiveResponse: Any = _MESSAGES["ServerLiveResponse"]
ServerReadyRequest: Any = _MESSAGES["ServerReadyRequest"]
ServerReadyResponse: Any = _MESSAGES["ServerReadyResponse"]
ModelReadyRequest: Any = _MESSAGES["ModelReadyRequest"]
ModelReadyResponse: Any = _MESSAGES["ModelReadyResponse"]
ServerMetadataRequest: Any = _MESSAGES["ServerMetadataRequest"]
ServerMetadataResponse: Any = _MESSAGES["ServerMetadataResponse"]
ModelMetadataRequest: Any = _MESSAGES["ModelMetadataRequest"]
ModelMetadataResponse: Any = _MESSAGES["ModelMetadataResponse"]
ModelInferRequest: Any = _MESSAGES["ModelInferRequest"]
ModelInferResponse: Any = _MESSAGES["ModelInferResponse"]
ModelStreamInferResponse: Any = _MESSAGES["ModelStreamInferResponse"]
HealthCheckRequest: Any = _MESSAGES["HealthCheckRequest"]
HealthCheckResponse: Any = _MESSAGES["HealthCheckResponse"]
