"""What a tenant has used: its own, or any tenant's for administrators.

routes = build_routes(ledger.totals)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict

from cluster.errors import PermissionDeniedError
from cluster.ledger import Detail, Total
from cluster.security.api_keys import TENANT_NAME
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.http.requests import validate
from serve_apps.gateway.http.responses import JsonResponse

Totals = Callable[..., list[Total]]
"""As Ledger.totals; blocking."""

_SCOPES = ("usage:read", "infer", "admin")
_DETAILS: dict[str, Detail] = {"version": "version", "key": "source"}


def _read_time(text: Any) -> datetime:
    # What was '+' in '+00:00' arrives as a space.
    try:
        moment = datetime.fromisoformat(str(text).replace(" ", "+"))
    except ValueError:
        raise ValueError(f"{str(text)[:40]!r} is no time; write 2030-01-31T12:00:00Z") from None
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError:  # the first or the last day that there is, elsewhere
        return moment.replace(tzinfo=UTC)


def _month_begin() -> datetime:
    return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


class UsageQuery(BaseModel):
    """The parameters of GET /v1/usage."""

    model_config = ConfigDict(extra="forbid")

    tenant: Annotated[str, Field(pattern=TENANT_NAME.pattern)] | None = None
    since: Annotated[datetime, BeforeValidator(_read_time)] = Field(default_factory=_month_begin)
    by: Literal["version", "key", "version,key", "key,version"] | None = None

    @property
    def details(self) -> tuple[Detail, ...]:
        names = (self.by or "").split(",")
        return tuple(detail for name, detail in _DETAILS.items() if name in names)


class UsageRow(TypedDict):
    """What was used of one kind and model."""

    kind: str
    model: str
    version: NotRequired[int | None]
    key: NotRequired[str | None]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cpu_s: float
    gpu_s: float


class UsageList(TypedDict):
    object: Literal["list"]
    tenant: str
    since: str
    data: list[UsageRow]


def build_routes(totals: Totals) -> list[Route]:
    """The route of usage."""

    @describes(
        "What the key's tenant has used; any tenant's for administrators",
        scopes=_SCOPES,
        query={name: field.annotation for name, field in UsageQuery.model_fields.items()},
        answer=UsageList,
    )
    async def usage(request: Request) -> Response:
        identity = require_any(request, *_SCOPES)
        asked = validate(UsageQuery, dict(request.query_params))
        tenant = asked.tenant or identity.tenant
        if tenant != identity.tenant and "admin" not in identity.scopes:
            raise PermissionDeniedError(
                f"this key is of tenant '{identity.tenant}', another's usage is not for it",
                hint="leave `tenant` out, or use a key with the scope 'admin'",
                param="tenant",
            )
        by = asked.details
        found = await asyncio.to_thread(totals, tenant=tenant, since=asked.since, by=by)
        return JsonResponse(
            UsageList(
                object="list",
                tenant=tenant,
                since=asked.since.isoformat(timespec="seconds"),
                data=[_row(total, by) for total in found],
            )
        )

    return [Route("/v1/usage", usage)]


def _row(total: Total, by: tuple[Detail, ...]) -> UsageRow:
    row = UsageRow(
        kind=total.kind,
        model=total.model,
        requests=total.num_requests,
        prompt_tokens=total.prompt_tokens,
        completion_tokens=total.completion_tokens,
        cpu_s=round(total.cpu_s, 1),
        gpu_s=round(total.gpu_s, 1),
    )
    if "version" in by:
        row["version"] = total.version
    if "source" in by:
        row["key"] = total.source
    return row
