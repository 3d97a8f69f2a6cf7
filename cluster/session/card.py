"""The card that `up` ends with: where everything is and what to type next."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.settings import Settings


def card(settings: Settings) -> str:
    key = settings.api_key_path.read_text(encoding="ascii").strip()
    return "\n".join(
        [
            "",
            f"  gateway        {settings.gateway_url}",
            f"  gRPC           {settings.grpc_address}",
            f"  API key        {key}",
            f"  MLflow         {settings.tracking_uri}",
            f"  Ray dashboard  {settings.dashboard_url}"
            f"   token in {_short(settings.ray_token_path)}",
            "",
            f"  try it         curl -H 'Authorization: Bearer {key}' "
            f"{settings.gateway_url}/v1/models",
            '  this shell     eval "$(heliostat env)"',
            f"  stop           {_stop(settings)}",
            "",
        ]
    )


def _stop(settings: Settings) -> str:
    is_default = settings.home == Path.cwd() / ".heliostat"
    return "heliostat down" if is_default else f"HELIOSTAT_HOME={settings.home} heliostat down"


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
