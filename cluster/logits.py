"""What is done to a model's logits before a token is chosen, and what is said of the choice.

A grammar, penalties, biases and min-p change the logits; sampling.py then chooses.

    scores = adjust(logits_V, sampling, prompt_ids, answer_ids, allowed_V)
    token = int(perturb(scores, sampling, seed=7, position=12).argmax())
    entry = describe_choice(logits_V, token, num_top=5)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from cluster.generation import Sampling, TokenLogprobs
from cluster.processing import Array


def adjust(
    logits_V: torch.Tensor,  # noqa: N803 - V is the vocabulary
    sampling: Sampling,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    allowed_V: Array | None = None,  # noqa: N803
) -> torch.Tensor:
    """Logits after grammar, penalties, biases and min-p; the very same where there are none.

    Args:
        allowed_V: which tokens the request's grammar allows now (`cluster.grammars`).
    """
    if not sampling.changes_logits:
        return logits_V
    scores_V = logits_V.to(torch.float32, copy=True)  # noqa: N806
    if allowed_V is not None:
        # First, so that min-p, top-k and top-p count among what is allowed.
        forbidden = torch.from_numpy(~allowed_V).to(scores_V.device)
        scores_V.masked_fill_(forbidden, -torch.inf)
    if sampling.repetition_penalty != 1:
        seen = _ids({*prompt_ids, *answer_ids}, scores_V)
        found = scores_V[seen]
        penalty = sampling.repetition_penalty
        scores_V[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if answer_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer_ids)
        said = _ids(counts, scores_V)
        times = torch.tensor(list(counts.values()), dtype=scores_V.dtype, device=scores_V.device)
        scores_V[said] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        biased = _ids([token for token, _ in sampling.logit_bias], scores_V)
        biases = [bias for _, bias in sampling.logit_bias]
        scores_V[biased] += torch.tensor(biases, dtype=scores_V.dtype, device=scores_V.device)
    if sampling.min_p > 0:
        # Of probabilities at this temperature, which divides the logits only later.
        lowest = scores_V.max() + sampling.temperature * math.log(sampling.min_p)
        scores_V.masked_fill_(scores_V < lowest, -torch.inf)
    return scores_V


def describe_choice(
    logits_V: torch.Tensor,  # noqa: N803
    token_id: int,
    num_top: int,
) -> TokenLogprobs:
    """How likely the model found a token, and which it found the most likely."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)  # noqa: N806
    values, ids = torch.topk(logprobs_V, min(num_top, logprobs_V.shape[-1]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)


def _ids(tokens: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)
