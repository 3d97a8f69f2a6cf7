"""The seam between the loop and what computes: one optimizer step, and its state.

The loop knows this Protocol only; `deepspeed_setup` provides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from jobs.models.family import Batch
from jobs.training.sharded_state import ShardedState
from jobs.training.timing import Stopwatch

LossFunction = Callable[[torch.nn.Module, Batch], torch.Tensor]
MeasureFunction = Callable[[torch.nn.Module, Batch], torch.Tensor]


class Engine(Protocol):
    """One worker's share of the model, its optimizer and their state."""

    clock: Stopwatch
    """Where `train_step` books its seconds."""

    @property
    def model(self) -> torch.nn.Module:
        """The module to set to training or evaluation."""

    def train_step(
        self, loss: LossFunction, micro_batches: Sequence[Batch], learning_rate: float
    ) -> torch.Tensor:
        """One optimizer step over all workers: down the mean gradient of `loss` over all copies of
        the model and their micro-batches. Returns the mean over this worker's micro-batches, or
        over all, as a detached scalar."""

    def learning_rate(self) -> float:
        """The rate that the last step used."""

    def gradient_norm(self) -> float | None:
        """Norm of the last step's whole gradient, before clipping: infinite if it was no number,
        None if it is not known."""

    def measure(self, measure: MeasureFunction, batch: Batch) -> torch.Tensor:
        """`measure` of the model and a batch, in the run's precision and without gradients; the
        same at all workers that share a copy of the model, which call it together."""

    def whole_model(self) -> AbstractContextManager[torch.nn.Module]:
        """Context that gives the first worker the model with all its weights; all enter together,
        and what the others get is of no use."""

    def state(self) -> ShardedState:
        """This worker's share of weights and optimizer state, to save or to load into."""

    def common(self) -> dict[str, Any]:
        """What else the next step depends on, as plain JSON; the same at all workers."""

    def check_common(self, values: dict[str, Any]) -> None:
        """Raises ValueError if `common` gives nothing of this shape."""

    def set_common(self, values: dict[str, Any]) -> None:
        """Take over what `common` gave, after the state has been loaded."""
