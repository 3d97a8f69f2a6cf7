"""A run's directory: interrupted runs go on, finished ones start anew, two drivers exclude."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConflictError
from jobs.training.run_directory import RunDirectory, RunState
from tests.unit.jobs.training.conftest import MakeConfig

INTERRUPTED = RunState(tracking_run_id="abc")
FINISHED = RunState(tracking_run_id="abc", result={"name": "tiny", "version": 1})


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> RunDirectory:
    run = RunDirectory.of(make_config(), tmp_path)
    (run.path / "checkpoints").mkdir(parents=True)
    return run


def test_an_interrupted_run_goes_on(run: RunDirectory) -> None:
    run.write(INTERRUPTED)
    assert run.begin("auto") == INTERRUPTED
    assert run.begin("reuse") == INTERRUPTED
    assert (run.path / "checkpoints").is_dir()


def test_a_finished_run_starts_anew_unless_it_may_be_reused(run: RunDirectory) -> None:
    run.write(FINISHED)
    assert run.begin("reuse") == FINISHED
    assert run.begin("auto") == RunState()
    assert not (run.path / "checkpoints").exists()


def test_never_means_anew(run: RunDirectory) -> None:
    run.write(INTERRUPTED)
    assert run.begin("never") == RunState()
    assert not (run.path / "checkpoints").exists()


def test_one_driver_at_a_time(run: RunDirectory) -> None:
    with run.locked():
        other = RunDirectory(run.path)
        with pytest.raises(ConflictError, match="is being trained by another process"):
            other.locked().__enter__()
    with run.locked():
        pass


def test_only_what_decides_the_result_makes_another_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = RunDirectory.of(make_config(), tmp_path).path
    assert RunDirectory.of(make_config(launcher="local", max_failures=0), tmp_path).path == first
    assert RunDirectory.of(make_config(seed=1), tmp_path).path != first
    assert RunDirectory.of(make_config(run_name="other"), tmp_path).path.name.startswith("other-")
