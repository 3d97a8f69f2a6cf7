"""Administration: deploy, steer releases, undeploy. Scope `admin`; every act leaves an audit row.

The work is the release controller's; here are the routes and the record of who asked.

    routes = build_routes(control, audit)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typing_extensions import TypedDict

from cluster.deployments import Strategy
from cluster.errors import HeliostatError, InputError, NotFoundError
from cluster.security.api_keys import Identity
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.http.requests import parse_object, validate
from serve_apps.options import DeploymentOptions, read_options, read_strategy

Steering = Literal["pause", "resume", "promote", "rollback"]
"""What may be done to a release by hand."""

_STEERING: dict[Steering, str] = {
    "pause": "Let the release under way take no further step",
    "resume": "Let a paused release go on",
    "promote": "Make the version that is compared with the champion the champion",
    "rollback": "End the release under way, or else go back to the champion before",
}


class ReleaseControl(Protocol):
    """What the gateway asks of the release controller. Answers are plain JSON values."""

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]: ...

    async def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]: ...

    async def steer(self, name: str, verb: Steering, actor: str) -> dict[str, Any]: ...

    async def deployments(self, name: str | None) -> list[dict[str, Any]]: ...

    async def release(self, name: str) -> dict[str, Any]: ...


Audit = Callable[[str, str, str, dict[str, Any]], None]
"""Records actor, action, target and detail; blocking."""


class Deployments(TypedDict):
    deployments: list[dict[str, Any]]


VersionNumber = Annotated[int, Field(ge=0, lt=10**9)]
NoticeSeconds = Annotated[int, Field(ge=0, lt=10**9)]


class DeployRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ref: str = Field(max_length=300)
    strategy: str = Field("direct", max_length=64)
    options: dict[str, Any] = Field(default_factory=dict)


class DeployDescription(BaseModel):
    """A DeployRequest with its options spelt out, which are read apart for better errors."""

    model_config = ConfigDict(extra="forbid")

    ref: str = Field(max_length=300)
    strategy: Strategy = "direct"
    options: DeploymentOptions = DeploymentOptions()


def build_routes(control: ReleaseControl, audit: Audit) -> list[Route]:
    """The routes below /admin."""

    @describes("Deploy a version of a model", scopes=("admin",), body=DeployDescription, status=202)
    async def deploy(request: Request) -> Response:
        actor = _actor(require_any(request, "admin"))
        asked = validate(DeployRequest, parse_object(await request.body()))
        read_strategy(asked.strategy)  # before they are written down
        read_options(asked.options)
        async with _Audited(audit, actor, "deploy", asked.ref, asked.model_dump()):
            row = await control.deploy(asked.ref, asked.strategy, asked.options, actor)
        return JSONResponse(row, 202)

    @describes("What is deployed", scopes=("admin",), answer=Deployments)
    async def list_deployments(request: Request) -> Response:
        require_any(request, "admin")
        return JSONResponse({"deployments": await control.deployments(None)})

    @describes("One deployment", scopes=("admin",))
    async def show_deployment(request: Request) -> Response:
        require_any(request, "admin")
        name, version = request.path_params["name"], _number(request.path_params["version"])
        return JSONResponse(_only(await control.deployments(name), name, version))

    @describes(
        "Take a model down, or one version of it",
        scopes=("admin",),
        answer=Deployments,
        status=202,
        query={"version": VersionNumber, "notice_s": NoticeSeconds},
    )
    async def undeploy(request: Request) -> Response:
        actor = _actor(require_any(request, "admin"))
        name = request.path_params["name"]
        version, notice_s = (_number_asked(request, field) for field in ("version", "notice_s"))
        detail = {"version": version, "notice_s": notice_s}
        async with _Audited(audit, actor, "undeploy", name, detail):
            rows = await control.undeploy(name, version, notice_s, actor)
        return JSONResponse({"deployments": rows}, 202)

    @describes("Weights, deployments, evidence and history of a model", scopes=("admin",))
    async def release(request: Request) -> Response:
        require_any(request, "admin")
        return JSONResponse(await control.release(request.path_params["name"]))

    return [
        Route("/admin/deployments", list_deployments),
        Route("/admin/deployments", deploy, methods=["POST"]),
        Route("/admin/deployments/{name}", undeploy, methods=["DELETE"]),
        Route("/admin/deployments/{name}/{version}", show_deployment),
        Route("/admin/releases/{name}", release),
        *(_steering_route(control, audit, verb) for verb in _STEERING),
    ]


def _steering_route(control: ReleaseControl, audit: Audit, verb: Steering) -> Route:
    @describes(_STEERING[verb], scopes=("admin",))
    async def steer(request: Request) -> Response:
        actor = _actor(require_any(request, "admin"))
        name = request.path_params["name"]
        async with _Audited(audit, actor, verb, name, {}):
            row = await control.steer(name, verb, actor)
        return JSONResponse(row)

    return Route(f"/admin/releases/{{name}}/{verb}", steer, methods=["POST"])


class _Audited:
    """Writes one row for an act, with its outcome."""

    def __init__(
        self, audit: Audit, actor: str, action: str, target: str, detail: dict[str, Any]
    ) -> None:
        self._audit = audit
        # PostgreSQL takes no NUL in a text.
        self._row = (actor, action, target.replace("\0", "\ufffd"))
        self._detail = detail

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        outcome = "accepted" if error is None else f"refused: {_short(error)}"
        detail = self._detail | {"outcome": outcome}
        await asyncio.to_thread(self._audit, *self._row, detail)


def _short(error: BaseException) -> str:
    return error.code if isinstance(error, HeliostatError) else type(error).__name__


def _actor(identity: Identity) -> str:
    # The tables hold 128 characters, which a tenant's name alone may have.
    return f"{identity.tenant[: 127 - len(identity.key_id)]}/{identity.key_id}"


def _number_asked(request: Request, field: str) -> int | None:
    text = request.query_params.get(field)
    return None if text is None else _number(text, field)


def _number(text: str, field: str = "version") -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
        raise InputError(f"{field} '{text}' is no whole number of at most 9 digits", param=field)
    return int(text)


def _only(rows: list[dict[str, Any]], name: str, version: int) -> dict[str, Any]:
    for row in rows:
        if row["version"] == version:
            return row
    raise NotFoundError(
        f"model '{name}' has no deployment of version {version}",
        hint="see `heliostat releases list`",
    )
