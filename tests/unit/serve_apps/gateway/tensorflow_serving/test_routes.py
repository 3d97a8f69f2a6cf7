"""TensorFlow Serving's REST: rows and columns, versions and labels, its errors, its metadata."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.processing import TensorSpec
from serve_apps.gateway.http.responses import write_json
from serve_apps.gateway.tensorflow_serving.bodies import _to_json

BRIGHT = [1.0, 0.9, 1.0, 1.0]
DARK = [0.0, 0.1, 0.0, 0.0]
OF_EACH = {
    "bool": True, "uint8": 255, "uint16": 1, "uint32": 2, "uint64": 2**64 - 1, "int8": -128,
    "int16": -1, "int32": -2, "int64": -(2**63), "fp16": 0.5, "fp32": 1.5, "fp64": 1e300,
    "bytes": "é",
}  # fmt: skip


async def predict(gateway: Any, path: str = "classes", **body: Any) -> Any:
    return await gateway.client.post(
        f"/v1/models/{path}:predict", json=body, headers=gateway.headers()
    )


async def get(gateway: Any, path: str) -> Any:
    return await gateway.client.get(f"/v1/models/{path}", headers=gateway.headers())


def png(brightness: int) -> dict[str, str]:
    stream = io.BytesIO()
    Image.new("L", (5, 5), brightness).save(stream, "PNG")
    return {"b64": base64.b64encode(stream.getvalue()).decode()}


@pytest.mark.parametrize(
    "instances",
    [[BRIGHT, DARK], [{"pixels": BRIGHT}, {"pixels": DARK}], [png(255), png(0)],
     [{"image": png(255)}, {"image": png(0)}]],
)  # fmt: skip
async def test_rows_are_answered_by_rows(gateway: Any, instances: list[Any]) -> None:
    answer = await predict(gateway, instances=instances, signature_name="serving_default")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == "classes/2"
    rows = answer.json()["predictions"]
    assert [row["label"] for row in rows] == ["bright", "dark"]
    for row in rows:
        assert set(row) == {"logits", "probabilities", "label"}
        assert sum(row["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize("inputs", [[BRIGHT, DARK], {"pixels": [BRIGHT, DARK]},
                                    {"image": [png(255), png(0)]}])  # fmt: skip
async def test_columns_are_answered_by_columns(gateway: Any, inputs: Any) -> None:
    answer = await predict(gateway, inputs=inputs)
    outputs = answer.json()["outputs"]
    assert outputs["label"] == ["bright", "dark"]
    assert np.array(outputs["logits"]).shape == (2, 3)


async def test_a_record_is_an_object_of_values(gateway: Any) -> None:
    """Of every datatype; a lone value stands for a sample that holds one."""
    answer = await predict(gateway, "echo/versions/1", instances=[OF_EACH, OF_EACH])
    assert answer.status_code == 200, answer.text
    expected = {f"same_{name}": [value] for name, value in OF_EACH.items()}
    assert answer.json()["predictions"] == [expected, expected]


async def test_bytes_that_are_no_text_come_back_as_base64(gateway: Any) -> None:
    binary = {"b64": base64.b64encode(b"\xff\0").decode()}
    answer = await predict(gateway, "echo/versions/1", instances=[OF_EACH | {"bytes": binary}])
    assert answer.json()["predictions"][0]["same_bytes"] == [binary]


async def test_versions_and_labels_are_chosen_by_path(gateway: Any) -> None:
    for path, version in [
        ("classes", "classes/2"), ("classes/versions/1", "classes/1"),
        ("classes/labels/previous", "classes/1"), ("classes@previous", "classes/1"),
    ]:  # fmt: skip
        answer = await predict(gateway, path, instances=[DARK])
        assert answer.headers["x-model-version"] == version
    for path in ("nothing", "classes/versions/7", "classes/labels/next", "classes/versions/x",
                 "classes@champion/versions/1", "classes@champion/labels/champion", "..%2fclasses",
                 "classes:predict", "%2e%2e"):  # fmt: skip
        answer = await predict(gateway, path, instances=[DARK])
        assert answer.status_code == 404, path
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "one of 'instances' and 'inputs'"),
        ({"instances": [DARK], "inputs": [DARK]}, "one of 'instances' and 'inputs'"),
        ({"instances": []}, "'instances'"),
        ({"instances": 5}, "'instances'"),
        ({"instances": [DARK], "signature_name": "other"}, "no signature 'other'"),
        ({"instances": [DARK], "extra": 1}, "'extra' is not known"),
        ({"instances": [[1.0] * 3]}, "'pixels' has shape [1, 3]"),
        ({"instances": [DARK, [1.0]]}, "unequal length"),
        ({"instances": [["a", "b", "c", "d"]]}, "no FP32"),
        ({"instances": [[1e39] * 4]}, "NaN or infinity"),
        ({"instances": [{"pixel": DARK}]}, "unknown input 'pixel'"),
        ({"instances": [{"pixels": DARK}, {}]}, "instance 1 has not the inputs of instance 0"),
        ({"instances": [{"pixels": DARK}, DARK]}, "instance 1 has not the inputs"),
        ({"instances": [{}]}, "'pixels' is missing"),
        ({"instances": [{"image": "text"}]}, "image"),
        ({"instances": [{"image": {"b64": "?"}}]}, "not base64"),
        ({"instances": [{"image": {"b64": 5}}]}, "expected strings"),
        ({"instances": [{"image": ["a", ["b"]]}]}, "expected strings"),
        ({"instances": [{"pixels": DARK, "image": "a"}]}, "both stand for 'pixels'"),
        ({"inputs": {"pixels": 1.0}}, "'pixels' has shape"),
        ({"inputs": {}}, "'pixels' is missing"),
        ({"inputs": "text"}, "no FP32"),
    ],
)
async def test_wrong_bodies_are_refused_by_name(
    gateway: Any, body: dict[str, Any], words: str
) -> None:
    answer = await predict(gateway, **body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


async def test_values_without_a_name_are_not_guessed(gateway: Any) -> None:
    answer = await predict(gateway, "echo/versions/1", instances=[1.0])
    assert answer.status_code == 400
    assert "have no name" in answer.json()["error"]


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize("path", ["classes", "classes/versions/1", "classes/labels/champion"])
async def test_other_verbs_are_refused_by_name(gateway: Any, path: str, verb: str) -> None:
    answer = await gateway.client.post(
        f"/v1/models/{path}:{verb}", json={"examples": []}, headers=gateway.headers()
    )
    assert answer.status_code == 404
    assert f"':{verb}'" in answer.json()["error"]


async def test_a_prediction_is_no_page(gateway: Any) -> None:
    answer = await get(gateway, "classes:predict")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert isinstance(answer.json()["error"], str)


async def test_a_language_model_takes_no_tensors(gateway: Any) -> None:
    answer = await predict(gateway, "talker", instances=[DARK])
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]


async def test_the_state_of_versions_stands_beside_openais_card(gateway: Any) -> None:
    state = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    both = (await get(gateway, "classes")).json()
    assert (both["id"], both["object"]) == ("classes", "model")
    assert both["model_version_status"] == [{"version": "1", **state}, {"version": "2", **state}]
    one = (await get(gateway, "classes@previous")).json()
    assert one["model_version_status"] == [{"version": "1", **state}]
    for path, version in [("classes/versions/1", "1"), ("classes/labels/champion", "2")]:
        answer = await get(gateway, path)
        assert answer.json() == {"model_version_status": [{"version": version, **state}]}
    assert (await get(gateway, "classes/versions/9")).status_code == 404


@pytest.mark.parametrize(("shape", "text"), [((), b"0.1"), ((1,), b"[0.1]"), ((0, 2), b"[]")])
def test_columns_have_the_outputs_shape(shape: tuple[int, ...], text: bytes) -> None:
    spec = TensorSpec(name="y", datatype="FP32", shape=shape)
    assert write_json(_to_json(spec, np.full(shape, 0.1, dtype=np.float32))) == text


async def test_metadata_describes_inputs_and_outputs(gateway: Any) -> None:
    for path in ("classes", "classes/versions/2", "classes/labels/champion"):
        values = (await get(gateway, f"{path}/metadata")).json()
        assert values["model_spec"]["version"] == "2"
        signature = values["metadata"]["signature_def"]["signature_def"]["serving_default"]
        pixels = signature["inputs"]["pixels"]
        assert pixels["dtype"] == "DT_FLOAT"
        assert [dim["size"] for dim in pixels["tensor_shape"]["dim"]] == ["-1", "4"]
        assert signature["inputs"]["image"]["dtype"] == "DT_STRING"
        assert set(signature["outputs"]) == {"logits", "probabilities", "label"}
