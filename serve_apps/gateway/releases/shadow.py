"""Asks a candidate what the champion has answered already, and compares the two answers.

What it says reaches nobody: it is on no bill, in no limit and in no customer's metrics.

    shadow = Shadow(champion, candidate, observer, means)
    shadow.offer_graph(inputs, outputs, size)       # after the customer has the answer
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import OverloadedError, UpstreamFailedError, first_line
from cluster.processing import Array, postprocess, preprocess
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.releases.comparison import compare_outputs, compare_tokens, require_finite
from serve_apps.gateway.releases.mirror import Mirror, Work
from serve_apps.gateway.releases.observer import Observer
from serve_apps.gateway.releases.stream_waits import StreamWaits
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.gateway.streams import with_settled_seed
from serve_apps.gateway.telemetry.telemetry import when_answered
from serve_apps.llm.engine import EngineRequest, TokenOutput

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 64
"""About what a token takes in memory."""


@dataclass(frozen=True)
class Means:
    """How a version is reached beside its customers: nothing here is charged or counted."""

    open: Callable[[ServedVersion], Awaitable[ServedModel]]
    predict: Callable[[ServedModel, Arrays], Awaitable[Arrays]]
    stream: Callable[[ServedModel, EngineRequest], AsyncGenerator[TokenOutput, None]]
    has_room: Callable[[ServedVersion], bool]
    """Whether a version's customers leave room for other work at this moment."""


class Shadow:
    """The candidate of one release, asked in what the champion's customers leave over."""

    def __init__(
        self, champion: ServedVersion, candidate: ServedVersion, observer: Observer, means: Means
    ) -> None:
        self._champion = champion
        self._candidate = candidate
        self._observer = observer
        self._means = means
        self._mirror = Mirror(self._has_room, lambda: observer.mirrored("dropped"))

    def offer_graph(self, inputs: Mapping[str, Array], expected: Arrays, size: int) -> None:
        """Ask with the same arrays, once the request is answered."""
        num_bytes = sum(x.nbytes for x in (*inputs.values(), *expected.values()))
        self._offer(lambda: self._ask_graph(inputs, expected, size), num_bytes)

    def offer_stream(self, request: EngineRequest, expected: Sequence[TokenOutput]) -> None:
        """Ask with the same prompt and seed, once the request is answered."""
        num_tokens = len(request.prompt_ids) + sum(len(output.token_ids) for output in expected)
        self._offer(lambda: self._ask_stream(request, expected), _TOKEN_BYTES * num_tokens)

    def close(self) -> None:
        self._mirror.close()

    def _has_room(self) -> bool:
        return self._means.has_room(self._champion)

    def _offer(self, work: Work, num_bytes: int) -> None:
        when_answered(lambda: self._mirror.offer(work, num_bytes))

    async def _ask_graph(self, inputs: Mapping[str, Array], expected: Arrays, size: int) -> None:
        begun_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._candidate.options.answer_timeout_s):
                model = await self._means.open(self._candidate)
                arrays = await asyncio.to_thread(preprocess, model.manifest, inputs)
                found = await self._means.predict(model, arrays)
                outputs = await asyncio.to_thread(postprocess, model.manifest, found)
            require_finite(outputs)
        except Exception as error:
            self._failed(error)
            return
        waited_s = time.perf_counter() - begun_s
        compared = await asyncio.to_thread(compare_outputs, expected, outputs)
        self._observer.observe("candidate", "errors", 0.0)
        self._observer.wait("candidate", "slow", size, waited_s)
        self._observer.observe("pair", "label_disagreement", compared.label_disagreement)
        self._observer.observe("pair", "score_distance", compared.score_distance)
        self._observer.mirrored("compared")

    async def _ask_stream(self, request: EngineRequest, expected: Sequence[TokenOutput]) -> None:
        again = dataclasses.replace(
            request, request_id=f"{request.request_id}-mirrored", tenant="", traceparent=None
        )
        try:
            found = await self._tokens(again)
        except Exception as error:
            self._failed(error)
            return
        if found is None:
            self._observer.mirrored("dropped")
            return
        compared = compare_tokens(expected, found)
        self._observer.observe("candidate", "errors", 0.0)
        self._observer.observe("pair", "token_disagreement", compared.token_disagreement)
        if compared.logprob_divergence is not None:
            self._observer.observe("pair", "logprob_divergence", compared.logprob_divergence)
        self._observer.mirrored("compared")

    async def _tokens(self, request: EngineRequest) -> list[TokenOutput] | None:
        """The candidate's whole answer; None where customers came to need the room."""
        options = self._candidate.options
        model = await self._means.open(self._candidate)
        waits = StreamWaits(self._observer, "candidate", request)
        found: list[TokenOutput] = []
        outputs = self._means.stream(model, request)
        try:
            async with asyncio.timeout(options.answer_timeout_s) as limit:
                async for output in outputs:
                    waits.take(output)
                    found.append(output)
                    if output.finish_reason is not None:
                        waits.end()
                        return found
                    if not self._has_room():
                        return None
                    now_s = asyncio.get_running_loop().time()
                    limit.reschedule(now_s + options.request_timeout_s)
        finally:
            await outputs.aclose()
        raise UpstreamFailedError("the model's stream ended early")

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OverloadedError):
            self._observer.mirrored("dropped")
            return
        # Also where it refuses the input: the champion has answered that.
        logger.info("%s failed at a mirrored request: %s", self._candidate, first_line(error))
        self._observer.observe("candidate", "errors", 1.0)
        self._observer.mirrored("failed")


def comparable(request: EngineRequest) -> EngineRequest:
    """The same request with what a comparison needs: a seed, and the tokens' log-probabilities."""
    settled = with_settled_seed(request)
    if settled.sampling.num_logprobs is not None:
        return settled
    return dataclasses.replace(
        settled, sampling=dataclasses.replace(settled.sampling, num_logprobs=0)
    )
