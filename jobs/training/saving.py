"""Saving and restoring by all workers together, while training goes on.

`start` copies the state to host memory, which is all that training waits for. A thread of every
worker then writes its file; at a later step boundary the workers agree that all have written, and a
thread of the first worker commits. A save that is due before the last one is written waits for it,
so that no checkpoint that was asked for is left out.

    saver = Saver(engine, store, group, layout, tell, scratch=run_dir / "fetched")
    restored = saver.restore()               # None: nothing to go on from
    saver.start(step, memory)
    saver.poll()                             # at every step
    saver.wait()                             # before the end
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.training.checkpointing import CheckpointStore, Chunk, name_of
from jobs.training.engine import Engine
from jobs.training.events import Fault, Saved, Sink
from jobs.training.fragments import HostBuffer, Image
from jobs.training.manifest import FileRecord, Manifest, Range
from jobs.training.memory import RunMemory
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup
from jobs.training.restoring import Restored, Restorer

_log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A save that this worker has not yet been told is written everywhere."""

    name: str
    manifest: Manifest
    """Its files still to come."""
    best_step: int
    began_at: float
    writing: Future[_Written]
    blocked_s: float = 0.0


@dataclass(frozen=True)
class _Written:
    """What a worker has written, or why it could not."""

    file: str
    record: FileRecord | None
    problem: str = ""


class Saver:
    """The checkpoints of one run at one worker; every worker makes the same calls.

    Args:
        scratch: where files of an object store may be copied to while they are read.
        dataset_digest: of the data that the run is trained on; empty where it does not matter.
        blocking: `start` returns when the checkpoint is whole.
    """

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        group: ProcessGroup,
        layout: Layout,
        tell: Sink,
        *,
        scratch: Path,
        dataset_digest: str = "",
        blocking: bool = False,
    ) -> None:
        self._engine, self._store, self._group, self._tell = engine, store, group, tell
        self._layout, self._blocking = layout, blocking
        self._copy, self._part = layout.copy_of(group.rank), layout.part_of(group.rank)
        self._dataset_digest = dataset_digest
        self._restorer = Restorer(
            engine, store, group, layout, tell, scratch=scratch, dataset_digest=dataset_digest
        )
        # Attempts sort by time, and nobody else's has the same name.
        self._session = group.from_first(f"{int(time.time()):010x}{uuid.uuid4().hex[:6]}")
        self._num_saves = 0
        self._buffer = HostBuffer(pin=group.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reserving: Future[None] | None = None
        self._pending: _Pending | None = None
        self._committing: Future[Saved | Fault] | None = None

    def start(self, step: int, memory: RunMemory) -> None:
        """Save the state as it is now.

        Failing to, on a full disk say, costs the checkpoint and not the training.
        """
        began_at = time.monotonic()
        self._settle()
        self._num_saves += 1
        name = name_of(step, f"{self._session}{self._num_saves:06d}")
        tensors, ranges = self._engine.state().share(self._copy, self._layout.num_copies)
        if self._reserving is not None:
            self._reserving.result()
        image = self._buffer.fill(tensors)
        manifest = Manifest(
            step=step,
            world_size=self._group.world_size,
            tensor=self._layout.tensor,
            pipeline=self._layout.pipeline,
            dataset_digest=self._dataset_digest,
            memory=memory.model_dump(mode="json"),
            engine=self._engine.common(),
        )
        writing = self._thread.submit(self._write, name, image, ranges)
        self._pending = _Pending(name, manifest, memory.monitor.best_step, began_at, writing)
        self._pending.blocked_s = time.monotonic() - began_at
        if self._blocking:
            self.wait()

    def poll(self) -> None:
        """Commit what all workers have written by now, if anything is being saved."""
        if self._reserving is None:
            # After the first step there is a state, and time before it is saved.
            tensors, _ = self._engine.state().share(self._copy, self._layout.num_copies)
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self._reserving = self._thread.submit(self._buffer.reserve, size_bytes)
        if self._pending is not None:
            is_done = torch.tensor([float(self._pending.writing.done())])
            if int(self._group.sum(is_done)) == self._group.world_size:
                self._settle()
        if self._committing is not None and self._committing.done():
            self._report()

    def wait(self) -> None:
        """Return once nothing is being saved."""
        self._settle()
        if self._committing is not None:
            self._report()

    def restore(self, *, at: int | None = None, at_most: int | None = None) -> Restored | None:
        """Load the newest checkpoint that is what was written, at every worker; None if there is
        none. Those that are corrupt are set aside, each with a `Fault`.

        Args:
            at: the checkpoint of this step and no other.
            at_most: the newest of this step or an earlier one; later ones are deleted, since the
                run goes another way from there.

        Raises:
            ConflictError: the checkpoint is of another model or other data, of a model that is
                divided in another way, or of another format.
            HeliostatError, OSError: the store cannot be used.
        """
        self.wait()
        return self._restorer.restore(at=at, at_most=at_most)

    def _settle(self) -> None:
        """Wait until every worker has written, and let the first one commit."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        waited_from = time.monotonic()
        written: list[_Written] = self._group.gather(pending.writing.result())
        pending.blocked_s += time.monotonic() - waited_from
        if self._group.is_first:
            self._report()
            self._committing = self._thread.submit(self._finish, pending, written)

    def _report(self) -> None:
        """Tell what became of a commit; at the first worker."""
        committing, self._committing = self._committing, None
        if committing is not None:
            self._tell(committing.result())

    def _write(self, name: str, image: Image, ranges: dict[str, Range]) -> _Written:
        """In a thread: write this worker's file."""
        file, digest = f"rank-{self._group.rank:05d}.safetensors", hashlib.sha256()
        try:
            self._store.write(name, file, _digested(image.chunks(), digest))
        except Exception as error:
            _log.info("checkpoint %s: %s not written", name, file, exc_info=True)
            return _Written(file, None, str(error) or type(error).__name__)
        record = FileRecord(
            size_bytes=image.size_bytes, sha256=digest.hexdigest(), part=self._part, ranges=ranges
        )
        return _Written(file, record)

    def _finish(self, pending: _Pending, written: list[_Written]) -> Saved | Fault:
        """In a thread of the first worker: commit what all have written, or remove it."""
        step = pending.manifest.step
        try:
            files = {one.file: one.record for one in written if one.record is not None}
            if len(files) < len(written):
                self._store.abandon(pending.name)
                raise OSError(_why([one.problem for one in written if one.problem]))
            manifest = pending.manifest.model_copy(update={"files": files})
            self._store.commit(pending.name, manifest, best_step=pending.best_step)
        except Exception as error:
            _log.info("checkpoint %s not committed", pending.name, exc_info=True)
            text = f"checkpoint at step {step} was not saved: {error or type(error).__name__}"
            return Fault(step, "checkpoint_failed", text)
        seconds = time.monotonic() - pending.began_at
        blocked_s = seconds if self._blocking else pending.blocked_s
        return Saved(step, manifest.size_bytes, seconds, blocked_s)


def _digested(chunks: Iterable[Chunk], digest: Any) -> Iterator[Chunk]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _why(problems: list[str]) -> str:
    workers = f"{len(problems)} worker(s) could not write"
    return f"{workers}: {problems[0]}"
