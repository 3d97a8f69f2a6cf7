"""Which block of the cache holds what: shared prefixes, counted references, the oldest goes first.

Pure bookkeeping without tensors. A full block is known by the block before it and its tokens, so
the blocks of a prefix are found by walking from its root, and no two prefixes are ever confused.

    pool = BlockPool(num_blocks=1024)
    prefix = pool.match(root=("tenant", None), tokens=[…])
    block = pool.take()
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 16

Node = Hashable
"""A prefix that ends with a full block; the root of all is whatever its user says."""


@dataclass(frozen=True)
class Prefix:
    """Blocks that hold the beginning of a sequence already."""

    blocks: list[int]
    node: Node


class BlockPool:
    """Blocks are in use, kept for a prefix that may come again, or free."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_users = [0] * num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks without users whose contents are known, the least recently used first."""
        self._blocks: dict[tuple[Node, tuple[int, ...]], tuple[int, int]] = {}
        """By the node before and the tokens: the block, and the node that it makes."""
        self._keys: dict[int, tuple[Node, tuple[int, ...]]] = {}
        self._last_node = 0

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._kept)

    def match(self, root: Node, tokens: Sequence[int]) -> Prefix:
        """The longest known prefix, its blocks taken; at least one token is left to compute."""
        node, blocks = root, []
        for end in range(BLOCK_TOKENS, len(tokens), BLOCK_TOKENS):
            known = self._blocks.get((node, tuple(tokens[end - BLOCK_TOKENS : end])))
            if known is None:
                break
            block, node = known
            blocks.append(block)
            self._num_users[block] += 1
            self._kept.pop(block, None)
        return Prefix(blocks, node)

    def take(self) -> int | None:
        """A block to fill; None where all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
        else:
            return None
        self._num_users[block] = 1
        return block

    def register(self, block: int, before: Node, tokens: tuple[int, ...]) -> Node:
        """Make a full block known; the node that it makes."""
        key = (before, tokens)
        known = self._blocks.get(key)
        if known is not None:  # computed twice at the same time: the first is kept
            return known[1]
        self._last_node += 1
        self._blocks[key] = (block, self._last_node)
        self._keys[block] = key
        return self._last_node

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each."""
        for block in reversed(blocks):  # the end of a prefix goes before what it stands on
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free.append(block)
