"""`FakeEngine`: a deterministic engine for tests and rehearsals, without a model.

A greedy answer repeats the prompt over and over: the token that comes next has a logit of 2, all
others have 0, which leaves a sampled answer free. An end-of-sequence token in the prompt therefore
ends a greedy answer there.

    engine = FakeEngine(vocab_size=512)
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import UpstreamFailedError
from cluster.processing import Array
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    FinishReason,
    Sampling,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
    check_request,
)

_IDLE_WAIT_S = 0.05
_FAVOUR = 2.0


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
        seed = secrets.randbits(32) if seed is None else seed
        progress = _Progress(request, seed, [*request.answer_ids])
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
        token, logprobs = self._next_token(progress)
        progress.generated.append(token)
        reason: FinishReason | None = None
        if token in sampling.eos_token_ids:
            reason = "stop"
        elif len(progress.generated) >= sampling.max_tokens:
            reason = "length"
        request_id = progress.request.request_id
        if reason is not None:
            del self._requests[request_id]
        return TokenOutput(request_id, (token,), reason, logprobs=logprobs)

    def _next_token(self, progress: _Progress) -> tuple[int, tuple[TokenLogprobs, ...]]:
        prompt, sampling = progress.request.prompt_ids, progress.request.sampling
        favourite = prompt[len(progress.generated) % len(prompt)]
        is_greedy = sampling.is_greedy or sampling.top_k == 1 or sampling.top_p < 1e-3
        is_greedy = is_greedy or sampling.min_p == 1
        if is_greedy and not sampling.changes_logits and sampling.num_logprobs is None:
            return favourite, ()
        logits = np.zeros(self._vocab_size)
        logits[favourite] = _FAVOUR
        scores = _adjust(logits.copy(), progress)
        if not is_greedy:
            position = len(prompt) + len(progress.generated)
            scores = scores / sampling.temperature + _noise(progress.seed, position, len(scores))
        token = int(scores.argmax())
        return token, _describe(logits, token, sampling)


def _adjust(logits: Array, progress: _Progress) -> Array:
    sampling, counts = progress.request.sampling, Counter(progress.generated)
    seen = list({*progress.request.prompt_ids, *counts})
    penalty = sampling.repetition_penalty
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    for token, count in counts.items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    return logits


def _noise(seed: int, position: int, size: int) -> Array:
    digest = hashlib.sha256(f"{seed}:{position}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).gumbel(size=size)


def _describe(logits: Array, token: int, sampling: Sampling) -> tuple[TokenLogprobs, ...]:
    if sampling.num_logprobs is None:
        return ()
    logprobs = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logprobs, kind="stable")[: sampling.num_logprobs]
    top = tuple((int(i), float(logprobs[i])) for i in best)
    return (TokenLogprobs(token, float(logprobs[token]), top),)
