"""How long the tokens of a release's versions keep their readers waiting.

Timed where they come from the replicas, so that a client that reads slowly makes no version slow.

    backend = WatchedBackend(backend, watch.observer_of)
    outputs = backend.generate("talker.v2", request, drain_s=60)
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable

from cluster.errors import OverloadedError, ReplicaLeavingError, UpstreamFailedError
from cluster.release_evidence import Arm
from serve_apps.gateway.backend import Arrays, ModelBackend
from serve_apps.gateway.releases.observer import Observer
from serve_apps.llm.engine import EngineRequest, TokenOutput

ObserverOf = Callable[[str], tuple[Observer, Arm] | None]
"""Who observes an application, or an adapter by its digest, and as what; None for nearly all."""


class StreamWaits:
    """The waits of one stream from one replica."""

    def __init__(self, observer: Observer, arm: Arm, request: EngineRequest) -> None:
        self._observer = observer
        self._arm = arm
        self._request_id = request.request_id
        self._num_prompt = len(request.prompt_ids)
        self._is_continued = bool(request.answer_ids)
        self._begun_s = time.perf_counter()
        self._first_s = self._last_s = 0.0
        self._num_after_first = 0

    async def watch(
        self, outputs: AsyncGenerator[TokenOutput, None]
    ) -> AsyncGenerator[TokenOutput, None]:
        """The same outputs; a failure is observed, and an end that is none."""
        has_finished = False
        try:
            async for output in outputs:
                self.take(output)
                has_finished = output.finish_reason is not None
                yield output
            if not has_finished:
                raise UpstreamFailedError("the model's stream ended early")
        except (OverloadedError, ReplicaLeavingError):
            # The answer goes on elsewhere, or its reader is told; neither is this replica's fault.
            raise
        except Exception as error:
            # A continuation's id begins with that of the request.
            self._observer.failed_requests.add(self._request_id.partition("-")[0])
            self._observer.failure(self._arm, error, "slow_first_token")
            raise
        finally:
            self.end()
            await outputs.aclose()

    def take(self, output: TokenOutput) -> None:
        """These came now."""
        if not output.token_ids:
            return
        now_s = time.perf_counter()
        if not self._first_s:
            self._first_s = now_s
            if not self._is_continued:
                waited_s = now_s - self._begun_s
                self._observer.wait(self._arm, "slow_first_token", self._num_prompt, waited_s)
        else:
            self._num_after_first += len(output.token_ids)
        self._last_s = now_s

    def end(self) -> None:
        """Nothing more comes."""
        if self._num_after_first:
            token_s = (self._last_s - self._first_s) / self._num_after_first
            self._observer.wait(self._arm, "slow_token", 1, token_s)


class WatchedBackend:
    """A ModelBackend whose streams are watched while a release is under way."""

    def __init__(self, backend: ModelBackend, observer_of: ObserverOf) -> None:
        self._backend = backend
        self._observer_of = observer_of

    async def predict(self, application: str, arrays: Arrays) -> Arrays:
        return await self._backend.predict(application, arrays)

    def generate(
        self, application: str, request: EngineRequest, *, drain_s: float
    ) -> AsyncGenerator[TokenOutput, None]:
        outputs = self._backend.generate(application, request, drain_s=drain_s)
        found = self._observer_of(request.adapter or application)
        return outputs if found is None else StreamWaits(*found, request).watch(outputs)

    async def prepare(self, application: str) -> None:
        await self._backend.prepare(application)

    def forget(self, application: str) -> None:
        self._backend.forget(application)
