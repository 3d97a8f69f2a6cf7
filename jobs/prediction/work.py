"""A worker: opens the model once, then reads, predicts and writes parts. Here, or on the cluster.

for done in in_process(Job("sha256:…", "jsonl", config, settings, bill), plan.tasks()): …
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import InputError, QuotaExceededError
from cluster.predictions import PartSummary
from cluster.settings import Settings
from jobs.prediction.bill import Bill, Budget, open_budget
from jobs.prediction.config import PredictConfig
from jobs.prediction.output import Output
from jobs.prediction.predictor import Answer, Predictor, Prepared, open_predictor
from jobs.prediction.rows import BadRow, Row, Values, to_json_lines, to_parquet
from jobs.prediction.source import Format, InputPart, read_task

Task = tuple[InputPart, ...]


@dataclass(frozen=True)
class Job:
    """What every worker must know; it may be sent to other processes."""

    digest: str
    format: Format
    config: PredictConfig
    settings: Settings
    bill: Bill


@dataclass(frozen=True)
class PartDone:
    """A part is written."""

    summary: PartSummary
    seconds: float


class Executor(Protocol):
    """Where tasks are worked on; parts are reported as they are written, in any order."""

    def __call__(self, job: Job, tasks: Sequence[Task]) -> Iterator[PartDone]: ...


class Worker:
    """One model in one process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._predictor: Predictor | None = None
        self._budget = open_budget(job.config, job.settings)
        stand_back(job.config.nice)

    def work(self, task: Task) -> Iterator[PartDone]:
        """Write the parts of a task."""
        config = self._job.config
        if self._predictor is None:
            self._predictor = open_predictor(self._job.digest, config, self._job.settings)
        output = Output.open(config.output, self._job.settings)
        started = time.monotonic()
        for part, rows in read_task(task):
            summary, records = predict_part(
                self._predictor, part.number, rows, config, self._budget
            )
            write = to_parquet if self._job.format == "parquet" else to_json_lines
            output.write_part(summary, write(records), self._job.format)
            now = time.monotonic()
            self._budget.settle(self._job.bill.entry(summary, now - started, config))
            yield PartDone(summary, now - started)
            started = now


def in_process(job: Job, tasks: Sequence[Task]) -> Iterator[PartDone]:
    """See `Executor`."""
    worker = Worker(job)
    for task in tasks:
        yield from worker.work(task)


def predict_part(
    predictor: Predictor,
    number: int,
    rows: Sequence[Row | BadRow],
    config: PredictConfig,
    budget: Budget,
) -> tuple[PartSummary, list[Values]]:
    """The answers of a part in its rows' order, and what became of it."""
    good = [row for row in rows if isinstance(row, Row)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    records: list[Values] = []
    tokens = [0, 0]
    for start in range(0, len(good), config.batch_size):
        batch = good[start : start + config.batch_size]
        for row, found in zip(batch, _answers(predictor, batch, budget), strict=True):
            kept = {name: row.values.get(name) for name in config.keep}
            if isinstance(found, Answer):
                records.append({**kept, "row": row.number, **found.values})
                tokens[0] += found.prompt_tokens
                tokens[1] += found.completion_tokens
            else:
                code = found.code if isinstance(found, QuotaExceededError) else ""
                bad.append(BadRow(row.number, row.where, str(found), kept, code))
    bad.sort(key=lambda row: row.number)
    bad_rows = tuple(row.record() for row in bad)
    return PartSummary(number, len(records), tokens[0], tokens[1], bad_rows), records


def _answers(
    predictor: Predictor, rows: Sequence[Row], budget: Budget
) -> list[Answer | InputError | QuotaExceededError]:
    """All together where there is room for them; the last ones get none of what there is not."""
    found: list[Any] = [*predictor.prepare(rows)]
    waiting = [place for place, each in enumerate(found) if isinstance(each, Prepared)]
    while waiting:
        with budget.reserved([found[place].max_tokens for place in waiting]) as num_rows:
            now, waiting = waiting[:num_rows], waiting[num_rows:]
            if not now:
                for place in waiting:
                    found[place] = _no_room(found[place].max_tokens)
                break
            answers = predictor.answer([found[place] for place in now])
            for place, answer in zip(now, answers, strict=True):
                found[place] = answer
                if isinstance(answer, Answer):
                    budget.spend(answer.prompt_tokens + answer.completion_tokens)
    return found


def _no_room(num_tokens: int) -> QuotaExceededError:
    return QuotaExceededError(
        f"the tenant's budget of tokens for this month has no room for {num_tokens:,} more",
        hint="ask the operator for more, or wait",
        unit="tokens",
    )


def stand_back(nice: int) -> None:
    """Let others go first on the same CPUs: for good, and for all of this process's threads."""
    if nice == 0:
        return
    # Linux keeps a niceness for each thread, which new ones take from the one that starts them.
    tasks = Path("/proc/self/task")
    threads = [int(path.name) for path in tasks.iterdir()] if tasks.is_dir() else [0]
    for thread in threads:
        current = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, max(nice, current))
