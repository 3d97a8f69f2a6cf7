"""What the language-model benchmark asks, and how it counts."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from benchmarks.llm_peers.completions_load import Load
from benchmarks.llm_peers.figures import StreamTimes, closed_loop, figures_of
from benchmarks.llm_peers.model import FULL

LOAD = Load(
    url="", model="", num_streams=2, num_answers=4, prompt_tokens=12, new_tokens=3,
    first_id=10, last_id=99, seed=1,
)  # fmt: skip


def test_the_full_shape_has_82_million_weights() -> None:
    assert FULL.num_weights == pytest.approx(82e6, rel=0.01)


def test_no_prompt_is_asked_twice() -> None:
    prompts = [LOAD.prompt(number) for number in range(4)]
    prompts += [replace(LOAD, seed=2).prompt(number) for number in range(4)]
    assert len({*map(tuple, prompts)}) == 8
    assert {len(prompt) for prompt in prompts} == {12}
    assert all(10 <= token <= 99 for prompt in prompts for token in prompt)


def test_prompts_share_their_beginning_in_every_round() -> None:
    shared = replace(LOAD, num_shared_tokens=8, num_beginnings=2)
    first, second, third = (shared.prompt(number) for number in range(3))
    assert first[:8] == third[:8] != second[:8]
    assert first[8:] != third[8:]
    assert replace(shared, seed=9).prompt(0)[:8] == first[:8]


def test_figures_are_of_all_answers() -> None:
    found = [StreamTimes(0, 1, 3, 21), StreamTimes(0, 2, 4, 21), StreamTimes(1, 4, 8, 21)]
    figures = figures_of(found, 9)
    assert (figures.tokens_per_s, figures.ttft_p50_s) == (7, 2)
    assert figures.decode_tokens_per_s == 10


async def test_so_many_streams_are_open_at_once() -> None:
    open_now = most = 0

    async def stream(number: int) -> StreamTimes:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.001)
        open_now -= 1
        return StreamTimes(0, 1, 2, number)

    await closed_loop(3, 10, stream)
    assert most == 3
