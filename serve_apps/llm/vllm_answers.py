"""What vLLM gives for one request, in our words, and what of it was said elsewhere already.

Knows vLLM's outputs by their fields alone.

    answer = Answer(request, repeats=False)
    output = answer.take(found.outputs[0])
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from cluster.errors import UpstreamFailedError
from serve_apps.llm.engine import EngineRequest, FinishReason, TokenLogprobs, TokenOutput

_FINISH_REASONS: dict[str | None, FinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
}


@dataclass
class Answer:
    """A request in flight at vLLM."""

    request: EngineRequest
    repeats: bool
    """The tokens that were already said are generated again and held back."""
    num_taken: int = 0
    has_begun: bool = False
    work: Future[None] | None = None

    @property
    def given(self) -> tuple[int, ...]:
        """Tokens of the answer that vLLM reads like the prompt."""
        return () if self.repeats else self.request.answer_ids

    @property
    def num_given(self) -> int:
        return len(self.given)

    def take(self, completion: Any) -> TokenOutput:
        """What a step added, without what was already said elsewhere.

        Raises:
            UpstreamFailedError: what is generated again differs from it.
        """
        tokens = tuple(int(token) for token in completion.token_ids)
        said = self.request.answer_ids[self.num_taken :] if self.repeats else ()
        num_repeated = min(len(tokens), len(said))
        if tokens[:num_repeated] != said[:num_repeated]:
            raise UpstreamFailedError("the answer cannot be continued: its tokens do not repeat")
        self.num_taken += len(tokens)
        sampling = self.request.sampling
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.num_logprobs is not None:
            logprobs = _logprobs(tokens, completion.logprobs, sampling.num_logprobs)
        reason = _FINISH_REASONS.get(completion.finish_reason, "error")
        return TokenOutput(
            self.request.request_id,
            tokens[num_repeated:],
            reason,
            f"vLLM ended it: {completion.finish_reason}" if reason == "error" else None,
            logprobs[num_repeated:],
        )


def _logprobs(
    tokens: tuple[int, ...], found: list[dict[int, Any]], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """vLLM gives the likeliest and, where it is not among them, the chosen one."""
    entries: list[TokenLogprobs] = []
    for token, scores in zip(tokens, found, strict=True):
        others = scores if len(scores) <= num_top else {i: scores[i] for i in scores if i != token}
        likeliest = sorted(((i, float(s.logprob)) for i, s in others.items()), key=lambda e: -e[1])
        entries.append(TokenLogprobs(token, float(scores[token].logprob), tuple(likeliest)))
    return tuple(entries)
