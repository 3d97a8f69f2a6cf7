"""What every worker does, from an opened dataset to an exported model; the same under Ray, torchrun
or alone.

It knows nothing of Ray, tracking or packages: it tells a sink, and returns what it made.

    outcome = run_worker(WorkerJob(config, dataset_dir, run_dir), sink)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import StoppedError
from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape, Exported, Family
from jobs.training.allocator import keep_freed_memory
from jobs.training.batching import BatchPlan
from jobs.training.checkpoint_location import open_store
from jobs.training.compiling import keep_compiled
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.engine import Engine
from jobs.training.events import (
    UNKNOWN_STEP,
    Decided,
    Evaluated,
    Fault,
    Notice,
    Sink,
    Started,
)
from jobs.training.flops import flops_per_token
from jobs.training.healing import Healer, Masked
from jobs.training.loop import Feed, Step, evaluate, measure_rows, train_steps
from jobs.training.memory import RunMemory
from jobs.training.monitor import check_metrics, explain, observe
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup, start_process_group
from jobs.training.recovery import RecoveryPolicy
from jobs.training.saving import Saver
from jobs.training.step_log import STEP_LOG_FILE, StepLog, StepRecord, digest_ids
from jobs.training.stopping import IsStopping
from jobs.training.telemetry import Telemetry, shared_peak
from jobs.training.watchdog import Watchdog

EXPORT_DIR = "export"
_FETCHED_DIR = "fetched"


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told; the same for all of them."""

    config: TrainConfig
    dataset_dir: Path
    run_dir: Path
    compiled_dir: Path | None = None
    """Where compiled code is kept for other workers and runs; None leaves that to torch."""
    peaks_path: Path | None = None
    """File of measured peaks of matrix products; None leaves out MFU."""


@dataclass(frozen=True)
class Outcome:
    """What training made."""

    exported: Exported
    metrics: dict[str, float]
    """By split and name: 'validation/loss', 'test/accuracy', …"""
    num_parameters: int
    seconds: float
    """Time spent in steps, evaluations and checkpoints since the (last) start."""


def run_worker(job: WorkerJob, sink: Sink, is_stopping: IsStopping = lambda: False) -> Outcome:
    """Train from the newest checkpoint to the last step, then export.

    Raises:
        JobFailedError: the loss is no longer a number, and going back does not help.
        StoppedError: some worker's `is_stopping` said so; there is a checkpoint to resume from.
        ConflictError: the newest checkpoint is not of this model, divided in this way, or not of
            this data.
    """
    torch.set_num_threads(job.config.threads_per_worker)
    if job.config.compile and job.compiled_dir is not None:
        keep_compiled(job.compiled_dir)
    group = start_process_group()
    if group.device.type == "cpu":
        keep_freed_memory()
    tell: Sink = sink if group.is_first else _tell_nobody

    def report_hang(seconds: float) -> None:
        # The second speaks where the first is the one that hangs.
        if group.rank <= 1:
            sink(Fault(UNKNOWN_STEP, "worker_hung", hang_text(job.config, group.rank, seconds)))

    with Watchdog(job.config.hang_timeout_s, report_hang) as watchdog:
        return _Worker(job, group, tell, is_stopping, watchdog).run()


def hang_text(config: TrainConfig, rank: int, seconds: float) -> str:
    """What a worker says that its watchdog ends, and what comes next."""
    if config.launcher == "ray":
        what_follows = "it ends, so that all are replaced"
    else:
        what_follows = "it ends; run it again to resume"
    return (
        f"worker {rank} has shown no sign of life for {seconds:.0f} s (hang_timeout_s); "
        f"{what_follows}"
    )


def _tell_nobody(_event: object) -> None:
    """The sink of all workers but the first."""


class _Worker:
    def __init__(
        self,
        job: WorkerJob,
        group: ProcessGroup,
        tell: Sink,
        is_stopping: IsStopping,
        watchdog: Watchdog,
    ) -> None:
        config = job.config
        self.is_stopping, self.watchdog = is_stopping, watchdog
        self.job, self.config, self.group, self.tell = job, config, group, tell
        self.dataset = Dataset.open(job.dataset_dir, verify=group.is_first)
        self.layout = Layout.of(config, group.world_size)
        self.plan = BatchPlan.of(config, self.layout.num_copies)
        self.family: Family = make_family(config.model, DataShape.of(self.dataset.info))
        check_metrics(config, self.family)
        self.store = open_store(config.checkpoint, job.run_dir, self.dataset.info.digest)
        rows = self.dataset.rows("train")
        self.feed = Feed(rows, self.plan, config.seed, group, self.layout)
        max_quarantined = round(config.recovery.max_quarantined_share * len(rows))
        self.healer = Healer(
            RecoveryPolicy(config.recovery),
            self,
            tell,
            micro_batch_size=self.plan.micro_batch_size,
            max_quarantined=max(max_quarantined, config.batch_size),
        )
        self._begin()

    def _begin(self) -> None:
        """A model as it is before the first step."""
        config = self.config
        torch.manual_seed(config.seed)
        model = self.family.build()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.telemetry = self._start_telemetry(model)
        self.engine: Engine = start_deepspeed(
            model,
            self.family,
            config,
            make_deepspeed_config(config, self.plan),
            self.group,
            self.layout,
        )
        self.engine.clock = self.telemetry.clock
        self.memory = RunMemory()
        self.saver = Saver(
            self.engine,
            self.store,
            self.group,
            self.layout,
            self.tell,
            scratch=self.job.run_dir / _FETCHED_DIR,
            dataset_digest=self.dataset.info.digest,
            blocking=config.checkpoint.blocking,
        )

    def _start_telemetry(self, model: torch.nn.Module) -> Telemetry:
        flops = flops_per_token(model, self.family.units_per_row)
        path = None if flops is None else self.job.peaks_path
        return Telemetry(
            units_per_step=self.plan.batch_size * self.family.units_per_row,
            group=self.group,
            flops_per_unit=flops,
            peak_flops=shared_peak(self.group, path, self.config.precision),
        )

    def run(self) -> Outcome:
        first_step = self._resume()
        self.tell(
            Started(
                num_parameters=self.num_parameters,
                world_size=self.group.world_size,
                device=self.group.device.type,
                unit=self.family.unit,
                first_step=first_step,
                useful_s=self.memory.useful_s,
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
        if restored is not None:
            self.memory = restored.memory
        step = 0 if restored is None else restored.step
        self.healer.recall(self.memory)
        self.telemetry.restart(useful_s=self.memory.useful_s)
        if self.group.is_first:
            self._resume_audit(step)
        return step

    def _resume_audit(self, step: int) -> None:
        path = self.job.run_dir / STEP_LOG_FILE
        self.step_log = StepLog.resume(path, step=step)
        last, now = self.step_log.last, self.group.world_size
        first_missing = 1 if last is None else last.step + 1
        if first_missing <= step:
            text = f"steps {first_missing} to {step} are missing from the audit ({path})"
            self.tell(Notice(f"{text}: it was lost or cut; training goes on"))
        if last is not None and last.world_size != now:
            text = f"going on with {now} worker(s) instead of {last.world_size}"
            self.tell(Fault(step, "resized", text))

    def go_back(self) -> int:
        self.watchdog.rest()
        step = self._resume()
        if step == 0:
            # Nothing has been saved yet: the seed gives the same beginning again.
            del self.engine, self.saver
            self._begin()
            self.healer.recall(self.memory)
        self.watchdog.beat()
        return step

    def take_steps(self, first_step: int, masked: Masked) -> Iterator[Step]:
        return train_steps(
            self.engine,
            self.family,
            self.feed,
            self.config,
            first_step=first_step,
            rate_scale=lambda: self.memory.monitor.rate_scale,
            masked=masked,
            is_stopping=self.is_stopping,
        )

    def look_into(self, step: int, masked: frozenset[int]) -> tuple[list[int], list[float]]:
        losses = measure_rows(self.engine, self.family, self.feed, step, masked)
        return self.feed.ids(step).tolist(), losses

    def _train(self, first_step: int) -> int:
        """The step it ends at: the last, or the one that early stopping chose."""
        if self.memory.monitor.stopped:
            return first_step
        config = self.config
        self.watchdog.beat()
        for step in self.healer.steps(first_step):
            self.watchdog.beat()
            self.telemetry.count()
            self.saver.poll()
            self._log_for_audit(step)
            last = step.number == config.steps
            if last or step.number % config.log_every_steps == 0:
                self.tell(self.telemetry.progress(step))
            # Without early stopping, the last step is measured once, by `_final_metrics`.
            if (last and config.early_stopping is not None) or (
                not last and step.number % config.evaluate_every_steps == 0
            ):
                with self.telemetry.paused("evaluate"):
                    self._observe(self._evaluate("validation", step.number), step.number)
            last = last or self.memory.monitor.stopped
            is_best = self.memory.monitor.best_step == step.number
            last = last or step.asked_to_stop
            if last or is_best or step.number % config.checkpoint.every_steps == 0:
                with self.telemetry.paused("checkpoint"):
                    self._save(step.number)
            if last:
                self.watchdog.rest()
                self.saver.wait()
                self._end_if_asked(step)
                return step.number
        return first_step

    def _save(self, step: int) -> None:
        memory = self.healer.remember(self.memory)
        self.memory = memory.model_copy(update={"useful_s": self.telemetry.useful_s})
        if self.group.is_first:
            self.step_log.flush()
        self.saver.start(step, self.memory)

    def _end_if_asked(self, step: Step) -> None:
        """A run that is at its end anyway goes on to it."""
        is_over = step.number == self.config.steps or self.memory.monitor.stopped
        if step.asked_to_stop and not is_over:
            text = f"asked to stop at step {step.number} of {self.config.steps}"
            self.tell(Fault(step.number, "stopped", text))
            raise StoppedError(f"stopped at step {step.number}", hint="run it again to resume")

    def _log_for_audit(self, step: Step) -> None:
        if not self.group.is_first:
            return
        ids = self.feed.ids(step.number - 1)
        self.step_log.add(
            StepRecord(
                step=step.number,
                rows=digest_ids(ids),
                loss=step.loss,
                learning_rate=step.learning_rate,
                world_size=self.group.world_size,
                num_masked=sum(int(id_) in self.healer.quarantine for id_ in ids),
            )
        )

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

    def _evaluate(self, split: str, step: int) -> dict[str, float]:
        metrics = evaluate(
            self.engine,
            self.family,
            self.dataset.rows(split),
            batch_size=self.plan.micro_batch_size,
            group=self.group,
            layout=self.layout,
            beat=self.watchdog.beat,
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
        self.watchdog.rest()
        directory = self.job.run_dir / EXPORT_DIR
        with self.engine.whole_model() as module:
            exported = None
            if self.group.is_first:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                exported = self.family.export(module.cpu().eval(), self.dataset, directory)
        result: Exported = self.group.from_first(exported)
        return result
