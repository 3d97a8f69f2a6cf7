"""Our messages are the protocol's: the same names, numbers and types as in its published client."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2

from serve_apps.gateway.open_inference import messages

NAMES = [
    name for name in dir(service_pb2)
    if hasattr(messages, name) and name.startswith(("Server", "Model"))
]  # fmt: skip


def fields_of(message: Any) -> dict[str, tuple[Any, ...]]:
    """Every field, those of messages inside too: number, type, label, its message, its choice."""
    fields = {
        f"{message.name}.{field.name}": (
            field.number, field.type, field.label, field.type_name, field.HasField("oneof_index"),
        )
        for field in message.field
    }  # fmt: skip
    for inner in message.nested_type:
        fields |= {f"{message.name}.{name}": field for name, field in fields_of(inner).items()}
    return fields


def described(message: Any) -> Any:
    proto = descriptor_pb2.DescriptorProto()
    message.DESCRIPTOR.CopyToProto(proto)
    return proto


@pytest.mark.parametrize("name", [*NAMES, "InferParameter", "InferTensorContents"])
def test_a_message_is_the_published_one(name: str) -> None:
    ours = messages._MESSAGES[name]
    theirs = getattr(service_pb2, name)
    assert ours is not theirs
    assert fields_of(described(ours)) == fields_of(described(theirs))


def test_all_of_ours_are_compared() -> None:
    assert len(NAMES) == 13
    assert {name.split(".")[0] for name in messages._INFERENCE} == {
        *NAMES, "InferParameter", "InferTensorContents",
    }  # fmt: skip


def test_a_message_of_theirs_is_read_as_ours() -> None:
    theirs = service_pb2.ModelInferRequest(model_name="digits", raw_input_contents=[b"\0\1"])
    theirs.parameters["timeout"].int64_param = 7
    theirs.inputs.add(name="pixels", datatype="FP32", shape=[1, -2])
    ours = messages.ModelInferRequest.FromString(theirs.SerializeToString())
    assert ours.parameters["timeout"].int64_param == 7
    assert list(ours.inputs[0].shape) == [1, -2]
    assert ours.SerializeToString() == theirs.SerializeToString()
