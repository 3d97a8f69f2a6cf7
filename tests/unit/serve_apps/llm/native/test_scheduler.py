"""Turns, budgets and blocks, without a model: each plan is carried out with made-up tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.native.blocks import BlockPool
from serve_apps.llm.native.scheduler import Chunk, Scheduler, Sequence


def sequence(name: str, num_prompt: int, max_tokens: int, tenant: str = "") -> Sequence:
    prompt = tuple(hash((name, i)) % 1000 for i in range(num_prompt))
    return Sequence(
        EngineRequest(name, prompt, Sampling(max_tokens=max_tokens), tenant=tenant), seed=0
    )


def carry_out(scheduler: Scheduler, chunks: list[Chunk]) -> list[str]:
    """Who finished."""
    finished = []
    ended = [chunk.sequence for chunk in chunks if chunk.gives_token]
    for chunk in chunks:
        scheduler.advance(chunk)
    for sequence in ended:
        sequence.tokens.append(1000 + len(sequence.tokens))
        if sequence.finish_reason is not None:
            scheduler.remove(sequence)
            finished.append(sequence.request.request_id)
    return finished


def test_a_step_stays_within_its_budget_and_tokens_come_first() -> None:
    scheduler = Scheduler(BlockPool(100), max_running=4, max_batch_tokens=20)
    scheduler.add(sequence("a", 3, 50))
    carry_out(scheduler, scheduler.plan())
    scheduler.add(sequence("b", 30, 5))
    scheduler.add(sequence("c", 5, 5))
    sizes = []
    for _ in range(3):
        chunks = scheduler.plan()
        sizes.append([(chunk.sequence.request.request_id, chunk.num_tokens) for chunk in chunks])
        carry_out(scheduler, chunks)
    assert sizes == [
        [("a", 1), ("b", 19)],
        [("a", 1), ("b", 11), ("c", 5)],
        [("b", 1), ("a", 1), ("c", 1)],  # the longest first
    ]


def test_tenants_take_turns_by_tokens() -> None:
    scheduler = Scheduler(BlockPool(1000), max_running=2, max_batch_tokens=64)
    for number in range(30):
        scheduler.add(sequence(f"g{number}", 40, 10, "greedy"))
    for number in range(3):
        scheduler.add(sequence(f"m{number}", 40, 10, "modest"))
    finished: list[str] = []
    while len(finished) < 8:
        finished += carry_out(scheduler, scheduler.plan())
    # Alone it would come after thirty others.
    assert {"m0", "m1", "m2"} <= set(finished)


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    scheduler = Scheduler(BlockPool(1000), max_running=1, max_batch_tokens=64)
    for number in range(20):
        scheduler.add(sequence(f"a{number}", 40, 5, "always"))
    finished: list[str] = []
    while len(finished) < 10:
        finished += carry_out(scheduler, scheduler.plan())
    for number in range(10):
        scheduler.add(sequence(f"b{number}", 40, 5, "back"))
    while len(finished) < 20:
        finished += carry_out(scheduler, scheduler.plan())
    served = Counter(name[0] for name in finished[10:])
    assert served["a"] in (4, 5, 6)


def test_reused_and_repeated_tokens_are_charged_once() -> None:
    scheduler = Scheduler(BlockPool(100), max_running=4, max_batch_tokens=64)
    first, again = sequence("a", 40, 1, "t"), sequence("a", 40, 1, "t")
    for one in (first, again):
        scheduler.add(one)
        scheduler.add(sequence("other", 1, 100, "o"))  # keeps the counters
        carry_out(scheduler, scheduler.plan())
    assert scheduler.num_reused_tokens == 32
    assert scheduler._served["t"] == 40 + 8


def test_the_youngest_gives_way_and_the_oldest_comes_first() -> None:
    scheduler = Scheduler(BlockPool(4), max_running=3, max_batch_tokens=64)
    old, young = sequence("old", 17, 40), sequence("young", 17, 40)
    scheduler.add(old)
    carry_out(scheduler, scheduler.plan())
    scheduler.add(young)
    finished: list[str] = []
    while not finished:
        finished = carry_out(scheduler, scheduler.plan())
    assert finished == ["old"]
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1) or young.place >= 0


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.sampled_from("abc")),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(7, 20),
    max_running=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 40),
)
def test_whatever_comes_ends_and_leaves_the_cache_empty(
    requests: list[tuple[int, int, str]], num_blocks: int, max_running: int, max_batch_tokens: int
) -> None:
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(pool, max_running=max_running, max_batch_tokens=max_batch_tokens)
    for number, (num_prompt, max_tokens, tenant) in enumerate(requests):
        scheduler.add(sequence(f"{number % 3}", num_prompt, max_tokens, tenant))
    finished: list[str] = []
    for _ in range(5000):
        chunks = scheduler.plan()
        owned = Counter(block for chunk in chunks for block in set(chunk.sequence.blocks))
        for chunk in chunks:
            ours = chunk.sequence
            first = ours.num_computed // 16
            # What is written now is nobody else's.
            assert all(owned[block] == 1 for block in ours.blocks[first:])
            assert len(ours.blocks) * 16 >= ours.num_computed + chunk.num_tokens
        assert sum(chunk.num_tokens for chunk in chunks) <= max(max_batch_tokens, max_running)
        finished += carry_out(scheduler, chunks)
        if len(finished) == len(requests):
            break
    assert len(finished) == len(requests)
    assert pool.num_available == num_blocks
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


def test_a_pool_gives_no_more_than_it_has() -> None:
    pool = BlockPool(2)
    taken = [pool.take(), pool.take()]
    assert sorted(block for block in taken if block is not None) == [0, 1]
    assert pool.take() is None
    pool.release([0])
    assert pool.take() == 0


@pytest.mark.parametrize("root", ["r", "s"])
def test_a_prefix_is_found_from_its_root_alone(root: str) -> None:
    pool = BlockPool(4)
    tokens = tuple(range(16))
    block = pool.take()
    assert block is not None
    pool.register(block, "r", tokens)
    pool.release([block])
    found = pool.match(root, [*tokens, 1])
    assert found.blocks == ([block] if root == "r" else [])
