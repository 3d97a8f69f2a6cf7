"""Customers of a canary stay with it, and where it fails them the champion answers."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from cluster.errors import (
    InputError,
    MachineError,
    OverloadedError,
    PackageError,
    UpstreamFailedError,
)
from cluster.processing import TensorSpec
from serve_apps.gateway.access.accounts import Accounts
from serve_apps.gateway.access.callers import Callers
from serve_apps.llm.fake import FakeEngine
from tests.unit.serve_apps.conftest import classify, graph_manifest

PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0.9] * 4}]}
INSTANCES = {"instances": [[0.9] * 4]}
PROMPT = {"model": "talker", "prompt": "the sun and the mirror", "max_tokens": 6}
CHAT = {"model": "talker", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def crash(_arrays: Any) -> Any:
    raise UpstreamFailedError("a replica went away")


def break_down(_arrays: Any) -> Any:
    raise RuntimeError("boom")


def refuse(_arrays: Any) -> Any:
    raise InputError("such pixels are not for me", param="pixels")


def have_no_room(_arrays: Any) -> Any:
    raise OverloadedError("full")


def give_no_number(arrays: Any) -> Any:
    return {"logits": np.full((len(arrays["pixels"]), 3), np.nan, np.float32)}


async def post(gateway: Any, path: str, body: Any, tenant: str = "acme", **headers: str) -> Any:
    key = gateway.keys.create(tenant, ["infer"]).key
    headers["authorization"] = f"Bearer {key}"
    return await gateway.client.post(path, json=body, headers=headers)


async def infer(gateway: Any, **options: str) -> Any:
    return await post(gateway, "/v2/models/classes/infer", PIXELS, **options)


@pytest.mark.parametrize(
    ("candidate", "metric"),
    [
        (crash, "errors"),
        (break_down, "errors"),
        (refuse, "errors"),
        (give_no_number, "errors"),
        (have_no_room, "slow"),
    ],
)
async def test_what_a_canary_fails_the_champion_answers(
    gateway: Any, trial: Any, candidate: Any, metric: str
) -> None:
    await trial.graph(candidate, weight=1.0)
    answer = await infer(gateway)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == "classes/2"
    assert answer.json()["model_version"] == "2"
    assert trial.seen("classes/3", "candidate", metric) == (1, 1)
    assert trial.seen("classes/3", "champion", "errors") == (1, 0)
    assert trial.value("failed_over_total", model="classes", version="3") == 1
    assert await trial.bill(1) == {("classes", 2): (1, 0, 0)}
    status = {"model": "classes", "tenant": "other"}
    assert trial.value("model_requests_total", **status, version="2", status="200") == 1


async def test_every_protocol_falls_back(gateway: Any, trial: Any, grpc_address: str) -> None:
    await trial.graph(crash, weight=1.0)
    answer = await post(gateway, "/v1/models/classes:predict", INSTANCES)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "classes/2")
    headers = gateway.headers("infer")
    async with triton.InferenceServerClient(grpc_address) as client:
        pixels = triton.InferInput("pixels", [1, 4], "FP32")
        pixels.set_data_from_numpy(np.full((1, 4), 0.9, np.float32))
        result = await client.infer("classes", [pixels], headers=headers)
        assert result.get_response().model_version == "2"
        with pytest.raises(InferenceServerException):
            await client.infer("classes", [pixels], model_version="3", headers=headers)
    assert trial.value("failed_over_total", model="classes", version="3") == 2


async def test_embeddings_are_all_of_one_version(gateway: Any, trial: Any) -> None:
    manifest = graph_manifest().model_copy(
        update={
            "outputs": (TensorSpec(name="embedding", datatype="FP32", shape=(-1, 3)),),
            "processing": graph_manifest().processing.model_copy(update={"post": ()}),
        }
    )
    calls = 0

    def fail_later(arrays: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("boom")
        return {"embedding": np.full((len(arrays["pixels"]), 3), 3, np.float32)}

    gateway.serve_graph(
        manifest.model_copy(update={"name": "vectors"}),
        lambda arrays: {"embedding": np.full((len(arrays["pixels"]), 3), 1, np.float32)},
    )
    gateway.backend._predictors["vectors.v2"] = fail_later
    await trial.begin("vectors", 1, 2, weight=1.0)
    # More than fit into one batch.
    numbers = {"model": "vectors", "input": [[0.5] * 4] * 70}
    answer = await post(gateway, "/v1/embeddings", numbers)
    assert answer.status_code == 200, answer.text
    assert {tuple(item["embedding"]) for item in answer.json()["data"]} == {(1.0, 1.0, 1.0)}
    assert calls == 2
    assert await trial.bill(1) == {("vectors", 1): (1, 0, 0)}


async def test_a_version_that_is_named_is_not_replaced(gateway: Any, trial: Any) -> None:
    await trial.graph(crash, weight=1.0)
    for path, body in (
        ("/v2/models/classes/versions/3/infer", PIXELS),
        ("/v1/models/classes/versions/3:predict", INSTANCES),
    ):
        answer = await post(gateway, path, body)
        assert (answer.status_code, answer.headers["x-model-version"]) == (502, "classes/3")
    assert trial.seen("classes/3", "champion", "errors") == (0, 0)


async def test_a_wrong_request_is_the_clients_fault(gateway: Any, trial: Any) -> None:
    await trial.graph(classify, weight=1.0)
    answer = await post(gateway, "/v2/models/classes/infer", {"inputs": []})
    assert answer.status_code == 400
    answer = await post(gateway, "/v2/models/talker/infer", PIXELS)
    assert answer.status_code == 400
    for arm in ("candidate", "champion"):
        assert trial.seen("classes/3", arm, "errors") == (0, 0)
    assert (await infer(gateway)).headers["x-model-version"] == "classes/3"
    assert trial.seen("classes/3", "candidate", "errors") == (1, 0)


async def test_a_champion_that_fails_as_well_is_not_asked_twice(gateway: Any, trial: Any) -> None:
    await trial.graph(crash, weight=1.0)
    gateway.backend._predictors["classes.v2"] = crash
    answer = await infer(gateway)
    assert (answer.status_code, answer.headers["x-model-version"]) == (502, "classes/2")
    assert trial.seen("classes/3", "champion", "errors") == (1, 1)
    assert trial.seen("classes/3", "candidate", "errors") == (1, 1)
    assert trial.value("failed_over_total", model="classes", version="3") == 0


async def test_a_request_that_allows_no_more_time_is_not_begun_again(
    gateway: Any, trial: Any
) -> None:
    def dawdle(arrays: Any) -> Any:
        time.sleep(0.4)
        return classify(arrays)

    await trial.graph(classify, weight=0.0)
    champion = {"x-session-id": "champion"}
    for _ in range(33):  # so that it is known what is slow
        await post(gateway, "/v2/models/classes/infer", PIXELS, **champion)
    await trial.graph(dawdle, weight=1.0)
    impatient = PIXELS | {"parameters": {"timeout": 300_000}}
    answer = await post(gateway, "/v2/models/classes/infer", impatient)
    assert (answer.status_code, answer.headers["x-model-version"]) == (504, "classes/3")
    assert trial.value("failed_over_total", model="classes", version="3") == 0
    assert trial.seen("classes/3", "candidate", "slow") == (1, 1)


@pytest.mark.parametrize("error", [PackageError("no"), MachineError("disk")])
async def test_a_package_that_does_not_open_fails_nobody(
    gateway: Any, trial: Any, error: Exception
) -> None:
    await trial.graph(classify, weight=1.0)
    models = gateway.app.state.models
    candidate = gateway.routes.served["classes", 3]
    load = models._catalogue._load

    def load_others(served: Any) -> Any:
        if served == candidate:
            raise error
        return load(served)

    models._catalogue._load = load_others
    models._catalogue._models.pop(candidate)
    answer = await infer(gateway)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "classes/2")
    assert trial.seen("classes/3", "candidate", "errors") == (1, 1)
    answer = await gateway.client.get("/v2/models/classes", headers=gateway.headers())
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "classes/2")


async def test_a_customer_stays_with_one_version(
    gateway: Any, trial: Any, grpc_address: str
) -> None:
    await trial.graph(classify, weight=0.5)

    async def version(tenant: str, **headers: str) -> str:
        answer = await infer(gateway, tenant=tenant, **headers)
        return str(answer.headers["x-model-version"])

    tenants = [f"tenant-{number}" for number in range(12)]
    found = {tenant: await version(tenant) for tenant in tenants}
    assert set(found.values()) == {"classes/2", "classes/3"}
    assert {tenant: await version(tenant) for tenant in tenants} == found
    sessions = [f"session-{number}" for number in range(12)]
    within = {name: await version("acme", **{"x-session-id": name}) for name in sessions}
    assert set(within.values()) == {"classes/2", "classes/3"}
    headers = gateway.headers("infer")
    async with triton.InferenceServerClient(grpc_address) as client:
        pixels = triton.InferInput("pixels", [1, 4], "FP32")
        pixels.set_data_from_numpy(np.full((1, 4), 0.9, np.float32))
        for name, expected in within.items():
            session = {**headers, "x-session-id": name}
            result = await client.infer("classes", [pixels], headers=session)
            assert f"classes/{result.get_response().model_version}" == expected


async def test_openais_user_stays_with_one_version(gateway: Any, trial: Any) -> None:
    await trial.engine(engine(gateway), weight=0.5)

    async def version(user: str, **body: Any) -> str:
        answer = await post(gateway, "/v1/completions", PROMPT | {"user": user} | body)
        return str(answer.headers["x-model-version"])

    users = [f"user-{number}" for number in range(12)]
    found = {user: await version(user) for user in users}
    assert set(found.values()) == {"talker/1", "talker/2"}
    assert {user: await version(user, stream=True) for user in users} == found


async def test_work_that_outlasts_a_release_is_the_champions(gateway: Any, trial: Any) -> None:
    await trial.graph(classify, weight=1.0)
    models = gateway.app.state.models
    identity = gateway.keys.verify(gateway.keys.create("acme", ["infer"]).key)
    with Callers(Accounts(lambda *_: {})).make(identity).entered():
        assert (await models.find("classes")).served.version == 3
        assert (await models.find_settled("classes")).served.version == 2
        assert (await models.find_settled("classes/3")).served.version == 3


def engine(gateway: Any, kind: Any = FakeEngine) -> Any:
    return kind(vocab_size=gateway.engine.stats().vocab_size, max_context_tokens=256)


class Fragile(FakeEngine):
    """Breaks down after so many tokens."""

    num_tokens = 3

    def _next_token(self, progress: Any) -> Any:
        if len(progress.generated) >= self.num_tokens:
            raise UpstreamFailedError("the engine stopped: out of memory")
        return super()._next_token(progress)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_canarys_stream_that_never_begins_is_the_champions(
    gateway: Any, trial: Any, stream: bool
) -> None:
    broken = engine(gateway)
    broken.fail("no memory")
    await trial.engine(broken, weight=1.0)
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        answer = await post(gateway, path, body | {"stream": stream, "temperature": 0})
        assert (answer.status_code, answer.headers["x-model-version"]) == (200, "talker/1")
        assert "error" not in answer.text
    assert trial.value("failed_over_total", model="talker", version="2") == 2
    num, total = trial.seen("talker/2", "candidate", "errors")
    assert num == total >= 2
    bill = await trial.bill(2)
    assert set(bill) == {("talker", 1)}
    assert bill["talker", 1][2] == 6 + 3


async def test_a_whole_answer_that_breaks_is_begun_again_and_paid_once(
    gateway: Any, trial: Any
) -> None:
    plain = (await post(gateway, "/v1/completions", PROMPT | {"temperature": 0})).json()
    await trial.engine(engine(gateway, Fragile), weight=1.0)
    answer = await post(gateway, "/v1/completions", PROMPT | {"temperature": 0, "n": 2})
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "talker/1")
    texts = {choice["text"] for choice in answer.json()["choices"]}
    assert texts == {plain["choices"][0]["text"]}
    bill = await trial.bill(2)
    prompt_tokens = plain["usage"]["prompt_tokens"]
    assert bill == {("talker", 1): (2, 2 * prompt_tokens, 6 + 12)}


async def test_a_canarys_stream_that_has_begun_ends_with_an_error_and_counts(
    gateway: Any, trial: Any
) -> None:
    await trial.engine(engine(gateway, Fragile), weight=1.0)
    answer = await post(gateway, "/v1/completions", PROMPT | {"stream": True, "temperature": 0})
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "talker/2")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "error" in json.loads(events[-2])
    num, total = trial.seen("talker/2", "candidate", "errors")
    assert num == total >= 1
    assert list(await trial.bill(1)) == [("talker", 2)]


async def test_a_stream_that_its_reader_stops_is_no_failure(gateway: Any, trial: Any) -> None:
    await trial.engine(engine(gateway), weight=1.0)
    text = (await post(gateway, "/v1/completions", PROMPT)).json()["choices"][0]["text"]
    await post(gateway, "/v1/completions", PROMPT | {"stop": text[1:3], "temperature": 0})
    await trial.until_seen("talker/2", "candidate", "errors", 2)
    assert trial.seen("talker/2", "candidate", "errors") == (2, 0)


async def test_nothing_fails_while_a_canary_crashes_under_load(gateway: Any, trial: Any) -> None:
    calls = 0

    def crash_sometimes(arrays: Any) -> Any:
        nonlocal calls
        calls += 1
        return crash(arrays) if calls > 10 else classify(arrays)

    await trial.graph(crash_sometimes, weight=0.5)
    headers = gateway.headers("infer")

    async def client(name: str) -> list[int]:
        own = headers | {"x-session-id": name}
        path = "/v2/models/classes/infer"
        answers = [await gateway.client.post(path, json=PIXELS, headers=own) for _ in range(10)]
        return [answer.status_code for answer in answers]

    found = await asyncio.gather(*(client(f"client {number}") for number in range(8)))
    assert {status for statuses in found for status in statuses} == {200}
    assert trial.value("failed_over_total", model="classes", version="3") > 0
