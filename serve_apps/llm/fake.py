"""`FakeEngine`: a deterministic engine for tests and rehearsals, without a model.

A greedy answer repeats the prompt over and over; a sampled one walks the vocabulary by its seed.
An end-of-sequence token in the prompt therefore ends the answer there.

    engine = FakeEngine(vocab_size=512)
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from dataclasses import dataclass, field

from cluster.errors import UpstreamFailedError
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    FinishReason,
    StepOutput,
    TokenOutput,
    check_request,
)

_IDLE_WAIT_S = 0.05


@dataclass
class _Progress:
    request: EngineRequest
    seed: int
    generated: list[int] = field(default_factory=list)


class FakeEngine:
    """One token per running request and step; `max_running` places."""

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        max_context_tokens: int = 4096,
        max_running: int = 32,
        step_time_s: float = 0.0,
    ) -> None:
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._max_running = max_running
        self._step_time_s = step_time_s
        self._requests: dict[str, _Progress] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None

    def add(self, request: EngineRequest) -> None:
        check_request(
            request, max_context_tokens=self._max_context_tokens, vocab_size=self._vocab_size
        )
        seed = request.sampling.seed
        progress = _Progress(request, secrets.randbits(32) if seed is None else seed)
        with self._changed:
            self._requests[request.request_id] = progress
            self._changed.notify_all()

    def step(self) -> StepOutput:
        time.sleep(self._step_time_s)
        with self._changed:
            if self._failure is not None:
                raise UpstreamFailedError(f"the engine stopped: {self._failure}")
            if not self._requests:
                self._changed.wait(_IDLE_WAIT_S)
            running = list(self._requests.values())[: self._max_running]
            return [self._advance(progress) for progress in running]

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._requests.pop(request_id, None)

    def stats(self) -> EngineStats:
        with self._changed:
            running = min(len(self._requests), self._max_running)
            return EngineStats(
                num_running=running,
                num_waiting=len(self._requests) - running,
                max_context_tokens=self._max_context_tokens,
                vocab_size=self._vocab_size,
            )

    def close(self) -> None:
        self.fail("closed")

    def fail(self, reason: str) -> None:
        """Break down, as a real engine might: every later step raises."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def _advance(self, progress: _Progress) -> TokenOutput:
        sampling = progress.request.sampling
        token = self._next_token(progress)
        progress.generated.append(token)
        reason: FinishReason | None = None
        if token in sampling.eos_token_ids:
            reason = "stop"
        elif len(progress.generated) >= sampling.max_tokens:
            reason = "length"
        request_id = progress.request.request_id
        if reason is not None:
            del self._requests[request_id]
        return TokenOutput(request_id, (token,), reason)

    def _next_token(self, progress: _Progress) -> int:
        prompt, sampling = progress.request.prompt_ids, progress.request.sampling
        greedy = prompt[len(progress.generated) % len(prompt)]
        if sampling.is_greedy or sampling.top_k == 1 or sampling.top_p < 1e-3:
            return greedy
        position = len(prompt) + len(progress.generated)
        text = f"{progress.seed}:{position}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % self._vocab_size
