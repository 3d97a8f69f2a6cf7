"""A prompt goes where its beginning is in the cache, unless that replica is too busy."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.llm.prefix_routing import (
    BLOCK_TOKENS,
    Candidate,
    PrefixIndex,
    PrefixRoutingPolicy,
    block_hashes,
)

SHARED = tuple(range(4 * BLOCK_TOKENS))
CACHED = 16 * BLOCK_TOKENS


@pytest.mark.parametrize(
    ("candidates", "order", "reason"),
    [
        ([Candidate("a")], "a", "a is the least busy"),
        ([Candidate("a", 2), Candidate("b", 1)], "ba", "b is the least busy"),
        ([Candidate("a"), Candidate("b", 0, 64)], "ba", "b has 64 of its tokens"),
        # 512 tokens are worth four requests more, and no fifth.
        ([Candidate("a", 0), Candidate("b", 3, CACHED)], "ba", "b has 512 of its tokens"),
        ([Candidate("a", 0), Candidate("b", 5, CACHED)], "ab", "a is the least busy"),
        # A few tokens decide between equals only.
        ([Candidate("a", 0), Candidate("b", 1, 32)], "ab", "a is the least busy"),
        # However long the prefix, the imbalance is bounded.
        ([Candidate("a", 0), Candidate("b", 8, 10**6)], "ba", "b has 1000000 of its tokens"),
        ([Candidate("a", 0), Candidate("b", 9, 10**6)], "ab", "a is the least busy"),
        ([Candidate("a", 0, 32), Candidate("b", 0, CACHED)], "ba", "b has 512 of its tokens"),
        ([Candidate("a", affinity=2), Candidate("b", affinity=1)], "ba", "b is the least busy"),
        # One that failed a moment ago is the last to be asked, and is asked all the same.
        (
            [Candidate("a", 0, CACHED, is_suspect=True), Candidate("b", 7)],
            "ba",
            "b is the one that did not fail",
        ),
        ([Candidate("a", is_suspect=True)], "a", "a is the least busy"),
    ],
)
def test_what_is_cached_is_weighed_against_what_is_running(
    candidates: list[Candidate], order: str, reason: str
) -> None:
    decision = PrefixRoutingPolicy().decide(candidates)
    assert decision.order == tuple(order)
    assert decision.reason == reason


@given(
    st.lists(
        st.builds(
            Candidate,
            st.uuids().map(str),
            st.integers(0, 100),
            st.integers(0, 10**6),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_replica_is_tried_and_none_is_burdened_without_bound(
    candidates: list[Candidate],
) -> None:
    policy = PrefixRoutingPolicy()
    order = policy.decide(candidates).order
    assert sorted(order) == sorted(c.name for c in candidates)
    best = next(c for c in candidates if c.name == order[0])
    good = [c for c in candidates if not c.is_suspect] or candidates
    assert best in good
    assert best.num_running - min(c.num_running for c in good) <= policy.max_imbalance


def test_the_longest_common_beginning_counts() -> None:
    index = PrefixIndex()
    index.note("a", block_hashes(SHARED))
    for length, cached in [(4, 4), (3, 3), (1, 1)]:
        prompt = (*SHARED[: length * BLOCK_TOKENS], *[7] * 3 * BLOCK_TOKENS)
        found = index.candidate("a", block_hashes(prompt), 0)
        assert found.num_cached_tokens == cached * BLOCK_TOKENS
    assert index.candidate("b", block_hashes(SHARED), 0).num_cached_tokens == 0
    other_beginning = block_hashes((9, *SHARED[1:]))
    assert index.candidate("a", other_beginning, 0).num_cached_tokens == 0


def test_less_than_a_block_and_another_adapter_share_nothing() -> None:
    assert block_hashes(SHARED[: BLOCK_TOKENS - 1]) == ()
    assert not set(block_hashes(SHARED)) & set(block_hashes(SHARED, "sha256:1"))
    assert not set(block_hashes(SHARED)) & set(block_hashes(SHARED, tenant="another"))


def test_what_was_not_sent_for_long_is_forgotten_from_its_end() -> None:
    index = PrefixIndex(max_blocks=6)
    index.note("a", block_hashes(SHARED))
    index.note("a", block_hashes([1] * 3 * BLOCK_TOKENS))
    found = index.candidate("a", block_hashes(SHARED), 0)
    assert found.num_cached_tokens == 3 * BLOCK_TOKENS
    # Sent again, it is the most recent.
    index.note("a", block_hashes(SHARED))
    assert index.candidate("a", block_hashes(SHARED), 0).num_cached_tokens == len(SHARED)


def test_a_replica_that_goes_takes_its_cache_along() -> None:
    index = PrefixIndex()
    for replica in "ab":
        index.note(replica, block_hashes(SHARED))
    index.keep_only(["b", "c"])
    found = {name: index.candidate(name, block_hashes(SHARED), 0) for name in "abc"}
    cached = {name: candidate.num_cached_tokens for name, candidate in found.items()}
    assert cached == {"a": 0, "b": len(SHARED), "c": 0}


def test_gateways_agree_on_a_new_prefix_and_spread_different_ones() -> None:
    """Each with an index of its own, in another process even."""

    def chosen(seed: int) -> str:
        index, blocks = PrefixIndex(), block_hashes([seed] * BLOCK_TOKENS)
        candidates = [index.candidate(name, blocks, 0) for name in ("r1", "r2")]
        return PrefixRoutingPolicy().decide(candidates).order[0]

    here = [chosen(seed) for seed in range(20)]
    assert set(here) == {"r1", "r2"}
    script = (
        "from serve_apps.llm.prefix_routing import *\n"
        "for seed in range(20):\n"
        "    blocks = block_hashes([seed] * BLOCK_TOKENS)\n"
        "    found = [PrefixIndex().candidate(n, blocks, 0) for n in ('r1', 'r2')]\n"
        "    print(PrefixRoutingPolicy().decide(found).order[0])\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert there.stdout.split() == here
