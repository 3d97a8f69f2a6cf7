"""What a stack consists of, in the order in which it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.session import mlflow_server, ray_head
from cluster.session.processes import RAY as RAY
from cluster.settings import Settings

MLFLOW = "mlflow"
SERVING = "serving"


@dataclass(frozen=True)
class ServerPart:
    """A server process that `up` starts and watches."""

    name: str
    label: str
    command: Callable[[Settings], Sequence[str]]
    is_ready: Callable[[Settings], bool]
    timeout_s: float
    environment: dict[str, str] = field(default_factory=dict)


def server_parts(settings: Settings) -> list[ServerPart]:
    """The servers that this stack runs itself."""
    ray = ServerPart(RAY, "Ray head", ray_head.command, ray_head.is_ready, timeout_s=90)
    mlflow = ServerPart(
        MLFLOW,
        "MLflow server",
        mlflow_server.command,
        mlflow_server.is_ready,
        timeout_s=120,
        environment=mlflow_server.ENVIRONMENT,
    )
    return [ray, mlflow] if mlflow_server.is_local(settings) else [ray]
