"""What keys, limits, metering and metrics cost a gateway: its CPU time with them and without.

In this process, without sockets, Ray and a model, where they weigh the most. Without them,
everybody is let in as one caller without limits, nothing is added up, and no metric is touched.

    pairs = cost_pairs(rounds=7)     # [(µs per request with them, µs without), …]
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.database import open_database
from cluster.ledger import Ledger
from cluster.model_package.manifest import Golden, Manifest
from cluster.processing import TensorSpec
from cluster.security.api_keys import ApiKeys, Identity
from cluster.security.leases import LeaseStore
from serve_apps.gateway.access.accounts import Accounts
from serve_apps.gateway.access.authentication import Authentication
from serve_apps.gateway.access.callers import Callers
from serve_apps.gateway.asgi import GatewayParts, build_asgi
from serve_apps.gateway.backend import Arrays, InProcessBackend
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.routing_table import Routes, ServedVersion
from serve_apps.gateway.telemetry.telemetry import RequestRecord, Telemetry

_FEATURES = 100
_AT_ONCE = 64
_REQUESTS = 4096
_PATH = "/v2/models/mlp/infer"
_PLENTY = 1_000_000_000


def cost_pairs(*, rounds: int) -> list[tuple[float, float]]:
    """Microseconds of CPU per request, with all of it and with none, one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measure(Path(directory), rounds))


async def _measure(directory: Path, rounds: int) -> list[tuple[float, float]]:
    database = open_database(f"sqlite:///{directory / 'bench.db'}")
    keys = ApiKeys(database)
    key = keys.create("acme", ["infer"]).key
    keys.set_tenant("acme", {"requests_per_minute": _PLENTY})
    everything = _build(database, keys, Telemetry())
    nothing = _build(database, keys, _NoTelemetry())
    for index, layer in enumerate(nothing.user_middleware):
        if layer.cls is Authentication:
            nothing.user_middleware[index].cls = _Anybody
    async with _running(everything), _running(nothing):
        for app in (everything, nothing):
            await _load(app, key)
        gc.collect()
        gc.freeze()
        pairs = []
        for index in range(rounds):
            order = [everything, nothing] if index % 2 == 0 else [nothing, everything]
            found = {id(app): await _load(app, key) for app in order}
            pairs.append((found[id(everything)], found[id(nothing)]))
        return pairs


def _build(database: Any, keys: ApiKeys, telemetry: Telemetry) -> Starlette:
    served = ServedVersion("mlp", 1, "sha256:" + "0" * 64, "mlp.v1")
    routes = Routes(served={("mlp", 1): served}, weights={"mlp": {1: 1.0}})
    manifest = Manifest(
        kind="graph",
        name="mlp",
        created_at="2026-01-01T00:00:00+00:00",
        files={},
        inputs=(TensorSpec(name="inputs", datatype="FP32", shape=(-1, _FEATURES)),),
        outputs=(TensorSpec(name="output", datatype="FP32", shape=(-1, 1)),),
        golden=Golden(inputs={}, outputs={}),
    )
    return build_asgi(
        GatewayParts(
            verify=keys.verify,
            read_routes=lambda: routes,
            load_model=lambda version: ServedModel(version, manifest),
            backend=_Backend(),
            control=None,  # type: ignore[arg-type]  # nobody administers here
            audit=lambda *_: None,
            exchange=LeaseStore(database).exchange,
            totals=Ledger(database).totals,
            telemetry=telemetry,
            add_evidence=lambda _deltas: None,
        )
    )


class _Backend(InProcessBackend):
    """Answers without computing."""

    async def predict(self, application: str, arrays: Arrays) -> Arrays:
        await asyncio.sleep(0)
        return {"output": arrays["inputs"][:, :1]}


class _NoTelemetry(Telemetry):
    """Keeps the record, which the layers above need, and counts nothing."""

    def request(self, protocol: str, route: str, *, request_id: str, **_: Any) -> Any:
        return contextlib.nullcontext(RequestRecord(request_id, protocol, route))

    def batches_of(self, served: ServedVersion) -> Callable[..., None]:
        return lambda *_: None

    def calls_of(self, served: ServedVersion, call: Any) -> Any:
        return call


class _Anybody:
    """In the place of Authentication: lets everybody in as one and the same."""

    def __init__(self, app: ASGIApp, keys: object, callers: Callers) -> None:
        self._app = app
        identity = Identity("key_0", "acme", frozenset({"infer"}))
        accounts = Accounts(lambda *_: None)  # type: ignore[arg-type, return-value]
        accounts.meter.add = lambda *_, **__: None  # type: ignore[method-assign]
        self._identity, self._caller = identity, Callers(accounts).make(identity)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["identity"] = self._identity
        with self._caller.entered():
            await self._app(scope, receive, send)


@contextlib.asynccontextmanager
async def _running(app: Starlette) -> AsyncIterator[None]:
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0.5)  # it has read its routes by then
        yield


async def _load(app: Starlette, key: str) -> float:
    """Microseconds of CPU per request."""
    body = json.dumps({"inputs": [_tensor()]}).encode()
    left: Iterator[int] = iter(range(_REQUESTS))

    async def client() -> None:
        for _ in left:
            await _ask(app, key, body)

    started_s = time.process_time()
    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
    return 1e6 * (time.process_time() - started_s) / _REQUESTS


async def _ask(app: Starlette, key: str, body: bytes) -> None:
    statuses = []
    parts = iter([body])

    async def receive() -> Message:
        for part in parts:
            return {"type": "http.request", "body": part, "more_body": False}
        return await asyncio.Event().wait()  # type: ignore[return-value]  # it never leaves

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    await app(_scope(key, len(body)), receive, send)
    if statuses[0] != 200:
        raise RuntimeError(f"answered {statuses[0]}")


def _scope(key: str, length: int) -> Scope:
    headers = {
        "host": "gateway",
        "content-type": "application/json",
        "authorization": f"Bearer {key}",
        "content-length": str(length),
    }
    return {
        "type": "http",
        "method": "POST",
        "path": _PATH,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "state": {},
    }


def _tensor() -> dict[str, Any]:
    values = np.random.default_rng(0).normal(size=_FEATURES)
    data = [round(float(x), 4) for x in values]
    return {"name": "inputs", "datatype": "FP32", "shape": [1, _FEATURES], "data": data}
