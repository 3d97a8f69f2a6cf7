"""What the native engine does beyond what every engine must: it shares, takes back and goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.errors import UpstreamFailedError
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.native.engine import NativeEngine
from serve_apps.llm.native.model import NativeModel
from tests.unit.serve_apps.llm.native.test_model import build

BUDGET = CacheBudget(max_cache_bytes=2**22, max_running=8, max_batch_tokens=48)


def engine(budget: CacheBudget = BUDGET) -> NativeEngine:
    theirs = build("qwen3")
    # Spread the logits, so that no two tokens are nearly tied.
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["lm_head.weight"] *= 5
    return NativeEngine(NativeModel(theirs.config, weights, budget), budget)


def ask(request_id: str, prompt: range | tuple[int, ...], **options: Any) -> EngineRequest:
    values = {"max_tokens": 20, "temperature": 0.0} | options
    return EngineRequest(request_id, tuple(prompt), Sampling(**values))


def run(engine: NativeEngine, *requests: EngineRequest) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    num_open = len(requests)
    while num_open:
        for output in engine.step():
            answers[output.request_id].extend(output.token_ids)
            num_open -= output.finish_reason is not None
    return answers


REQUESTS = [
    ask("greedy", range(3, 40), max_tokens=70),
    ask("short", (5,), max_tokens=70),
    ask("seeded", range(1, 31), max_tokens=70, temperature=0.9, seed=3),
    ask("penalised", range(7, 60), max_tokens=60, repetition_penalty=1.3, frequency_penalty=0.6),
    ask("narrow", range(50, 90), max_tokens=60, temperature=1.2, top_k=7, top_p=0.9, seed=9),
]


def test_sequences_that_give_their_cache_back_lose_nothing() -> None:
    roomy = engine()
    # Eleven blocks: two of the five fit in full.
    tight = engine(replace(BUDGET, max_cache_bytes=11 * 16 * 2 * 2 * 2 * 16 * 4))
    assert run(tight, *REQUESTS) == run(roomy, *REQUESTS)
    assert tight.stats().num_preempted > 0
    assert roomy.stats().num_preempted == 0


def test_answers_do_not_depend_on_how_prompts_are_cut() -> None:
    whole = engine(replace(BUDGET, max_batch_tokens=512))
    cut = engine(replace(BUDGET, max_batch_tokens=8))
    assert run(cut, *REQUESTS) == run(whole, *REQUESTS)


def test_long_and_short_sequences_answer_as_they_would_alone() -> None:
    together = engine(replace(BUDGET, max_batch_tokens=512))
    requests = [
        ask(f"r{number}", range(number + 1, number + 1 + length), max_tokens=25)
        for number, length in enumerate((1, 90, 15, 16, 40, 2, 31))
    ]
    answers = run(together, *requests)
    assert together.stats().num_preempted == 0
    for request in requests:
        alone = run(engine(), request)
        assert answers[request.request_id] == alone[request.request_id]


def test_prompts_are_computed_while_others_get_their_tokens() -> None:
    busy = engine(replace(BUDGET, max_batch_tokens=16))
    busy.add(ask("first", (1, 2, 3), max_tokens=30))
    while not busy.step():
        pass
    busy.add(ask("long", range(90)))
    for _ in range(5):
        assert [output.request_id for output in busy.step()] == ["first"]
    # 90 tokens at 15 per step: the sixth step holds the last of them.
    assert [output.request_id for output in busy.step()] == ["first", "long"]


def test_a_prefix_is_computed_once_and_changes_nothing() -> None:
    shared = tuple(range(4, 56))
    first, second = ask("a", (*shared, 1, 2, 3)), ask("b", (*shared, 60, 61))
    warm = engine()
    run(warm, first)
    assert warm.stats().num_reused_tokens == 0
    expected = run(engine(), second)
    assert run(warm, second) == expected
    assert warm.stats().num_reused_tokens == 48  # three full blocks of 16
    # An answer is as good a prefix as a prompt: the next turn of a talk.
    answer = tuple(expected["b"])
    talk = ask("c", (*shared, 60, 61, *answer, 9))
    assert run(warm, talk) == run(engine(), talk)
    # 74 tokens of prompt and answer, the last of them never computed: four blocks.
    assert warm.stats().num_reused_tokens == 48 + 64


def test_the_very_same_prompt_is_reused_but_for_its_end() -> None:
    prompt = tuple(range(32))
    warm = engine()
    assert run(warm, ask("a", prompt))["a"] == run(warm, ask("b", prompt))["b"]
    assert warm.stats().num_reused_tokens == 16


def test_tenants_and_adapters_share_no_prefixes() -> None:
    warm = engine()
    request = replace(ask("a", range(40)), tenant="one")
    run(warm, request)
    run(warm, replace(request, tenant="two"))
    assert warm.stats().num_reused_tokens == 0
    run(warm, request)
    assert warm.stats().num_reused_tokens == 32


def test_a_full_cache_forgets_prefixes_and_stays_right() -> None:
    small = engine(replace(BUDGET, max_cache_bytes=9 * 16 * 2 * 2 * 2 * 16 * 4))
    prompts = [tuple((start + i) % 97 for i in range(50)) for start in (0, 30, 60, 0)]
    for prompt in prompts:
        assert run(small, ask("s", prompt)) == run(engine(), ask("s", prompt))


def test_who_leaves_during_a_step_is_not_heard_again() -> None:
    working = engine()
    forward = working._model.forward

    def leave(batch: Any) -> torch.Tensor:
        working.abort("gone")
        return forward(batch)

    working.add(ask("gone", (1, 2)))
    working.add(ask("stays", (1, 2)))
    working._model.forward = leave  # type: ignore[method-assign]
    assert [output.request_id for output in working.step()] == ["stays"]
    assert working.stats().num_running == 1


def test_it_starts_where_an_aborted_one_left_its_place() -> None:
    narrow = engine(replace(BUDGET, max_running=1))
    narrow.add(ask("a", range(30), max_tokens=50))
    narrow.add(ask("b", (4, 5)))
    narrow.step()
    assert (narrow.stats().num_running, narrow.stats().num_waiting) == (1, 1)
    narrow.abort("a")
    assert [output.request_id for output in narrow.step()] == ["b"]
    narrow.abort("b")
    narrow.add(ask("c", (4, 5)))
    narrow.abort("c")
    assert narrow.step() == ()
    assert (narrow.stats().num_running, narrow.stats().num_waiting) == (0, 0)


def test_a_broken_model_is_reported_and_ends_the_engine() -> None:
    broken = engine()

    def explode(_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    broken._model.forward = explode  # type: ignore[method-assign]
    broken.add(ask("doomed", (1, 2)))
    for _ in range(2):
        with pytest.raises(UpstreamFailedError, match="the engine stopped: out of memory"):
            broken.step()
    with pytest.raises(UpstreamFailedError, match="the engine stopped"):
        broken.add(ask("later", (1, 2)))
    broken.close()


def test_a_closed_engine_says_so() -> None:
    closed = engine()
    closed.close()
    closed.close()
    with pytest.raises(UpstreamFailedError, match="it was closed"):
        closed.step()


def test_all_choose_in_one_message() -> None:
    working = engine()
    for number in range(6):
        working.add(ask(f"r{number}", (number + 1,)))
    outputs = working.step()
    assert len(outputs) == 6


@pytest.mark.parametrize("place", [0, 5, 40, 59])
def test_what_is_no_number_ends_its_own_answer_and_reaches_no_other(place: int) -> None:
    def with_broken_token() -> NativeEngine:
        theirs = build("qwen3")
        weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        weights["lm_head.weight"] *= 5
        weights["model.embed_tokens.weight"][90] = torch.nan
        return NativeEngine(NativeModel(theirs.config, weights, BUDGET), BUDGET)

    later = ask("later", (3, 4, 5, 6), max_tokens=4)
    beside = ask("beside", (5,), max_tokens=30)
    expected = run(with_broken_token(), later) | run(with_broken_token(), beside)
    engine = with_broken_token()
    engine.add(beside)
    answers: dict[str, list[int]] = {"beside": []}
    # A prompt of two steps; the second time nothing of it is taken for known.
    for name in ("first", "second"):
        engine.add(ask(name, (*range(1, 1 + place), 90, *range(2 + place, 61))))
        while name not in answers:
            for output in engine.step():
                answers.setdefault(output.request_id, []).extend(output.token_ids)
                if output.request_id == name:
                    assert (output.token_ids, output.finish_reason) == ((), "error")
    # The blocks that they leave are the next one's, which sees less of them than was written.
    engine.add(later)
    while engine.stats().num_running or engine.stats().num_waiting:
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert {name: answers[name] for name in expected} == expected
