"""What two versions answer to the same request is compared row by row, or token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cluster.errors import UpstreamFailedError
from serve_apps.gateway.releases.comparison import (
    compare_outputs,
    compare_tokens,
    require_finite,
)
from serve_apps.llm.engine import TokenLogprobs, TokenOutput


def words(*values: str) -> Any:
    return np.array([value.encode() for value in values], dtype=object)


def numbers(*values: Any) -> Any:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("champion", "candidate", "label_disagreement", "score_distance"),
    [
        (words("a", "b"), words("a", "b"), 0, 0),
        (words("a", "b", "c", "c"), words("a", "b", "c", "d"), 0.25, 0),
        (np.array([1, 2]), np.array([1, 3]), 0.5, 0),
        # Classes' probabilities: total variation.
        (numbers([0.6, 0.4]), numbers([0.6, 0.4]), 0, 0),
        (numbers([0.6, 0.4]), numbers([0.4, 0.6]), 1, 0.2),
        (numbers([1, 0], [0, 1]), numbers([1, 0], [1, 0]), 0.5, 0.5),
        # Other scores: relative to their lengths.
        (numbers([3, 0]), numbers([-3, 0]), 1, 1),
        (numbers([3, 4]), numbers([3, 4]), 0, 0),
        (numbers([0, 0]), numbers([0, 0]), 0, 0),
        # One number for a row: relative above 1, absolute below.
        (numbers(200, 100), numbers(210, 150), 0.5, (10 / 210 + 50 / 150) / 2),
        (numbers([0.01]), numbers([0.05]), 0, 0.04),
        (numbers([5]), numbers([-1e9]), 1, 1),
        # What is not the same kind of answer.
        (numbers([0.6, 0.4]), numbers([0.5, 0.3, 0.2]), 1, 1),
        (numbers([0.6]), words("a"), 1, 1),
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), 0, 0),
    ],
)
def test_outputs_are_compared_row_by_row(
    champion: Any, candidate: Any, label_disagreement: float, score_distance: float
) -> None:
    found = compare_outputs({"y": champion}, {"y": candidate})
    assert found.label_disagreement == pytest.approx(label_disagreement)
    assert found.score_distance == pytest.approx(score_distance, abs=1e-6)


def test_probabilities_count_before_the_logits_that_they_are_made_of() -> None:
    champion = {"logits": numbers([9, 0]), "probabilities": numbers([0.9, 0.1])}
    candidate = {"logits": numbers([1, 0]), "probabilities": numbers([0.8, 0.2])}
    assert compare_outputs(champion, candidate).score_distance == pytest.approx(0.1)
    assert compare_outputs(champion, {"logits": numbers([9, 0])}).label_disagreement == 1


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
scores = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=finite)


@given(scores, st.randoms())
def test_every_figure_lies_between_0_and_1_and_equals_are_equal(x: Any, random: Any) -> None:
    shuffled = x.copy().reshape(-1)
    random.shuffle(shuffled)
    found = compare_outputs({"y": x}, {"y": shuffled.reshape(x.shape)})
    assert 0 <= found.label_disagreement <= 1
    assert 0 <= found.score_distance <= 1 + 1e-9
    same = compare_outputs({"y": x}, {"y": x.copy()})
    assert (same.label_disagreement, same.score_distance) == (0, 0)


def test_what_is_no_number_is_refused() -> None:
    require_finite({"y": numbers([1, 2]), "label": words("a"), "n": np.array([1])})
    for bad in (math.nan, math.inf):
        with pytest.raises(UpstreamFailedError):
            require_finite({"label": words("a"), "y": numbers([1, bad])})


def answer(*tokens: int, logprobs: Any = ()) -> list[TokenOutput]:
    entries = tuple(
        TokenLogprobs(token, logprob) for token, logprob in zip(tokens, logprobs, strict=False)
    )
    middle = len(tokens) // 2
    return [
        TokenOutput("r", tokens[:middle], logprobs=entries[:middle]),
        TokenOutput("r", tokens[middle:], "length", logprobs=entries[middle:]),
    ]


@pytest.mark.parametrize(
    ("champion", "candidate", "disagreement", "divergence"),
    [
        (answer(1, 2, 3, 4), answer(1, 2, 3, 4), 0, None),
        (answer(1, 2, 3, 4), answer(1, 2, 9, 4), 0.5, None),
        (answer(1, 2), answer(1, 2, 3, 4), 0.5, None),
        (answer(1, 2), answer(9, 2), 1, None),
        ([], [], 0, None),
        (answer(1, 2, logprobs=[-1, -2]), answer(1, 2, logprobs=[-1.5, -2]), 0, 0.25),
        # After the first that differs, they are no longer about the same.
        (answer(1, 2, logprobs=[-1, -2]), answer(1, 9, logprobs=[-1.5, -9]), 0.5, 0.5),
        (answer(1, 2, logprobs=[-1, -2]), answer(1, 2, logprobs=[-math.inf, -2]), 0, 0.5),
        (answer(1, logprobs=[-math.inf]), answer(1, logprobs=[-math.inf]), 0, 0),
        (answer(1, logprobs=[-1]), answer(9, logprobs=[-1]), 1, None),
    ],
)
def test_tokens_are_compared_up_to_the_first_that_differs(
    champion: Any, candidate: Any, disagreement: float, divergence: float | None
) -> None:
    found = compare_tokens(champion, candidate)
    assert found.token_disagreement == pytest.approx(disagreement)
    assert found.logprob_divergence == pytest.approx(divergence)
