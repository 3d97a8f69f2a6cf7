"""What happens around every request: an id, a record, a limit on the body, errors in their shape.

Plain ASGI, so that streams pass through untouched.

    app = RequestContext(BodyLimit(inner, max_bytes=32 * 1024**2), telemetry=Telemetry())
"""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import PayloadTooLargeError, UsageError
from serve_apps.gateway.access.authentication import PUBLIC_PATHS
from serve_apps.gateway.http.errors import as_heliostat_error, render
from serve_apps.gateway.http.headers import header_of
from serve_apps.gateway.http.sweep import Sweep
from serve_apps.gateway.telemetry.telemetry import RequestRecord, Telemetry, note_error

REQUEST_ID_HEADER = "x-request-id"
MODEL_VERSION_HEADER = "x-model-version"
_REQUEST_ID, _MODEL_VERSION = REQUEST_ID_HEADER.encode(), MODEL_VERSION_HEADER.encode()
UNMATCHED_ROUTE = "unmatched"
UPLOAD_PATH = "/v1/files"
"""Where bodies are written to disk as they come, so that they may be larger."""
_FORM_BYTES = 64 * 1024
"""What a form has beside its file."""
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


class SlowBodyError(UsageError):
    """The body of a request did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class RequestContext:
    """Gives each request an id and a record, and turns whatever escapes into an answer."""

    def __init__(
        self, app: ASGIApp, *, telemetry: Telemetry | None = None, sends_request_id: bool = True
    ) -> None:
        self._app = app
        self._telemetry = telemetry or Telemetry()
        self._sends_request_id = sends_request_id
        self._templates: dict[object, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_from(header_of(scope, _REQUEST_ID))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        with self._telemetry.request(
            protocol_of(scope["path"]),
            UNMATCHED_ROUTE,
            request_id=request_id,
            traceparent=header_of(scope, b"traceparent") or None,
            # Who watches the gateway's health asks each second.
            is_traced=scope["path"] not in PUBLIC_PATHS,
        ) as record:
            record.path, record.state = scope["path"], state

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    record.status = message["status"]
                    self._add_headers(message, record)
                elif message["type"] == "http.response.body":
                    record.is_complete = not message.get("more_body", False)
                await send(message)

            try:
                await self._app(scope, receive, send_noted)
            except Exception as error:
                if record.status is not None:
                    note_error(as_heliostat_error(error))
                    raise  # the answer is cut off, which is all that can still be said
                await render(error, scope["path"])(scope, receive, send_noted)
            finally:
                record.route = self._template(scope)

    def _add_headers(self, message: Message, record: RequestRecord) -> None:
        headers = message["headers"] = list(message["headers"])
        if self._sends_request_id:
            headers.append((_REQUEST_ID, record.request_id.encode()))
        if record.served is not None:
            headers.append((_MODEL_VERSION, str(record.served).encode()))
        if record.notice is not None:
            told = record.notice.headers().items()
            headers += [(name.encode(), value.encode()) for name, value in told]

    def _template(self, scope: Scope) -> str:
        """The path as it was declared, e.g. `/v2/models/{name}/infer`."""
        endpoint = scope.get("endpoint")
        if endpoint is None:
            return UNMATCHED_ROUTE
        if not self._templates:
            for route in reversed(scope["app"].routes):
                self._templates[getattr(route, "endpoint", None)] = route.path
        return self._templates.get(endpoint, UNMATCHED_ROUTE)


class BodyLimit:
    """Refuses bodies over a size, announced or counted while they come, and slow ones."""

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_upload_bytes: int = 0, max_s: float = 60.0
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max(max_bytes, max_upload_bytes + _FORM_BYTES)
        self._max_s = max_s
        self._sweep = Sweep()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOAD_PATH
        max_bytes = self._max_upload_bytes if is_upload else self._max_bytes
        # An upload may take as much longer as it may be larger.
        max_s = self._max_s * max_bytes / self._max_bytes
        announced = header_of(scope, b"content-length")
        if announced.isdigit() and int(announced) > max_bytes:
            raise _too_large(max_bytes)
        await self._app(scope, _Body(receive, self._sweep, max_bytes, max_s).receive, send)


class _Body:
    """One request's body as it comes."""

    def __init__(self, receive: Receive, sweep: Sweep, max_bytes: int, max_s: float) -> None:
        self._receive, self._sweep = receive, sweep
        self._max_bytes, self._max_s = max_bytes, max_s
        self._deadline_s = asyncio.get_running_loop().time() + max_s
        self._num_bytes = 0
        self._is_complete = False
        self._is_late = False
        self._reader: asyncio.Task[Any] | None = None

    async def receive(self) -> Message:
        """Raises SlowBodyError, PayloadTooLargeError."""
        # What is received after the body is the client's leaving, for which there is time.
        message = await (self._receive() if self._is_complete else self._receive_in_time())
        self._is_complete = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        return message

    def look(self, now_s: float) -> None:
        if now_s >= self._deadline_s and not self._is_late and self._reader is not None:
            self._is_late = True
            self._reader.cancel()

    async def _receive_in_time(self) -> Message:
        self._reader = asyncio.current_task()
        self._sweep.add(self)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if not self._is_late or self._reader is None or self._reader.uncancel():
                raise
            raise SlowBodyError(
                f"the request body did not arrive within {self._max_s:g} s", hint="send it faster"
            ) from None
        finally:
            self._sweep.discard(self)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"the request body has more than {max_bytes} bytes, the most allowed",
        hint="send fewer samples or a shorter text in each request",
    )


def protocol_of(path: str) -> str:
    """Whose door a path is."""
    if path == "/v2" or path.startswith("/v2/"):
        return "open_inference"
    if path.startswith("/v1/"):
        is_verb = path.startswith("/v1/models/") and ":" in path
        return "tensorflow_serving" if is_verb else "openai"
    return "admin" if path.startswith("/admin/") else "page"


def request_id_from(sent: str) -> str:
    """The client's own id if it is a harmless one, else a new one."""
    if sent and _ACCEPTABLE_ID.fullmatch(sent):
        return sent
    # Tells requests apart and guards nothing, so it need not cost a call of the kernel.
    return f"req_{random.getrandbits(128):032x}"
