"""Tracing that is off costs nothing, imports included."""

from __future__ import annotations

import subprocess
import sys

from cluster.observability.tracing import Tracing, end, traceparent_of


def test_without_an_endpoint_opentelemetry_is_not_even_imported() -> None:
    code = (
        "import sys\n"
        "from cluster.observability.tracing import open_tracing\n"
        "from cluster.settings import Settings\n"
        "tracing = open_tracing(Settings(), 'gateway')\n"
        "with tracing.span('x') as span:\n"
        "    assert span is None and tracing.traceparent() is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_not_started_can_be_ended() -> None:
    span = Tracing().start("x", kind="server", traceparent="00-1-1-01")
    assert span is None
    assert traceparent_of(span) is None
    end(span, {"a": 1}, ValueError("x"))
