"""Composition root of the gateway: the settings' database and packages, Serve's models.

serve run serve_apps.gateway.app:build_app
"""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.applications import Starlette

from cluster.batches import BatchStore
from cluster.config import parse_config
from cluster.database import open_database
from cluster.drift_counts import DriftStore
from cluster.ledger import Ledger
from cluster.model_package import open_version
from cluster.model_package.files import MODEL_DIR, TOKENIZER
from cluster.model_package.golden_text import check_text
from cluster.observability.logs import configure_logging
from cluster.observability.metrics import MetricsExport, flush_for_ever
from cluster.observability.tracing import open_tracing
from cluster.processing.text import TextProcessor
from cluster.releases import ReleaseStore
from cluster.security.api_keys import ApiKeys
from cluster.security.audit import AuditLog
from cluster.security.leases import LeaseStore
from cluster.settings import Settings, load_settings
from cluster.storage import Storage
from cluster.tenant_files import TenantFiles
from serve_apps.gateway.asgi import GatewayConfig, GatewayParts, build_asgi
from serve_apps.gateway.batches.driver import BatchParts
from serve_apps.gateway.batches.runner import RayRunner
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.open_inference.grpc_server import GrpcAddress
from serve_apps.gateway.routing_table import ServedVersion, read_routes
from serve_apps.gateway.serve_backend import ServeBackend, ServeControl
from serve_apps.gateway.telemetry.telemetry import Telemetry
from serve_apps.replicas import SYSTEM_OPTIONS

_MAX_ONGOING_REQUESTS = 10_000
"""Serve answers what exceeds it in plain text, so the gateway's own limits must bind first."""


def build_app(values: dict[str, Any]) -> serve.Application:
    """The gateway as a Serve application; `values` are those of GatewayConfig."""
    settings = load_settings()
    config = parse_config(values, GatewayConfig, source="arguments of application 'gateway'")
    config = config.model_copy(update={"sends_request_id": False})

    def in_replica() -> Starlette:
        here = load_settings()
        configure_logging(here.log_format, in_replica=True)
        return build_asgi(_real_parts(here, config))

    deployment = serve.deployment(
        name="gateway",
        num_replicas=settings.gateway_replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        **SYSTEM_OPTIONS,
    )
    return deployment(serve.ingress(in_replica)()).bind()


def load_model(served: ServedVersion, settings: Settings) -> ServedModel:
    """Open a served version's verified package."""
    package = open_version(served, settings)
    is_graph = package.manifest.kind == "graph"
    if is_graph and f"{MODEL_DIR}/{TOKENIZER}" not in package.manifest.files:
        return ServedModel(served, package.manifest)
    text = TextProcessor.load(package.model_dir)
    # Its replicas have done so too, but here may be another version of what reads it.
    check_text(package.manifest, text)
    return ServedModel(served, package.manifest, text)


def _real_parts(settings: Settings, config: GatewayConfig) -> GatewayParts:
    database = open_database(settings.database)
    store, keys = ReleaseStore(database), ApiKeys(database)
    tracing = open_tracing(settings, "gateway")
    telemetry = Telemetry(tracing=tracing, logs_access=settings.access_log)
    export = MetricsExport(telemetry.instruments.registry)
    drift = DriftWatch(telemetry.instruments, DriftStore(database).write)

    def name_tenants() -> None:
        tenants = sorted(keys.list_tenants(), key=lambda tenant: tenant.created_at)
        oldest = tenants[: settings.metrics_tenants]
        telemetry.instruments.name_tenants(tenant.name for tenant in oldest)

    return GatewayParts(
        verify=keys.verify,
        read_routes=lambda: read_routes(store),
        load_model=lambda served: load_model(served, settings),
        backend=ServeBackend(tracing),
        control=ServeControl(),
        audit=AuditLog(database).record,
        exchange=LeaseStore(database).exchange,
        totals=Ledger(database).totals,
        add_evidence=store.add_evidence,
        config=config,
        telemetry=telemetry,
        export_metrics=lambda: flush_for_ever(export, [name_tenants, drift.flush]),
        grpc_address=GrpcAddress(settings.host, settings.grpc_port),
        batches=_batch_parts(settings, config),
        drift=drift,
    )


def _batch_parts(settings: Settings, config: GatewayConfig) -> BatchParts:
    database, storage = open_database(settings.database), Storage.open(settings.storage_root)
    return BatchParts(
        files=TenantFiles(database, storage),
        store=BatchStore(database),
        storage=storage,
        runner=RayRunner(settings),
        options=config.batches,
    )
