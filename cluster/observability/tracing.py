"""Traces by OpenTelemetry, sent over OTLP/HTTP where the settings name an endpoint.

Without one nothing of OpenTelemetry is even imported, and every call here returns at once.

    tracing = open_tracing(settings, "gateway")
    with tracing.span("infer digits/3", attributes={…}) as span:
        handle.predict.remote(arrays, traceparent_of(span))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from cluster.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span

Attributes = Mapping[str, Any]
Kind = Literal["internal", "server", "client"]


class Tracing:
    """Starts spans, or none: `provider` is None where tracing is off."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("heliostat") if provider is not None else None

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def start(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        traceparent: str | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
    ) -> Span | None:
        """A span that is not the current one; the caller ends it, with `end`.

        Args:
            traceparent: W3C header of the parent; without it the current span is the parent.
            attributes: None as a value leaves an attribute out.
        """
        if self._tracer is None:
            return None
        from opentelemetry.trace import Link, SpanKind

        return self._tracer.start_span(
            name,
            context=_context_of(traceparent),
            kind=SpanKind[kind.upper()],
            attributes=_given(attributes or {}),
            links=[Link(span.get_span_context()) for span in links],
        )

    def span(self, name: str, **options: Any) -> AbstractContextManager[Span | None]:
        """As `start`, but current within the block, whose end and error it records."""
        if self._tracer is None:
            return nullcontext()
        return self._current(name, options)

    def traceparent(self) -> str | None:
        """What continues the current span elsewhere; None where nothing is recorded."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import get_current_span

        return traceparent_of(get_current_span())

    @contextmanager
    def _current(self, name: str, options: dict[str, Any]) -> Iterator[Span | None]:
        from opentelemetry.trace import use_span

        span = self.start(name, **options)
        assert span is not None
        with use_span(span, end_on_exit=True):
            yield span

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def open_tracing(settings: Settings, part: str) -> Tracing:
    """Tracing as the settings want it; `part` is what this process is, e.g. "gateway"."""
    if not settings.otlp_endpoint:
        return Tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        sampler=_sampler(settings.trace_ratio),
        resource=Resource.create({"service.name": f"heliostat-{part}"}),
    )
    endpoint = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


def traceparent_of(span: Span | None) -> str | None:
    """The W3C header that continues this span elsewhere; None where nothing is recorded."""
    if span is None or not span.is_recording():
        return None
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent")


def end(span: Span | None, attributes: Attributes, error: BaseException | None = None) -> None:
    """End a span with what is known by then."""
    if span is None:
        return
    span.set_attributes(_given(attributes))
    if error is not None:
        set_failed(span, error)
    span.end()


def set_failed(span: Span, error: BaseException | None) -> None:
    """Mark a span as failed, and say by what where that is known."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, None if error is None else str(error)))


def _context_of(traceparent: str | None) -> Context | None:
    if traceparent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _given(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _sampler(ratio: float) -> Sampler:
    """The ratio binds for whoever calls: a client's own decision to sample costs us, not them.

    It follows from the trace's id, so that all processes decide alike.
    """
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    by_id = TraceIdRatioBased(ratio)
    return ParentBased(root=by_id, remote_parent_sampled=by_id)
