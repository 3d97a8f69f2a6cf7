"""Saving and restoring by all workers together: every one has its share, the first commits.

saver = Saver(engine, store, group, tell)
restored = saver.restore()               # None: nothing to go on from
saver.start(step, memory)
saver.poll()                             # at every step
saver.wait()                             # before the end
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cluster.errors import ConflictError
from jobs.training.checkpointing import STATE_DIR, Checkpoint, CheckpointStore
from jobs.training.engine import Engine
from jobs.training.events import Notice, Saved, Sink
from jobs.training.memory import RunMemory
from jobs.training.process_group import ProcessGroup

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """Where training goes on from."""

    step: int
    """Steps done."""
    memory: RunMemory


class Saver:
    """The checkpoints of one run at one worker; every worker makes the same calls."""

    def __init__(
        self, engine: Engine, store: CheckpointStore, group: ProcessGroup, tell: Sink
    ) -> None:
        self._engine, self._store, self._group, self._tell = engine, store, group, tell

    def start(self, step: int, memory: RunMemory) -> None:
        """Save the state as it is now.

        Failing to, on a full disk say, costs the checkpoint and not the training.
        """
        started_at = time.monotonic()
        try:
            saved = self._save(step, memory)
        except OSError as error:
            self._tell(Notice(f"checkpoint at step {step} was not saved: {error}"))
            return
        if saved is not None:
            self._tell(Saved(step, saved.size_bytes, time.monotonic() - started_at))

    def poll(self) -> None:
        """Commit what all workers have written by now, if anything is being saved."""

    def wait(self) -> None:
        """Return once nothing is being saved."""

    def restore(self, *, at: int | None = None, at_most: int | None = None) -> Restored | None:
        """Load the newest checkpoint, at every worker; None if there is none.

        Args:
            at: the checkpoint of this step and no other.
            at_most: the newest of this step or an earlier one.
        """
        self.wait()
        found: Checkpoint | None = None
        if self._group.is_first:
            found = self._find(at, at_most)
        found = self._group.from_first(found)
        if found is None:
            return None
        if found.world_size != self._group.world_size:
            raise ConflictError(
                f"checkpoint {found.path.name} was written by {found.world_size} workers, and this "
                f"run has {self._group.world_size}",
                hint=f"run with {found.world_size} workers, or --set resume=never to start anew",
            )
        self._engine.load(found.state_dir)
        return Restored(found.step, RunMemory.model_validate(found.memory))

    def _find(self, at: int | None, at_most: int | None) -> Checkpoint | None:
        def notify(text: str) -> None:
            self._tell(Notice(text))

        if at is not None:
            return self._store.at(at, notify=notify)
        return self._store.newest(notify=notify, at_most=at_most)

    def _save(self, step: int, memory: RunMemory) -> Checkpoint | None:
        """One checkpoint by all workers; the first commits it and returns it."""
        store, group = self._store, self._group
        partial: Path | None
        partial, problem = _attempt(lambda: store.begin(step)) if group.is_first else (None, "")
        partial, problem = group.from_first((partial, problem))
        if partial is None:
            raise OSError(problem)
        state_dir = partial / STATE_DIR
        _, problem = _attempt(lambda: self._engine.save(state_dir))
        num_failed = int(group.sum(torch.tensor([float(bool(problem))])))
        if num_failed:
            if group.is_first:
                store.abandon(partial)
            raise OSError(problem or f"{num_failed} worker(s) could not write")
        if not group.is_first:
            return None
        return store.commit(
            partial,
            step,
            world_size=group.world_size,
            memory=memory.model_dump(mode="json"),
            best_step=memory.monitor.best_step,
        )


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, str]:
    """The action's value and no problem, or no value and the problem in words."""
    try:
        return action(), ""
    except OSError as error:
        return None, str(error) or type(error).__name__
