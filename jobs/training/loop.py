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

from jobs.data.dataset import LOSS_MASK
from jobs.data.rows import Array, Rows
from jobs.data.sampler import Ids, global_batch, ids_for_rank
from jobs.models.family import Batch, Family
from jobs.models.weighting import ROW_WEIGHT
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
    gradient_norm: float | None
    """Over the whole model, before clipping; None if it was not computed."""
    asked_to_stop: bool
    """Some worker has been, so all end here."""


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

    def ids(self, step: int) -> Ids:
        """Of the whole step, over all workers."""
        return global_batch(
            num_rows=len(self.rows), batch_size=self.plan.batch_size, seed=self.seed, step=step
        )

    def micro_batches(self, step: int, masked: frozenset[int] = frozenset()) -> list[Batch]:
        """Rows in `masked` keep their places, with a weight of 0."""
        ids = self.ids(step)
        # All workers must agree on whether there are weights: see `count_units`.
        is_masked = np.isin(ids, list(masked)) if masked else np.zeros(len(ids), bool)
        masks = is_masked if is_masked.any() else None
        return [
            self._batch(part, None if masks is None else np.isin(part, list(masked)))
            for part in np.split(self._share(ids), self.plan.accumulation_steps)
        ]

    def _share(self, ids: Ids) -> Ids:
        return ids_for_rank(ids, rank=self.copy, world_size=self.layout.num_copies)

    def _batch(self, ids: Ids, is_masked: Array | None) -> Batch:
        columns = self.rows.read(ids)
        if is_masked is not None:
            columns = mask_rows(columns, is_masked)
        return to_batch(columns, self.group.device)


def train_steps(
    engine: Engine,
    family: Family,
    feed: Feed,
    config: TrainConfig,
    *,
    first_step: int,
    rate_scale: Callable[[], float] = lambda: 1.0,
    masked: Callable[[int], frozenset[int]] = lambda _step: frozenset(),
    is_stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Take the steps from `first_step` (steps already done) to the last.

    Args:
        rate_scale: what past evaluations have made of the learning rate, asked before each step.
        masked: the rows that do not count, asked before each step with the steps already done.
        is_stopping: whether this worker has been asked to stop, asked after each step.
    """
    for step in range(first_step, config.steps):
        rows_masked = masked(step)
        with engine.clock.measure("data"):
            batches = feed.micro_batches(step, rows_masked)
        engine.model.train()
        seed_everything(config.seed, step, feed.copy)
        rate = learning_rate(
            config.schedule, peak=config.optimizer.learning_rate, step=step, steps=config.steps
        )
        loss = _share_of_mean(family, feed, count_units(family, batches, feed))
        mine = engine.train_step(loss, batches, rate * rate_scale())
        told = torch.stack([mine.cpu(), torch.tensor(float(is_stopping()))])
        total, num_stopping = feed.group.sum(told).tolist()
        yield Step(
            number=step + 1,
            # The mean of what workers have is that over the global batch: see `_share_of_mean`.
            loss=total / feed.group.world_size,
            learning_rate=engine.learning_rate(),
            gradient_norm=engine.gradient_norm(),
            asked_to_stop=num_stopping > 0,
        )


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
    # Where nothing counts, the sum is 0 and so is the mean.
    scale = feed.plan.accumulation_steps * feed.plan.world_size / (num_units or 1.0)

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return family.loss(model, batch) * scale

    return loss


@torch.no_grad()
def measure_rows(
    engine: Engine, family: Family, feed: Feed, step: int, masked: frozenset[int]
) -> list[float]:
    """The loss of each row of a step, in the order of its ids, at every worker; nothing is learnt
    from them, and those masked have a loss of no meaning."""
    engine.model.eval()
    batches = feed.micro_batches(step, masked)
    mine = torch.cat([engine.measure(family.row_losses, batch).cpu() for batch in batches])
    losses = torch.zeros(feed.plan.batch_size, dtype=torch.float64)
    if feed.layout.part_of(feed.group.rank) == 0:
        losses[feed.copy * len(mine) : (feed.copy + 1) * len(mine)] = mine.double()
    return list(feed.group.sum(losses).tolist())


@torch.no_grad()
def evaluate(
    engine: Engine,
    family: Family,
    rows: Rows,
    *,
    batch_size: int,
    group: ProcessGroup,
    layout: Layout,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics over all rows, shared among the workers; every worker gets them, and calls `beat`
    after each batch."""
    engine.model.eval()
    total: torch.Tensor | None = None
    copy, speaks = layout.copy_of(group.rank), layout.part_of(group.rank) == 0
    for ids, counts in _evaluation_ids(len(rows), batch_size, copy, layout.num_copies):
        sums = engine.measure(family.measure, to_batch(rows.read(ids), group.device))
        sums = sums if counts and speaks else torch.zeros_like(sums)
        total = sums if total is None else total + sums
        beat()
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


def mask_rows(columns: dict[str, Array], is_masked: Array) -> dict[str, Array]:
    """Give rows a weight of 0, and zeros for content: what made a loss infinite would otherwise
    make 0 times infinity of it."""
    found = {}
    for name, array in columns.items():
        found[name] = array.copy()
        found[name][is_masked] = 0
    weights = found.get(ROW_WEIGHT, np.ones(len(is_masked), np.float32))
    return {**found, ROW_WEIGHT: np.where(is_masked, 0, weights).astype(np.float32)}


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
