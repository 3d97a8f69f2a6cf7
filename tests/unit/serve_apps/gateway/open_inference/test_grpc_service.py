"""The Open Inference Protocol over gRPC, as the unmodified `tritonclient.grpc` speaks it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from cluster.errors import InputError
from serve_apps.gateway import tensors
from serve_apps.gateway.open_inference import messages
from serve_apps.gateway.open_inference.grpc_service import read_request

BRIGHT = np.array([[1.0, 0.9, 1.0, 1.0]], dtype=np.float32)
METHOD = f"/{messages.INFERENCE_SERVICE}/ModelInfer"
ONE_OF_EACH = {
    "BOOL": np.array([[True], [False]]),
    "BYTES": np.array([["é".encode()], [b"\xff\0"]], dtype=object),
    **{
        name: np.array([[3], [0]], dtype=name.lower().replace("fp", "float"))
        for name in tensors.DATATYPES - {"BOOL", "BYTES"}
    },
}


@pytest.fixture
async def client(grpc_address: str) -> AsyncIterator[triton.InferenceServerClient]:
    async with triton.InferenceServerClient(grpc_address) as client:
        yield client


@pytest.fixture
async def channel(grpc_address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(grpc_address) as channel:
        yield channel


def tensor(name: str, array: Any, datatype: str = "FP32") -> triton.InferInput:
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def typed(contents: dict[str, Any], datatype: str = "FP32", **changes: Any) -> Any:
    values = {"name": "pixels", "datatype": datatype, "shape": [1, 4], "contents": contents}
    return service_pb2.ModelInferRequest(model_name="classes", inputs=[values | changes])


async def infer(channel: grpc.aio.Channel, gateway: Any, request: Any) -> Any:
    call = channel.unary_unary(METHOD, lambda m: m.SerializeToString(),
                               service_pb2.ModelInferResponse.FromString)  # fmt: skip
    return await call(request, metadata=tuple(gateway.headers().items()))


async def test_the_client_sees_the_server_and_its_models(gateway: Any, client: Any) -> None:
    headers = gateway.headers()
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("classes", "1", headers=headers)
    assert not await client.is_model_ready("classes", "7", headers=headers)
    assert (await client.get_server_metadata(headers=headers)).name == "heliostat"
    metadata = await client.get_model_metadata("classes", headers=headers, as_json=True)
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"][0] == {"name": "pixels", "datatype": "FP32", "shape": ["-1", "4"]}
    assert [output["name"] for output in metadata["outputs"]] == [
        "logits", "probabilities", "label",
    ]  # fmt: skip


async def test_every_datatype_comes_back_as_it_was(gateway: Any, client: Any) -> None:
    sent = [tensor(name.lower(), array, name) for name, array in ONE_OF_EACH.items()]
    result = await client.infer("echo", sent, "1", request_id="id 7", headers=gateway.headers())
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("id 7", "echo", "1")
    assert len(response.raw_output_contents) == len(ONE_OF_EACH)
    for name, array in ONE_OF_EACH.items():
        found = result.as_numpy(f"same_{name.lower()}")
        assert found.dtype == array.dtype, name
        np.testing.assert_array_equal(found, array)


TYPED = {
    "BOOL": "bool", "BYTES": "bytes", "FP32": "fp32", "FP64": "fp64", "INT64": "int64",
    "UINT64": "uint64", "INT8": "int", "INT16": "int", "INT32": "int", "UINT8": "uint",
    "UINT16": "uint", "UINT32": "uint",
}  # fmt: skip


@pytest.mark.parametrize("datatype", ONE_OF_EACH)
def test_typed_contents_are_taken_too(datatype: str) -> None:
    array = ONE_OF_EACH[datatype]
    field = f"{TYPED.get(datatype, 'fp32')}_contents"
    sent = typed({field: array.reshape(-1).tolist()}, datatype, shape=[2, 1])
    if datatype in TYPED:
        found = read_request(sent).inputs["pixels"]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    else:
        with pytest.raises(InputError, match=r"FP16 has its .* send them in raw_input_contents"):
            read_request(sent)


async def test_outputs_are_those_asked_for(gateway: Any, client: Any) -> None:
    wanted = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("logits")]
    result = await client.infer(
        "classes", [tensor("pixels", BRIGHT)], outputs=wanted, headers=gateway.headers()
    )
    assert [output.name for output in result.get_response().outputs] == ["label", "logits"]
    assert result.as_numpy("label").tolist() == [b"bright"]
    assert result.as_numpy("logits").shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "version", "code", "words"),
    [
        ("none", "", "NOT_FOUND", "is not deployed"),
        ("classes", "7", "NOT_FOUND", "deployed versions are: 1, 2"),
        ("classes@champion", "1", "NOT_FOUND", "has a version already"),
        ("../classes", "", "NOT_FOUND", "not valid"),
        ("broken", "", "FAILED_PRECONDITION", "not what was signed"),
        ("talker", "", "INVALID_ARGUMENT", "/v1/completions"),
    ],
)
async def test_models_that_cannot_answer_are_told_by_a_status(
    gateway: Any, client: Any, model: str, version: str, code: str, words: str
) -> None:
    with pytest.raises(InferenceServerException, match=words) as caught:
        await client.infer(model, [tensor("pixels", BRIGHT)], version, headers=gateway.headers())
    assert caught.value.status() == f"StatusCode.{code}"


@pytest.mark.parametrize(
    ("request_sent", "words"),
    [
        (typed({"fp32_contents": [1.0] * 3}), "but 3 elements"),
        (typed({"int_contents": [1] * 4}), "'pixels' of FP32 has its values in int_contents"),
        (typed({"fp32_contents": [1.0] * 4, "bool_contents": [True]}), "and"),
        (typed({"fp32_contents": [float("nan")] * 4}), "holds NaN"),
        (typed({"int_contents": [300] * 4}, "INT8"), "no INT8"),
        (typed({"fp32_contents": [1.0] * 4}, "BF16"), "'BF16', which does not exist here"),
        (typed({"fp32_contents": [1.0] * 4}, shape=[-1, 4]), "none below 0"),
        (typed({"fp32_contents": [1.0] * 4}, shape=[4, 1]), "has shape [4, 1]"),
        (typed({"fp32_contents": [1.0] * 4}, name="pixel"), "unknown input 'pixel'"),
        (typed({"fp32_contents": [1.0] * 4}, parameters={"shared_memory_region": {}}),
         "'shared_memory_region' of input 'pixels'"),
        (service_pb2.ModelInferRequest(model_name="classes"), "has no inputs"),
        (service_pb2.ModelInferRequest(
            model_name="classes", inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 4]}],
            raw_input_contents=[b"", b""]), "2 raw contents for 1 inputs"),
        (service_pb2.ModelInferRequest(
            model_name="classes", raw_input_contents=[b"\0" * 16],
            inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 4],
                     "contents": {"fp32_contents": [1.0]}}]), "in fp32_contents"),
        (service_pb2.ModelInferRequest(
            model_name="classes", parameters={"priority": {"int64_param": 1}},
            inputs=[{"name": "pixels"}]), "'priority' of the request"),
        (service_pb2.ModelInferRequest(
            model_name="classes", parameters={"timeout": {"string_param": "soon"}},
            inputs=[{"name": "pixels"}]), "'timeout' is 'soon'"),
        (service_pb2.ModelInferRequest(
            model_name="classes", raw_input_contents=[b"\0" * 16],
            inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 4]}],
            outputs=[{"name": "logits", "parameters": {"classification": {"int64_param": 2}}}]),
         "'classification' of output 'logits'"),
        (service_pb2.ModelInferRequest(
            model_name="classes", raw_input_contents=[b"\0" * 16],
            inputs=[{"name": "pixels\n" + "x" * 9000, "datatype": "FP32", "shape": [1, 4]}]),
         "unknown input 'pixels xxx"),
    ],
)  # fmt: skip
async def test_wrong_tensors_are_refused_by_name(
    gateway: Any, channel: Any, request_sent: Any, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel, gateway, request_sent)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()
    assert "\n" not in caught.value.details()


async def test_a_stream_answers_in_order_and_outlives_a_bad_request(
    gateway: Any, client: Any
) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            array = BRIGHT if number != 1 else BRIGHT[:, :3]
            inputs = [tensor("pixels", array)]
            yield {"model_name": "classes", "inputs": inputs, "request_id": str(number)}

    answers = [
        answer async for answer in client.stream_infer(requests(), headers=gateway.headers())
    ]
    results = [result for result, _ in answers]
    errors = [error for _, error in answers]
    assert [result.get_response().id for result in results if result] == ["0", "2"]
    assert errors[0] is errors[2] is None
    assert "'pixels' has shape [1, 3]" in str(errors[1])
