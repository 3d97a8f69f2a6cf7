"""An engine's work on one request as a span: when each of its steps gave tokens.

outputs = traced_steps(tracing, request, runner.generate(request))
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from cluster.observability.tracing import Tracing, end
from serve_apps.llm.engine import EngineRequest, TokenOutput


async def traced_steps(
    tracing: Tracing, request: EngineRequest, outputs: AsyncGenerator[TokenOutput, None]
) -> AsyncGenerator[TokenOutput, None]:
    """The same outputs; each is an event of the span, which keeps the last 128."""
    span = tracing.start("generate", kind="server", traceparent=request.traceparent)
    num_steps = num_tokens = 0
    failure: Exception | None = None
    try:
        async for output in outputs:
            num_steps += 1
            num_tokens += len(output.token_ids)
            if span is not None:
                span.add_event("engine step", {"heliostat.num_tokens": len(output.token_ids)})
            yield output
    except Exception as error:
        failure = error
        raise
    finally:
        await outputs.aclose()
        usage = {
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "gen_ai.usage.output_tokens": num_tokens,
            "heliostat.num_engine_steps": num_steps,
        }
        end(span, usage, failure)
