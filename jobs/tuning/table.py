"""A sweep in words: its trials as a table, best first. Pure.

print("\\n".join(trial_table(plan, state)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jobs.training.reporter import format_duration
from jobs.tuning.ledger import SweepState, TrialRecord
from jobs.tuning.plan import Plan, Trial
from jobs.tuning.space import show

_ORDER = {"finished": 0, "stopped": 1, "failed": 2}


def trial_table(plan: Plan, state: SweepState) -> Iterator[str]:
    """One line per ended trial, finished ones first."""
    fields = list(plan.config.space)
    ended = [
        (trial, state.trials[trial.identity])
        for trial in plan.trials
        if trial.identity in state.trials
    ]
    ended.sort(key=lambda pair: _rank(plan, pair[1]))
    rows = [("trial", "status", "step", plan.metric, "time", *fields)]
    rows += [_row(plan, trial, record, fields) for trial, record in ended]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
    for trial, record in ended:
        if record.error:
            yield f"trial {trial.number} failed: {record.error}"


def _rank(plan: Plan, record: TrialRecord) -> tuple[int, float]:
    value = record.metrics.get(plan.metric, 0.0)
    return _ORDER[record.status], -value if plan.config.is_maximised else value


def _row(plan: Plan, trial: Trial, record: TrialRecord, fields: Sequence[str]) -> tuple[str, ...]:
    value = record.metrics.get(plan.metric)
    return (
        str(trial.number),
        record.status,
        str(record.step or "-"),
        "-" if value is None else f"{value:.4f}",
        format_duration(record.seconds),
        *(show(trial.values[field]) for field in fields),
    )
