"""The two system applications, deployed through the dashboard's REST.

Model applications are the controller's: Serve keeps apart what was deployed by this configuration
and what was deployed by `serve.run`, so putting it again leaves them alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.errors import StartError
from cluster.session.ray_head import auth_header
from cluster.settings import LOOPBACK, Settings

_POLL_INTERVAL_S = 0.1
_RETRY_INTERVAL_S = 0.5
_RETRIES_S = 10.0
DEPLOY_FAILED = "DEPLOY_FAILED"
APPLICATIONS: tuple[dict[str, Any], ...] = (
    {
        "name": "controller",
        "import_path": "serve_apps.release.controller:build_app",
        "route_prefix": None,
    },
    {"name": "gateway", "import_path": "serve_apps.gateway.app:build_app", "route_prefix": "/"},
)


def deploy(settings: Settings) -> None:
    """Ask Serve for both applications; returns before they run.

    Raises:
        StartError: Serve refused the configuration.
    """
    if any(status == DEPLOY_FAILED for status, _ in application_states(settings).values()):
        _put(settings, [])  # Serve does not try an unchanged application again
    _put(settings, APPLICATIONS)


def drain(settings: Settings, patience_s: float) -> None:
    """Take nothing more and let the gateway answer what it has; models stay up meanwhile.

    Returns when that is done, when it takes too long, or when there is nothing to ask.
    """
    if not application_states(settings):
        return
    deadline_s = time.monotonic() + patience_s
    with contextlib.suppress(StartError):
        _put(settings, [], timeout_s=5)
        while time.monotonic() < deadline_s:
            states = application_states(settings)
            if not any(application["name"] in states for application in APPLICATIONS):
                return
            time.sleep(_POLL_INTERVAL_S)


def _put(settings: Settings, applications: Sequence[dict[str, Any]], timeout_s: float = 60) -> None:
    body = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": LOOPBACK, "port": settings.gateway_port},
        "applications": list(applications),
    }
    deadline_s = time.monotonic() + _RETRIES_S
    while True:
        try:
            # The first call starts Serve itself.
            answer = httpx.put(
                _url(settings), json=body, headers=auth_header(settings), timeout=timeout_s
            )
            break
        except httpx.HTTPError as error:
            # Dropped by a dashboard that is busy starting, or goes with its head: that is known
            # only moments later.
            if isinstance(error, httpx.TimeoutException) or time.monotonic() > deadline_s:
                raise StartError(
                    f"Ray Serve did not take the applications: {error}",
                    hint="see `heliostat status`",
                ) from None
        time.sleep(_RETRY_INTERVAL_S)
    if answer.status_code != 200:
        raise StartError(
            f"Ray Serve refused the applications: {answer.text[-300:]}",
            hint="see `heliostat status`",
        )


def application_states(settings: Settings) -> dict[str, tuple[str, str]]:
    """Name → (Serve's status, its message); empty while Serve is not up."""
    try:
        answer = httpx.get(_url(settings), headers=auth_header(settings), timeout=5)
    except (httpx.HTTPError, FileNotFoundError):
        return {}
    if answer.status_code != 200:
        return {}
    applications: dict[str, Any] = answer.json().get("applications", {})
    return {name: _state(details) for name, details in applications.items()}


def is_gateway_ready(settings: Settings) -> bool:
    try:
        answer = httpx.get(f"{settings.gateway_url}/v2/health/ready", timeout=2)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def is_ready(settings: Settings) -> bool:
    """Whether both applications run and the gateway answers through HAProxy.

    Raises:
        StartError: one of them cannot be deployed.
    """
    states = application_states(settings)
    for application in APPLICATIONS:
        name = application["name"]
        status, message = states.get(name, ("MISSING", ""))
        if status == DEPLOY_FAILED:
            raise StartError(f"application '{name}' failed: {message}")
        if status != "RUNNING":
            return False
    return is_gateway_ready(settings)


def _url(settings: Settings) -> str:
    return f"{settings.dashboard_url}/api/serve/applications/"


def _state(details: dict[str, Any]) -> tuple[str, str]:
    messages = [str(details.get("message", ""))]
    messages += [str(d.get("message", "")) for d in details.get("deployments", {}).values()]
    return str(details["status"]), _last_line(messages)


def _last_line(messages: list[str]) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    errors = [line for line in lines if "Error" in line and not line.startswith("File ")]
    return (errors or [line for line in lines if line] or [""])[-1]
