"""Saving by all workers together: every one writes its share, the first commits.

save_together(engine, store, group, step, monitor)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from jobs.training.checkpointing import STATE_DIR, Checkpoint, CheckpointStore
from jobs.training.engine import Engine
from jobs.training.monitor import MonitorState
from jobs.training.process_group import ProcessGroup

Value = TypeVar("Value")


def save_together(
    engine: Engine,
    store: CheckpointStore,
    group: ProcessGroup,
    step: int,
    monitor: MonitorState,
) -> Checkpoint | None:
    """One checkpoint by all workers; the first commits it and returns it.

    Raises:
        OSError: some worker could not write; at every worker, with nothing left behind.
    """
    partial: Path | None
    partial, problem = _attempt(lambda: store.begin(step)) if group.is_first else (None, "")
    partial, problem = group.from_first((partial, problem))
    if partial is None:
        raise OSError(problem)
    state_dir = partial / STATE_DIR
    _, problem = _attempt(lambda: engine.save(state_dir))
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
        decisions=monitor.model_dump(),
        best_step=monitor.best_step,
    )


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, str]:
    """The action's value and no problem, or no value and the problem in words."""
    try:
        return action(), ""
    except OSError as error:
        return None, str(error) or type(error).__name__
