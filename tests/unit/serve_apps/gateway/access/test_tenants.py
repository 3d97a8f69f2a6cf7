"""Keys for some models, tenants with limits, and what they have used, as clients see it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from cluster.database import open_database
from cluster.ledger import Entry, Ledger
from cluster.model_package.manifest import Golden, Manifest
from cluster.processing import TensorSpec
from serve_apps.llm.engine import EngineRequest

PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]}
HOSTILE = {
    "x-tenant": "rich",
    "x-tenant-id": "rich",
    "x-api-key": "hst_other",
    "x-forwarded-for": "10.0.0.1",
    "x-forwarded-user": "rich",
    "x-forwarded-email": "boss@rich.example",
    "x-real-ip": "127.0.0.1",
    "forwarded": "for=127.0.0.1;by=rich",
    "x-user": "rich",
    "x-remote-user": "rich",
    "x-scopes": "admin",
    "openai-organization": "rich",
    "openai-project": "rich",
    "cookie": "tenant=rich; key=hst_other",
}


def bearer(gateway: Any, tenant: str = "acme", *scopes: str, **options: Any) -> dict[str, str]:
    key = gateway.keys.create(tenant, scopes or ["infer"], **options).key
    return {"authorization": f"Bearer {key}"}


async def infer(gateway: Any, headers: dict[str, str], model: str = "classes") -> httpx.Response:
    answer: httpx.Response = await gateway.client.post(
        f"/v2/models/{model}/infer", json=PIXELS, headers=headers
    )
    return answer


async def complete(gateway: Any, headers: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"model": "talker", "prompt": "the sun", "max_tokens": 5, "temperature": 0, **fields}
    answer: httpx.Response = await gateway.client.post(
        "/v1/completions", json=body, headers=headers
    )
    return answer


async def usage(gateway: Any, headers: dict[str, str], query: str = "") -> Any:
    answer = await gateway.client.get(f"/v1/usage{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def usage_when_settled(gateway: Any, headers: dict[str, str], requests: int) -> Any:
    for _ in range(100):
        rows = (await usage(gateway, headers, "?by=version,key"))["data"]
        if sum(row["requests"] for row in rows) >= requests:
            break
        await asyncio.sleep(0.05)
    return rows


async def test_a_key_for_one_model_knows_of_no_other(gateway: Any) -> None:
    headers = bearer(gateway, models=["classes"])
    listed = (await gateway.client.get("/v1/models", headers=headers)).json()["data"]
    assert [model["id"] for model in listed] == ["classes"]
    shown = (await gateway.client.get("/v1/catalogue", headers=headers)).json()["data"]
    assert [model["id"] for model in shown] == ["classes"]
    assert (await infer(gateway, headers)).status_code == 200
    assert (await infer(gateway, headers, "classes/versions/1")).status_code == 200
    there = await complete(gateway, headers)
    absent = await complete(gateway, headers, model="nothing")
    assert (there.status_code, absent.status_code) == (404, 404)
    assert there.text.replace("talker", "nothing") == absent.text
    for path in ("/v1/models/talker", "/v2/models/talker", "/v2/models/talker/ready",
                 "/v2/models/mute/versions/1", "/v2/models/classes/versions/9"):  # fmt: skip
        answer = await gateway.client.get(path, headers=headers)
        assert answer.status_code == 404
        assert not {"talker", "mute", "broken"} & set(
            answer.text.replace(f"model '{path.split('/')[3]}'", "").split()
        )
    chat = {"model": "talker", "messages": [{"role": "user", "content": "a"}]}
    answer = await gateway.client.post("/v1/chat/completions", json=chat, headers=headers)
    assert answer.status_code == 404


async def test_more_requests_than_a_minute_has_are_429_in_each_protocols_shape(
    gateway: Any,
) -> None:
    gateway.keys.set_tenant("acme", {"requests_per_minute": 3})
    headers = bearer(gateway)
    remaining = []
    for _ in range(3):
        answer = await infer(gateway, headers)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert 60 <= int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 63
        remaining.append(answer.headers["x-ratelimit-remaining-requests"])
    assert remaining == ["2", "1", "0"]
    refused = await infer(gateway, headers)
    assert refused.status_code == 429
    assert "3 requests per minute" in refused.json()["error"]
    refused = await complete(gateway, headers)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 63
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # Looking, administration and other tenants go on.
    for path in ("/v1/models", "/v1/usage", "/v1/nothing"):
        answer = await gateway.client.get(path, headers=headers)
        assert answer.status_code != 429
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await infer(gateway, bearer(gateway, "other"))).status_code == 200
    rollback = "/admin/releases/classes/rollback"
    answer = await gateway.client.post(rollback, headers=bearer(gateway, "acme", "admin"))
    assert answer.status_code == 200


async def test_answers_that_are_errors_carry_the_limits_too(gateway: Any) -> None:
    gateway.keys.set_tenant("acme", {"requests_per_minute": 100, "tokens_per_minute": 1000})
    headers = bearer(gateway)
    answers = [
        await gateway.client.post("/v1/completions", content=b"{", headers=headers),
        await gateway.client.post("/v1/completions", content=b"x" * 70_000, headers=headers),
        await gateway.client.get("/v1/completions", headers=headers),
        await gateway.client.get("/admin/deployments", headers=headers),
    ]

    async def break_down(*_: object) -> Any:
        raise RuntimeError("boom")

    gateway.backend.predict = break_down
    answers.append(await infer(gateway, headers))
    assert [answer.status_code for answer in answers] == [400, 413, 405, 403, 500]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    del gateway.backend.predict
    assert "x-ratelimit-limit-tokens" not in (await infer(gateway, bearer(gateway, "b"))).headers


async def test_tokens_are_reserved_and_what_was_not_used_is_given_back(gateway: Any) -> None:
    gateway.keys.set_tenant("acme", {"tokens_per_minute": 120})
    headers = bearer(gateway)
    answer = await complete(gateway, headers, max_tokens=100)
    used = answer.json()["usage"]["total_tokens"]
    if used <= 60:  # it ended by itself
        assert (await complete(gateway, headers, max_tokens=40)).status_code == 200
    else:
        refused = await complete(gateway, headers, max_tokens=100)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "tokens"
    never = await complete(gateway, headers, max_tokens=130)
    assert never.status_code == 400
    assert never.json()["error"]["param"] == "max_tokens"


async def test_a_months_budget_ends_with_a_quota_error_that_nobody_retries(gateway: Any) -> None:
    gateway.keys.set_tenant("acme", {"monthly_tokens": 50})
    headers = bearer(gateway)
    entry = Entry("before", tenant="acme", kind="completion", model="m", source="k",
                  completion_tokens=50)  # fmt: skip
    Ledger(open_database(gateway.database_url)).record([entry])
    refused = await complete(gateway, headers)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert (await infer(gateway, headers)).status_code == 200  # tensors have no tokens


async def test_streams_beyond_the_limit_are_refused_until_one_ends(
    gateway: Any, server_url: str
) -> None:
    gateway.keys.set_tenant("acme", {"max_streams": 1})
    gateway.engine._step_time_s = 0.02
    async with httpx.AsyncClient(base_url=f"{server_url}/v1", headers=bearer(gateway)) as client:
        body = {"model": "talker", "prompt": "a", "max_tokens": 240, "stream": True}
        async with client.stream("POST", "/completions", json=body) as stream:
            assert stream.status_code == 200
            refused = await client.post("/completions", json=body | {"stream": False})
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "streams"
        gateway.engine._step_time_s = 0.0005
        for _ in range(100):
            answer = await client.post("/completions", json=body | {"stream": False})
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.05)
        assert answer.status_code == 200


async def test_usage_is_by_model_and_on_request_by_key_and_version(gateway: Any) -> None:
    headers, other = bearer(gateway), bearer(gateway, "other")
    answer = await complete(gateway, headers)
    for model in ("classes", "classes", "classes/versions/1"):
        await infer(gateway, headers, model)
    await infer(gateway, other)
    await infer(gateway, headers, "nothing")
    rows = await usage_when_settled(gateway, headers, 4)
    (key_id,) = {row.pop("key") for row in rows}
    assert key_id == gateway.keys.verify(headers["authorization"].removeprefix("Bearer ")).key_id
    said = answer.json()["usage"]
    found = {(row["kind"], row["model"], row["version"]): row for row in rows}
    assert found.keys() == {
        ("completion", "talker", 1), ("inference", "classes", 2), ("inference", "classes", 1),
    }  # fmt: skip
    talker = found["completion", "talker", 1]
    assert talker["prompt_tokens"] == said["prompt_tokens"]
    assert talker["completion_tokens"] == said["completion_tokens"]
    assert [row["requests"] for row in found.values()].count(2) == 1
    whole = await usage(gateway, headers)
    assert whole["tenant"] == "acme"
    assert [(row["model"], row["requests"]) for row in whole["data"]] == [
        ("talker", 1), ("classes", 3),
    ]  # fmt: skip
    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    assert (await usage(gateway, headers, f"?since={later}"))["data"] == []


async def test_only_administrators_see_anothers_usage(gateway: Any) -> None:
    await infer(gateway, bearer(gateway, "other"))
    admin = bearer(gateway, "acme", "admin")
    await usage_when_settled(gateway, bearer(gateway, "other", "usage:read"), 1)
    assert (await usage(gateway, admin, "?tenant=other"))["data"][0]["requests"] == 1
    for query, headers, status in (
        ("?tenant=other", bearer(gateway), 403),
        ("", bearer(gateway, "acme", "models:read"), 403),
        ("?since=ever", admin, 400),
        ("?by=weekday", admin, 400),
        ("?user=other", admin, 400),
    ):
        answer = await gateway.client.get(f"/v1/usage{query}", headers=headers)
        assert answer.status_code == status, query
    answer = await gateway.client.get("/v1/usage?since=30d", headers=admin)
    message = answer.json()["error"]["message"]
    assert message == "parameter 'since': '30d' is no time; write 2030-01-31T12:00:00Z"


async def test_identity_never_comes_from_what_a_client_says(gateway: Any) -> None:
    gateway.keys.set_tenant("rich")
    mine = bearer(gateway)
    for headers in (HOSTILE, HOSTILE | {"authorization": "Bearer hst_wrong"}):
        assert (await infer(gateway, headers)).status_code == 401
    assert (await infer(gateway, HOSTILE | mine)).status_code == 200
    assert (await complete(gateway, HOSTILE | mine, user="rich")).status_code == 200
    answer = await gateway.client.get("/admin/deployments", headers=HOSTILE | mine)
    assert answer.status_code == 403
    answer = await gateway.client.get("/v1/usage?tenant=rich", headers=HOSTILE | mine)
    assert answer.status_code == 403
    rows = await usage_when_settled(gateway, mine, 2)
    assert sum(row["requests"] for row in rows) == 2
    admin = bearer(gateway, "rich", "admin")
    assert (await usage(gateway, admin))["data"] == []


async def test_a_revoked_key_ends_within_a_second(gateway: Any) -> None:
    headers = bearer(gateway)
    assert (await infer(gateway, headers)).status_code == 200
    (record,) = gateway.keys.list("acme")
    gateway.keys.revoke(record.id)
    started_s = time.monotonic()
    while (await infer(gateway, headers)).status_code == 200:
        assert time.monotonic() - started_s < 1
        await asyncio.sleep(0.02)


async def test_the_official_client_raises_and_retries_as_it_does_elsewhere(
    gateway: Any, server_url: str
) -> None:
    gateway.keys.set_tenant("acme", {"requests_per_minute": 1, "max_streams": 1})
    key = gateway.keys.create("acme", ["infer"]).key
    request = {"model": "talker", "prompt": "a", "max_tokens": 2}
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=0
    ) as client:
        await client.completions.create(**request)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(**request)
        assert (refused.value.type, refused.value.code) == ("requests", "rate_limit_exceeded")
        assert int(refused.value.response.headers["retry-after"]) > 1

    # Streams come free at once, so its own retry finds a place.
    gateway.keys.set_tenant("acme", {"requests_per_minute": None})
    await asyncio.sleep(0.9)  # keys are remembered for 0.8 s
    gateway.engine._step_time_s = 0.005
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=3
    ) as client:
        answers = await asyncio.gather(
            client.completions.create(**request | {"max_tokens": 30}),
            client.completions.create(**request),
        )
        assert all(answer.choices for answer in answers)


async def test_tokens_of_embeddings_are_limited_and_counted(gateway: Any) -> None:
    ids = TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1))
    vector = TensorSpec(name="vector", datatype="FP32", shape=(-1, 1))
    manifest = Manifest(
        kind="graph", name="vectors", created_at="2026-01-01T00:00:00+00:00", files={},
        inputs=(ids,), outputs=(vector,), golden=Golden(inputs={}, outputs={}),
    )  # fmt: skip
    gateway.serve_graph(manifest, lambda arrays: {"vector": np.ones((1, 1), dtype=np.float32)})
    gateway.keys.set_tenant("acme", {"tokens_per_minute": 10})
    headers = bearer(gateway)
    statuses = []
    for tokens in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3]):
        body = {"model": "vectors/1", "input": tokens}
        answer = await gateway.client.post("/v1/embeddings", json=body, headers=headers)
        statuses.append(answer.status_code)
    assert statuses == [200, 200, 429], answer.text
    (row,) = await usage_when_settled(gateway, headers, 2)
    assert (row["kind"], row["requests"], row["prompt_tokens"]) == ("inference", 2, 8)


async def test_the_engine_is_told_whose_a_request_is(gateway: Any) -> None:
    sent: list[EngineRequest] = []
    generate = gateway.backend.generate

    def remembering(application: str, request: EngineRequest, *, drain_s: float) -> Any:
        sent.append(request)
        return generate(application, request, drain_s=drain_s)

    gateway.backend.generate = remembering
    body = {"model": "talker", "prompt": "a", "max_tokens": 1}
    for tenant in ("poor", "rich"):
        headers = HOSTILE | bearer(gateway, tenant)
        await gateway.client.post("/v1/completions", json=body, headers=headers)
    assert [request.tenant for request in sent] == ["poor", "rich"]
