"""Which replica is to generate an answer: one that has the beginning of its prompt in its cache,
unless that one is busier than its cache is worth.

What the replicas hold is not asked for but remembered: a replica that was sent a prompt has it,
until more recent ones took its place. Knows token ids and names of replicas; nothing of Ray.

    index, policy = PrefixIndex(), PrefixRoutingPolicy()
    blocks = block_hashes(request.prompt_ids)
    decision = policy.decide([index.candidate("r1", blocks, num_running=3), …])
    index.note(decision.order[0], blocks)
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 32
"""Prompts are compared in pieces of so many tokens."""
_MAX_BLOCKS = 8192


def block_hashes(
    token_ids: Sequence[int], adapter: str | None = None, tenant: str = ""
) -> tuple[int, ...]:
    """One number for each whole block, of it and all before it: the same in every process.

    With another adapter the same tokens leave something else in the cache, and tenants share none.
    """
    found: list[int] = []
    chained = zlib.crc32(f"{tenant}\n{adapter or ''}".encode())
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        # Of numbers alone, Python's hash does not depend on the process.
        chained = hash((chained, *token_ids[start : start + BLOCK_TOKENS]))
        found.append(chained)
    return tuple(found)


@dataclass(frozen=True)
class Candidate:
    """A replica, as a request sees it."""

    name: str
    num_running: int = 0
    num_cached_tokens: int = 0
    """How much of the prompt's beginning it has."""
    is_suspect: bool = False
    """It failed a moment ago."""
    affinity: int = 0
    """Decides between equals; the same in every gateway, so that they agree without asking."""


@dataclass(frozen=True)
class RoutingDecision:
    order: tuple[str, ...]
    """Replicas, the best first."""
    reason: str


@dataclass(frozen=True)
class PrefixRoutingPolicy:
    """Weighs what a replica need not read again against what it has to do."""

    tokens_per_request: int = 128
    """A request more at a replica is as bad as so many tokens more to read."""
    max_imbalance: int = 8
    """However long the prefix, a replica with so many requests more than another is overloaded."""

    def decide(self, candidates: Sequence[Candidate]) -> RoutingDecision:
        fewest = min(c.num_running for c in candidates)

        def worth(candidate: Candidate) -> int:
            is_overloaded = candidate.num_running - fewest > self.max_imbalance
            return 0 if is_overloaded else candidate.num_cached_tokens

        def cost(candidate: Candidate) -> tuple[bool, int, int, str]:
            load = candidate.num_running * self.tokens_per_request
            return (
                candidate.is_suspect,
                load - worth(candidate),
                candidate.affinity,
                candidate.name,
            )

        ordered = sorted(candidates, key=cost)
        best = ordered[0]
        if worth(best):
            reason = f"has {best.num_cached_tokens} of its tokens"
        elif best.num_running == fewest:
            reason = "is the least busy"
        else:
            reason = "is the one that did not fail"
        return RoutingDecision(tuple(c.name for c in ordered), f"{best.name} {reason}")


class PrefixIndex:
    """Which blocks each replica was sent last. Not for several threads."""

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def note(self, replica: str, blocks: Sequence[int]) -> None:
        """It was sent a prompt of these blocks."""
        held = self._blocks.setdefault(replica, OrderedDict())
        # The first is the last to be forgotten: without it the others are of no use.
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._max_blocks:
            held.popitem(last=False)

    def candidate(
        self, replica: str, blocks: Sequence[int], num_running: int, *, is_suspect: bool = False
    ) -> Candidate:
        """The replica, as a request with these blocks sees it."""
        held = self._blocks.get(replica, ())
        num_cached = next((i for i, b in enumerate(blocks) if b not in held), len(blocks))
        first = blocks[0] if blocks else 0
        return Candidate(
            replica,
            num_running,
            num_cached * BLOCK_TOKENS,
            is_suspect,
            zlib.crc32(f"{first}:{replica}".encode()),
        )

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget those that are gone, and their caches with them."""
        for gone in self._blocks.keys() - set(replicas):
            del self._blocks[gone]
