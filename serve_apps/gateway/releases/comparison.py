"""How far the answers of two versions to the same request lie apart; every figure is in [0, 1].

Pure. The first answer is the champion's, which is taken for right.

    compare_outputs({"label": ...}, {"label": ...}).label_disagreement     # share of the rows
    compare_tokens(champion_outputs, candidate_outputs).token_disagreement
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import UpstreamFailedError
from cluster.processing import Array
from serve_apps.gateway.backend import Arrays
from serve_apps.llm.engine import TokenOutput

_TOLERANCE = 0.1
"""Two numbers further apart disagree: relatively, and absolutely below 1."""
_SUM_ERROR = 1e-2
"""Probabilities add up to 1 within this; 16-bit ones are no nearer."""


@dataclass(frozen=True)
class OutputComparison:
    """Of a graph's outputs."""

    label_disagreement: float
    """Share of the rows with another label, class or (beyond a tolerance) number."""
    score_distance: float
    """Mean over the rows: total variation of probabilities, relative distance of other scores."""


@dataclass(frozen=True)
class TokenComparison:
    """Of two language models' tokens, drawn with the same noise."""

    token_disagreement: float
    """Share of the answer from the first token that differs: after it, nothing is comparable."""
    logprob_divergence: float | None
    """Mean distance of the tokens' log-probabilities before that, each at most 1; None where there
    is none to compare."""


def is_finite(outputs: Mapping[str, Array]) -> bool:
    """Whether every number is one."""
    return all(x.dtype.kind != "f" or bool(np.isfinite(x).all()) for x in outputs.values())


def require_finite(outputs: Arrays) -> None:
    """Raises UpstreamFailedError for NaN and infinity."""
    if not is_finite(outputs):
        raise UpstreamFailedError("an output holds NaN or infinity")


def compare_outputs(champion: Arrays, candidate: Arrays) -> OutputComparison:
    """An output that is missing, or has another shape or kind, differs in all rows."""
    disagreements: list[float] = []
    probabilities: list[float] = []
    others: list[float] = []
    for name, ours in champion.items():
        theirs = candidate.get(name)
        if theirs is None or theirs.shape != ours.shape or theirs.dtype.kind != ours.dtype.kind:
            return OutputComparison(1.0, 1.0)
        if ours.size == 0:
            continue
        ours, theirs = _rows(ours), _rows(theirs)
        if ours.dtype.kind != "f":
            disagreements.append(float((ours != theirs).any(axis=1).mean()))
        elif ours.shape[1] == 1:
            distances = _number_distances(ours[:, 0], theirs[:, 0])
            disagreements.append(float((distances > _TOLERANCE).mean()))
            others.append(float(distances.mean()))
        else:
            disagreements.append(float((ours.argmax(1) != theirs.argmax(1)).mean()))
            if _are_probabilities(ours) and _are_probabilities(theirs):
                probabilities.append(float(_total_variation(ours, theirs).mean()))
            else:
                others.append(float(_relative_distance(ours, theirs).mean()))
    # Logits are only another way to write the probabilities made of them.
    return OutputComparison(
        max(disagreements, default=0.0), max(probabilities or others, default=0.0)
    )


def compare_tokens(
    champion: Sequence[TokenOutput], candidate: Sequence[TokenOutput]
) -> TokenComparison:
    """Of whole answers, or of as much of the candidate's as the champion's has."""
    ours = [token for output in champion for token in output.token_ids]
    theirs = [token for output in candidate for token in output.token_ids]
    longest = max(len(ours), len(theirs))
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    disagreement = 1 - same / longest if longest else 0.0
    ours_logprobs = [entry.logprob for output in champion for entry in output.logprobs]
    their_logprobs = [entry.logprob for output in candidate for entry in output.logprobs]
    pairs = list(zip(ours_logprobs, their_logprobs, strict=False))[:same]
    if not pairs:
        return TokenComparison(disagreement, None)
    distances = [min(1.0, abs(a - b)) for a, b in pairs if a != b]
    return TokenComparison(disagreement, sum(distances) / len(pairs))


def _rows(x: Array) -> Array:
    return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)


def _number_distances(ours: Array, theirs: Array) -> Array:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    scale = np.maximum(1.0, np.maximum(np.abs(ours), np.abs(theirs)))
    distances: Array = np.minimum(1.0, np.abs(ours - theirs) / scale)
    return distances


def _are_probabilities(x: Array) -> bool:
    return bool((x >= 0).all() and (np.abs(x.sum(axis=1) - 1) <= _SUM_ERROR).all())


def _total_variation(ours: Array, theirs: Array) -> Array:
    distances: Array = np.minimum(1.0, np.abs(ours - theirs).sum(axis=1) / 2)
    return distances


def _relative_distance(ours: Array, theirs: Array) -> Array:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1) + np.linalg.norm(theirs, axis=1)
    apart = np.linalg.norm(ours - theirs, axis=1)
    distances: Array = np.divide(apart, lengths, out=np.zeros_like(apart), where=lengths > 0)
    return distances
