"""Choosing tokens so that each request has its own temperature, top-p, top-k and seed.

By the Gumbel-max trick a sample is the argmax of the logits plus noise, and the noise depends
only on the request's seed and the token's position: never on what else is in the batch, nor on
whether the answer was interrupted and taken up again (Maddison et al. 2014, "A* Sampling").

    scores = perturb(logits_V, Sampling(max_tokens=1, temperature=0.8), seed=7, position=12)
    token = int(scores.argmax())
"""

from __future__ import annotations

import torch

from cluster.generation import Sampling

_MIX_1 = 0x9E3779B97F4A7C15
_MIX_2 = 0xBF58476D1CE4E5B9
_MASK = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-6
"""Below it the most likely token is as good as certain; logits divided by less overflow."""


def perturb(
    logits_V: torch.Tensor,  # noqa: N803 - V is the vocabulary
    sampling: Sampling,
    *,
    seed: int,
    position: int,
) -> torch.Tensor:
    """Scores whose argmax is the token: the logits themselves for a greedy request."""
    if sampling.is_greedy:
        return logits_V
    scores_V = logits_V.float() / max(sampling.temperature, _LEAST_TEMPERATURE)  # noqa: N806
    scores_V = _keep_top_k(scores_V, sampling.top_k)  # noqa: N806
    scores_V = _keep_top_p(scores_V, sampling.top_p)  # noqa: N806
    generator = torch.Generator().manual_seed(mix(seed, position))
    noise_V = torch.empty(scores_V.shape[-1]).exponential_(generator=generator)  # noqa: N806
    return scores_V - noise_V.log().to(scores_V.device)


def _keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    if not 0 < top_k < scores.shape[-1]:
        return scores
    threshold = torch.topk(scores, top_k).values[-1]
    return scores.masked_fill(scores < threshold, -torch.inf)


def _keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p >= 1:
        return scores
    ordered, indices = torch.sort(scores, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    # Drop a token when those before it already add up; the first always stays.
    drop = torch.cumsum(probabilities, dim=-1) - probabilities >= top_p
    drop[0] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(0, indices, drop), -torch.inf)


def mix(seed: int, position: int) -> int:
    """A well-spread 63-bit seed (splitmix64), so that neighbours get unrelated noise."""
    value = (seed * _MIX_1 + position * _MIX_2 + _MIX_1) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_2) & _MASK
    return (value ^ (value >> 31)) >> 1
