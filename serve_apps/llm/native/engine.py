"""`NativeEngine`: Heliostat's own continuous batching in torch, for laptops, CI and one GPU.

engine = NativeEngine(NativeModel.load(package.model_dir, budget), budget)
engine.add(EngineRequest("r1", (1, 2, 3), Sampling(max_tokens=8)))
outputs = engine.step()
"""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

from cluster.errors import UpstreamFailedError
from cluster.grammars import Grammars
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    FinishReason,
    StepOutput,
    TokenOutput,
    begin_grammar,
    check_adapter,
    check_request,
)
from serve_apps.llm.native.batch import BlockTables, make_batch
from serve_apps.llm.native.blocks import BlockPool
from serve_apps.llm.native.choosing import BROKEN, Choice, choose
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
            logits, is_broken = model.forward(batch)
            broken = _sequences_of(chunks, is_broken.tolist())
            choices = choose(logits, [chunk.sequence for chunk in ended])
        except Exception as error:
            self._fail(str(error) or repr(error))
            raise UpstreamFailedError(f"the engine stopped: {error}") from error
        with self._changed:
            return self._take(chunks, broken, ended, choices)

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
        self, chunks: list[Chunk], broken: set[Sequence], ended: list[Chunk], choices: list[Choice]
    ) -> StepOutput:
        """Note what was computed and say what was chosen, but nothing of who left meanwhile."""
        outputs = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.place < 0:
                continue
            if sequence in broken:  # nobody may take over its beginning
                outputs.append(self._end(sequence, *BROKEN))
            else:
                self._scheduler.advance(chunk)
        for chunk, choice in zip(ended, choices, strict=True):
            sequence = chunk.sequence
            if sequence.place < 0:
                continue
            request_id = sequence.request.request_id
            if choice.failure is not None:
                outputs.append(self._end(sequence, *choice.failure))
                continue
            sequence.tokens.append(choice.token_id)
            reason = sequence.finish_reason
            if reason is not None:
                self._scheduler.remove(sequence)
                del self._sequences[request_id]
            outputs.append(
                TokenOutput(request_id, (choice.token_id,), reason, logprobs=choice.logprobs)
            )
        return outputs

    def _end(self, sequence: Sequence, reason: FinishReason, error: str) -> TokenOutput:
        """Without another token."""
        request_id = sequence.request.request_id
        self._scheduler.remove(sequence)
        del self._sequences[request_id]
        return TokenOutput(request_id, (), reason, error)

    def _check_works(self) -> None:
        if self._failure is not None:
            raise UpstreamFailedError(f"the engine stopped: {self._failure}")

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()


def _sequences_of(chunks: list[Chunk], is_wanted: list[bool]) -> set[Sequence]:
    """Those with such a row among the rows of all chunks."""
    found: set[Sequence] = set()
    first = 0
    for chunk in chunks:
        if any(is_wanted[first : first + chunk.num_tokens]):
            found.add(chunk.sequence)
        first += chunk.num_tokens
    return found
