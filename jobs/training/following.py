"""What a driver does with what its workers tell: prints it, logs it, and puts it on the account.

with followed(config, settings, dataset, run, state, tracker) as sink:
    launcher.run(job, sink)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from cluster.database import open_database
from cluster.ledger import Ledger
from cluster.settings import Settings
from cluster.tracking import RunTracker
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.event_log import EVENTS_FILE, EventLog
from jobs.training.events import UNKNOWN_STEP, Event, Fault, Progress, Sink
from jobs.training.goodput import Goodput
from jobs.training.reporter import Reporter
from jobs.training.run_directory import RunDirectory, RunState
from jobs.training.usage import UsageMeter


@contextlib.contextmanager
def followed(
    config: TrainConfig,
    settings: Settings,
    dataset: Dataset,
    run: RunDirectory,
    state: RunState,
    tracker: RunTracker,
) -> Iterator[Sink]:
    """Ears for what workers tell: printed, logged, and put on the account."""
    goodput = Goodput(state.began_at)
    faults = EventLog(run.path / EVENTS_FILE)
    reporter = _make_reporter(config, dataset, tracker, faults, goodput)
    meter = UsageMeter(
        Ledger(open_database(settings.database)).record,
        config,
        run_id=tracker.run_id,
        num_workers=config.num_workers,
    )

    last_step = 0

    def hear(event: Event) -> None:
        nonlocal last_step
        if isinstance(event, Progress):
            last_step = event.step
        elif isinstance(event, Fault) and event.step == UNKNOWN_STEP:
            # Ray's controller and watchdogs know of no steps: the last one seen is put in.
            event = dataclasses.replace(event, step=last_step)
        meter.observe(event)
        reporter(event)

    with meter.running():
        try:
            yield hear
        finally:
            shares = {f"goodput/{name}": share for name, share in goodput.breakdown().items()}
            tracker.log_metrics(shares, config.steps)


def _record_fault(fault: Fault, faults: EventLog, tracker: RunTracker) -> None:
    """An event on the run: a line of its file, a count, and a tag that the list of runs shows."""
    faults.add(fault)
    tracker.log_artifact(faults.path)
    counts = faults.counts()
    step = max(fault.step, 0)
    tracker.log_metrics({f"faults/{kind}": float(count) for kind, count in counts.items()}, step)
    tracker.set_tags({"faults": ", ".join(f"{kind} {count}" for kind, count in counts.items())})


def _make_reporter(
    config: TrainConfig,
    dataset: Dataset,
    tracker: RunTracker,
    faults: EventLog,
    goodput: Goodput,
) -> Reporter:
    units_per_row = dataset.info.text.sequence_length if dataset.info.text else 1
    return Reporter(
        steps=config.steps,
        units_per_step=config.batch_size * units_per_row,
        log_metrics=tracker.log_metrics,
        log_dict=tracker.log_dict,
        log_fault=lambda fault: _record_fault(fault, faults, tracker),
        goodput=goodput,
    )
