"""One trace from a client's header to the replica's work, over a real OTLP receiver at the end."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.observability.tracing import Tracing, open_tracing
from cluster.settings import Settings
from serve_apps.description import Description
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.serve_backend import ServeBackend
from serve_apps.llm.engine import EngineRequest, Sampling, TokenOutput
from serve_apps.llm.traced import traced_steps
from serve_apps.predictor.deployment import Predictor

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]}
CHAT = {
    "model": "talker@champion",
    "messages": [{"role": "user", "content": "the sun"}],
    "max_tokens": 4,
    "temperature": 0,
    "seed": 7,
    "stream": True,
}


@pytest.fixture
def spans(gateway: Any) -> InMemorySpanExporter:
    """What the gateway of this test has traced."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    gateway.telemetry.tracing = Tracing(provider)
    return exporter


def named(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    found = [span for span in spans.get_finished_spans() if span.name == name]
    assert len(found) == 1, [span.name for span in spans.get_finished_spans()]
    return found[0]


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def id_of(span: ReadableSpan) -> str:
    return f"{span.get_span_context().span_id:016x}"


async def test_a_graphs_trace_goes_from_the_clients_to_the_call(
    gateway: Any, spans: InMemorySpanExporter
) -> None:
    headers = gateway.headers() | {"traceparent": TRACEPARENT, "x-request-id": "mine"}
    await gateway.client.post("/v2/models/classes/infer", json=PIXELS, headers=headers)
    request = named(spans, "/v2/models/{name}/infer")
    infer, call = named(spans, "infer classes/2"), named(spans, "call classes/2")
    assert {f"{span.get_span_context().trace_id:032x}" for span in (request, infer, call)} == {
        TRACE_ID
    }
    assert parent_of(request) == PARENT_ID
    assert parent_of(infer) == id_of(request)
    assert parent_of(call) == id_of(infer)
    attributes = dict(request.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["heliostat.request_id"] == "mine"
    assert attributes["heliostat.tenant"] == "acme"
    assert attributes["heliostat.model_version"] == "classes/2"
    digest = gateway.served["classes", 2].digest
    assert (call.attributes or {})["heliostat.package_digest"] == digest


async def test_requests_that_share_a_call_are_linked_to_it(
    gateway: Any, spans: InMemorySpanExporter
) -> None:
    headers = gateway.headers()
    await asyncio.gather(
        *(
            gateway.client.post("/v2/models/classes/infer", json=PIXELS, headers=headers)
            for _ in range(6)
        )
    )
    finished = spans.get_finished_spans()
    requests = {id_of(s) for s in finished if s.name == "/v2/models/{name}/infer"}
    calls = [span for span in finished if span.name == "call classes/2"]
    assert len(requests) == 6
    assert len(calls) < 6, "some were joined"
    links = [f"{link.context.span_id:016x}" for call in calls for link in call.links]
    assert len(links) == 6 - len(calls)
    assert set(links) < requests


async def test_a_language_models_span_has_the_gen_ai_attributes(
    gateway: Any, spans: InMemorySpanExporter
) -> None:
    sent: list[EngineRequest] = []
    generate = gateway.backend.generate

    def remembering(application: str, request: EngineRequest, *, drain_s: float) -> Any:
        sent.append(request)
        return generate(application, request, drain_s=drain_s)

    gateway.backend.generate = remembering
    body = CHAT | {"model": "talker/1"}
    headers = gateway.headers() | {"traceparent": TRACEPARENT}
    await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    span = named(spans, "chat talker/1")
    attributes = dict(span.attributes or {})
    (request,) = sent
    assert {name: attributes[name] for name in attributes if name.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "heliostat",
        "gen_ai.request.model": "talker",
        "gen_ai.response.model": "talker/1",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert [event.name for event in span.events] == ["first token"]
    assert request.traceparent == f"00-{TRACE_ID}-{id_of(span)}-01"
    assert parent_of(span) == id_of(named(spans, "/v1/chat/completions"))


async def test_a_failure_marks_its_spans(gateway: Any, spans: InMemorySpanExporter) -> None:
    gateway.engine.fail("out of memory")
    body = CHAT | {"model": "talker", "stream": False}
    answer = await gateway.client.post("/v1/chat/completions", json=body, headers=gateway.headers())
    assert answer.status_code == 502
    for name in ("/v1/chat/completions", "chat talker/1"):
        span = named(spans, name)
        assert not span.status.is_ok
        assert "out of memory" in (span.status.description or "")


async def test_health_is_not_traced_and_what_is_not_traced_reaches_no_replica(
    gateway: Any, spans: InMemorySpanExporter
) -> None:
    await gateway.client.get("/v2/health/live", headers={"traceparent": TRACEPARENT})
    assert not spans.get_finished_spans()
    gateway.telemetry.tracing = Tracing()
    gateway.backend.generate = lambda application, request: refuse(request)

    def refuse(request: EngineRequest) -> Any:
        assert request.traceparent is None
        raise AssertionError("seen")

    await gateway.client.post("/v1/chat/completions", json=CHAT, headers=gateway.headers())
    assert not spans.get_finished_spans()


async def test_the_handle_call_carries_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    backend = ServeBackend(tracing)
    calls: list[tuple[Any, ...]] = []

    async def call(*arguments: Any, **_: Any) -> Arrays:
        calls.append(arguments)
        return {}

    monkeypatch.setattr(backend._handles, "call", call)
    await backend.predict("digits.v1", {})
    with tracing.span("call digits/1"):
        await backend.predict("digits.v1", {})
    (span,) = exporter.get_finished_spans()
    context = span.get_span_context()
    first, second = (arguments[2:] for arguments in calls)
    assert first == ({},)
    assert second[1].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")


async def test_a_predictor_goes_on_with_the_trace_it_is_given() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    replica = object.__new__(Predictor)  # without a package to open
    replica._tracing = Tracing(provider)
    replica._runtime = SimpleNamespace(run=lambda arrays, _stop: arrays)  # type: ignore[assignment]
    replica._description = Description("sha256:1", "cpu")
    assert await replica.predict({}) == {}
    assert not exporter.get_finished_spans()
    assert await replica.predict({}, TRACEPARENT) == {}
    span = named(exporter, "run graph")
    assert (f"{span.get_span_context().trace_id:032x}", parent_of(span)) == (TRACE_ID, PARENT_ID)
    assert dict(span.attributes or {}) == {"heliostat.package_digest": "sha256:1"}


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The URL of an OTLP receiver, and (service, span) of all that it has received."""
    received: list[tuple[str, Any]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    received.extend((attributes["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


async def test_the_engines_steps_arrive_over_otlp(
    receiver: tuple[str, list[tuple[str, Any]]],
) -> None:
    endpoint, received = receiver
    tracing = open_tracing(Settings(otlp_endpoint=endpoint), "language-model")

    async def steps() -> Any:
        yield TokenOutput("r", (1, 2))
        yield TokenOutput("r", (3,), "stop")

    request = EngineRequest("r", (5, 6, 7), Sampling(max_tokens=9), TRACEPARENT)
    outputs = [output async for output in traced_steps(tracing, request, steps())]
    assert [output.token_ids for output in outputs] == [(1, 2), (3,)]
    await asyncio.to_thread(tracing.close)
    ((service, span),) = received
    assert (service, span.name) == ("heliostat-language-model", "generate")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert [event.name for event in span.events] == ["engine step"] * 2
    attributes = {a.key: a.value.int_value for a in span.attributes}
    assert attributes == {
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "heliostat.num_engine_steps": 2,
    }


@pytest.mark.parametrize(("ratio", "num_traced"), [(0.0, 0), (1.0, 1)])
async def test_the_ratio_binds_clients_that_ask_to_be_traced(
    receiver: tuple[str, list[tuple[str, Any]]], gateway: Any, ratio: float, num_traced: int
) -> None:
    endpoint, received = receiver
    settings = Settings(otlp_endpoint=endpoint, trace_ratio=ratio)
    gateway.telemetry.tracing = open_tracing(settings, "gateway")
    answer: httpx.Response = await gateway.client.get(
        "/v1/models", headers=gateway.headers() | {"traceparent": TRACEPARENT}
    )
    assert answer.status_code == 200
    await asyncio.to_thread(gateway.telemetry.tracing.close)
    assert len(received) == num_traced
