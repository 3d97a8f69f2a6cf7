"""vLLM's outputs in our words; test_engines.py runs the whole engine where vLLM is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import UpstreamFailedError
from serve_apps.llm.engine import EngineRequest, Sampling, TokenLogprobs
from serve_apps.llm.vllm_answers import Answer


def answer(*said: int, repeats: bool = False, **sampling: Any) -> Answer:
    request = EngineRequest("r", (1, 2), Sampling(max_tokens=9, **sampling), answer_ids=said)
    return Answer(request, repeats)


def given(*tokens: int, reason: str | None = None, logprobs: Any = None) -> Any:
    return SimpleNamespace(token_ids=list(tokens), finish_reason=reason, logprobs=logprobs)


def scores(**by_token: tuple[float, int]) -> Any:
    return {
        int(name.strip("t")): SimpleNamespace(logprob=logprob, rank=rank)
        for name, (logprob, rank) in by_token.items()
    }


def test_tokens_come_as_they_are_with_why_they_end() -> None:
    found = answer()
    assert found.take(given(5, 6)).token_ids == (5, 6)
    last = found.take(given(7, reason="length"))
    assert (last.request_id, last.token_ids, last.finish_reason) == ("r", (7,), "length")


def test_an_end_that_is_not_ours_is_an_error_that_names_it() -> None:
    last = answer().take(given(reason="abort"))
    assert (last.finish_reason, last.error) == ("error", "vLLM ended it: abort")


def test_what_was_said_is_prompt_unless_it_is_repeated() -> None:
    assert answer(5, 6).given == (5, 6)
    assert answer(5, 6, repeats=True).given == ()


def test_what_is_repeated_is_held_back() -> None:
    found = answer(5, 6, 7, repeats=True)
    assert [found.take(given(*tokens)).token_ids for tokens in ((5, 6), (7, 8), (9,))] == [
        (), (8,), (9,)
    ]  # fmt: skip


def test_an_answer_that_does_not_repeat_is_not_gone_on_with() -> None:
    found = answer(5, 6, repeats=True)
    found.take(given(5))
    with pytest.raises(UpstreamFailedError, match="its tokens do not repeat"):
        found.take(given(8))


def test_the_likeliest_come_best_first_without_a_choice_that_is_not_among_them() -> None:
    found = answer(num_logprobs=2)
    unlikely = scores(t9=(-5.0, 40), t3=(-0.5, 1), t4=(-1.0, 2))
    likely = scores(t4=(-1.5, 2), t3=(-0.5, 1))
    assert found.take(given(9, 4, logprobs=[unlikely, likely])).logprobs == (
        TokenLogprobs(9, -5.0, ((3, -0.5), (4, -1.0))),
        TokenLogprobs(4, -1.5, ((3, -0.5), (4, -1.5))),
    )


def test_log_probabilities_of_what_is_repeated_are_held_back_too() -> None:
    found = answer(5, repeats=True, num_logprobs=0)
    both = [scores(t5=(-1.0, 1)), scores(t6=(-2.0, 3))]
    assert found.take(given(5, 6, logprobs=both)).logprobs == (TokenLogprobs(6, -2.0),)
