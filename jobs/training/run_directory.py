"""A run on disk: one directory per config, its lock, and what is known of it across restarts.

    runs/NAME-IDENTITY/
      run.json            tracking run id, and the result once it is finished
      lock                held while a process drives the run
      checkpoints/ export/

It knows nothing of training.

    with RunDirectory.of(config, settings.home).locked() as run:
        state = run.begin(config.resume, dataset.info.digest, notify=say)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from cluster.config import StrictModel, first_problem
from cluster.errors import ConflictError
from jobs.training.config import TrainConfig
from jobs.training.plain_files import read_file

_STATE_FILE = "run.json"
_LOCK_FILE = "lock"


def _ignore(_text: str) -> None:
    """Whoever begins a run without data is not told about data."""


def _nothing() -> None:
    """Nothing of the run is kept elsewhere."""


class RunState(StrictModel):
    """What outlives a driver."""

    tracking_run_id: str = ""
    dataset_digest: str = ""
    """The data that it is trained on: other data makes another run of the same config."""
    checkpoint_location: str = ""
    """Where the checkpoints are kept, if elsewhere; `heliostat gc` reads it, and the name."""
    checkpoint_name: str = ""
    """Their directory there."""
    began_at: float = 0.0
    """When it was first driven, in seconds since 1970; 0 if it has not been."""
    result: dict[str, JsonValue] | None = None
    """Set once the model is registered: the run is finished."""

    def driven(self, tracking_run_id: str) -> RunState:
        """As it is while somebody drives it."""
        began_at = self.began_at or time.time()
        update = {"tracking_run_id": tracking_run_id, "began_at": began_at}
        return self.model_copy(update=update)


class RunDirectory:
    """The directory of the run that a config describes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: TrainConfig, home: Path) -> RunDirectory:
        name = config.run_name or config.name
        return cls(home / "runs" / f"{name}-{config.identity[:12]}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunDirectory]:
        """Hold the run; the lock goes with the process, so a killed driver leaves none.

        Raises:
            ConflictError: another process drives this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.path / _LOCK_FILE))
            except BlockingIOError:
                raise ConflictError(
                    f"run {self.path.name} is being trained by another process",
                    hint="wait for it, stop it, or give this one another --set run_name=NAME",
                ) from None
            yield self

    def begin(
        self,
        resume: Literal["auto", "reuse", "never"],
        dataset_digest: str = "",
        *,
        notify: Callable[[str], None] = _ignore,
        forget: Callable[[], None] = _nothing,
    ) -> RunState:
        """What to go on from: the state of an interrupted run, or of a finished one to reuse.

        Anything else is cleared away, and a fresh state returned.

        Args:
            dataset_digest: of the data to train on; empty where it does not matter.
            notify: told in one line if the data is no longer what the run began with, or what was
                known of the run is damaged.
            forget: removes what is kept of the run elsewhere, when it starts anew.

        Raises:
            MachineError: the file of what is known of the run cannot be read.
        """
        state = RunState() if resume == "never" else self._read(notify)
        finished = state.result is not None
        known = {state.dataset_digest, dataset_digest} - {""}
        has_other_data = len(known) == 2
        if has_other_data:
            notify(
                f"the data has changed since this run began ({state.dataset_digest}, now "
                f"{dataset_digest}): it starts anew"
            )
        if resume == "never" or (finished and resume == "auto") or has_other_data:
            self._clear()
            forget()
            state = RunState()
        return state.model_copy(update={"dataset_digest": dataset_digest or state.dataset_digest})

    def write(self, state: RunState) -> None:
        write_json(self.path / _STATE_FILE, state.model_dump(mode="json"))

    def _read(self, notify: Callable[[str], None]) -> RunState:
        path = self.path / _STATE_FILE
        data = read_file(path)
        if data is None:
            return RunState()
        try:
            return RunState.model_validate_json(data)
        except ValidationError as error:
            notify(
                f"warning: {path} is damaged ({first_problem(error)}): which MLflow run this was, "
                "and its result, are not known; it goes on from its checkpoints"
            )
            return RunState()

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process; raises BlockingIOError if another one has it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def write_json(path: Path, values: dict[str, JsonValue]) -> None:
    """Replace a file by one that is on the disk, whole."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
