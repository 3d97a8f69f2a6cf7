"""One release at a gateway: both versions' answers are observed, some of the champion's mirrored.

watched = WatchedRelease(release, champion, candidate, evidence, means)
outputs = await watched.infer(model, inputs, answer)
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from cluster.processing import Array
from cluster.release_evidence import Arm
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.releases.comparison import is_finite, require_finite
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.observer import Observer
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.releases.shadow import Means, Shadow, comparable
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.llm.engine import EngineRequest, TokenOutput

Infer = Callable[[ServedModel, Mapping[str, Array]], Awaitable[Arrays]]
Generate = Callable[[ServedModel, EngineRequest], AsyncGenerator[TokenOutput, None]]


class WatchedRelease:
    """Its two versions, as their customers meet them."""

    def __init__(
        self,
        release: Release,
        champion: ServedVersion,
        candidate: ServedVersion,
        evidence: Evidence,
        means: Means,
    ) -> None:
        self.champion = champion
        self.candidate = candidate
        self.observer = Observer(release, evidence)
        self._shadow = Shadow(champion, candidate, self.observer, means)

    def goes_on_as(
        self, release: Release, champion: ServedVersion, candidate: ServedVersion
    ) -> bool:
        """Take new shares of the same release; False if it is another one."""
        if (self.champion, self.candidate) != (champion, candidate):
            return False
        if self.observer.release.id != release.id:
            return False
        self.observer.release = release
        return True

    def arm_of(self, served: ServedVersion) -> Arm | None:
        if served == self.champion:
            return "champion"
        return "candidate" if served == self.candidate else None

    def close(self) -> None:
        """The release is over."""
        self._shadow.close()

    def failed_over(self, *, is_observed: bool) -> None:
        """The champion has answered what the candidate failed, which may be observed already."""
        self.observer.failed_over()
        if not is_observed:
            self.observer.observe("candidate", "errors", 1.0)

    async def infer(self, model: ServedModel, inputs: Mapping[str, Array], answer: Infer) -> Arrays:
        """A graph's answer.

        Raises:
            UpstreamFailedError: the candidate's holds NaN or infinity.
        """
        arm = self.arm_of(model.served) or "champion"
        size = _num_samples(inputs)
        begun_s = time.perf_counter()
        try:
            outputs = await answer(model, inputs)
            if arm == "candidate":
                require_finite(outputs)
        except Exception as error:
            self.observer.failure(arm, error, "slow")
            raise
        except asyncio.CancelledError:
            self.observer.abandoned(arm, "slow", size, time.perf_counter() - begun_s)
            raise
        self.observer.wait(arm, "slow", size, time.perf_counter() - begun_s)
        is_good = arm == "candidate" or is_finite(outputs)
        self.observer.observe(arm, "errors", float(not is_good))
        if arm == "champion" and is_good and self._is_drawn():
            self._shadow.offer_graph(inputs, outputs, size)
        return outputs

    async def generate(
        self, model: ServedModel, request: EngineRequest, generate: Generate
    ) -> AsyncGenerator[TokenOutput, None]:
        """A language model's answer. Its waits, and replicas that fail, `WatchedBackend` sees."""
        arm = self.arm_of(model.served) or "champion"
        is_mirrored = arm == "champion" and self._is_drawn()
        asked = comparable(request) if is_mirrored else request
        hides_logprobs = asked.sampling.num_logprobs != request.sampling.num_logprobs
        outputs = generate(model, asked)
        taken: list[TokenOutput] = []
        has_begun = has_failed = has_finished = False
        try:
            async for output in outputs:
                has_begun, has_finished = True, output.finish_reason is not None
                if is_mirrored:
                    taken.append(output)
                yield dataclasses.replace(output, logprobs=()) if hides_logprobs else output
        except Exception as error:
            has_failed = True
            if asked.request_id not in self.observer.failed_requests:
                self.observer.failure(arm, error, "slow_first_token")
            raise
        finally:
            await outputs.aclose()
            self.observer.failed_requests.discard(asked.request_id)
            if has_begun and not has_failed:
                self.observer.observe(arm, "errors", 0.0)
            if is_mirrored and has_finished:
                self._shadow.offer_stream(asked, taken)

    def _is_drawn(self) -> bool:
        share = self.observer.release.mirrored_share
        # Spreads traffic; nothing secret depends on it.
        return share > 0 and random.random() < share  # noqa: S311


def _num_samples(inputs: Mapping[str, Array]) -> int:
    first = next(iter(inputs.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
