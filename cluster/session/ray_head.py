"""The Ray head of a local stack: its command line, its token, and when it is ready."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from cluster.session.scratch import scratch_dir
from cluster.settings import LOOPBACK, Settings


def command(settings: Settings) -> Sequence[str]:
    arguments = {
        "--port": settings.ray_port,
        "--node-ip-address": LOOPBACK,
        "--dashboard-host": settings.host,
        "--dashboard-port": settings.dashboard_port,
        "--dashboard-agent-listen-port": 0,
        "--metrics-export-port": settings.metrics_port,
        # 0 means any free port; the default range would clash with a second stack's.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--temp-dir": scratch_dir(settings.home) / "ray",
        "--object-store-memory": settings.object_store_bytes,
    }
    if settings.num_cpus is not None:
        arguments["--num-cpus"] = settings.num_cpus
    if settings.num_gpus is not None:
        arguments["--num-gpus"] = settings.num_gpus
    options = [f"{name}={value}" for name, value in arguments.items()]
    # The monitor serves cluster autoscalers, which one machine has not.
    flags = ["--head", "--block", "--no-monitor", "--disable-usage-stats"]
    return [str(Path(sys.executable).parent / "ray"), "start", *flags, *options]


def ensure_token(settings: Settings) -> None:
    """Make the token that every call to Ray must carry, once."""
    path = settings.ray_token_path
    if path.exists():
        return
    # Whole or not at all: a full disk must not leave an empty token.
    staged = path.with_suffix(".tmp")
    staged.touch(mode=0o600)
    staged.write_text(secrets.token_hex(32), encoding="ascii")
    staged.replace(path)


def auth_header(settings: Settings) -> dict[str, str]:
    token = settings.ray_token_path.read_text(encoding="ascii").strip()
    return {"Authorization": f"Bearer {token}"}


def is_ready(settings: Settings) -> bool:
    """Whether the dashboard answers us and Serve's REST routes are loaded."""
    url = f"{settings.dashboard_url}/api/version"
    try:
        return httpx.get(url, headers=auth_header(settings), timeout=2).status_code == 200
    except (httpx.HTTPError, FileNotFoundError):
        return False
