"""What is written down about a request while it is answered: metrics, spans, its log line.

A protocol opens a record for each request; the parts below find it through a context variable, so
that no signature carries it. Knows nothing of HTTP.

    telemetry = Telemetry()
    with telemetry.request("open_inference_grpc", "ModelInfer", request_id="req_1") as record:
        record.state["identity"] = identity
        …                                    # an error that leaves here is counted and logged
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.errors import HeliostatError, NotFoundError, OverloadedError
from cluster.observability.logs import request_id_of_logs
from cluster.observability.tracing import Tracing, end, set_failed, traceparent_of
from cluster.security.api_keys import Identity
from serve_apps.gateway.notices import Notice
from serve_apps.gateway.routing_table import Routes, ServedVersion
from serve_apps.gateway.telemetry.instruments import (
    NO_MODEL,
    UNKNOWN_MODEL,
    Instruments,
    ModelLabel,
)
from serve_apps.llm.engine import EngineRequest, TokenOutput

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from serve_apps.gateway.backend import Arrays

CLIENT_GONE = 499
"""Status of a request whose client left before its answer was complete."""
_TOO_MANY_REQUESTS = 429
_MAX_REASON = 300

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("heliostat.access")
_NOTHING = nullcontext()


@dataclass(eq=False, slots=True)
class RequestRecord:
    """One request, as far as it has come."""

    request_id: str
    protocol: str
    route: str
    started_s: float = field(default_factory=time.perf_counter)
    path: str = ""
    """As the client wrote it: for traces, never a label."""
    state: dict[str, Any] = field(default_factory=dict)
    """What authentication finds out is put here, as `identity`."""
    served: ServedVersion | None = None
    """The version that the request names."""
    notice: Notice | None = None
    """Of that version's end."""
    status: int | None = None
    """As HTTP has it, in every protocol; None until the answer has begun."""
    is_complete: bool = False
    error: HeliostatError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    embedded_tokens: int = 0
    """Those of the prompt tokens that no engine read."""
    span: Span | None = None
    afterwards: list[Callable[[], None]] | None = None
    """To be called when the answer has been sent."""

    @property
    def identity(self) -> Identity | None:
        """Who the verified key stands for."""
        identity: Identity | None = self.state.get("identity")
        return identity

    def outcome(self) -> int:
        """The status; of an answer that broke off, what it would have been had that come first."""
        if self.error is not None:
            return self.error.http_status
        return self.status if self.is_complete and self.status is not None else CLIENT_GONE


_current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)
_joined: ContextVar[Sequence[RequestRecord]] = ContextVar("joined", default=())
"""The requests of the batch that this code calls a replica for."""


def current_request() -> RequestRecord | None:
    """The request that this code works for."""
    return _current.get()


def note_error(error: HeliostatError) -> None:
    """An error is being answered."""
    record = _current.get()
    if record is not None:
        record.error = error


def note_model(served: ServedVersion, notice: Notice | None = None) -> None:
    """The request is about this version, which may be about to end."""
    record = _current.get()
    if record is not None:
        record.served, record.notice = served, notice


def when_answered(action: Callable[[], None]) -> None:
    """Do this once the current request's answer has been sent; at once where there is none."""
    record = _current.get()
    if record is None:
        action()
        return
    if record.afterwards is None:
        record.afterwards = []
    record.afterwards.append(action)


def note_embedded(num_tokens: int) -> None:
    """A graph has read so many tokens for the request."""
    record = _current.get()
    if record is not None:
        record.prompt_tokens += num_tokens
        record.embedded_tokens += num_tokens


class Telemetry:
    """Where one gateway replica writes down what it does."""

    def __init__(
        self,
        instruments: Instruments | None = None,
        tracing: Tracing | None = None,
        *,
        logs_access: bool = False,
    ) -> None:
        self.instruments = instruments or Instruments()
        self.tracing = tracing or Tracing()
        self._logs_access = logs_access

    def request(
        self,
        protocol: str,
        route: str,
        *,
        request_id: str,
        traceparent: str | None = None,
        is_traced: bool = True,
    ) -> _Watched:
        """The time in which a request is answered.

        Args:
            protocol, route: never a text of the client's; the route may still change.
            traceparent: W3C header, if the client sent one.
        """
        span = None
        if is_traced and self.tracing.is_on:
            span = self.tracing.span(route, kind="server", traceparent=traceparent)
        return _Watched(self, RequestRecord(request_id, protocol, route), span)

    def model_call(self, served: ServedVersion) -> AbstractContextManager[Any]:
        """A request's way through pre-processing and queue to a graph's answer."""
        if not self.tracing.is_on:
            return _NOTHING
        attributes = _model_attributes(served)
        record = _current.get()
        if record is None or not record.path.endswith("/embeddings"):
            return self.tracing.span(f"infer {served}", attributes=attributes)
        attributes |= _generative_attributes(served, "embeddings")
        return self.tracing.span(f"embeddings {served}", attributes=attributes)

    def stream(self, served: ServedVersion, request: EngineRequest) -> StreamWatch:
        """A language model's answer; see StreamWatch."""
        return StreamWatch(self, served, request)

    def watch_queue(self, served: ServedVersion, num_waiting: Callable[[], int]) -> None:
        """Ask for the length of this queue whenever metrics are exported."""
        gauge = self.instruments.queue_depth.labels(*label_of(served))
        gauge.set_function(num_waiting)

    def batches_of(
        self, served: ServedVersion
    ) -> Callable[[Sequence[float], int, Sequence[Context]], None]:
        """What a batcher calls with each batch: waits in seconds, samples, requests' contexts."""
        cells = self.instruments.version(label_of(served))

        def taken(waits_s: Sequence[float], num_samples: int, contexts: Sequence[Context]) -> None:
            for wait_s in waits_s:
                cells.wait(wait_s)
            cells.batch(num_samples)
            if self.tracing.is_on:
                _joined.set([record for c in contexts if (record := c.get(_current)) is not None])

        return taken

    def calls_of(
        self, served: ServedVersion, call: Callable[[Arrays], Awaitable[Arrays]]
    ) -> Callable[[Arrays], Awaitable[Arrays]]:
        """The same call, watched. It is part of its first request's trace, the others link."""
        observe = self.instruments.version(label_of(served)).call

        async def watched(arrays: Arrays) -> Arrays:
            started_s = time.perf_counter()
            others = [record.span for record in _joined.get()[1:] if record.span is not None]
            attributes = _model_attributes(served)
            with self.tracing.span(
                f"call {served}", kind="client", attributes=attributes, links=others
            ):
                try:
                    return await call(arrays)
                finally:
                    observe(time.perf_counter() - started_s)

        return watched

    def follow(self, routes: Routes) -> None:
        """Forget what is no longer served."""
        self.instruments.keep_only(label_of(served) for served in routes.served.values())
        for served in routes.served.values():
            self.instruments.enter(label_of(served), served.state)

    def finish(self, record: RequestRecord) -> None:
        """A request has been answered, or given up."""
        duration_s = time.perf_counter() - record.started_s
        status, instruments = record.outcome(), self.instruments
        instruments.answered(record.protocol, record.route, status, duration_s)
        label = _label_of(record)
        tenant = instruments.tenant(record.identity.tenant if record.identity else None)
        if label is not NO_MODEL:
            instruments.answered_model(label, tenant, status, duration_s)
        if record.embedded_tokens:
            tokens = instruments.tokens.labels(*label, tenant, "prompt")
            tokens.inc(record.embedded_tokens)
        if is_shed(record.error):
            assert record.error is not None
            instruments.shed.labels(record.error.code, *label).inc()
        elif status >= 500:
            logger.warning("request failed", extra=_log_fields(record, status, duration_s))
        if self._logs_access:
            access_logger.info("request", extra=_log_fields(record, status, duration_s))
        if record.span is not None:
            record.span.update_name(record.route)
            record.span.set_attributes(_request_attributes(record, status))
            if status >= 500:
                set_failed(record.span, record.error)


class _Watched:
    """As a class, for it is on every request's way: a generator costs three times as much."""

    __slots__ = ("_in_flight", "_record", "_span", "_telemetry", "_tokens")

    def __init__(
        self,
        telemetry: Telemetry,
        record: RequestRecord,
        span: AbstractContextManager[Span | None] | None,
    ) -> None:
        self._telemetry = telemetry
        self._record = record
        self._span = span

    def __enter__(self) -> RequestRecord:
        record = self._record
        self._in_flight = self._telemetry.instruments.in_flight_of(record.protocol)
        self._in_flight.inc()
        self._tokens = _current.set(record), request_id_of_logs.set(record.request_id)
        if self._span is not None:
            record.span = self._span.__enter__()
        return record

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        record = self._record
        if isinstance(error, Exception) and record.error is None:
            known = error if isinstance(error, HeliostatError) else None
            record.error = known or HeliostatError("failed")
        self._in_flight.dec()
        try:
            self._telemetry.finish(record)
        finally:
            if self._span is not None:
                self._span.__exit__(kind, error, trace)
            _current.reset(self._tokens[0])
            request_id_of_logs.reset(self._tokens[1])
            for action in record.afterwards or ():
                action()


class StreamWatch:
    """Counts and times the tokens of one answer.

    with telemetry.stream(served, request) as watch:
        async for output in watch.outputs(outputs):
            ...
    """

    def __init__(self, telemetry: Telemetry, served: ServedVersion, request: EngineRequest) -> None:
        instruments, label = telemetry.instruments, label_of(served)
        self._served = served
        self._continuations = instruments.continuations
        self._record = _current.get()
        self._cells = instruments.version(label)
        identity = self._record.identity if self._record else None
        tenant = instruments.tenant(identity.tenant if identity else None)
        self._prompt = instruments.tokens.labels(*label, tenant, "prompt")
        self._completion = instruments.tokens.labels(*label, tenant, "completion")
        self._last_s = self._record.started_s if self._record else time.perf_counter()
        self._num_tokens = 0
        self._finish_reason: str | None = None
        self._span = telemetry.tracing.start(
            f"{_operation(self._record)} {served}",
            kind="client",
            attributes=_model_attributes(served)
            | _generative_attributes(served, _operation(self._record))
            | _sampling_attributes(request),
        )
        self.request = replace(request, traceparent=traceparent_of(self._span))
        """What the replica is to be sent: with the trace's context."""

    def __enter__(self) -> StreamWatch:
        self._cells.streams.inc()
        return self

    async def outputs(
        self, outputs: AsyncGenerator[TokenOutput, None]
    ) -> AsyncGenerator[TokenOutput, None]:
        """The same outputs, noted as they come."""
        try:
            async for output in outputs:
                self._take(output)
                yield output
        finally:
            await outputs.aclose()

    def continued(self, reason: str) -> None:
        """The answer goes on at another replica; `reason` is 'failed' or 'moved'."""
        self._continuations.labels(*label_of(self._served), reason).inc()
        if self._span is not None:
            self._span.add_event("continued elsewhere", {"heliostat.reason": reason})

    def _take(self, output: TokenOutput) -> None:
        num_tokens = len(output.token_ids)
        self._finish_reason = output.finish_reason
        if not num_tokens:
            return
        now_s = time.perf_counter()
        if self._num_tokens:
            self._cells.next_token((now_s - self._last_s) / num_tokens)
        else:
            self._begin(now_s)
        self._last_s = now_s
        self._num_tokens += num_tokens
        self._completion.inc(num_tokens)
        if self._record is not None:
            self._record.completion_tokens += num_tokens

    def _begin(self, now_s: float) -> None:
        num_prompt = len(self.request.prompt_ids)
        self._cells.first_token(now_s - self._last_s)
        self._prompt.inc(num_prompt)
        if self._record is not None:
            self._record.prompt_tokens += num_prompt
        if self._span is not None:
            self._span.add_event("first token")

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._cells.streams.dec()
        if self._span is None:
            return
        reasons = (self._finish_reason,) if self._finish_reason else None
        end(
            self._span,
            {
                "gen_ai.usage.input_tokens": len(self.request.prompt_ids),
                "gen_ai.usage.output_tokens": self._num_tokens,
                "gen_ai.response.finish_reasons": reasons,
            },
            error if isinstance(error, Exception) else None,
        )


def label_of(served: ServedVersion) -> ModelLabel:
    return ModelLabel(served.name, str(served.version))


def is_shed(error: HeliostatError | None) -> bool:
    """Whether a request was refused for lack of room, here or in its tenant's limits."""
    return isinstance(error, OverloadedError) or (
        error is not None and error.http_status == _TOO_MANY_REQUESTS
    )


def _label_of(record: RequestRecord) -> ModelLabel:
    if record.served is not None:
        return label_of(record.served)
    is_unknown = isinstance(record.error, NotFoundError) and record.error.param == "model"
    return UNKNOWN_MODEL if is_unknown else NO_MODEL


def _log_fields(record: RequestRecord, status: int, duration_s: float) -> dict[str, Any]:
    identity, served, error = record.identity, record.served, record.error
    fields = {
        "request_id": record.request_id,
        "protocol": record.protocol,
        "route": record.route,
        "status": status,
        "duration_ms": round(1000 * duration_s, 3),
        "tenant": identity.tenant if identity else None,
        "key_id": identity.key_id if identity else None,
        "model_version": str(served) if served else None,
        "package_digest": served.digest if served else None,
        "prompt_tokens": record.prompt_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "error": error.code if error else None,
        "reason": str(error)[:_MAX_REASON] if error else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _request_attributes(record: RequestRecord, status: int) -> dict[str, Any]:
    fields = {
        "http.route": record.route,
        "url.path": record.path,
        "http.response.status_code": status,
        "error.type": record.error.code if record.error else None,
        "heliostat.protocol": record.protocol,
        "heliostat.request_id": record.request_id,
        "heliostat.tenant": record.identity.tenant if record.identity else None,
        "heliostat.key_id": record.identity.key_id if record.identity else None,
        "heliostat.model_version": str(record.served) if record.served else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _model_attributes(served: ServedVersion) -> dict[str, Any]:
    return {
        "heliostat.model_version": str(served),
        "heliostat.package_digest": served.digest,
    }


def _operation(record: RequestRecord | None) -> str:
    return "chat" if record is not None and "/chat/" in record.path else "text_completion"


def _generative_attributes(served: ServedVersion, operation: str) -> dict[str, Any]:
    """By OpenTelemetry's conventions for generative models."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "heliostat",
        "gen_ai.request.model": served.name,
        "gen_ai.response.model": str(served),
    }


def _sampling_attributes(request: EngineRequest) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.seed": sampling.seed,
    }
