"""One error, in the shape that each protocol's clients expect.

The Open Inference and TensorFlow Serving routes answer `{"error": "message"}`, all others OpenAI's
`{"error": {message, type, code, param}}`. This is the only place that knows either.

    response = render(InputError("…", param="prompt"), "/v1/completions")
"""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.errors import (
    AuthenticationError,
    DatabaseBusyError,
    HeliostatError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    RateLimitedError,
    UsageError,
)
from serve_apps.gateway.telemetry.telemetry import note_error

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
# `/v1/models/NAME` itself is OpenAI's.
_TENSORFLOW = re.compile(r"/v1/models/.+(:[a-z]*|/metadata|/versions/[^/]*|/labels/[^/]*)$", re.S)


class MethodNotAllowedError(UsageError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    http_status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path takes {allowed}")
        self.allowed = allowed


def as_heliostat_error(error: Exception) -> HeliostatError:
    """Any error as one of ours; what is unexpected keeps its details to the log."""
    if isinstance(error, DatabaseBusyError):
        logger.warning("%s", error)  # where it lies is the operator's business
        return OverloadedError("the database is busy", hint="try again in a moment")
    if isinstance(error, HeliostatError):
        return error
    if isinstance(error, HTTPException):
        return _from_http(error)
    logger.error("unexpected error", exc_info=error)
    return HeliostatError(
        "an unexpected error happened here", hint="report the request id to the operator"
    )


def render(error: Exception, path: str) -> JSONResponse:
    """The response for an error on this path."""
    known = as_heliostat_error(error)
    note_error(known)
    return JSONResponse(body_for(known, path), known.http_status, headers_for(known))


def headers_for(known: HeliostatError) -> dict[str, str]:
    """What a client is told of an error beside the body."""
    headers: dict[str, str] = {}
    if isinstance(known, OverloadedError):
        headers["retry-after"] = str(_RETRY_AFTER_S)
    if isinstance(known, RateLimitedError):
        headers["retry-after"] = str(math.ceil(known.retry_after_s))
    if isinstance(known, QuotaExceededError):
        headers["x-should-retry"] = "false"  # OpenAI's clients would, in vain
    if isinstance(known, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(known, MethodNotAllowedError):
        headers["allow"] = known.allowed
    return headers


def body_for(error: HeliostatError, path: str) -> dict[str, Any]:
    """The JSON body of an error on this path."""
    if path == "/v2" or path.startswith("/v2/") or _TENSORFLOW.match(path):
        return {"error": str(error)}
    return {
        "error": {
            "message": str(error),
            "type": _openai_type(error),
            "code": error.code,
            "param": error.param,
        }
    }


def server_sent(error: Exception, path: str) -> str:
    """An error as the last event of a stream that has begun."""
    known = as_heliostat_error(error)
    note_error(known)
    return f"data: {json.dumps(body_for(known, path))}\n\n"


def _openai_type(error: HeliostatError) -> str:
    if isinstance(error, QuotaExceededError):
        return error.code
    if isinstance(error, RateLimitedError):
        return error.unit
    if error.http_status == AuthenticationError.http_status:
        return "authentication_error"
    if error.http_status == 403:
        return "permission_error"
    return "invalid_request_error" if error.http_status < 500 else "server_error"


def _from_http(error: HTTPException) -> HeliostatError:
    if error.status_code == 404:
        return NotFoundError("there is no such path", hint="GET /openapi.json lists all")
    if error.status_code == 405:
        return MethodNotAllowedError((error.headers or {}).get("Allow", ""))
    return UsageError(str(error.detail)) if error.status_code < 500 else HeliostatError("failed")
