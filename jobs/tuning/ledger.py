"""What is known of a sweep across restarts: which trials have ended, and how.

    sweeps/NAME-IDENTITY/
      sweep.json          MLflow run of the sweep, ended trials, and the result once registered
      lock                held while a process drives the sweep

A ledger of ours instead of `Tuner.restore`: trials go on from their own checkpoints, and plain JSON
survives a kill between any two writes and a new version of Ray. It knows nothing of training.

    with Ledger.of(plan, settings.home).locked() as ledger:
        state = ledger.begin(config.resume)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError, field_validator

from cluster.config import StrictModel
from cluster.errors import ConflictError, InputError
from jobs.training.run_directory import lock_file, write_json
from jobs.tuning.plan import Plan

_STATE_FILE = "sweep.json"


class TrialRecord(StrictModel):
    """How a trial ended."""

    status: Literal["finished", "stopped", "failed"]
    """stopped: by the scheduler, before its last step."""
    step: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    """The last that were measured, by split and name."""
    seconds: float = 0.0
    error: str = ""


class SweepState(StrictModel):
    """What outlives a driver."""

    tracking_run_id: str = ""
    trials: dict[str, TrialRecord] = Field(default_factory=dict)
    """Ended trials by their identity."""
    result: dict[str, JsonValue] | None = None
    """Set once the best trial is registered: the sweep is finished."""

    @field_validator("result")
    @classmethod
    def _names_a_version(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        if value is not None and not {"name", "version", "digest"} <= value.keys():
            raise ValueError("its result names no version")
        return value


class Ledger:
    """The directory of the sweep that a plan describes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = SweepState()

    @classmethod
    def of(cls, plan: Plan, home: Path) -> Ledger:
        return cls(home / "sweeps" / f"{plan.config.name}-{plan.identity[:12]}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[Ledger]:
        """Hold the sweep; raises ConflictError if another process does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.path / "lock"))
            except BlockingIOError:
                raise ConflictError(
                    f"sweep {self.path.name} is being driven by another process",
                    hint="wait for it, stop it, or give this one another --set name=NAME",
                ) from None
            yield self

    def begin(self, resume: Literal["auto", "never"]) -> SweepState:
        """What to go on from.

        Raises:
            InputError: the ledger is damaged; beginning anew would repeat trials that have ended.
        """
        if resume == "never":
            self.write(SweepState())
            return self.state
        file = self.path / _STATE_FILE
        try:
            self.state = SweepState.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return self.state
        except ValidationError as error:
            raise InputError(
                f"the sweep's ledger {file} is damaged: {error.errors()[0]['msg']}",
                hint="bring it back from a backup, or begin anew with --set resume=never",
            ) from None
        return self.state

    def record(self, identity: str, record: TrialRecord) -> None:
        """A trial has ended; synced to disk before this returns."""
        trials = {**self.state.trials, identity: record}
        self.write(self.state.model_copy(update={"trials": trials}))

    def write(self, state: SweepState) -> None:
        self.state = state
        write_json(self.path / _STATE_FILE, state.model_dump(mode="json"))


def find_best(plan: Plan, state: SweepState) -> int | None:
    """Index of the finished trial with the best metric; the earlier of equals."""
    sign = 1 if plan.config.is_maximised else -1
    finished = [
        (sign * record.metrics[plan.metric], -index)
        for index, trial in enumerate(plan.trials)
        if (record := state.trials.get(trial.identity)) is not None
        and record.status == "finished"
        and plan.metric in record.metrics
    ]
    return -max(finished)[1] if finished else None
