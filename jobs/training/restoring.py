"""Restoring by all workers together: each one reads, verifies and takes what it holds.

A worker maps only those files into memory that hold something it needs, after comparing their
digests; so a checkpoint of any number of workers and any ZeRO stage can be gone on from.

    restorer = Restorer(engine, store, group, layout, tell, scratch=run_dir / "fetched")
    restored = restorer.restore()            # None: nothing to go on from
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.config import first_problem
from cluster.errors import ConflictError, HeliostatError
from jobs.training.checkpointing import CheckpointStore, problem_of, step_of
from jobs.training.engine import Engine
from jobs.training.events import Fault, Sink
from jobs.training.fragments import FragmentFiles, difference, extents, needed_files
from jobs.training.manifest import FileRecord, Manifest, OtherFormatError, Range
from jobs.training.memory import RunMemory
from jobs.training.parallelism import Layout
from jobs.training.process_group import ProcessGroup

Value = TypeVar("Value")
_Failure = (OSError, ValueError, HeliostatError)
_ANEW = "--set resume=never to start anew"


@dataclass(frozen=True)
class Restored:
    """Where training goes on from."""

    step: int
    """Steps done."""
    memory: RunMemory


class Restorer:
    """Reads the checkpoints of one run at one worker; every worker makes the same calls.

    Args:
        scratch: where files of an object store are copied to while they are read.
        dataset_digest: of the data that the run is trained on; empty where it does not matter.
    """

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        group: ProcessGroup,
        layout: Layout,
        tell: Sink,
        *,
        scratch: Path,
        dataset_digest: str = "",
    ) -> None:
        self._engine, self._store, self._group, self._tell = engine, store, group, tell
        self._dataset_digest = dataset_digest
        self._layout, self._part = layout, layout.part_of(group.rank)
        self._scratch = scratch / f"rank-{group.rank:05d}"

    def restore(self, *, at: int | None = None, at_most: int | None = None) -> Restored | None:
        """See `Saver.restore`."""
        for name in self._at_first(self._candidates, at, at_most):
            manifest, problem = self._at_first(self._read_manifest, name)
            problem = problem or self._load(name, manifest)
            if not problem:
                return Restored(manifest.step, RunMemory.model_validate(manifest.memory))
            self._at_first(self._set_aside, name, problem)
        return None

    def _candidates(self, at: int | None, at_most: int | None) -> list[str]:
        self._store.tidy()
        names = self._store.names()
        if at is not None:
            return [name for name in names if step_of(name) == at]
        for name in names:
            if at_most is not None and step_of(name) > at_most:
                self._store.remove(name)
        return [name for name in names if at_most is None or step_of(name) <= at_most]

    def _read_manifest(self, name: str) -> tuple[Manifest | None, str]:
        try:
            manifest = self._store.manifest(name)
            if manifest.step != step_of(name):
                return None, f"its manifest is of step {manifest.step}"
            RunMemory.model_validate(manifest.memory)
            self._engine.check_common(manifest.engine)
        except FileNotFoundError as error:
            return None, f"{Path(error.filename).name} is missing"
        except OtherFormatError as error:
            raise ConflictError(
                f"checkpoint {name} cannot be read by this version: {error}",
                hint=f"go on with the version that wrote it, or {_ANEW}",
            ) from None
        except ValidationError as error:
            return None, f"its manifest cannot be read: {first_problem(error)}"
        except OSError as error:
            return None, f"its manifest cannot be read: {error.strerror or error}"
        except ValueError as error:
            return None, f"its manifest cannot be read: {error}"
        return manifest, ""

    def _set_aside(self, name: str, problem: str) -> None:
        aside = self._store.set_aside(name)
        text = f"checkpoint {name} is corrupt ({problem}); set aside as {aside}"
        self._tell(Fault(step_of(name), "checkpoint_corrupt", text))

    def _load(self, name: str, manifest: Manifest) -> str:
        """Load a checkpoint, or say what is wrong with it; the same at every worker."""
        self._require_same_data(name, manifest)
        self._require_same_division(name, manifest)
        state = self._engine.state()
        self._require_same_parameters(name, manifest, state.ranges)
        records = {file: one for file, one in manifest.files.items() if one.part == self._part}
        try:
            files, problem = self._everywhere(lambda: self._verified(name, records, state.ranges))
            if not problem:
                state.load(files)
                self._engine.set_common(manifest.engine)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return problem

    def _verified(
        self, name: str, records: dict[str, FileRecord], wanted: dict[str, Range]
    ) -> tuple[FragmentFiles, str]:
        """The files that this worker needs, and what is wrong with them."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        held = {file: record.ranges for file, record in records.items()}
        needed = needed_files(held, wanted)
        directory = self._store.fetch(name, needed, self._scratch)
        files = FragmentFiles(directory, held)
        problems = (problem_of(directory / file, records[file]) for file in needed)
        # None is parsed before all are known to be what was written.
        return files, next(filter(None, problems), "") or files.problem(needed)

    def _everywhere(self, action: Callable[[], tuple[Value, str]]) -> tuple[Value, str]:
        """An action's value here, and the first problem that any worker has with it."""
        value, problem, error = _attempt(action)
        found: list[tuple[str, Exception | None]] = self._group.gather((problem, error))
        for _, error in found:
            if error is not None:
                raise error
        assert value is not None
        return value, next((problem for problem, _ in found if problem), "")

    def _at_first(self, action: Callable[..., Any], *arguments: object) -> Any:
        """What an action of the first worker gives, or raises, at every worker."""
        value, error = None, None
        if self._group.is_first:
            try:
                value = action(*arguments)
            except _Failure as caught:
                error = caught
        value, error = self._group.from_first((value, error))
        if error is not None:
            raise error
        return value

    def _require_same_division(self, name: str, manifest: Manifest) -> None:
        theirs = (manifest.tensor, manifest.pipeline)
        if theirs != (self._layout.tensor, self._layout.pipeline):
            raise ConflictError(
                f"checkpoint {name} is of a model divided by parallelism.tensor {theirs[0]} and "
                f"pipeline {theirs[1]}, and this run has tensor {self._layout.tensor} and pipeline "
                f"{self._layout.pipeline}",
                hint=f"set them back (num_workers may differ), or {_ANEW}",
                param="parallelism",
            )

    def _require_same_data(self, name: str, manifest: Manifest) -> None:
        theirs, ours = manifest.dataset_digest, self._dataset_digest
        if theirs and ours and theirs != ours:
            raise ConflictError(
                f"checkpoint {name} is of a training on other data ({theirs}, and this run's is "
                f"{ours})",
                hint=_ANEW,
            )

    def _require_same_parameters(
        self, name: str, manifest: Manifest, ranges: dict[str, Range]
    ) -> None:
        """All copies of a part of the model together hold all of it, here and in a checkpoint."""
        everywhere: list[tuple[int, dict[str, Range]]] = self._group.gather((self._part, ranges))
        for part in sorted({part for part, _ in everywhere}):
            sizes = extents(ranges for of, ranges in everywhere if of == part)
            files = manifest.files.items()
            held = {file: record.ranges for file, record in files if record.part == part}
            if found := difference(held, sizes):
                raise ConflictError(f"checkpoint {name} is of another model: {found}", hint=_ANEW)


def _attempt(
    action: Callable[[], tuple[Value, str]],
) -> tuple[Value | None, str, Exception | None]:
    try:
        value, problem = action()
        return value, problem, None
    except _Failure as error:
        return None, "", error
