"""What of the stack answers right now.

for endpoint in endpoints(settings):
    print(endpoint.name, endpoint.url, endpoint.ready)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.session import mlflow_server, ray_head, serving
from cluster.settings import Settings


@dataclass(frozen=True)
class Endpoint:
    """A door of the stack. `detail` says why it is not ready."""

    name: str
    url: str
    ready: bool
    detail: str = ""


def endpoints(settings: Settings) -> list[Endpoint]:
    """Ask every endpoint at the same time."""
    probes: list[Callable[[Settings], Endpoint]] = [_gateway, _controller, _mlflow, _dashboard]
    with ThreadPoolExecutor(len(probes)) as pool:
        return list(pool.map(lambda probe: probe(settings), probes))


def _gateway(settings: Settings) -> Endpoint:
    ready = serving.is_gateway_ready(settings)
    return Endpoint("gateway", settings.gateway_url, ready, "" if ready else "does not answer")


def _controller(settings: Settings) -> Endpoint:
    status, message = serving.application_states(settings).get("controller", ("not deployed", ""))
    detail = "" if status == "RUNNING" else f"{status.lower()} {message}".strip()
    return Endpoint("controller", f"{settings.dashboard_url}/#/serve", not detail, detail)


def _mlflow(settings: Settings) -> Endpoint:
    ready = mlflow_server.is_ready(settings)
    return Endpoint("mlflow", settings.tracking_uri, ready, "" if ready else "does not answer")


def _dashboard(settings: Settings) -> Endpoint:
    ready = ray_head.is_ready(settings)
    return Endpoint(
        "ray-dashboard", settings.dashboard_url, ready, "" if ready else "does not answer"
    )
