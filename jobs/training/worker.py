"""What every worker does, from an opened dataset to an exported model; the same under Ray, torchrun
or alone.

It knows nothing of Ray, tracking or packages: it tells a sink, and returns what it made.

    outcome = run_worker(WorkerJob(config, dataset_dir, run_dir), sink)
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import JobFailedError
from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape, Exported, Family
from jobs.training.batching import BatchPlan
from jobs.training.checkpointing import CheckpointStore
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.engine import Engine
from jobs.training.events import Decided, Evaluated, Notice, Progress, Sink, Started
from jobs.training.loop import Feed, Step, evaluate, train_steps
from jobs.training.memory import RunMemory
from jobs.training.monitor import check_metrics, explain, observe
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup, start_process_group
from jobs.training.saving import Saver
from jobs.training.speed import SpeedMeter

CHECKPOINTS_DIR = "checkpoints"
EXPORT_DIR = "export"


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told; the same for all of them."""

    config: TrainConfig
    dataset_dir: Path
    run_dir: Path


@dataclass(frozen=True)
class Outcome:
    """What training made."""

    exported: Exported
    metrics: dict[str, float]
    """By split and name: 'validation/loss', 'test/accuracy', …"""
    num_parameters: int
    seconds: float
    """Time spent in steps, evaluations and checkpoints since the (last) start."""


def run_worker(job: WorkerJob, sink: Sink) -> Outcome:
    """Train from the newest checkpoint to the last step, then export.

    Raises:
        JobFailedError: the loss is no longer a number.
        ConflictError: the newest checkpoint was written by another number of workers.
    """
    torch.set_num_threads(job.config.threads_per_worker)
    group = start_process_group()
    tell: Sink = sink if group.is_first else _tell_nobody
    return _Worker(job, group, tell).run()


def _tell_nobody(_event: object) -> None:
    """The sink of all workers but the first."""


class _Worker:
    def __init__(self, job: WorkerJob, group: ProcessGroup, tell: Sink) -> None:
        config = job.config
        self.job, self.config, self.group, self.tell = job, config, group, tell
        self.dataset = Dataset.open(job.dataset_dir, verify=group.is_first)
        self.layout = Layout.of(config, group.world_size)
        self.plan = BatchPlan.make(
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            world_size=self.layout.num_copies,
        )
        self.family: Family = make_family(config.model, DataShape.of(self.dataset.info))
        check_metrics(config, self.family)
        torch.manual_seed(config.seed)
        model = self.family.build()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine: Engine = start_deepspeed(
            model, self.family, config, make_deepspeed_config(config, self.plan), group, self.layout
        )
        self.memory = RunMemory()
        store = CheckpointStore(job.run_dir / CHECKPOINTS_DIR, keep=config.checkpoint.keep)
        self.saver = Saver(self.engine, store, group, tell)

    def run(self) -> Outcome:
        first_step = self._resume()
        self.tell(
            Started(
                num_parameters=self.num_parameters,
                world_size=self.group.world_size,
                device=self.group.device.type,
                unit=self.family.unit,
                first_step=first_step,
            )
        )
        started_at = time.monotonic()
        last_step = self._train(first_step)
        metrics = self._final_metrics(self._restore_best(last_step))
        seconds = time.monotonic() - started_at
        return Outcome(self._export(), metrics, self.num_parameters, seconds)

    def _resume(self) -> int:
        """Steps already done."""
        restored = self.saver.restore()
        if restored is None:
            return 0
        self.memory = restored.memory
        return restored.step

    def _train(self, first_step: int) -> int:
        """The step it ends at: the last, or the one that early stopping chose."""
        if self.memory.monitor.stopped:
            return first_step
        config = self.config
        feed = Feed(self.dataset.rows("train"), self.plan, config.seed, self.group, self.layout)
        meter = SpeedMeter(self.plan.batch_size * self.family.units_per_row)
        for step in train_steps(
            self.engine,
            self.family,
            feed,
            config,
            first_step=first_step,
            rate_scale=lambda: self.memory.monitor.rate_scale,
        ):
            meter.count()
            self.saver.poll()
            last = step.number == config.steps
            if last or step.number % config.log_every_steps == 0:
                self._log(step, meter)
            # Without early stopping, the last step is measured once, by `_final_metrics`.
            if (last and config.early_stopping is not None) or (
                not last and step.number % config.evaluate_every_steps == 0
            ):
                with meter.paused():
                    self._observe(self._evaluate("validation", step.number), step.number)
            last = last or self.memory.monitor.stopped
            is_best = self.memory.monitor.best_step == step.number
            if last or is_best or step.number % config.checkpoint.every_steps == 0:
                with meter.paused():
                    self.saver.start(step.number, self.memory)
            if last:
                self.saver.wait()
                return step.number
        return first_step

    def _observe(self, metrics: dict[str, float], step: int) -> None:
        # The first worker's decision is everybody's, whatever the last bit of their sums.
        before = self.memory.monitor
        state = self.group.from_first(observe(before, self.config, metrics, step))
        for text in explain(before, state, self.config):
            self.tell(Decided(step, text))
        self.memory = self.memory.model_copy(update={"monitor": state})

    def _restore_best(self, last_step: int) -> int:
        """Go back to the weights that early stopping found best; the step that they are of."""
        best_step = self.memory.monitor.best_step
        if best_step in (0, last_step):
            return last_step
        if self.saver.restore(at=best_step) is None:
            self.tell(
                Notice(
                    f"the checkpoint of step {best_step}, the best, is gone; "
                    f"what is packaged is of step {last_step}"
                )
            )
            return last_step
        self.tell(Decided(best_step, "the best weights, which will be packaged"))
        return best_step

    def _log(self, step: Step, meter: SpeedMeter) -> None:
        if not math.isfinite(step.loss):
            raise JobFailedError(
                f"the loss is {step.loss} at step {step.number}",
                hint="lower optimizer.learning_rate or lengthen schedule.warmup_steps",
            )
        self.tell(Progress(step.number, step.loss, step.learning_rate, meter.units_per_s()))

    def _evaluate(self, split: str, step: int) -> dict[str, float]:
        metrics = evaluate(
            self.engine,
            self.family,
            self.dataset.rows(split),
            batch_size=self.plan.micro_batch_size,
            group=self.group,
            layout=self.layout,
        )
        self.tell(Evaluated(step, split, metrics))
        return metrics

    def _final_metrics(self, step: int) -> dict[str, float]:
        splits = [split for split in ("validation", "test") if len(self.dataset.rows(split))]
        return {
            f"{split}/{name}": value
            for split in splits
            for name, value in self._evaluate(split, step).items()
        }

    def _export(self) -> Exported:
        directory = self.job.run_dir / EXPORT_DIR
        with self.engine.whole_model() as module:
            exported = None
            if self.group.is_first:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                exported = self.family.export(module.cpu().eval(), self.dataset, directory)
        result: Exported = self.group.from_first(exported)
        return result
