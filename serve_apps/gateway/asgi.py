"""The gateway as an ASGI application, whatever its parts are: the same in tests and in Ray Serve.

app = build_asgi(GatewayParts(verify=keys.verify, …))
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.config import StrictModel
from cluster.errors import HeliostatError
from serve_apps.gateway import admin, open_inference, openai
from serve_apps.gateway.authentication import Authentication, KeyCache, Verify
from serve_apps.gateway.backend import ModelBackend
from serve_apps.gateway.catalogue import Load, ModelCatalogue
from serve_apps.gateway.errors import render
from serve_apps.gateway.middleware import BodyLimit, RequestContext
from serve_apps.gateway.models import Models
from serve_apps.gateway.routing_table import Routes, RoutingTable


class GatewayConfig(StrictModel):
    """Limits of one gateway replica."""

    max_body_bytes: int = 32 * 1024**2
    sends_request_id: bool = True
    """Off behind Ray Serve, which sends the header itself."""


@dataclass(frozen=True)
class GatewayParts:
    """What a gateway is made of."""

    verify: Verify
    read_routes: Callable[[], Routes]
    load_model: Load
    backend: ModelBackend
    control: admin.ReleaseControl
    audit: admin.Audit
    config: GatewayConfig = field(default_factory=GatewayConfig)


def build_asgi(parts: GatewayParts) -> FastAPI:
    """Wire the parts together. Nothing is documented or listed without a key."""
    table = RoutingTable(parts.read_routes)
    models = Models(table, ModelCatalogue(parts.load_model), parts.backend)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await table.start()
        yield
        await table.stop()

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.include_router(openai.build_router(models))
    app.include_router(open_inference.build_router(models))
    app.include_router(admin.build_router(parts.control, parts.audit))
    for kind in (HeliostatError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=parts.config.max_body_bytes)
    app.add_middleware(Authentication, keys=KeyCache(parts.verify))
    app.add_middleware(RequestContext, sends_request_id=parts.config.sends_request_id)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return render(error, request.url.path)
