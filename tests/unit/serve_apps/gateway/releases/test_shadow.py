"""Mirrored requests tell two versions apart, and no customer notices them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from cluster.errors import InputError
from cluster.release_evidence import read_evidence
from serve_apps.gateway.routing_table import Routes
from serve_apps.llm.fake import FakeEngine

PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [2, 4], "data": [0.9] * 8}]}
PROMPT = {"model": "talker", "prompt": "the sun and the mirror", "max_tokens": 6}


def classify(arrays: Any) -> Any:
    """As the champion does it."""
    mean = arrays["pixels"].mean(axis=1, keepdims=True)
    return {"logits": (-20 * (mean - np.array([[0.0, 0.5, 1.0]])) ** 2).astype(np.float32)}


def confuse(arrays: Any) -> Any:
    return {"logits": classify(arrays)["logits"][:, ::-1].copy()}


def crash(_arrays: Any) -> Any:
    raise RuntimeError("boom")


def refuse(_arrays: Any) -> Any:
    raise InputError("such pixels are not for me", param="pixels")


def give_no_number(arrays: Any) -> Any:
    return {"logits": np.full((len(arrays["pixels"]), 3), np.nan, np.float32)}


def dawdle(arrays: Any) -> Any:
    time.sleep(0.6)
    return classify(arrays)


async def infer(gateway: Any, num: int = 1, path: str = "/v2/models/classes/infer") -> list[Any]:
    headers = gateway.headers("infer")
    answers = [await gateway.client.post(path, json=PIXELS, headers=headers) for _ in range(num)]
    assert {answer.status_code for answer in answers} == {200}
    return answers


async def complete(gateway: Any, **changes: Any) -> Any:
    headers = gateway.headers("infer")
    answer = await gateway.client.post("/v1/completions", json=PROMPT | changes, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (classify, {"errors": 0.0, "label_disagreement": 0.0, "score_distance": 0.0}),
        (confuse, {"errors": 0.0, "label_disagreement": 1.0}),
        (crash, {"errors": 1.0}),
        (refuse, {"errors": 1.0}),
        (give_no_number, {"errors": 1.0}),
    ],
)
async def test_a_candidates_answers_are_compared_and_reach_nobody(
    gateway: Any, trial: Any, candidate: Any, expected: dict[str, float]
) -> None:
    (before,) = await infer(gateway)
    await trial.graph(candidate, mirrored=1.0)
    answers = await infer(gateway, 3)
    await trial.until_mirrored("classes/3", 3)
    assert {a.json()["outputs"][0]["data"][0] for a in answers} == {
        before.json()["outputs"][0]["data"][0]
    }
    assert {answer.headers["x-model-version"] for answer in answers} == {"classes/2"}
    for metric in ("errors", "label_disagreement", "score_distance"):
        arm = "candidate" if metric == "errors" else "pair"
        num, total = trial.seen("classes/3", arm, metric)
        if metric in expected:
            assert (num, total) == (3, 3 * expected[metric])
        elif expected["errors"]:
            assert num == 0
    assert trial.seen("classes/3", "champion", "errors") == (3, 0)
    # Neither on the bill nor in what customers' metrics count.
    assert await trial.bill(4) == {("classes", 2): (4, 0, 0)}
    version = {"model": "classes", "version": "3"}
    assert trial.value("call_duration_seconds_count", **version) == 0
    assert trial.value("model_request_duration_seconds_count", **version) == 0


async def test_limits_do_not_count_what_is_mirrored(gateway: Any, trial: Any) -> None:
    key = gateway.keys.create("narrow", ["infer"]).key
    gateway.keys.set_tenant("narrow", {"requests_per_minute": 5})
    await trial.graph(classify, mirrored=1.0)
    headers = {"authorization": f"Bearer {key}"}
    for left in (4, 3, 2):
        answer = await gateway.client.post("/v2/models/classes/infer", json=PIXELS, headers=headers)
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        await trial.until_mirrored("classes/3", 5 - left)


async def test_a_slow_candidate_is_told_from_the_champion(gateway: Any, trial: Any) -> None:
    await trial.graph(dawdle, mirrored=1.0)
    await infer(gateway, 40)
    await trial.until_seen("classes/3", "candidate", "slow")
    assert trial.seen("classes/3", "candidate", "slow") == (1, 1)
    num, total = trial.seen("classes/3", "champion", "slow")
    assert 0 < num < 40
    assert total < num / 2


async def test_a_share_is_mirrored_and_nothing_once_the_release_is_over(
    gateway: Any, trial: Any
) -> None:
    await trial.graph(classify, mirrored=0.5)
    await infer(gateway, 30)
    async with asyncio.timeout(10):
        while trial.mirrored("classes/3", "compared") < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    routes = gateway.routes
    served = {key: each for key, each in routes.served.items() if key != ("classes", 3)}
    await gateway.route(served=served, releases={})
    await infer(gateway, 3)
    await asyncio.sleep(0.05)
    assert trial.mirrored("classes/3", "compared") == 0  # its metrics are forgotten with it
    assert trial.seen("classes/3", "champion", "errors") == (0, 0)


async def test_the_customer_has_the_answer_before_the_candidate_is_asked(
    gateway: Any, trial: Any
) -> None:
    asked_s: list[float] = []

    def note(arrays: Any) -> Any:
        asked_s.append(time.monotonic())
        return classify(arrays)

    await trial.graph(note, mirrored=1.0)
    sent_s: list[float] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.1)
            sent_s.append(time.monotonic())

    await ask_directly(gateway, send)
    await trial.until_mirrored("classes/3")
    assert asked_s[0] > sent_s[-1]


async def ask_directly(gateway: Any, send: Any) -> None:
    """One request whose answer is sent slowly."""
    body = json.dumps(PIXELS).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()

    headers = [(b"authorization", gateway.headers("infer")["authorization"].encode())]
    scope = {
        "type": "http", "method": "POST", "path": "/v2/models/classes/infer", "raw_path": b"",
        "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
        "server": ("gateway", 80), "client": ("test", 1), "root_path": "", "app": gateway.app,
    }  # fmt: skip
    await gateway.app(scope, receive, send)


async def test_a_stream_over_grpc_is_mirrored_while_it_is_open(
    gateway: Any, trial: Any, grpc_address: str
) -> None:
    await trial.graph(classify, mirrored=1.0)
    asked: asyncio.Queue[Any] = asyncio.Queue()

    async def requests() -> Any:
        while (sent := await asked.get()) is not None:
            yield sent

    pixels = triton.InferInput("pixels", [1, 4], "FP32")
    pixels.set_data_from_numpy(np.full((1, 4), 0.9, np.float32))
    async with triton.InferenceServerClient(grpc_address) as client:
        answers = client.stream_infer(requests(), headers=gateway.headers("infer"))
        for number in (1, 2):
            asked.put_nowait({"model_name": "classes", "inputs": [pixels]})
            _, error = await anext(answers)
            assert error is None
            await trial.until_mirrored("classes/3", number)
        asked.put_nowait(None)


async def test_the_gateway_hands_the_evidence_to_the_database(gateway: Any, trial: Any) -> None:
    await trial.graph(confuse, mirrored=1.0)
    await infer(gateway, 2)
    await trial.until_mirrored("classes/3", 2)

    async with asyncio.timeout(10):
        while ("pair", "label_disagreement") not in read(gateway):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    found = read(gateway)
    assert found["pair", "label_disagreement"].mean == 1.0
    assert found["champion", "errors"].num >= 1


def read(gateway: Any) -> Any:
    with gateway.database.connect() as connection:
        return read_evidence(connection, "rel_1", 1)


async def test_without_a_release_nothing_is_observed(gateway: Any) -> None:
    await infer(gateway, 2)
    models = gateway.app.state.models
    assert models._releases._evidence._sums == {}
    assert models._releases.of(gateway.served["classes", 2]) is None
    assert Routes().releases == {}


class Stubborn(FakeEngine):
    """Says the next token after the one that it should say, from the second on."""

    def _next_token(self, progress: Any) -> Any:
        token, logprobs = super()._next_token(progress)
        return (token + 1 if progress.generated else token), logprobs


class Sluggish(FakeEngine):
    """Takes its time for each token."""

    def _next_token(self, progress: Any) -> Any:
        time.sleep(0.3)
        return super()._next_token(progress)


def engine(gateway: Any, kind: Any = FakeEngine) -> Any:
    return kind(vocab_size=gateway.engine.stats().vocab_size, max_context_tokens=256)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
async def test_an_equal_language_model_draws_the_same_tokens(
    gateway: Any, trial: Any, temperature: float, stream: bool
) -> None:
    await trial.engine(engine(gateway), mirrored=1.0)
    answer = await complete(gateway, temperature=temperature, stream=stream)
    assert answer.headers["x-model-version"] == "talker/1"
    assert '"logprobs":null' in answer.text.replace(" ", "")
    await trial.until_mirrored("talker/2")
    assert trial.seen("talker/2", "pair", "token_disagreement") == (1, 0)
    assert trial.seen("talker/2", "pair", "logprob_divergence") == (1, 0)
    assert trial.seen("talker/2", "candidate", "errors") == (1, 0)
    assert trial.seen("talker/2", "champion", "errors") == (1, 0)
    bill = await trial.bill(1)
    assert list(bill) == [("talker", 1)]
    assert trial.value("time_to_first_token_seconds_count", model="talker", version="2") == 0


async def test_the_answer_is_the_same_whether_it_is_mirrored_or_not(
    gateway: Any, trial: Any
) -> None:
    asked = {"temperature": 1, "seed": 3, "logprobs": 2}
    alone = (await complete(gateway, **asked)).json()["choices"]
    without = (await complete(gateway, temperature=1, seed=3)).json()["choices"]
    await trial.engine(engine(gateway), mirrored=1.0)
    assert (await complete(gateway, **asked)).json()["choices"] == alone
    assert (await complete(gateway, temperature=1, seed=3)).json()["choices"] == without


async def test_another_language_model_says_other_tokens(gateway: Any, trial: Any) -> None:
    await trial.engine(engine(gateway, Stubborn), mirrored=1.0)
    await complete(gateway, temperature=0)
    await trial.until_mirrored("talker/2")
    num, total = trial.seen("talker/2", "pair", "token_disagreement")
    assert (num, total) == (1, pytest.approx(5 / 6))


async def test_a_language_model_that_fails_is_noticed(gateway: Any, trial: Any) -> None:
    broken = engine(gateway)
    broken.fail("no memory")
    await trial.engine(broken, mirrored=1.0)
    await complete(gateway)
    await trial.until_mirrored("talker/2")
    assert trial.seen("talker/2", "candidate", "errors") == (1, 1)


async def test_a_slow_language_model_is_told_from_the_champion(gateway: Any, trial: Any) -> None:
    await trial.engine(engine(gateway, Sluggish), mirrored=1.0)
    for _ in range(36):
        await complete(gateway, max_tokens=2)
    for metric in ("slow_first_token", "slow_token"):
        await trial.until_seen("talker/2", "candidate", metric)
        num, total = trial.seen("talker/2", "candidate", metric)
        assert num == total
