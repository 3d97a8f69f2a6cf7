"""What surrounds every gRPC call: a key, an id, and errors as gRPC's own statuses.

The counterpart of `access/authentication.py` and `http/middleware.py`. The key is checked before
the first byte of a message is read.

    server = grpc.aio.server(interceptors=[Door(keys, callers, telemetry)])
    handler = grpc.unary_unary_rpc_method_handler(answering(work), …)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from cluster.errors import HeliostatError, InputError
from cluster.security.api_keys import Identity
from serve_apps.gateway.access.authentication import KeyCache, bearer_key, require_scope
from serve_apps.gateway.access.callers import Caller, Callers
from serve_apps.gateway.http.errors import as_heliostat_error, headers_for
from serve_apps.gateway.http.middleware import (
    MODEL_VERSION_HEADER,
    REQUEST_ID_HEADER,
    UNMATCHED_ROUTE,
    SlowBodyError,
    request_id_from,
)
from serve_apps.gateway.http.sweep import Sweep
from serve_apps.gateway.open_inference.messages import HEALTH_SERVICE, INFERENCE_SERVICE
from serve_apps.gateway.stickiness import SESSION_HEADER
from serve_apps.gateway.telemetry.telemetry import (
    RequestRecord,
    Telemetry,
    current_request,
    note_error,
)

PUBLIC_METHODS = frozenset(
    {
        f"/{INFERENCE_SERVICE}/ServerLive",
        f"/{INFERENCE_SERVICE}/ServerReady",
        f"/{HEALTH_SERVICE}/Check",
    }
)
"""Everything else needs a key, unknown methods included."""

_PROTOCOL = "open_inference_grpc"
OK = 200
"""As HTTP has it: what telemetry knows."""
_MAX_DETAILS_BYTES = 2000
"""Of a status: it travels in headers, for which clients have little room."""
_MAX_MESSAGE_S = 60.0
"""For a message to arrive in, as long as for a body over HTTP."""
_MAX_PUBLIC_S = 10.0
"""For the empty message of a call without a key."""
_MAX_SILENCE_S = 600.0
"""Between the messages of a stream."""

_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    410: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class UnknownMethodError(HeliostatError):
    """There is no such method, or we do not offer it."""

    code = "unknown_method"
    http_status = 501


@dataclass
class Call:
    """One call under way."""

    request_id: str
    keys: KeyCache
    callers: Callers
    telemetry: Telemetry
    key: str
    sweep: Sweep
    traceparent: str | None = None
    session: str = ""
    """Who the customer is within the tenant, if it is said."""
    route: str = UNMATCHED_ROUTE
    """The method's name, once it is known to be one."""
    is_public: bool = False
    record: RequestRecord | None = None
    """Says which model answers, once that is known."""
    caller: Caller | None = None

    async def identity(self) -> Identity:
        """Who calls; asked again, it notices that the key was revoked meanwhile.

        Raises:
            AuthenticationError: no good key.
        """
        return await self.keys.identify(self.key)

    @asynccontextmanager
    async def entered(self, *scopes: str, counts: bool = False) -> AsyncIterator[None]:
        """Be the current caller for one request, which may count in the tenant's minute.

        Raises:
            AuthenticationError: no good key.
            PermissionDeniedError: a key with none of the scopes.
            RateLimitedError: the tenant has no request left.
        """
        identity = await self.identity()
        if (record := current_request()) is not None:
            record.state["identity"] = identity
        require_scope(identity, *scopes)
        self.caller = self.callers.make(identity, lambda: self.session)
        if counts:
            await self.caller.count_request()
        with self.caller.entered():
            yield

    async def message(self, context: Any, max_s: float) -> bytes | None:
        """The call's next message; None after its last.

        Raises:
            SlowBodyError: it did not arrive in time.
        """
        wait = _Wait(max_s)
        self.sweep.add(wait)
        try:
            found = await context.read()
        except asyncio.CancelledError:
            if not wait.is_late or wait.reader.uncancel():
                raise
            raise SlowBodyError(
                f"no message arrived within {max_s:g} s", hint="send it faster"
            ) from None
        finally:
            self.sweep.discard(wait)
        return None if found is grpc.aio.EOF else found

    def recorded(self, number: int = 1) -> AbstractContextManager[RequestRecord]:
        """The time in which it is answered, or a request of this number in its stream."""
        return self.telemetry.request(
            _PROTOCOL,
            self.route,
            request_id=self.request_id if number == 1 else f"{self.request_id}-{number}",
            traceparent=self.traceparent,
            # Who watches the gateway's health asks each second.
            is_traced=not self.is_public,
        )

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """What the caller is told beside the answer."""
        told = [(REQUEST_ID_HEADER, self.request_id)]
        if self.record is not None and self.record.served is not None:
            told.append((MODEL_VERSION_HEADER, str(self.record.served)))
            if self.record.notice is not None:
                told += self.record.notice.headers().items()
        if self.caller is not None:
            told += [(name.decode(), value.decode()) for name, value in self.caller.limit_headers()]
        return tuple(told)


class _Wait:
    """For a message."""

    def __init__(self, max_s: float) -> None:
        reader = asyncio.current_task()
        assert reader is not None, "calls are answered by tasks"
        self.reader = reader
        self.is_late = False
        self._deadline_s = asyncio.get_running_loop().time() + max_s

    def look(self, now_s: float) -> None:
        if now_s >= self._deadline_s and not self.is_late:
            self.is_late = True
            self.reader.cancel()


_call: ContextVar[Call] = ContextVar("call")
Work = Callable[[bytes, Call], Awaitable[Any]]
StreamWork = Callable[[AsyncIterator[bytes], Call], AsyncGenerator[Any, None]]


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets nobody pass without a good key."""

    def __init__(self, keys: KeyCache, callers: Callers, telemetry: Telemetry) -> None:
        self._keys = keys
        self._callers = callers
        self._telemetry = telemetry
        self._sweep = Sweep()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """The handler of a call, or one that refuses it without reading on."""
        metadata = dict(details.invocation_metadata)
        call = Call(
            request_id=request_id_from(str(metadata.get(REQUEST_ID_HEADER, ""))),
            keys=self._keys,
            callers=self._callers,
            telemetry=self._telemetry,
            sweep=self._sweep,
            key=bearer_key(str(metadata.get("authorization", ""))),
            traceparent=metadata.get("traceparent"),
            session=str(metadata.get(SESSION_HEADER, "")),
            is_public=details.method in PUBLIC_METHODS,
        )
        # The handler runs in the same task.
        _call.set(call)
        if not call.is_public:
            try:
                await call.identity()
            except HeliostatError as error:
                return _refusal(call, error)
        handler = await continuation(details)
        if handler is None:
            return _refusal(
                call,
                UnknownMethodError(
                    f"there is no method '{details.method:.200}' here",
                    hint=f"services are {INFERENCE_SERVICE} and {HEALTH_SERVICE}, without what "
                    "changes models or shares memory",
                ),
            )
        call.route = details.method.rpartition("/")[2]
        return handler


def answering(work: Work) -> Callable[[AsyncIterator[bytes], Any], Awaitable[Any]]:
    """A method of one message and one answer, whose errors become statuses.

    For a handler of streams: gRPC itself would wait for the message for ever.
    """

    async def behave(_requests: AsyncIterator[bytes], context: Any) -> Any:
        call = _call.get()
        with call.recorded() as record:
            call.record = record
            try:
                max_s = _MAX_PUBLIC_S if call.is_public else _MAX_MESSAGE_S
                data = await call.message(context, max_s)
                if data is None:
                    raise InputError("the call has no message")
                answer = await work(data, call)
            except Exception as error:
                await _abort(context, call, error)
            record.status, record.is_complete = OK, True
        context.set_trailing_metadata(call.trailing_metadata)
        return answer

    return behave


def streaming(work: StreamWork) -> Callable[[AsyncIterator[bytes], Any], Awaitable[None]]:
    """A method with a stream of answers, whose errors become statuses and end it; each request of
    it has a record of its own, which `work` opens."""

    async def behave(_requests: AsyncIterator[bytes], context: Any) -> None:
        call = _call.get()
        try:
            async with aclosing(work(_messages(call, context), call)) as answers:
                async for answer in answers:
                    await context.write(answer)
        except Exception as error:
            await _abort(context, call, error)
        context.set_trailing_metadata(call.trailing_metadata)

    return behave


async def _messages(call: Call, context: Any) -> AsyncIterator[bytes]:
    max_s = _MAX_MESSAGE_S
    while True:
        try:
            data = await call.message(context, max_s)
        except SlowBodyError:
            with call.recorded():  # a stream that falls silent is no request, but seen
                raise
        if data is None:
            return
        yield data
        max_s = _MAX_SILENCE_S


def message_of(error: Exception) -> str:
    """What a caller is told of an error: one line, not too long for a header."""
    text = " ".join(str(as_heliostat_error(error)).split())
    return text.encode()[:_MAX_DETAILS_BYTES].decode(errors="ignore")


def status_of(error: Exception) -> grpc.StatusCode:
    """gRPC's word for an error."""
    return _STATUSES.get(as_heliostat_error(error).http_status, grpc.StatusCode.INTERNAL)


def _refusal(call: Call, error: HeliostatError) -> Any:
    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> None:
        with call.recorded():
            await _abort(context, call, error)

    # As a stream, so that no message is read first.
    return grpc.stream_stream_rpc_method_handler(refuse)


async def _abort(context: Any, call: Call, error: Exception) -> NoReturn:
    known = as_heliostat_error(error)
    note_error(known)
    told = (*call.trailing_metadata, *headers_for(known).items())
    await context.abort(status_of(known), message_of(known), told)
    raise asyncio.CancelledError  # abort has raised already
