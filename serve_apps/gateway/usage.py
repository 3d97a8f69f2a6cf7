"""What a tenant has used: its own, or any tenant's for administrators.

routes = build_routes(ledger.totals)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import InputError, PermissionDeniedError
from cluster.ledger import Detail, Total
from serve_apps.gateway.authentication import require_any

Totals = Callable[..., list[Total]]
"""As Ledger.totals; blocking."""

_DETAILS: dict[str, Detail] = {"version": "version", "key": "source"}
_PARAMETERS = ("tenant", "since", "by")


def build_routes(totals: Totals) -> list[Route]:
    """The route of usage."""

    async def usage(request: Request) -> Response:
        identity = require_any(request, "usage:read", "infer", "admin")
        query = request.query_params
        for name in query:
            if name not in _PARAMETERS:
                raise InputError(
                    f"parameter '{name}' is not known here",
                    hint=f"known are: {', '.join(_PARAMETERS)}",
                    param=name,
                )
        tenant = query.get("tenant", identity.tenant)
        if tenant != identity.tenant and "admin" not in identity.scopes:
            raise PermissionDeniedError(
                f"this key is of tenant '{identity.tenant}', another's usage is not for it",
                hint="leave `tenant` out, or use a key with the scope 'admin'",
                param="tenant",
            )
        since = _since(query.get("since"))
        by = _details(query.get("by"))
        found = await asyncio.to_thread(totals, tenant=tenant, since=since, by=by)
        return JSONResponse(
            {
                "object": "list",
                "tenant": tenant,
                "since": since.isoformat(timespec="seconds"),
                "data": [_row(total, by) for total in found],
            }
        )

    return [Route("/v1/usage", usage)]


def _since(text: str | None) -> datetime:
    """A moment; without one, the beginning of the month."""
    if text is None:
        return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    try:
        # What was '+' in '+00:00' arrives as a space.
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError(
            f"since {text!r} is no time", hint="write 2030-01-31T12:00:00Z", param="since"
        ) from None


def _details(text: str | None) -> tuple[Detail, ...]:
    names = [] if not text else text.split(",")
    for name in names:
        if name not in _DETAILS:
            raise InputError(
                f"usage cannot be by {name!r}",
                hint=f"expected some of: {','.join(_DETAILS)}",
                param="by",
            )
    return tuple(detail for name, detail in _DETAILS.items() if name in names)


def _row(total: Total, by: tuple[Detail, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": total.kind, "model": total.model}
    if "version" in by:
        row["version"] = total.version
    if "source" in by:
        row["key"] = total.source
    return row | {
        "requests": total.num_requests,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cpu_s": round(total.cpu_s, 1),
        "gpu_s": round(total.gpu_s, 1),
    }
