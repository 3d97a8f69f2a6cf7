"""The gateway's administration routes, as the command line uses them.

Knows HTTP and nothing of how releases work.

    admin = AdminClient.open(settings)
    row = admin.deploy("digits/3", "direct", {})
"""

from __future__ import annotations

from typing import Any, cast

import httpx

from cluster.errors import (
    AuthenticationError,
    ConflictError,
    HeliostatError,
    NotFoundError,
    NotRunningError,
    OverloadedError,
    PermissionDeniedError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UsageError,
)
from cluster.settings import Settings

_TIMEOUT_S = 70.0
_ERRORS: dict[int, type[HeliostatError]] = {
    400: UsageError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    502: UpstreamFailedError,
    503: OverloadedError,
    504: UpstreamTimeoutError,
}


class AdminClient:
    """Calls with a key of scope `admin`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def open(cls, settings: Settings) -> AdminClient:
        """Speak to this machine's gateway with the local key, or with HELIOSTAT_API_KEY.

        Raises:
            NotRunningError: there is no key, so nothing was ever started here.
        """
        return cls(
            httpx.Client(
                base_url=settings.gateway_url,
                headers={"authorization": f"Bearer {_key(settings)}"},
                timeout=_TIMEOUT_S,
                trust_env=False,
                # A command makes few calls and then ends: leave no connection open behind it.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        )

    def deploy(self, ref: str, strategy: str, options: dict[str, Any]) -> dict[str, Any]:
        body = {"ref": ref, "strategy": strategy, "options": options}
        return self._call("POST", "/admin/deployments", json=body)

    def deployment(self, name: str, version: int) -> dict[str, Any]:
        return self._call("GET", f"/admin/deployments/{name}/{version}")

    def deployments(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self._call("GET", "/admin/deployments")["deployments"])

    def undeploy(
        self, name: str, version: int | None, notice_s: int | None = None
    ) -> list[dict[str, Any]]:
        asked = {"version": version, "notice_s": notice_s}
        params = {field: str(value) for field, value in asked.items() if value is not None}
        answer = self._call("DELETE", f"/admin/deployments/{name}", params=params)
        return cast(list[dict[str, Any]], answer["deployments"])

    def steer(self, name: str, verb: str) -> dict[str, Any]:
        """`pause`, `resume`, `promote` or `rollback`."""
        return self._call("POST", f"/admin/releases/{name}/{verb}")

    def release(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/admin/releases/{name}")

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **arguments)
        except httpx.TimeoutException:
            raise NotRunningError(
                f"the gateway at {self._http.base_url} does not answer",
                hint="see `heliostat status`",
            ) from None
        except httpx.TransportError:
            raise _not_running() from None
        if answer.is_success:
            return cast(dict[str, Any], answer.json())
        raise _error(answer)


def _key(settings: Settings) -> str:
    if settings.api_key:
        return settings.api_key
    try:
        return settings.api_key_path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise _not_running() from None


def _not_running() -> NotRunningError:
    return NotRunningError("heliostat is not running", hint="run `heliostat up`")


def _error(answer: httpx.Response) -> HeliostatError:
    try:
        error = answer.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # not the gateway's own answer, but the proxy's
        return NotRunningError(
            f"the gateway is not ready (HTTP {answer.status_code})", hint="see `heliostat status`"
        )
    return _ERRORS.get(answer.status_code, HeliostatError)(message, param=param)
