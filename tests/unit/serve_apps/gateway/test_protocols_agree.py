"""The same input gives the same outputs through every protocol, numbers and files alike."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from PIL import Image

OUTPUTS = ("logits", "probabilities", "label")
Answer = dict[str, list[Any]]


def picture(kind: str, brightness: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (7, 5), (brightness,) * 3).save(stream, kind)
    return stream.getvalue()


def objects(values: list[bytes]) -> Any:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


NUMBERS = np.random.default_rng(7).random((5, 4), dtype=np.float32)
INPUTS = {
    "numbers": ("pixels", "FP32", NUMBERS),
    "png": ("image", "BYTES", objects([picture("PNG", value) for value in (0, 99, 255)])),
    "jpeg": ("image", "BYTES", objects([picture("JPEG", value) for value in (0, 99, 255)])),
}


def plain(outputs: dict[str, Any]) -> Answer:
    """Numbers as 32 bits hold them, texts as text."""
    label = [v.decode() if isinstance(v, bytes) else v for v in list(outputs["label"])]
    numbers = {n: np.asarray(outputs[n], dtype=np.float32).tolist() for n in OUTPUTS[:2]}
    return {**numbers, "label": label}


def with_triton(client: Any, sent: Any, headers: dict[str, str], **options: Any) -> Answer:
    result = client.infer("classes", [sent], headers=headers, **options)
    return plain({name: result.as_numpy(name) for name in OUTPUTS})


async def by_json(gateway: Any, name: str, datatype: str, array: Any) -> Answer:
    data = (
        [base64.b64encode(value).decode() for value in array]
        if datatype == "BYTES"
        else array.tolist()
    )
    tensor = {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data}
    answer = await gateway.client.post(
        "/v2/models/classes/infer", json={"inputs": [tensor]}, headers=gateway.headers()
    )
    assert answer.status_code == 200, answer.text
    found = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer.json()["outputs"]}
    return plain(found)


async def by_rows(gateway: Any, name: str, datatype: str, array: Any) -> Answer:
    values = (
        [{"b64": base64.b64encode(value).decode()} for value in array]
        if datatype == "BYTES"
        else array.tolist()
    )
    answer = await gateway.client.post(
        "/v1/models/classes:predict",
        json={"instances": [{name: value} for value in values]},
        headers=gateway.headers(),
    )
    assert answer.status_code == 200, answer.text
    rows = answer.json()["predictions"]
    return plain({output: [row[output] for row in rows] for output in OUTPUTS})


@pytest.mark.parametrize("kind", INPUTS)
async def test_all_protocols_give_the_same(
    gateway: Any, http_address: str, grpc_address: str, kind: str
) -> None:
    name, datatype, array = INPUTS[kind]
    headers = gateway.headers()

    def by_http() -> Answer:
        sent = http_client.InferInput(name, list(array.shape), datatype)
        with http_client.InferenceServerClient(http_address) as client:
            return with_triton(client, sent.set_data_from_numpy(array), dict(headers))

    def by_grpc() -> Answer:
        sent = grpc_client.InferInput(name, list(array.shape), datatype)
        with grpc_client.InferenceServerClient(grpc_address) as client:
            return with_triton(client, sent.set_data_from_numpy(array), dict(headers))

    protocols: list[Callable[..., Awaitable[Answer]]] = [by_json, by_rows]
    answers = [await protocol(gateway, name, datatype, array) for protocol in protocols]
    answers += [await asyncio.to_thread(by_http), await asyncio.to_thread(by_grpc)]
    assert len(answers[0]["label"]) == len(array)
    assert all(answer == answers[0] for answer in answers)


async def test_texts_and_records_give_the_same(gateway: Any, http_address: str) -> None:
    """A record is one input for each of its fields; text is an input of BYTES."""
    texts = ["定日镜", ""]
    fields = {
        spec["name"]: spec["datatype"]
        for spec in (
            await gateway.client.get("/v2/models/echo/versions/1", headers=gateway.headers())
        ).json()["inputs"]
    }
    columns = {
        name: texts if datatype == "BYTES" else [True, False] if datatype == "BOOL" else [1, 0]
        for name, datatype in fields.items()
    }
    tensors = [
        {"name": name, "datatype": fields[name], "shape": [2, 1], "data": values}
        for name, values in columns.items()
    ]
    records = [{name: values[row] for name, values in columns.items()} for row in range(2)]

    async def post(path: str, body: Any) -> Any:
        return (await gateway.client.post(path, json=body, headers=gateway.headers())).json()

    by_tensors = await post("/v2/models/echo/versions/1/infer", {"inputs": tensors})
    by_records = await post("/v1/models/echo/versions/1:predict", {"instances": records})
    found = {output["name"]: output["data"] for output in by_tensors["outputs"]}
    assert found["same_bytes"] == texts
    assert found == {name: [row[name][0] for row in by_records["predictions"]] for name in found}
