"""Whose tokens a step computes. Pure: token ids and counts, no tensors and no clock.

Every running sequence that is ready gets its next token; what is left of the step's budget goes to
prompts, in chunks. Tenants take turns by the tokens that were computed for them (virtual token
counters; Sheng et al. 2024, "Fairness in Serving Large Language Models"). Where the cache is full,
the youngest sequence gives its blocks back and later computes them again from its tokens: the
oldest always comes to its end, so nothing is lost and nobody waits for ever.

    scheduler = Scheduler(pool, max_running=32, max_batch_tokens=512)
    scheduler.add(sequence)
    for chunk in scheduler.plan(): …
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.grammars import GrammarState
from serve_apps.llm.engine import EngineRequest, FinishReason
from serve_apps.llm.native.blocks import BLOCK_TOKENS, BlockPool, Node


@dataclass(eq=False)
class Sequence:
    """A request's tokens and where they are in the cache."""

    request: EngineRequest
    seed: int
    grammar: GrammarState | None = None
    tokens: list[int] = field(init=False)
    """The prompt and the answer so far."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the blocks."""
    place: int = -1
    """Its row among those that run; -1 while it waits."""
    arrival: int = 0
    num_charged: int = 0
    """Tokens that its tenant was charged for: none twice."""
    node: Node = None
    num_registered: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.answer_ids]

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def is_ready(self) -> bool:
        """Whether only its newest token has to be computed."""
        return len(self.tokens) - self.num_computed == 1

    @property
    def finish_reason(self) -> FinishReason | None:
        sampling = self.request.sampling
        if self.tokens[-1] in sampling.eos_token_ids:
            return "stop"
        is_full = len(self.tokens) - self.num_prompt >= sampling.max_tokens
        return "length" if is_full else None


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence, from `num_computed` on, that a step computes."""

    sequence: Sequence
    num_tokens: int

    @property
    def gives_token(self) -> bool:
        """Whether it reaches the sequence's end, so that its next token can be chosen."""
        sequence = self.sequence
        return sequence.num_computed + self.num_tokens == len(sequence.tokens)


class Scheduler:
    """Sequences that wait and those that run."""

    def __init__(self, pool: BlockPool, *, max_running: int, max_batch_tokens: int) -> None:
        self._pool = pool
        self._max_batch_tokens = max(max_batch_tokens, max_running)
        self._places = list(range(max_running - 1, -1, -1))
        self._running: list[Sequence] = []
        """In the order of their arrival."""
        self._waiting: dict[str, deque[Sequence]] = {}
        """By tenant; none of them is empty."""
        self._served: dict[str, int] = {}
        """Tokens computed for each tenant, as far as it counts against the others."""
        self._num_arrived = 0
        self.num_preempted = 0
        self.num_reused_tokens = 0
        """Prompt tokens that were found in the cache."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._num_arrived += 1
        sequence.arrival = self._num_arrived
        tenant = sequence.request.tenant
        active = {*self._waiting, *(running.request.tenant for running in self._running)}
        if not active:
            self._served.clear()
        elif tenant not in active:
            # Having asked for nothing earns no right to be served alone for a while.
            lowest = min(self._served.get(other, 0) for other in active)
            self._served[tenant] = max(self._served.get(tenant, 0), lowest)
        self._waiting.setdefault(tenant, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its place."""
        if sequence.place >= 0:
            self._stop(sequence)
            return
        tenant = sequence.request.tenant
        queue = self._waiting.get(tenant, deque())
        if sequence in queue:
            queue.remove(sequence)
        if not queue:
            self._waiting.pop(tenant, None)

    def plan(self) -> list[Chunk]:
        """What the next step computes, its blocks taken: ready sequences come first."""
        chunks = self._next_tokens()
        budget = self._max_batch_tokens - len(chunks)
        while budget and self._places and self._admit():
            pass
        planned = {chunk.sequence for chunk in chunks}
        prompts = [sequence for sequence in self._running if sequence not in planned]
        for sequence in sorted(prompts, key=self._turn):
            if not budget:
                break
            num_tokens = min(budget, len(sequence.tokens) - sequence.num_computed)
            budget -= num_tokens
            chunks.append(self._charged(Chunk(sequence, num_tokens)))
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk was computed; what it filled can be shared from now on."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        while (end := (sequence.num_registered + 1) * BLOCK_TOKENS) <= sequence.num_computed:
            tokens = tuple(sequence.tokens[end - BLOCK_TOKENS : end])
            block = sequence.blocks[sequence.num_registered]
            sequence.node = self._pool.register(block, sequence.node, tokens)
            sequence.num_registered += 1

    def _next_tokens(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in [sequence for sequence in self._running if sequence.is_ready]:
            while sequence.place >= 0 and len(sequence.blocks) * BLOCK_TOKENS < len(
                sequence.tokens
            ):
                block = self._pool.take()
                if block is not None:
                    sequence.blocks.append(block)
                else:
                    self._preempt(self._running[-1])
            if sequence.place >= 0:
                chunks.append(self._charged(Chunk(sequence, 1)))
        # Those of about the same length attend together.
        return sorted(chunks, key=lambda chunk: -len(chunk.sequence.blocks))

    def _admit(self) -> bool:
        """Let the next sequence run; False where none waits or the cache has no room for it."""
        if not self._waiting:
            return False
        tenant = min(self._waiting, key=lambda tenant: self._turn(self._waiting[tenant][0]))
        sequence = self._waiting[tenant][0]
        # What one tenant asked is not to be guessed by another from how quick an answer is.
        root = (tenant, sequence.request.adapter)
        prefix = self._pool.match(root, sequence.tokens)
        num_blocks = -(-len(sequence.tokens) // BLOCK_TOKENS) - len(prefix.blocks)
        # Those that run are about to need one more each; to take it back at once would be vain.
        if num_blocks + len(self._running) > self._pool.num_available:
            self._pool.release(prefix.blocks)
            return False
        taken = [self._pool.take() for _ in range(num_blocks)]
        sequence.blocks = prefix.blocks + [block for block in taken if block is not None]
        sequence.node, sequence.num_registered = prefix.node, len(prefix.blocks)
        sequence.num_computed = len(prefix.blocks) * BLOCK_TOKENS
        self.num_reused_tokens += sequence.num_computed
        sequence.place = self._places.pop()
        self._waiting[tenant].popleft()
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        self._running.append(sequence)
        self._running.sort(key=lambda sequence: sequence.arrival)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._waiting.setdefault(sequence.request.tenant, deque()).appendleft(sequence)
        self.num_preempted += 1

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.blocks)
        self._places.append(sequence.place)
        sequence.place, sequence.blocks, sequence.num_computed = -1, [], 0

    def _turn(self, sequence: Sequence) -> tuple[int, int]:
        """The lowest is next."""
        return self._served.get(sequence.request.tenant, 0), sequence.arrival

    def _charged(self, chunk: Chunk) -> Chunk:
        sequence, tenant = chunk.sequence, chunk.sequence.request.tenant
        end = sequence.num_computed + chunk.num_tokens
        new = max(0, end - max(sequence.num_charged, sequence.num_computed))
        sequence.num_charged = max(sequence.num_charged, end)
        self._served[tenant] = self._served.get(tenant, 0) + new
        return chunk
