"""What an engine is: token ids in, token ids out, many requests at once.

Knows nothing of text, HTTP or Ray: the gateway tokenises, detokenises and applies stop strings.

    engine.add(EngineRequest("r1", (1, 2, 3), Sampling(max_tokens=8, temperature=0)))
    while True:
        for output in engine.step():            # one message per step, for all requests together
            print(output.request_id, output.token_ids, output.finish_reason)
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cluster.errors import InputError, NotFoundError
from cluster.generation import Sampling as Sampling
from cluster.generation import TokenLogprobs as TokenLogprobs
from cluster.grammars import Grammars, GrammarState

FinishReason = Literal["stop", "length", "error", "refused"]
"""Refused is what turns out to be impossible only on the way: the caller is at fault."""


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
    """What went wrong, where the finish reason is 'error' or 'refused'."""
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
    num_preempted: int = 0
    """How often a sequence gave its cache back for another, since the start."""
    num_reused_tokens: int = 0
    """Prompt tokens whose keys and values were in the cache already, since the start."""
    precision: str = "float32"
    """Number type that the model is computed in."""


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


@runtime_checkable
class AdapterLoader(Protocol):
    """An engine that answers for adapters as well; both from any thread."""

    def load_adapter(self, digest: str, model_dir: Path) -> None:
        """Take an adapter from a *verified* peft directory.

        Raises:
            PackageError: it cannot be used beside others, or not with this model.
        """

    def unload_adapter(self, digest: str) -> None:
        """Forget an adapter that no request in flight asks for."""


def check_adapter(request: EngineRequest, loaded: Container[str] = ()) -> None:
    """Raises NotFoundError for an adapter that the engine does not hold."""
    if request.adapter is not None and request.adapter not in loaded:
        raise adapter_not_loaded(request.adapter)


def adapter_not_loaded(digest: str) -> NotFoundError:
    return NotFoundError(
        f"adapter {digest} is not loaded beside this model",
        hint="deploy the adapter without shares_base, or its base with engine 'native'",
        param="model",
    )


def begin_grammar(request: EngineRequest, grammars: Grammars | None) -> GrammarState | None:
    """The state that a request's answer begins with, if it has a grammar.

    Raises:
        InputError: the engine has no tokenizer for it, or the grammar is wrong.
    """
    grammar = request.sampling.grammar
    if grammar is None:
        return None
    if grammars is None:
        raise InputError("this engine cannot hold an answer to a grammar", param=grammar.kind)
    return grammars.begin(grammar, request.sampling.eos_token_ids)


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
    if len(prompt) >= max_context_tokens:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the model holds {max_context_tokens} "
            "tokens, those of the answer among them",
            hint="shorten the prompt",
            param="prompt",
        )
    if total > max_context_tokens:
        raise InputError(
            f"{len(prompt)} prompt tokens and max_tokens {sampling.max_tokens} make {total}, "
            f"but the model holds {max_context_tokens} tokens",
            hint="shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
