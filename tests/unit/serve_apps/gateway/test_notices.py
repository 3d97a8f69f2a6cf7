"""A version with notice says so with every answer, and is gone afterwards in each protocol."""

from __future__ import annotations

import time
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from serve_apps.gateway.notices import Notice

PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0.9] * 4}]}
INSTANCES = {"instances": [[0.9] * 4]}
PROMPT = {"model": "talker", "prompt": "the sun", "max_tokens": 2}
GIVEN = Notice.read("2026-01-01T00:00:00.000000+00:00", "2126-01-08T00:00:00+00:00")
HEADERS = {"deprecation": "@1767225600", "sunset": "Tue, 08 Jan 2126 00:00:00 GMT"}
OVER = Notice(1, 2)
VERSIONS = [("classes", 2), ("talker", 1)]


async def post(gateway: Any, path: str, body: Any) -> Any:
    return await gateway.client.post(path, json=body, headers=gateway.headers())


def pixels() -> Any:
    sent = triton.InferInput("pixels", [1, 4], "FP32")
    return sent.set_data_from_numpy(np.full((1, 4), 0.9, np.float32))


async def test_every_answer_of_a_version_with_notice_says_until_when(
    gateway: Any, grpc_address: str
) -> None:
    await gateway.route(notices=dict.fromkeys(VERSIONS, GIVEN))
    for path, body, status in (
        ("/v2/models/classes/infer", PIXELS, 200),
        ("/v2/models/classes/infer", {"inputs": []}, 400),
        ("/v1/models/classes:predict", INSTANCES, 200),
        ("/v1/completions", PROMPT, 200),
        ("/v1/completions", PROMPT | {"stream": True}, 200),
    ):
        answer = await post(gateway, path, body)
        found = {name: answer.headers.get(name) for name in HEADERS}
        assert (answer.status_code, found) == (status, HEADERS), path
    other = await post(gateway, "/v2/models/classes/versions/1/infer", PIXELS)
    assert not HEADERS.keys() & other.headers.keys()
    async with grpc.aio.insecure_channel(grpc_address) as channel:
        method = "/inference.GRPCInferenceService/ModelMetadata"
        request = service_pb2.ModelMetadataRequest(name="classes").SerializeToString()
        metadata = tuple(gateway.headers().items())
        call = channel.unary_unary(method)(request, metadata=metadata)
        await call
        assert HEADERS.items() <= dict(await call.trailing_metadata()).items()


@pytest.mark.parametrize("is_taken_down", [False, True])
async def test_afterwards_it_is_gone_in_each_protocols_shape(
    gateway: Any, server_url: str, grpc_address: str, is_taken_down: bool
) -> None:
    routes = gateway.routes
    weights = dict(routes.weights)
    if is_taken_down:
        weights |= {"classes": {}, "talker": {}}
    served = {
        key: each
        for key, each in routes.served.items()
        if not is_taken_down or key[0] not in ("classes", "talker")
    }
    await gateway.route(
        served=served, weights=weights, notices=dict.fromkeys(VERSIONS, OVER), aliases={}
    )
    for path, body in (
        ("/v2/models/classes/infer", PIXELS),
        ("/v2/models/classes/versions/2/infer", PIXELS),
        ("/v1/models/classes:predict", INSTANCES),
    ):
        answer = await post(gateway, path, body)
        assert answer.status_code == 410
        assert "is gone; its end was announced for Thu, 01 Jan 1970" in answer.json()["error"]
    key = gateway.headers("infer")["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key=key) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="talker", prompt="the sun")
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (
        410, "gone", "model",
    )  # fmt: skip
    async with triton.InferenceServerClient(grpc_address) as triton_client:
        with pytest.raises(InferenceServerException, match="is gone") as refused:
            await triton_client.infer("classes", [pixels()], headers=gateway.headers("infer"))
        assert refused.value.status() == "StatusCode.NOT_FOUND"
        ready = await triton_client.is_model_ready("classes", headers=gateway.headers("infer"))
        assert ready is False


async def test_the_end_comes_without_anybody_writing_it(gateway: Any) -> None:
    ends_at_s = time.time() + 0.6
    await gateway.route(notices={("classes", 2): Notice(0, ends_at_s)})
    while (answer := await post(gateway, "/v2/models/classes/infer", PIXELS)).status_code == 200:
        assert time.time() < ends_at_s + 5
    assert answer.status_code == 410
    assert time.time() >= ends_at_s


async def test_a_key_for_other_models_learns_nothing_of_it(gateway: Any) -> None:
    await gateway.route(notices=dict.fromkeys(VERSIONS, OVER))
    key = gateway.keys.create("acme", ["infer"], models=["talker"]).key
    headers = {"authorization": f"Bearer {key}"}
    answer = await gateway.client.post("/v2/models/classes/infer", json=PIXELS, headers=headers)
    assert answer.status_code == 404
    answer = await gateway.client.post("/v1/completions", json=PROMPT, headers=headers)
    assert answer.status_code == 410
