"""Binary tensors over HTTP, as `tritonclient.http` sends and reads them, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from serve_apps.gateway import tensors

BRIGHT = np.array([[1.0, 0.9, 1.0, 1.0]], dtype=np.float32)
JSON_LENGTH = "inference-header-content-length"
Result = TypeVar("Result")
ONE_OF_EACH = {
    "BOOL": np.array([[True], [False]]),
    "BYTES": np.array([["é".encode()], [b""]], dtype=object),
    **{
        name: np.array([[3], [0]], dtype=name.lower().replace("fp", "float"))
        for name in tensors.DATATYPES - {"BOOL", "BYTES"}
    },
}


async def use(
    gateway: Any, address: str, work: Callable[[triton.InferenceServerClient, Any], Result]
) -> Result:
    """The client is synchronous and belongs to one thread."""

    def in_thread() -> Result:
        with triton.InferenceServerClient(address) as client:
            return work(client, gateway.headers())

    return await asyncio.to_thread(in_thread)


def tensor(name: str, array: Any, datatype: str = "FP32", **options: Any) -> triton.InferInput:
    sent = triton.InferInput(name, list(array.shape), datatype)
    return sent.set_data_from_numpy(array, **options)


def every_input(**options: Any) -> list[triton.InferInput]:
    return [tensor(n.lower(), array, n, **options) for n, array in ONE_OF_EACH.items()]


async def test_the_client_sees_the_server_and_its_models(gateway: Any, http_address: str) -> None:
    def work(client: Any, headers: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("classes", "2", headers=headers)
        assert not client.is_model_ready("classes", "7", headers=headers)
        assert client.get_server_metadata(headers=headers)["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("classes", headers=headers)
        assert metadata["inputs"][0] == {"name": "pixels", "datatype": "FP32", "shape": [-1, 4]}
        with pytest.raises(InferenceServerException, match=r"\[404\]"):
            client.get_model_config("classes", headers=headers)
        with pytest.raises(InferenceServerException, match=r"\[401\].*API key"):
            client.get_model_metadata("classes")

    await use(gateway, http_address, work)


@pytest.mark.parametrize("is_binary", [True, False])
async def test_every_datatype_comes_back_as_it_was(
    gateway: Any, http_address: str, is_binary: bool
) -> None:
    outputs = [
        triton.InferRequestedOutput(f"same_{name.lower()}", binary_data=is_binary)
        for name in ONE_OF_EACH
    ]

    def work(client: Any, headers: Any) -> Any:
        return client.infer(
            "echo", every_input(binary_data=is_binary), "1", outputs, "id 7", headers=headers
        )

    result = await use(gateway, http_address, work)
    assert result.get_response()["id"] == "id 7"
    for name, array in ONE_OF_EACH.items():
        found = result.as_numpy(f"same_{name.lower()}")
        if name == "BYTES" and not is_binary:
            array = np.array([["é"], [""]], dtype=object)
        assert found.dtype == array.dtype, name
        np.testing.assert_array_equal(found, array)


async def test_all_outputs_are_binary_unless_asked_for_otherwise(
    gateway: Any, http_address: str
) -> None:
    mixed = [
        triton.InferRequestedOutput("label", binary_data=False),
        triton.InferRequestedOutput("probabilities", binary_data=True),
    ]

    def work(client: Any, headers: Any) -> tuple[Any, Any]:
        sent = [tensor("pixels", BRIGHT)]
        return (
            client.infer("classes", sent, headers=headers),
            client.infer("classes", sent, outputs=mixed, headers=headers),
        )

    whole, part = await use(gateway, http_address, work)
    sizes = {
        o["name"]: o["parameters"]["binary_data_size"] for o in whole.get_response()["outputs"]
    }
    assert sizes == {"logits": 12, "probabilities": 12, "label": 4 + len("bright")}
    assert whole.as_numpy("label").tolist() == [b"bright"]
    assert [o["name"] for o in part.get_response()["outputs"]] == ["label", "probabilities"]
    assert part.as_numpy("label").tolist() == ["bright"]
    np.testing.assert_array_equal(part.as_numpy("probabilities"), whole.as_numpy("probabilities"))


async def test_an_image_is_sent_as_its_bytes(gateway: Any, http_address: str) -> None:
    stream = io.BytesIO()
    Image.new("L", (9, 9), 255).save(stream, "JPEG")
    files = np.array([stream.getvalue()], dtype=object)
    result = await use(
        gateway,
        http_address,
        lambda client, headers: client.infer(
            "classes", [tensor("image", files, "BYTES")], headers=headers
        ),
    )
    assert result.as_numpy("label").tolist() == [b"bright"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequence_id": 5}, "'sequence_id' of the request is not supported"),
        ({"priority": 1}, "'priority' of the request is not supported"),
        ({"parameters": {"seed": 1}}, "known are: binary_data_output, timeout"),
        ({"outputs": [triton.InferRequestedOutput("logits", class_count=2)]}, "'classification'"),
        ({"timeout": -1}, "'timeout' is -1; expected microseconds"),
        ({"timeout": 1}, "no answer within the 1e-06 s"),
    ],
)
async def test_parameters_are_refused_by_name_and_never_ignored(
    gateway: Any, http_address: str, options: dict[str, Any], words: str
) -> None:
    def work(client: Any, headers: Any) -> None:
        client.infer("classes", [tensor("pixels", BRIGHT)], headers=headers, **options)

    with pytest.raises(InferenceServerException, match=words):
        await use(gateway, http_address, work)


async def test_shared_memory_is_refused_by_name(gateway: Any, http_address: str) -> None:
    shared = triton.InferInput("pixels", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    wanted = triton.InferRequestedOutput("logits")
    wanted.set_shared_memory("region", 12)

    def of_input(client: Any, headers: Any) -> None:
        client.infer("classes", [shared], headers=headers)

    def of_output(client: Any, headers: Any) -> None:
        client.infer("classes", [tensor("pixels", BRIGHT)], outputs=[wanted], headers=headers)

    for work in (of_input, of_output):
        with pytest.raises(InferenceServerException, match="'shared_memory_region' of"):
            await use(gateway, http_address, work)


async def test_the_largest_time_that_a_request_allows_is_enough(
    gateway: Any, http_address: str
) -> None:
    result = await use(
        gateway,
        http_address,
        lambda client, headers: client.infer(
            "classes", [tensor("pixels", BRIGHT)], timeout=30_000_000, headers=headers
        ),
    )
    assert result.as_numpy("logits").shape == (1, 3)


def raw_request(data: bytes = BRIGHT.tobytes(), **changes: Any) -> tuple[bytes, bytes]:
    values = {
        "name": "pixels", "datatype": "FP32", "shape": [1, 4],
        "parameters": {"binary_data_size": len(data)},
    } | changes  # fmt: skip
    return json.dumps({"inputs": [values]}).encode(), data


@pytest.mark.parametrize(
    ("parts", "length", "words"),
    [
        (raw_request(), None, "not valid JSON"),
        (raw_request(), "0", "Inference-Header-Content-Length' is '0'"),
        (raw_request(), "-1", "Inference-Header-Content-Length"),
        (raw_request(), "9" * 19, "Inference-Header-Content-Length"),
        (raw_request(), "9" * 5000, "Inference-Header-Content-Length"),
        (raw_request(), "١", "Inference-Header-Content-Length"),
        (raw_request(parameters={"binary_data_size": 17}), "", "'binary_data_size' of 17, 16"),
        (raw_request(parameters={"binary_data_size": -1}), "", "'binary_data_size' of -1"),
        (raw_request(parameters={"binary_data_size": True}), "", "'binary_data_size' of True"),
        (raw_request(parameters={"binary_data_size": 12}), "", "'pixels' has 12 bytes of data"),
        (raw_request(parameters={}), "", "neither 'data' nor 'binary_data_size'"),
        (raw_request(data=BRIGHT.tobytes() + b"_", parameters={"binary_data_size": 16}), "",
         "1 bytes that are no input's"),
        (raw_request(shape=[1, 2**60]), "", "elements; send at most"),
        (raw_request(shape=[1, 4, 1]), "", "has shape \\[1, 4, 1\\]"),
        (raw_request(datatype="INT32"), "", "has datatype INT32"),
        (raw_request(data=np.array([[1, np.nan, 1, 1]], np.float32).tobytes()), "",
         "'pixels' holds NaN"),
    ],
)  # fmt: skip
async def test_bodies_that_do_not_add_up_are_refused(
    gateway: Any, parts: tuple[bytes, bytes], length: str | None, words: str
) -> None:
    headers = gateway.headers()
    if length is not None:
        headers[JSON_LENGTH] = (length or str(len(parts[0]))).encode()
    answer = await gateway.client.post(
        "/v2/models/classes/infer", content=b"".join(parts), headers=headers
    )
    assert answer.status_code == 400, answer.text
    with pytest.raises(ValueError, match=words):
        raise ValueError(answer.json()["error"])


async def test_data_both_ways_is_refused(gateway: Any) -> None:
    text, data = raw_request(data=BRIGHT.tobytes())
    both = text.replace(b'"shape"', b'"data": [1.0], "shape"')
    answer = await gateway.client.post(
        "/v2/models/classes/infer",
        content=both + data,
        headers=gateway.headers() | {JSON_LENGTH: str(len(both))},
    )
    assert "both 'data' and 'binary_data_size'" in answer.json()["error"]
