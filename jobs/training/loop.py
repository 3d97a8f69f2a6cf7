"""The training loop: one iterable of steps, over any engine and any family.

It knows nothing of Ray, DeepSpeed, files or tracking. A step's data is a function of its number
alone, so a loop may start at any step.

    for step in train_steps(engine, family, feed, config, first_step=0):
        print(step.number, step.loss)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jobs.data.rows import Array, Rows
from jobs.data.sampler import Ids, global_batch, ids_for_rank
from jobs.models.family import Batch, Family
from jobs.models.weighting import LOSS_MASK, ROW_WEIGHT
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.engine import Engine, LossFunction
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup
from jobs.training.schedule import learning_rate


@dataclass(frozen=True)
class Step:
    """A step that has been taken."""

    number: int
    """Counted from 1."""
    loss: float
    """Mean over all that the step predicts, the same at every worker."""
    learning_rate: float


@dataclass(frozen=True)
class Feed:
    """This worker's share of the training rows, as micro-batches."""

    rows: Rows
    plan: BatchPlan
    seed: int
    group: ProcessGroup
    layout: Layout

    @property
    def copy(self) -> int:
        """The copy of the model that this worker belongs to."""
        return self.layout.copy_of(self.group.rank)

    def micro_batches(self, step: int) -> list[Batch]:
        ids = global_batch(
            num_rows=len(self.rows), batch_size=self.plan.batch_size, seed=self.seed, step=step
        )
        mine = ids_for_rank(ids, rank=self.copy, world_size=self.layout.num_copies)
        parts = np.split(mine, self.plan.accumulation_steps)
        return [to_batch(self.rows.read(part), self.group.device) for part in parts]


def train_steps(
    engine: Engine,
    family: Family,
    feed: Feed,
    config: TrainConfig,
    *,
    first_step: int,
    rate_scale: Callable[[], float] = lambda: 1.0,
) -> Iterator[Step]:
    """Take the steps from `first_step` (steps already done) to the last; `rate_scale` is asked
    before each one for what past evaluations have made of the learning rate."""
    for step in range(first_step, config.steps):
        engine.model.train()
        seed_everything(config.seed, step, feed.copy)
        rate = learning_rate(
            config.schedule, peak=config.optimizer.learning_rate, step=step, steps=config.steps
        )
        batches = feed.micro_batches(step)
        loss = _share_of_mean(family, feed, count_units(family, batches, feed))
        mine = engine.train_step(loss, batches, rate * rate_scale())
        # The mean of what workers have is the mean over the global batch: see `_share_of_mean`.
        mean = float(feed.group.sum(mine)) / feed.group.world_size
        yield Step(step + 1, mean, engine.learning_rate())


def count_units(family: Family, batches: Sequence[Batch], feed: Feed) -> float:
    """What the whole step predicts, over all workers; asked of nobody where nothing has weights."""
    if not batches[0].keys() & {ROW_WEIGHT, LOSS_MASK}:
        return float(feed.plan.batch_size * family.units_per_row)
    mine = torch.stack([family.num_units(batch).cpu() for batch in batches]).sum()
    return float(feed.group.sum(mine)) / feed.layout.num_parts


def _share_of_mean(family: Family, feed: Feed, num_units: float) -> LossFunction:
    """A loss whose mean over a worker's micro-batches, and then over copies of the model, is the
    mean over the global batch.

    Engines take both means of gradients as of losses. So it is right however many units each
    micro-batch holds; a mean of the micro-batches' own means is not.
    """
    scale = feed.plan.accumulation_steps * feed.plan.world_size / max(num_units, 1.0)

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return family.loss(model, batch) * scale

    return loss


@torch.no_grad()
def evaluate(
    engine: Engine,
    family: Family,
    rows: Rows,
    *,
    batch_size: int,
    group: ProcessGroup,
    layout: Layout,
) -> dict[str, float]:
    """Metrics over all rows, shared among the workers; every worker gets them."""
    engine.model.eval()
    total: torch.Tensor | None = None
    copy, speaks = layout.copy_of(group.rank), layout.part_of(group.rank) == 0
    for ids, counts in _evaluation_ids(len(rows), batch_size, copy, layout.num_copies):
        sums = engine.measure(family.measure, to_batch(rows.read(ids), group.device))
        sums = sums if counts and speaks else torch.zeros_like(sums)
        total = sums if total is None else total + sums
    assert total is not None, "a split that is evaluated has rows"
    return family.metrics(group.sum(total))


def _evaluation_ids(
    num_rows: int, batch_size: int, copy: int, num_copies: int
) -> Iterator[tuple[Ids, bool]]:
    """The batches of a copy of the model, and whether they count.

    Every copy gets the same number of batches, since a sharded model's forward pass needs all
    workers; one that has run out repeats a row that does not count.
    """
    for start in itertools.count(0, batch_size * num_copies):
        if start >= num_rows:
            return
        first = start + copy * batch_size
        ids = np.arange(first, min(first + batch_size, num_rows), dtype=np.int64)
        yield (ids, True) if len(ids) else (np.zeros(1, np.int64), False)


def to_batch(columns: dict[str, Array], device: torch.device) -> Batch:
    """Arrays as tensors; torch has few unsigned types, so token ids widen."""
    return {
        name: torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" else array).to(
            device
        )
        for name, array in columns.items()
    }


def seed_everything(seed: int, step: int, copy: int) -> None:
    """Random state (dropout) as a function of the step, so that it need not be saved."""
    text = f"{seed}/{step}/{copy}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
