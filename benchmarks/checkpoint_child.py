"""One rank of `checkpoint_stall`: one training that is saved in two ways, in turn.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint_child DIRECTORY PAIRS

The first rank prints a JSON object per save: who saved, how long training waited, and how long
training took in all beyond its usual steps until the checkpoint was whole.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.train_throughput import make_config
from jobs.models.families import make_family
from jobs.models.family import Batch
from jobs.training.batching import BatchPlan
from jobs.training.checkpointing import FolderStore
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.events import Event, Saved
from jobs.training.expected_shape import expected_shape
from jobs.training.memory import RunMemory
from jobs.training.parallelism import Layout
from jobs.training.process_group import start_process_group
from jobs.training.saving import Saver

_STEPS_BETWEEN = 4
_MAX_STEPS = 40
_TOKENS = 129


class Bench:
    """A training, and both ways of saving it."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        config = make_config("local").model_copy(update={"compile": False, "micro_batch_size": 1})
        self._directory = directory
        self.group = start_process_group()
        layout = Layout.of(config, self.group.world_size)
        config = config.model_copy(update={"batch_size": layout.num_copies})
        plan = BatchPlan.make(
            batch_size=config.batch_size, micro_batch_size=1, world_size=layout.num_copies
        )
        shape = expected_shape(config.data)
        self._family = make_family(config.model, shape)
        deepspeed_config = make_deepspeed_config(config, plan)
        self._engine = start_deepspeed(
            self._family.build(), self._family, config, deepspeed_config, self.group, layout
        )
        tokens = torch.randint(0, shape.vocab_size, (1, _TOKENS))
        self._batches: list[Batch] = [{"tokens": tokens}]
        self._saved: list[Saved] = []
        self._saver = Saver(
            self._engine,
            FolderStore(directory / "ours", keep=2),
            self.group,
            layout,
            self._hear,
            scratch=directory / "fetched",
        )
        self._num_saves = 0

    def _hear(self, event: Event) -> None:
        if isinstance(event, Saved):
            self._saved.append(event)

    def step(self) -> float:
        """Seconds of a training step."""
        began_at = time.perf_counter()
        self._engine.train_step(self._family.loss, self._batches, 1e-4)
        self._saver.poll()
        return time.perf_counter() - began_at

    def typical_step(self) -> float:
        return statistics.median(self.step() for _ in range(_STEPS_BETWEEN))

    def ours(self) -> tuple[float, float]:
        """Seconds that training waited, and that it took longer in all."""
        usual_s = self.typical_step()
        self._num_saves += 1
        num_before, began_at = len(self._saved), time.perf_counter()
        self._saver.start(self._num_saves, RunMemory())
        num_steps = 0
        while not self._is_whole(num_before) and num_steps < _MAX_STEPS:
            self.step()
            num_steps += 1
        in_all = time.perf_counter() - began_at - num_steps * usual_s
        blocked = self._saved[-1].blocked_s if self.group.is_first else 0.0
        return blocked, in_all

    def _is_whole(self, num_before: int) -> bool:
        found: bool = self.group.from_first(len(self._saved) > num_before)
        return found

    def peer(self) -> tuple[float, float]:
        """The same of DeepSpeed's own, which returns when all is written."""
        self.typical_step()
        self._num_saves += 1
        target = self._directory / "peer"
        self.group.barrier()
        began_at = time.perf_counter()
        # Not part of the Engine Protocol: this is what its users call.
        deepspeed_engine = self._engine.model
        deepspeed_engine.save_checkpoint(str(target), tag=f"step{self._num_saves}")  # type: ignore[operator]
        seconds = time.perf_counter() - began_at
        self.group.barrier()
        if self.group.is_first:
            shutil.rmtree(target)
        return seconds, seconds


def main(directory: Path, num_pairs: int) -> None:
    bench = Bench(directory)
    for number in range(-1, num_pairs):
        arms = {"ours": bench.ours, "peer": bench.peer}
        for name in ["ours", "peer"] if number % 2 else ["peer", "ours"]:
            blocked_s, in_all_s = arms[name]()
            # The first pair warms up.
            if bench.group.is_first and number >= 0:
                found = {"arm": name, "blocked_s": blocked_s, "in_all_s": in_all_s}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
