"""What a gateway writes down about its requests: counters, log lines and headers."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import numpy as np
import pytest

from cluster.errors import OverloadedError
from cluster.processing import Processing, TensorSpec
from serve_apps.gateway.http.middleware import protocol_of
from serve_apps.gateway.routing_table import Routes
from serve_apps.gateway.telemetry.instruments import Instruments, ModelLabel
from serve_apps.gateway.telemetry.telemetry import Telemetry
from tests.unit.serve_apps.conftest import graph_manifest

PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]}
PROMPT = {"model": "talker", "prompt": "the sun", "max_tokens": 6, "temperature": 0}
CHAT = {"model": "talker", "messages": [{"role": "user", "content": "the sun"}], "max_tokens": 4}


def value(gateway: Any, name: str, **labels: str) -> float | None:
    found: float | None = gateway.telemetry.instruments.registry.get_sample_value(name, labels)
    return found


def num_series(gateway: Any) -> int:
    registry = gateway.telemetry.instruments.registry
    return sum(len(family.samples) for family in registry.collect())


async def post(gateway: Any, path: str, body: Any, **headers: str) -> Any:
    return await gateway.client.post(path, json=body, headers=gateway.headers() | headers)


async def test_a_graphs_requests_are_counted(gateway: Any) -> None:
    await asyncio.gather(*(post(gateway, "/v2/models/classes/infer", PIXELS) for _ in range(5)))
    route = {"protocol": "open_inference", "route": "/v2/models/{name}/infer"}
    version = {"model": "classes", "version": "2"}
    assert value(gateway, "heliostat_requests_total", **route, status="200") == 5
    assert value(gateway, "heliostat_request_duration_seconds_count", **route) == 5
    assert value(gateway, "heliostat_model_request_duration_seconds_count", **version) == 5
    assert value(gateway, "heliostat_queue_wait_seconds_count", **version) == 5
    assert value(gateway, "heliostat_batch_samples_sum", **version) == 5
    calls = value(gateway, "heliostat_call_duration_seconds_count", **version)
    assert calls == value(gateway, "heliostat_batch_samples_count", **version)
    assert value(gateway, "heliostat_queue_depth", **version) == 0
    assert value(gateway, "heliostat_requests_in_flight", protocol="open_inference") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answers_tokens_are_counted_and_timed(gateway: Any, stream: bool) -> None:
    gateway.telemetry.instruments.name_tenants(["acme"])
    answer = await post(gateway, "/v1/completions", PROMPT | {"stream": stream})
    assert answer.status_code == 200
    version = {"model": "talker", "version": "1"}
    tokens = {**version, "tenant": "acme"}
    assert value(gateway, "heliostat_tokens_total", **tokens, kind="completion") == 6
    assert value(gateway, "heliostat_tokens_total", **tokens, kind="prompt") == 2
    assert value(gateway, "heliostat_time_to_first_token_seconds_count", **version) == 1
    itl = value(gateway, "heliostat_inter_token_latency_seconds_count", **version)
    assert itl is not None
    assert 1 <= itl <= 5, "one for each message after the first"
    assert value(gateway, "heliostat_open_streams", **version) == 0
    assert value(gateway, "heliostat_model_requests_total", **tokens, status="200") == 1


async def test_the_tokens_of_embeddings_are_counted(gateway: Any) -> None:
    ids = TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1))
    mask = TensorSpec(name="attention_mask", datatype="INT64", shape=(-1, -1))
    vector = TensorSpec(name="vector", datatype="FP32", shape=(-1, 2))
    manifest = graph_manifest().model_copy(
        update={
            "name": "ids",
            "inputs": (ids, mask),
            "outputs": (vector,),
            "processing": Processing(),
        }
    )
    gateway.serve_graph(
        manifest, lambda arrays: {"vector": np.ones((len(arrays["input_ids"]), 2), np.float32)}
    )
    body = {"model": "ids/1", "input": [[1, 2, 3], [4]]}
    answer = await post(gateway, "/v1/embeddings", body)
    assert answer.json()["usage"]["prompt_tokens"] == 4
    labels = {"model": "ids", "version": "1", "tenant": "other", "kind": "prompt"}
    assert value(gateway, "heliostat_tokens_total", **labels) == 4


async def test_what_is_shed_is_counted_by_its_reason(gateway: Any) -> None:
    answers = await asyncio.gather(
        *(
            post(gateway, "/v1/completions", PROMPT | {"model": "mute", "max_tokens": 1})
            for _ in range(6)
        )
    )
    num_shed = [answer.status_code for answer in answers].count(503)
    assert num_shed >= 1
    labels = {"reason": "overloaded", "model": "mute", "version": "1"}
    assert value(gateway, "heliostat_shed_total", **labels) == num_shed


async def test_labels_never_take_a_text_from_a_client(gateway: Any) -> None:
    async def ask(word: str) -> None:
        key = gateway.keys.create(f"tenant-{word}", ["infer", "models:read"]).key
        headers = {"authorization": f"Bearer {key}"}
        await gateway.client.get(f"/v1/{word}", headers=headers)
        await gateway.client.get(f"/{word}")
        await gateway.client.get(f"/v2/models/{word}", headers=headers)
        await gateway.client.get(f"/v1/models/{word}", headers=headers)
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = PROMPT | {"model": word, "messages": []}
            await gateway.client.post(path, json=body, headers=headers)
        await gateway.client.post(
            "/v2/models/classes/infer", json=PIXELS, headers=headers | {"x-tenant": word}
        )

    await ask("first")
    before = num_series(gateway)
    for word in ("second", "third@x", "fourth"):
        await ask(word.replace("@", "."))
    assert num_series(gateway) == before
    unknown = {"model": "unknown", "version": "unknown", "tenant": "other", "status": "404"}
    assert (value(gateway, "heliostat_model_requests_total", **unknown) or 0) >= 4
    assert value(gateway, "heliostat_requests_total",
                 protocol="page", route="unmatched", status="401") == 4  # fmt: skip


def test_only_named_tenants_are_told_apart() -> None:
    instruments = Instruments()
    instruments.name_tenants(["acme"])
    found = [instruments.tenant(name) for name in ("acme", "beta", None)]
    assert found == ["acme", "other", "none"]


def test_a_version_that_is_no_longer_served_is_forgotten() -> None:
    telemetry = Telemetry()
    instruments = telemetry.instruments
    instruments.answered_model(ModelLabel("digits", "1"), "acme", 200, 0.1)
    instruments.version(ModelLabel("digits", "1")).wait(0.1)
    telemetry.follow(Routes())
    samples = [s for family in instruments.registry.collect() for s in family.samples]
    assert not [sample for sample in samples if sample.labels.get("model") == "digits"]


async def test_every_answer_about_a_model_names_the_version(gateway: Any) -> None:
    for path, body, status, version in (
        ("/v2/models/classes/infer", PIXELS, 200, "classes/2"),
        ("/v2/models/classes/versions/1/infer", PIXELS, 200, "classes/1"),
        ("/v2/models/classes/infer", {"inputs": []}, 400, "classes/2"),
        ("/v2/models/talker/infer", PIXELS, 400, "talker/1"),
        ("/v1/completions", PROMPT, 200, "talker/1"),
        ("/v1/completions", PROMPT | {"stream": True}, 200, "talker/1"),
        ("/v1/completions", PROMPT | {"prompt": ""}, 400, "talker/1"),
        ("/v1/completions", PROMPT | {"max_tokens": 10_000}, 400, "talker/1"),
        ("/v1/chat/completions", CHAT | {"stream": True}, 200, "talker/1"),
        ("/v1/chat/completions", CHAT | {"model": "mute"}, 400, "mute/1"),
        ("/v1/completions", PROMPT | {"model": "broken"}, 422, "broken/1"),
        ("/v1/completions", PROMPT | {"model": "nobody"}, 404, None),
    ):
        answer = await post(gateway, path, body, **{"x-request-id": "mine"})
        assert (answer.status_code, answer.headers.get("x-model-version")) == (status, version), (
            path,
            body,
            answer.text,
        )
        assert answer.headers.get_list("x-request-id") == ["mine"]
    for path in ("/v1/models", "/v2", "/v2/health/live"):
        answer = await gateway.client.get(path, headers=gateway.headers())
        assert "x-model-version" not in answer.headers


async def test_the_access_log_says_who_asked_what_and_how_it_ended(
    gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = gateway.keys.create("acme", ["infer"])
    headers = {"authorization": f"Bearer {key.key}", "x-request-id": "mine"}
    with caplog.at_level(logging.INFO, "heliostat.access"):
        await gateway.client.post("/v1/completions", json=PROMPT, headers=headers)
    (record,) = [r for r in caplog.records if r.name == "heliostat.access"]
    fields = vars(record)
    assert fields["duration_ms"] > 0
    expected = {
        "request_id": "mine",
        "protocol": "openai",
        "route": "/v1/completions",
        "status": 200,
        "tenant": "acme",
        "key_id": key.id,
        "model_version": "talker/1",
        "package_digest": gateway.served["talker", 1].digest,
        "prompt_tokens": 2,
        "completion_tokens": 6,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert key.key not in json.dumps(fields, default=str)


async def test_an_error_of_ours_is_logged_with_the_request_id_even_without_an_access_log(
    gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.telemetry._logs_access = False

    async def break_down(*_: object) -> Any:
        raise RuntimeError("boom")

    gateway.backend.predict = break_down
    answer = await post(gateway, "/v2/models/classes/infer", PIXELS, **{"x-request-id": "mine"})
    assert answer.status_code == 500
    assert "boom" not in answer.text
    (record,) = [r for r in caplog.records if r.getMessage() == "request failed"]
    assert (vars(record)["request_id"], vars(record)["error"]) == ("mine", "internal_error")
    caplog.clear()
    await post(gateway, "/v2/models/classes/infer", {"inputs": []})
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_client_that_leaves_is_told_from_an_answer(gateway: Any) -> None:
    async def leave() -> None:
        await post(gateway, "/v1/completions", PROMPT | {"model": "mute", "max_tokens": 50})

    task = asyncio.create_task(leave())
    while value(gateway, "heliostat_open_streams", model="mute", version="1") != 1:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert value(gateway, "heliostat_requests_in_flight", protocol="openai") == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    labels = {"protocol": "openai", "route": "/v1/completions"}
    assert value(gateway, "heliostat_requests_total", **labels, status="499") == 1
    assert value(gateway, "heliostat_requests_in_flight", protocol="openai") == 0
    assert value(gateway, "heliostat_open_streams", model="mute", version="1") == 0


def test_another_protocol_records_its_requests_by_hand() -> None:
    telemetry = Telemetry()
    with (
        pytest.raises(OverloadedError),
        telemetry.request("open_inference_grpc", "ModelInfer", request_id="r"),
    ):
        raise OverloadedError("full")
    with telemetry.request("open_inference_grpc", "ModelInfer", request_id="r") as record:
        record.status, record.is_complete = 200, True
    get = telemetry.instruments.registry.get_sample_value
    labels = {"protocol": "open_inference_grpc", "route": "ModelInfer"}
    assert get("heliostat_requests_total", {**labels, "status": "503"}) == 1
    assert get("heliostat_requests_total", {**labels, "status": "200"}) == 1


@pytest.mark.parametrize(
    ("path", "protocol"),
    [
        ("/v1/chat/completions", "openai"),
        ("/v1/models/digits", "openai"),
        ("/v1/models/digits:predict", "tensorflow_serving"),
        ("/v1/models/digits/versions/3:predict", "tensorflow_serving"),
        ("/v2", "open_inference"),
        ("/v2/models/digits/infer", "open_inference"),
        ("/v2x", "page"),
        ("/admin/deployments", "admin"),
        ("/", "page"),
    ],
)
def test_a_path_belongs_to_a_protocol(path: str, protocol: str) -> None:
    assert protocol_of(path) == protocol
