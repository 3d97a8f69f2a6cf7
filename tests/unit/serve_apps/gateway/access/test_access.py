"""Who may come in, how large a request may be, and what every error looks like."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
import tritonclient.grpc.aio as triton
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

from cluster.database import audit_log, open_database
from cluster.errors import AuthenticationError, DatabaseBusyError
from cluster.security.api_keys import Identity
from serve_apps.gateway.access.authentication import PUBLIC_PATHS, KeyCache

VALUES = {"name": "classes", "version": "1", "name:word": "classes", "version:word": "1",
          "alias:word": "champion", "name:model": "classes"}  # fmt: skip


def every_route(gateway: Any) -> list[tuple[str, str]]:
    routes: list[tuple[str, str]] = []
    for route in gateway.app.routes:
        assert isinstance(route, Route), f"{route!r} is a kind of route unknown to this test"
        path = route.path
        for name, value in VALUES.items():
            path = path.replace("{" + name + "}", value)
        routes.extend((method, path) for method in route.methods or ())
    return sorted(routes)


async def test_every_route_needs_a_key_or_is_on_the_public_list(gateway: Any) -> None:
    routes = every_route(gateway)
    assert len(routes) > 15
    for method, path in routes:
        answer = await gateway.client.request(method, path)
        if path in PUBLIC_PATHS:
            assert answer.status_code == 200, path
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or "Authorization: Bearer KEY" in answer.text


async def test_no_method_of_any_path_gets_past_the_keys(gateway: Any) -> None:
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
    for path in {path for _, path in every_route(gateway)} - PUBLIC_PATHS:
        for method in methods:
            answer = await gateway.client.request(method, path)
            assert answer.status_code == 401, (method, path)


async def test_every_administrative_route_needs_its_scope(gateway: Any) -> None:
    headers = gateway.headers("infer", "models:read", "usage:read")
    routes = [(method, path) for method, path in every_route(gateway) if "/admin" in path]
    assert len(routes) >= 6
    for method, path in routes:
        answer = await gateway.client.request(method, path, headers=headers)
        assert answer.status_code == 403, (method, path)
    assert gateway.control.calls == []


@pytest.mark.parametrize("path", ["/docs", "/metrics", "/v1/nothing", "/-/routes"])
async def test_what_does_not_exist_needs_a_key_too(gateway: Any, path: str) -> None:
    assert (await gateway.client.get(path)).status_code == 401
    assert (await gateway.client.get(path, headers=gateway.headers())).status_code == 404


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic aGVsbG8=", "hst_x", "Bearer \xff"]
)
async def test_a_wrong_key_is_refused(gateway: Any, header: str) -> None:
    answer = await gateway.client.get(
        "/v1/models", headers={"authorization": header.encode("latin-1")}
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path", "scopes", "status"),
    [
        ("GET", "/v1/models", ["models:read"], 200),
        ("GET", "/v1/models", ["infer"], 200),
        ("GET", "/v1/models", ["admin"], 403),
        ("GET", "/v2/models/classes", ["models:read"], 200),
        ("POST", "/v1/completions", ["models:read"], 403),
        ("POST", "/v2/models/classes/infer", ["models:read", "admin"], 403),
        ("POST", "/v1/models/classes:predict", ["models:read", "admin"], 403),
        ("GET", "/v1/models/classes/metadata", ["models:read"], 200),
        ("GET", "/v1/models/classes/versions/1", ["admin"], 403),
        ("GET", "/admin/deployments", ["infer", "models:read"], 403),
        ("POST", "/admin/deployments", ["infer", "models:read"], 403),
        ("DELETE", "/admin/deployments/classes", ["infer"], 403),
        ("POST", "/admin/releases/classes/rollback", ["infer"], 403),
        ("GET", "/admin/deployments", ["admin"], 200),
    ],
)
async def test_scopes_decide(
    gateway: Any, method: str, path: str, scopes: list[str], status: int
) -> None:
    answer = await gateway.client.request(method, path, headers=gateway.headers(*scopes))
    assert answer.status_code == status, answer.text
    assert gateway.control.calls == []


async def test_a_key_is_remembered_for_less_than_a_second() -> None:
    now = 0.0
    asked: list[str] = []

    def verify(key: str) -> Identity:
        asked.append(key)
        if len(asked) > 1:
            raise AuthenticationError("revoked")
        return Identity("key_1", "acme", frozenset({"infer"}))

    cache = KeyCache(verify, clock=lambda: now)
    await cache.identify("k")
    now = 0.3
    await cache.identify("k")
    assert asked == ["k"]
    now = 0.8
    with pytest.raises(AuthenticationError):
        await cache.identify("k")


async def test_a_key_in_use_is_looked_up_again_while_nobody_waits() -> None:
    now, is_revoked, may_answer = 0.0, False, threading.Event()

    def verify(key: str) -> Identity:
        assert may_answer.wait(10)
        if is_revoked:
            raise AuthenticationError("revoked")
        return Identity("key_1", "acme", frozenset({"infer"}))

    async def identify_at_once() -> None:
        asking = asyncio.create_task(cache.identify("k"))
        await asyncio.sleep(0)
        assert asking.done()

    async def let_look_up() -> None:
        may_answer.set()
        while cache._asking:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        may_answer.clear()

    cache = KeyCache(verify, clock=lambda: now)
    first = asyncio.create_task(cache.identify("k"))
    await asyncio.sleep(0)
    await let_look_up()
    assert (await first).tenant == "acme"
    now = 0.5
    await identify_at_once()
    await let_look_up()
    now = 1.2  # of what was seen at 0.5
    await identify_at_once()
    is_revoked = True
    await let_look_up()
    now = 1.21
    may_answer.set()
    with pytest.raises(AuthenticationError):
        await cache.identify("k")


async def test_without_the_database_everybody_is_turned_away_in_each_protocol(
    gateway: Any, grpc_address: str
) -> None:
    headers = gateway.headers()
    with gateway.database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE api_keys RENAME TO away"))
    answer = await gateway.client.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "keys cannot be looked up" in answer.json()["error"]["message"]
    async with triton.InferenceServerClient(grpc_address) as client:
        with pytest.raises(InferenceServerException, match="keys cannot be looked up") as refused:
            await client.get_server_metadata(headers=headers)
    assert refused.value.status() == "StatusCode.UNAVAILABLE"


async def test_a_key_waits_for_nobodys_work(gateway: Any) -> None:
    headers = gateway.headers("infer")
    gateway.keys.set_tenant("acme", {"requests_per_minute": 100})
    gate = threading.Event()
    # What customers send takes all the threads that there are for it.
    busy = [asyncio.create_task(asyncio.to_thread(gate.wait, 20)) for _ in range(200)]
    try:
        async with asyncio.timeout(4):
            answer = await gateway.client.post("/v1/nothing", headers=headers)
    finally:
        gate.set()
        await asyncio.gather(*busy)
    assert answer.status_code == 404
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"


async def test_where_the_database_lies_is_not_for_customers(gateway: Any) -> None:
    headers = gateway.headers("admin")
    gateway.control.error = DatabaseBusyError("the database /home/me/a.db is busy")
    body = {"ref": "classes/1"}
    answer = await gateway.client.post("/admin/deployments", headers=headers, json=body)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"] == "the database is busy; try again in a moment"


async def test_many_requests_with_one_key_ask_once() -> None:
    asked: list[str] = []

    def verify(key: str) -> Identity:
        asked.append(key)
        return Identity("key_1", "acme", frozenset({"infer"}))

    cache = KeyCache(verify)
    await asyncio.gather(*(cache.identify("k") for _ in range(50)))
    assert asked == ["k"]


@pytest.mark.parametrize(
    ("path", "is_openai"),
    [
        ("/v1/nope", True), ("/v1/models/nope", True), ("/v1/models/classes/nope", True),
        ("/v2/nope", False), ("/admin/nope", True), ("/nope", True),

        ("/v1/models/nope/metadata", False), ("/v1/models/nope/versions/1", False),
        ("/v1/models/classes/labels/nope", False),
    ],
)  # fmt: skip
async def test_unknown_paths_answer_in_the_protocols_shape(
    gateway: Any, path: str, is_openai: bool
) -> None:
    answer = await gateway.client.get(path, headers=gateway.headers())
    assert answer.status_code == 404
    error = answer.json()["error"]
    if is_openai:
        assert set(error) == {"message", "type", "code", "param"}
    else:
        assert isinstance(error, str)


async def test_a_wrong_method_is_told(gateway: Any) -> None:
    answer = await gateway.client.get("/v1/completions", headers=gateway.headers())
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    several = await gateway.client.put("/admin/deployments", headers=gateway.headers())
    assert several.headers["allow"] == "GET, HEAD, POST"


async def test_every_answer_has_a_request_id(gateway: Any) -> None:
    for path, status in [("/v2/health/live", 200), ("/v1/models", 401)]:
        answer = await gateway.client.get(path)
        assert answer.status_code == status
        assert answer.headers["x-request-id"].startswith("req_")
    mine = await gateway.client.get("/v2/health/live", headers={"x-request-id": "trace-7"})
    assert mine.headers["x-request-id"] == "trace-7"
    odd = await gateway.client.get("/v2/health/live", headers={"x-request-id": "a b" * 100})
    assert odd.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v2/models/classes/infer", "/admin/deployments"]
)
async def test_large_bodies_are_refused_announced_or_not(gateway: Any, path: str) -> None:
    body = b"x" * (64 * 1024 + 1)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, chunks()):
        answer = await gateway.client.post(path, content=content, headers=gateway.headers())
        assert answer.status_code == 413, answer.text
        assert "65536 bytes" in answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"a": NaN}', b"[" * 100_000, b"\xff\xfe", b'"text"']
)
async def test_what_is_no_json_object_is_refused(gateway: Any, body: bytes) -> None:
    headers = gateway.headers()
    for path in ("/v1/completions", "/v2/models/classes/infer", "/admin/deployments"):
        answer = await gateway.client.post(path, content=body[:60_000], headers=headers)
        assert answer.status_code == 400, (path, answer.text)
        assert "JSON" in answer.text


async def test_an_unexpected_error_keeps_its_details(gateway: Any) -> None:
    gateway.control.error = RuntimeError("secret path /etc/shadow")
    answer = await gateway.client.post(
        "/admin/deployments", json={"ref": "classes"}, headers=gateway.headers()
    )
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "name",
    ["..", "../talker", "talker/../classes", "%2e%2e", "a\x00b", "clаsses", "classes/0",
     "classes/x", "classes@", "@champion", "CLASSES", "x" * 129, " classes"],
)  # fmt: skip
async def test_only_strict_names_find_models(gateway: Any, name: str) -> None:
    answer = await gateway.client.post(
        "/v1/completions", json={"model": name, "prompt": "a"}, headers=gateway.headers()
    )
    assert answer.status_code == 404, answer.text


async def test_administration_reaches_the_controller_and_leaves_a_trace(gateway: Any) -> None:
    headers = gateway.headers("admin")
    client = gateway.client
    answer = await client.post(
        "/admin/deployments",
        json={"ref": "classes/1", "options": {"num_replicas": 2}},
        headers=headers,
    )
    assert answer.status_code == 202
    undeploy = "/admin/deployments/classes?version=1&notice_s=60"
    assert (await client.delete(undeploy, headers=headers)).is_success
    assert gateway.control.calls[-1][:4] == ("undeploy", "classes", 1, 60)
    for verb in ("pause", "resume", "promote", "rollback"):
        assert (await client.post(f"/admin/releases/classes/{verb}", headers=headers)).is_success
    gateway.control.error = AuthenticationError("no")
    await client.post("/admin/deployments", json={"ref": "classes"}, headers=headers)
    verbs = [call[0] for call in gateway.control.calls]
    assert verbs == ["deploy", "undeploy", "pause", "resume", "promote", "rollback", "deploy"]
    assert gateway.control.calls[0][1:4] == ("classes/1", "direct", {"num_replicas": 2})
    with open_database(gateway.database_url).connect() as connection:
        rows = connection.execute(
            sa.select(audit_log).where(audit_log.c.action.in_(verbs)).order_by(audit_log.c.id)
        ).all()
    assert [row.action for row in rows] == verbs
    assert all(row.actor.startswith("acme/key_") for row in rows)
    outcomes = [row.detail["outcome"] for row in rows]
    assert outcomes == ["accepted"] * 6 + ["refused: invalid_api_key"]


async def test_what_is_written_down_fits_the_table(gateway: Any) -> None:
    key = gateway.keys.create("t" * 128, ["admin"]).key
    headers = {"authorization": f"Bearer {key}"}
    body = {"ref": "cl\0sses"}
    await gateway.client.post("/admin/deployments", json=body, headers=headers)
    with open_database(gateway.database_url).connect() as connection:
        query = sa.select(audit_log).where(audit_log.c.action == "deploy")
        row = connection.execute(query).one()
    assert row.target == "cl\ufffdsses"
    assert len(row.actor) == 128
    assert "/key_" in row.actor


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/deployments", {"ref": "x", "strateggy": "direct"}, 400),
        ("POST", "/admin/deployments", {}, 400),
        ("POST", "/admin/deployments", {"ref": "x" * 400}, 400),
        ("POST", "/admin/deployments", {"ref": "x", "strategy": "blue"}, 400),
        ("POST", "/admin/deployments", {"ref": "x", "options": {"num_cpus": 1e-9}}, 400),
        ("POST", "/admin/deployments", {"ref": "x", "options": {"nope": "x" * 10_000}}, 400),
        ("DELETE", "/admin/deployments/classes?version=one", None, 400),
        ("DELETE", "/admin/deployments/classes?notice_s=-1", None, 400),
        ("POST", "/admin/releases/classes/stop", None, 404),
        ("GET", "/admin/deployments/classes/9", None, 404),
        ("GET", "/admin/deployments/classes/x", None, 400),
        ("GET", "/admin/releases/unknown", None, 404),
    ],
)
async def test_bad_administration_is_refused(
    gateway: Any, method: str, path: str, body: Any, status: int
) -> None:
    answer = await gateway.client.request(method, path, json=body, headers=gateway.headers())
    assert answer.status_code == status, answer.text
    assert gateway.control.calls == []


async def test_a_websocket_is_closed_before_it_opens(gateway: Any) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v2/health/live", "headers": []}
    await gateway.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
