"""The Open Inference Protocol over HTTP: metadata, numbers, images, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

BRIGHT = [1.0, 0.9, 1.0, 1.0]
DARK = [0.0, 0.1, 0.0, 0.0]


def tensor(*rows: list[float], **changes: Any) -> dict[str, Any]:
    values = [value for row in rows for value in row]
    shape = [len(rows), 4]
    return {"name": "pixels", "datatype": "FP32", "shape": shape, "data": values} | changes


async def infer(gateway: Any, *inputs: dict[str, Any], path: str = "classes", **more: Any) -> Any:
    return await gateway.client.post(
        f"/v2/models/{path}/infer", json={"inputs": list(inputs), **more}, headers=gateway.headers()
    )


def outputs(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def png(brightness: int, size: int = 2) -> str:
    stream = io.BytesIO()
    Image.new("L", (size, size), brightness).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


async def test_numbers_give_probabilities_and_a_label(gateway: Any) -> None:
    answer = await infer(gateway, tensor(BRIGHT, DARK), id="abc")
    values = answer.json()
    assert (values["id"], values["model_name"], values["model_version"]) == ("abc", "classes", "2")
    assert answer.headers["x-model-version"] == "classes/2"
    found = outputs(answer)
    assert found["label"] == {
        "name": "label", "datatype": "BYTES", "shape": [2], "data": ["bright", "dark"],
    }  # fmt: skip
    probabilities = np.array(found["probabilities"]["data"]).reshape(2, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


async def test_nested_data_and_integers_are_taken(gateway: Any) -> None:
    nested = tensor(BRIGHT, data=[[1, 1, 1, 1]])
    assert outputs(await infer(gateway, nested))["label"]["data"] == ["bright"]


async def test_an_image_answers_as_its_pixels_do(gateway: Any) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [png(255), png(0, 64)]}
    from_images = outputs(await infer(gateway, image))
    from_numbers = outputs(await infer(gateway, tensor([1.0] * 4, [0.0] * 4)))
    assert from_images == from_numbers


async def test_only_wanted_outputs_are_given(gateway: Any) -> None:
    found = outputs(await infer(gateway, tensor(BRIGHT), outputs=[{"name": "label"}]))
    assert set(found) == {"label"}
    unknown = await infer(gateway, tensor(BRIGHT), outputs=[{"name": "lable"}])
    assert unknown.status_code == 400
    assert "there are: logits, probabilities, label" in unknown.json()["error"]


async def test_versions_and_aliases_are_chosen_by_name(gateway: Any) -> None:
    for path, version in [
        ("classes", "2"), ("classes/versions/1", "1"), ("classes@previous", "1"),
        ("classes@champion", "2"),
    ]:  # fmt: skip
        assert (await infer(gateway, tensor(DARK), path=path)).json()["model_version"] == version


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", "there are: broken, classes, mute, talker"),
        ("retired", "is not deployed"),
        ("classes/versions/9", "deployed versions are: 1, 2"),
        ("classes/versions/x", "not a positive number"),
        ("classes@next", "is version 3, which is not deployed"),
        ("classes@none", "deployed versions are: 1, 2"),
        ("classes@champion/versions/1", "has a version already"),
        ("..%2fclasses", "no such path"),
        ("%2e%2e", "not valid"),
        ("a%00b", "not valid"),
    ],
)
async def test_what_is_not_served_is_not_found(gateway: Any, path: str, words: str) -> None:
    answer = await infer(gateway, tensor(DARK), path=path)
    assert answer.status_code == 404
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datatype": "FP64"}, "'pixels' has datatype FP64"),
        ({"datatype": "FLOAT"}, "datatype 'FLOAT', which does not exist"),
        ({"shape": [1, 5], "data": [1.0] * 5}, "'pixels' has shape [1, 5]"),
        ({"shape": [2, 4]}, "shape [2, 4] but 4 elements"),
        ({"shape": [-1, 4]}, "'pixels' has shape"),
        ({"shape": [0, 4], "data": []}, "'pixels' has shape [0, 4]"),
        ({"data": ["a", "b", "c", "d"]}, "no FP32"),
        ({"data": [[1.0, 2.0], [3.0]]}, "unequal length"),
        ({"data": [None] * 4}, "no FP32"),
        ({"data": [1e39] * 4}, "NaN or infinity"),
        ({"datatype": "INT8", "data": [300] * 4}, "no INT8"),
        ({"name": "pixel"}, "unknown input 'pixel'"),
        ({"datatype": "BYTES", "data": ["a"] * 4}, "'pixels' has datatype BYTES"),
        ({"datatype": "BYTES", "data": [1] * 4}, "expected strings"),
        ({"name": "image", "datatype": "BYTES", "shape": [1], "data": ["no"]}, "base64"),
        ({"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]}, "image"),
        ({"extra": 1}, "'inputs.0.extra' is not known"),
        ({"data": 5}, "'inputs.0.data'"),
        ({"shape": [0, 10**18], "data": []}, "'pixels' has shape [0, "),
        ({"shape": [0, 10**30], "data": []}, "'inputs.0.shape.1': input should be a valid integer"),
        (
            {"name": "image", "datatype": "BYTES", "data": json.loads("[" * 50 + "]" * 50)},
            "shape",
        ),
    ],
)
async def test_wrong_tensors_are_refused_by_name(
    gateway: Any, changes: dict[str, Any], words: str
) -> None:
    answer = await infer(gateway, tensor(DARK) | changes)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


async def test_half_of_a_character_is_refused(gateway: Any) -> None:
    for half in (b"\\ud800", b"\xed\xa0\x80"):
        body = json.dumps({"id": "@", "inputs": [tensor(DARK)]}).encode().replace(b"@", half)
        answer = await gateway.client.post(
            "/v2/models/classes/infer", content=body, headers=gateway.headers()
        )
        assert answer.status_code == 400, answer.text
        assert "not valid JSON" in answer.json()["error"]
    assert (await infer(gateway, tensor(DARK), id="\U0001f600")).json()["id"] == "\U0001f600"


async def test_inputs_given_twice_or_not_at_all_are_refused(gateway: Any) -> None:
    assert "given twice" in (await infer(gateway, tensor(DARK), tensor(DARK))).json()["error"]
    assert (await infer(gateway)).status_code == 400


async def test_a_language_model_takes_no_tensors(gateway: Any) -> None:
    answer = await infer(gateway, tensor(DARK), path="talker")
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]


async def test_bad_requests_do_not_harm_good_ones_beside_them(gateway: Any) -> None:
    good, bad = tensor(BRIGHT), tensor(BRIGHT, shape=[1, 3], data=[1.0] * 3)
    answers = await asyncio.gather(*(infer(gateway, bad if i % 3 == 0 else good) for i in range(8)))
    assert [answer.status_code for answer in answers] == [400, 200, 200, 400, 200, 200, 400, 200]


async def test_metadata_says_what_may_be_sent_and_what_comes_back(gateway: Any) -> None:
    answer = await gateway.client.get("/v2/models/classes", headers=gateway.headers())
    assert answer.json() == {
        "name": "classes",
        "versions": ["1", "2"],
        "platform": "onnx",
        "inputs": [
            {"name": "pixels", "datatype": "FP32", "shape": [-1, 4]},
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }
    server = (await gateway.client.get("/v2", headers=gateway.headers())).json()
    assert server["name"] == "heliostat"


async def test_readiness_of_models(gateway: Any) -> None:
    for path, status in [
        ("classes/ready", 200), ("classes/versions/1/ready", 200), ("talker/ready", 200),
        ("none/ready", 404), ("classes/versions/7/ready", 404),
    ]:  # fmt: skip
        answer = await gateway.client.get(f"/v2/models/{path}", headers=gateway.headers())
        assert answer.status_code == status
