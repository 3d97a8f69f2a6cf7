"""What an engine is: token ids in, token ids out, many requests at once.

Knows nothing of text, HTTP or Ray: the gateway tokenises, detokenises and applies stop strings.

    engine.add(EngineRequest("r1", (1, 2, 3), Sampling(max_tokens=8, temperature=0)))
    while True:
        for output in engine.step():            # one message per step, for all requests together
            print(output.request_id, output.token_ids, output.finish_reason)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.errors import InputError
from cluster.generation import Sampling as Sampling
from cluster.generation import TokenLogprobs as TokenLogprobs

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class EngineRequest:
    """One answer to generate; the id is the caller's and unique among those in flight."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    traceparent: str | None = None
    """W3C context of the trace that this is part of."""
    answer_ids: tuple[int, ...] = ()
    """Tokens of the answer that were generated elsewhere: the engine goes on after them. They
    count for max_tokens, penalties and the positions of the noise, and are not emitted again."""
    adapter: str | None = None
    """Digest of the adapter package that answers; None is the model itself."""
    tenant: str = ""
    """Whose it is: tenants take turns by the tokens that they were served."""

    @property
    def num_given_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class TokenOutput:
    """New tokens of one request. An end-of-sequence token is included, as the last one."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What went wrong, where the finish reason is 'error'."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""


StepOutput = Sequence[TokenOutput]


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing now, and what it can do at most."""

    num_running: int
    num_waiting: int
    max_context_tokens: int
    vocab_size: int


class Engine(Protocol):
    """Generates for many requests at once. `add` and `abort` may come from any thread."""

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InputError if it can never be answered."""

    def step(self) -> StepOutput:
        """New tokens since the last step; waits a moment and returns nothing when idle.

        Raises UpstreamFailedError once the engine cannot go on; it is then of no more use.
        """

    def abort(self, request_id: str) -> None:
        """Forget a request and free its place; unknown ids are ignored."""

    def stats(self) -> EngineStats:
        """A cheap snapshot."""

    def close(self) -> None:
        """Stop for good; safe to call twice."""


def check_request(request: EngineRequest, *, max_context_tokens: int, vocab_size: int) -> None:
    """Refuse what an engine could never answer.

    Raises:
        InputError: names the field.
    """
    prompt, sampling = request.prompt_ids, request.sampling
    if not prompt:
        raise InputError("the prompt has no tokens, expected at least one", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(i for i in prompt if not 0 <= i < vocab_size)
        raise InputError(
            f"token id {wrong} is not in the vocabulary of {vocab_size} tokens", param="prompt"
        )
    for token in request.answer_ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is not in the vocabulary of {vocab_size} tokens",
                param="answer_ids",
            )
    for token, _ in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is not in the vocabulary of {vocab_size} tokens",
                param="logit_bias",
            )
    if sampling.max_tokens < 1:
        raise InputError(
            f"max_tokens is {sampling.max_tokens}, expected at least 1", param="max_tokens"
        )
    if len(request.answer_ids) >= sampling.max_tokens:
        raise InputError(
            f"the answer has {len(request.answer_ids)} tokens already, expected fewer than "
            f"max_tokens {sampling.max_tokens}",
            param="answer_ids",
        )
    total = len(prompt) + sampling.max_tokens
    if total > max_context_tokens:
        raise InputError(
            f"{len(prompt)} prompt tokens and max_tokens {sampling.max_tokens} make {total}, "
            f"but the model holds {max_context_tokens} tokens",
            hint="shorten the prompt or lower max_tokens",
            param="max_tokens" if len(prompt) < max_context_tokens else "prompt",
        )
