"""The gateway as an ASGI application, whatever its parts are: the same in tests and in Ray Serve.

app = build_asgi(GatewayParts(verify=keys.verify, …))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.middleware import Middleware

from cluster.config import StrictModel
from serve_apps.gateway import admin, model_cards
from serve_apps.gateway.access import usage
from serve_apps.gateway.access.accounts import Accounts, Exchange
from serve_apps.gateway.access.authentication import Authentication, KeyCache, Verify
from serve_apps.gateway.access.callers import Callers
from serve_apps.gateway.backend import ModelBackend
from serve_apps.gateway.batches.driver import BatchDriver, BatchParts
from serve_apps.gateway.batches.routes import batch_routes
from serve_apps.gateway.batches.work import BatchOptions
from serve_apps.gateway.catalogue import Load, ModelCatalogue
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.http import openapi
from serve_apps.gateway.http.application import Application
from serve_apps.gateway.http.compression import Decompression
from serve_apps.gateway.http.departures import Departures
from serve_apps.gateway.http.middleware import BodyLimit, RequestContext
from serve_apps.gateway.models import Models
from serve_apps.gateway.open_inference import routes as open_inference
from serve_apps.gateway.open_inference.grpc_calls import Door
from serve_apps.gateway.open_inference.grpc_server import GrpcAddress, GrpcServer
from serve_apps.gateway.open_inference.grpc_service import InferenceService
from serve_apps.gateway.openai import embeddings
from serve_apps.gateway.openai import routes as openai
from serve_apps.gateway.openai.schema import TextLimits
from serve_apps.gateway.page import routes as page
from serve_apps.gateway.releases.evidence import AddEvidence, Evidence
from serve_apps.gateway.routing_table import Routes, RoutingTable
from serve_apps.gateway.telemetry.telemetry import Telemetry
from serve_apps.gateway.tensorflow_serving import routes as tensorflow_serving


class GatewayConfig(StrictModel):
    """Limits of one gateway replica."""

    max_body_bytes: int = 32 * 1024**2
    max_body_s: float = 60.0
    """A body must have arrived by then."""
    text: TextLimits = TextLimits()
    sends_request_id: bool = True
    """Off behind Ray Serve, which sends the header itself."""
    max_file_bytes: int = 200 * 1024**2
    """Of an uploaded file."""
    batches: BatchOptions = BatchOptions()


@dataclass(frozen=True)
class GatewayParts:
    """What a gateway is made of."""

    verify: Verify
    read_routes: Callable[[], Routes]
    load_model: Load
    backend: ModelBackend
    control: admin.ReleaseControl
    audit: admin.Audit
    exchange: Exchange
    totals: usage.Totals
    add_evidence: AddEvidence
    telemetry: Telemetry = field(default_factory=Telemetry)
    export_metrics: Callable[[], Coroutine[None, None, None]] | None = None
    """Runs for as long as the gateway does."""
    config: GatewayConfig = field(default_factory=GatewayConfig)
    grpc_address: GrpcAddress | None = None
    """Where to speak gRPC as well; None does not."""
    batches: BatchParts | None = None
    """Without it there are no files and no batches."""
    drift: DriftWatch | None = None
    """Told of every request; None counts them and says so to nobody."""


def build_asgi(parts: GatewayParts) -> Starlette:
    """Wire the parts together."""
    table = RoutingTable(parts.read_routes)
    accounts = Accounts(parts.exchange)
    evidence = Evidence(parts.add_evidence, parts.telemetry.instruments)
    catalogue = ModelCatalogue(parts.load_model)
    models = Models(
        table, catalogue, parts.backend, parts.telemetry, evidence=evidence, drift=parts.drift
    )
    keys, callers = KeyCache(parts.verify), Callers(accounts)
    grpc_server = _grpc_server(parts, models, Door(keys, callers, parts.telemetry))
    driver = BatchDriver(parts.batches, models, parts.config.text) if parts.batches else None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await table.start()
        await accounts.start()
        await evidence.start()
        export = asyncio.create_task(parts.export_metrics()) if parts.export_metrics else None
        if grpc_server is not None:
            await grpc_server.start()
            app.state.grpc_server = grpc_server
        if driver is not None:
            await driver.start()
        yield
        if driver is not None:
            await driver.stop()
        if grpc_server is not None:
            await grpc_server.stop()
        if export is not None:
            export.cancel()
        await accounts.stop()
        models.close()
        await evidence.stop()
        await table.stop()
        await asyncio.to_thread(parts.telemetry.tracing.close)

    routes = [
        *open_inference.build_routes(models),
        # Before OpenAI's, whose path of a model takes any.
        *tensorflow_serving.build_routes(models),
        *openai.build_routes(models, parts.config.text),
        *embeddings.build_routes(models, parts.config.text),
        *(batch_routes(driver, parts.config.max_file_bytes) if driver else ()),
        *model_cards.build_routes(models),
        *page.build_routes(),
        *usage.build_routes(parts.totals),
        *admin.build_routes(parts.control, parts.audit),
    ]
    app = Application(
        [*routes, openapi.build_route(routes)],
        [
            Middleware(Departures),
            Middleware(
                RequestContext,
                telemetry=parts.telemetry,
                sends_request_id=parts.config.sends_request_id,
            ),
            Middleware(Authentication, keys=keys, callers=callers),
            Middleware(
                BodyLimit,
                max_bytes=parts.config.max_body_bytes,
                max_upload_bytes=parts.config.max_file_bytes,
                max_s=parts.config.max_body_s,
            ),
            Middleware(Decompression, max_bytes=parts.config.max_body_bytes),
        ],
        lifespan=lifespan,
    )
    app.state.models = models
    return app


def _grpc_server(parts: GatewayParts, models: Models, door: Door) -> GrpcServer | None:
    if parts.grpc_address is None:
        return None
    max_bytes = parts.config.max_body_bytes
    service = InferenceService(models)
    return GrpcServer(service, door, parts.grpc_address, max_message_bytes=max_bytes)
