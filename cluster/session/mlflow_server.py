"""The MLflow server of a local stack: loopback only, SQLite and artefacts in the home directory.

MLflow asks no key here: it listens on loopback and answers only requests that name a loopback host,
which stops web pages in the user's browser. A fleet puts its own door in front of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from cluster.settings import LOOPBACK, Settings

ENVIRONMENT = {
    # Two more processes that evaluate traces; nothing here asks for them.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def command(settings: Settings) -> Sequence[str]:
    directory = settings.home / "mlflow"
    hosts = f"{LOOPBACK}:{settings.mlflow_port},localhost:{settings.mlflow_port}"
    return [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        f"--host={LOOPBACK}",
        f"--port={settings.mlflow_port}",
        "--workers=1",
        f"--allowed-hosts={hosts}",
        f"--backend-store-uri=sqlite:///{directory / 'mlflow.db'}",
        f"--artifacts-destination={directory / 'artifacts'}",
    ]


def is_local(settings: Settings) -> bool:
    """Whether the stack runs its own server, or uses one that is elsewhere."""
    return not settings.mlflow_tracking_uri


def is_ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.tracking_uri}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
