"""`NativeEngine`: Heliostat's own continuous batching in torch, for laptops, CI and one GPU.

engine = NativeEngine(NativeModel.load(package.model_dir, budget), budget)
engine.add(EngineRequest("r1", (1, 2, 3), Sampling(max_tokens=8)))
outputs = engine.step()
"""

from __future__ import annotations

import itertools
import secrets
import threading
from bisect import bisect
from collections.abc import Collection
from collections.abc import Sequence as Series
from pathlib import Path

from cluster.errors import UpstreamFailedError
from cluster.grammars import Grammars
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    StepOutput,
    TokenOutput,
    begin_grammar,
    check_adapter,
    check_request,
)
from serve_apps.llm.native.batch import BlockTables, make_batch
from serve_apps.llm.native.blocks import BlockPool
from serve_apps.llm.native.choosing import NO_NUMBERS, Choice, Failure, choose
from serve_apps.llm.native.low_rank import Adapter, read_adapter
from serve_apps.llm.native.model import NativeModel
from serve_apps.llm.native.scheduler import Chunk, Scheduler, Sequence

_IDLE_WAIT_S = 0.1


class NativeEngine:
    """An Engine: a scheduler's plan, one forward pass and one choice of tokens in each step."""

    def __init__(
        self, model: NativeModel, budget: CacheBudget, grammars: Grammars | None = None
    ) -> None:
        self._model = model
        self._grammars = grammars
        self._adapters: dict[str, Adapter] = {}
        self._tables = BlockTables(budget.max_running, model.max_context_tokens)
        self._scheduler = Scheduler(
            BlockPool(model.num_blocks),
            max_running=budget.max_running,
            max_batch_tokens=budget.max_batch_tokens,
        )
        self._sequences: dict[str, Sequence] = {}
        self._changed = threading.Condition()
        """Guards all above but the model; a forward pass runs without it."""
        self._failure: str | None = None

    def add(self, request: EngineRequest) -> None:
        check_request(
            request,
            max_context_tokens=self._model.max_context_tokens,
            vocab_size=self._model.shape.vocab_size,
        )
        seed = request.sampling.seed
        seed = secrets.randbits(62) if seed is None else seed
        sequence = Sequence(request, seed, begin_grammar(request, self._grammars))
        with self._changed:
            self._check_works()
            check_adapter(request, self._adapters)
            self._sequences[request.request_id] = sequence
            self._scheduler.add(sequence)
            self._changed.notify_all()

    def load_adapter(self, digest: str, model_dir: Path) -> None:
        model = self._model
        adapter = read_adapter(model_dir, model.shape, dtype=model.dtype, device=model.device)
        model.check_fits(adapter)
        with self._changed:
            self._adapters[digest] = adapter

    def unload_adapter(self, digest: str) -> None:
        with self._changed:
            self._adapters.pop(digest, None)

    def step(self) -> StepOutput:
        with self._changed:
            self._check_works()
            if not self._sequences:
                self._changed.wait(_IDLE_WAIT_S)
            chunks = self._scheduler.plan()
            if not chunks:
                return ()
            model = self._model
            batch = make_batch(
                chunks,
                self._tables,
                model.shape,
                dtype=model.dtype,
                device=model.device,
                adapters=self._adapters,
            )
            ended = [chunk for chunk in chunks if chunk.gives_token]
        try:
            computed = model.forward(batch)
            choices = choose(computed.logits, [chunk.sequence for chunk in ended])
        except Exception as error:
            self._fail(str(error) or repr(error))
            raise UpstreamFailedError(f"the engine stopped: {error}") from error
        broken = _owners(computed.broken_rows, chunks)
        with self._changed:
            return self._take(chunks, ended, choices, broken)

    def abort(self, request_id: str) -> None:
        with self._changed:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._scheduler.remove(sequence)

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                max_context_tokens=self._model.max_context_tokens,
                vocab_size=self._model.shape.vocab_size,
                num_preempted=self._scheduler.num_preempted,
                num_reused_tokens=self._scheduler.num_reused_tokens,
                precision=self._model.precision,
            )

    def close(self) -> None:
        self._fail("it was closed")

    def _take(
        self,
        chunks: Series[Chunk],
        ended: Series[Chunk],
        choices: Series[Choice],
        broken: Collection[Sequence],
    ) -> StepOutput:
        """Note what was computed and say what was chosen, but nothing of who left meanwhile."""
        failures: dict[Sequence, Failure] = dict.fromkeys(broken, NO_NUMBERS)
        for chunk, choice in zip(ended, choices, strict=True):
            if choice.failure is not None:
                failures[chunk.sequence] = choice.failure
        outputs: list[TokenOutput] = []
        # First: what they filled is shared with nobody.
        for sequence, failure in failures.items():
            if sequence.place >= 0:
                self._forget(sequence)
                outputs.append(TokenOutput(sequence.request.request_id, (), *failure))
        for chunk in chunks:
            if chunk.sequence.place >= 0:
                self._scheduler.advance(chunk)
        for chunk, choice in zip(ended, choices, strict=True):
            sequence = chunk.sequence
            if sequence.place < 0:
                continue
            sequence.tokens.append(choice.token_id)
            reason = sequence.finish_reason
            if reason is not None:
                self._forget(sequence)
            outputs.append(
                TokenOutput(
                    sequence.request.request_id,
                    (choice.token_id,),
                    reason,
                    logprobs=choice.logprobs,
                )
            )
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]

    def _check_works(self) -> None:
        if self._failure is not None:
            raise UpstreamFailedError(f"the engine stopped: {self._failure}")

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()


def _owners(rows: Series[int], chunks: Series[Chunk]) -> set[Sequence]:
    """Whose the rows of a step are."""
    if not rows:
        return set()
    ends = list(itertools.accumulate(chunk.num_tokens for chunk in chunks))
    return {chunks[bisect(ends, row)].sequence for row in rows}
