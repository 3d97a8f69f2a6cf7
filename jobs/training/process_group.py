"""The process group: which worker this is, and small exchanges between workers.

Ranks come from whatever started the process: Ray Train, torchrun, or nobody (one worker).

    group = start_process_group()
    group.rank, group.world_size
    total = group.sum(torch.tensor([1.0]))
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class ProcessGroup:
    """This worker among all."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all workers."""
        total = values.detach().clone().to(self.device)
        distributed.all_reduce(total)
        return total.cpu()

    def from_first(self, value: Any) -> Any:
        """The first worker's value, at every worker."""
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank, at every worker."""
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        distributed.barrier()


def start_process_group() -> ProcessGroup:
    """Join the group that a launcher has prepared, or be the only worker."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "WORLD_SIZE" in os.environ:
            distributed.init_process_group(backend)
        else:
            # A store of its own: no port is opened for a single worker.
            distributed.init_process_group(
                backend,
                store=distributed.HashStore(),  # type: ignore[attr-defined]
                rank=0,
                world_size=1,
            )
    return ProcessGroup(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )


def launched_rank() -> int:
    """Rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of workers that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
