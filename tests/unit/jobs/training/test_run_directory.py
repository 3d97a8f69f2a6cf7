"""A run's directory: interrupted runs go on, finished ones start anew, two drivers exclude."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConflictError, MachineError
from jobs.training.event_log import EventLog
from jobs.training.events import Fault
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


def test_other_data_under_the_same_config_makes_another_run(run: RunDirectory) -> None:
    told: list[str] = []
    forgotten: list[str] = []

    def begin(digest: str) -> RunState:
        return run.begin(
            "reuse", digest, notify=told.append, forget=lambda: forgotten.append(digest)
        )

    state = begin("sha256:one").model_copy(update={"tracking_run_id": "abc"})
    run.write(state)
    assert begin("sha256:one") == state
    assert (told, forgotten) == ([], [])
    assert begin("sha256:two") == RunState(dataset_digest="sha256:two")
    assert not (run.path / "checkpoints").exists()
    assert forgotten == ["sha256:two"]
    (line,) = told
    assert "the data has changed since this run began (sha256:one, now sha256:two)" in line


@pytest.mark.parametrize("damage", [b"{", b"", b"\xff\xfe", b"[" * 200_000, b'{"nope": 1}'])
def test_damage_to_what_is_known_of_a_run_is_said(run: RunDirectory, damage: bytes) -> None:
    (run.path / "run.json").write_bytes(damage)
    told: list[str] = []
    assert run.begin("auto", "sha256:two", notify=told.append) == RunState(
        dataset_digest="sha256:two"
    )
    (line,) = told
    assert "run.json is damaged (" in line
    assert "\n" not in line
    assert (run.path / "checkpoints").is_dir()


def test_what_is_known_of_a_run_must_be_a_file(run: RunDirectory) -> None:
    (run.path / "run.json").mkdir()
    with pytest.raises(MachineError, match=r"run.json cannot be used: it is no plain file; "):
        run.begin("auto")
    assert run.begin("never") == RunState()
    assert not (run.path / "run.json").exists()


def test_faults_are_kept_in_a_plain_file_that_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).add(Fault(3, "worker_lost", "worker 1 was killed"))
    path.write_bytes(b"\xff\n" + b"[" * 200_000 + b"\n" + path.read_bytes())
    assert EventLog(path).counts() == {"worker_lost": 1}
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MachineError, match=r"events.jsonl cannot be used: it is no plain file; "):
        EventLog(path)


@pytest.mark.parametrize(
    "values",
    [
        {"launcher": "local", "max_failures": 0, "device": "cpu"},
        {"num_workers": 1, "threads_per_worker": 2, "micro_batch_size": 1},
        {"checkpoint": {"every_steps": 7, "keep": 3, "location": "s3://bucket/prefix"}},
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
    ],
    ids=lambda values: ", ".join(values),
)
def test_what_does_not_decide_the_result_finds_the_same_run(
    make_config: MakeConfig, tmp_path: Path, values: dict[str, Any]
) -> None:
    first = RunDirectory.of(make_config(), tmp_path).path
    assert RunDirectory.of(make_config(**values), tmp_path).path == first


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"precision": "bf16"},
        {"batch_size": 8},
        {"deepspeed": {"bf16": {"enabled": True}}},
    ],
    ids=lambda values: ", ".join(values),
)
def test_what_decides_the_result_makes_another_run(
    make_config: MakeConfig, tmp_path: Path, values: dict[str, Any]
) -> None:
    first = RunDirectory.of(make_config(), tmp_path).path
    assert RunDirectory.of(make_config(**values), tmp_path).path != first
    assert RunDirectory.of(make_config(run_name="other"), tmp_path).path.name.startswith("other-")


def test_a_location_holds_no_credentials(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="credentials belong in the environment"):
        make_config(checkpoint={"location": "s3://key:secret@bucket/prefix"})


def test_a_location_that_nothing_can_write_to_is_refused_with_the_config(
    make_config: MakeConfig,
) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.location\n.* scheme 'ftp', expected"):
        make_config(checkpoint={"location": "ftp://host/prefix"})
    assert make_config(checkpoint={"location": "file:///shared"}).checkpoint.location
