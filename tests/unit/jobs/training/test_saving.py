"""Saving while training goes on: what is saved, what a failure costs, and what a kill leaves."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Storage
from jobs.data.dataset import Dataset
from jobs.training.checkpointing import Chunk, FolderStore
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Fault, Progress, Saved, Started
from jobs.training.manifest import MANIFEST_FILE
from jobs.training.memory import RunMemory
from jobs.training.saving import Saver
from jobs.training.worker import WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import PRELOADED, run_ranks
from tests.unit.jobs.training.test_resharding import make_engine, train_all


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting has tests of its own, and takes seconds."""
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)


class GatedStore(FolderStore):
    """Writes when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, keep=2)
        self.gate = threading.Event()

    def write(self, save: str, file: str, chunks: Iterable[Chunk]) -> None:
        assert self.gate.wait(60)
        super().write(save, file, chunks)


class Gated:
    """A saver of a small model whose store waits."""

    def __init__(self, config: TrainConfig, dataset: Dataset, root: Path) -> None:
        self.events: list[Event] = []
        self.engine, group, layout = make_engine(config, dataset.directory)
        self.store = GatedStore(root)
        self.saver = Saver(self.engine, self.store, group, layout, self.events.append, scratch=root)

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([one.stepped.detach().flatten() for one in self.engine.state().holdings])

    def change_weights(self) -> None:
        with torch.no_grad():
            for holding in self.engine.state().holdings:
                holding.stepped.add_(1.0)


@pytest.fixture
def gated(make_config: MakeConfig, digits: Dataset, tmp_path: Path) -> Gated:
    config = make_config(deepspeed={"zero_optimization": {"stage": 0}})
    return Gated(config, digits, tmp_path)


def test_what_is_saved_is_the_state_at_the_start_whatever_training_does_meanwhile(
    gated: Gated,
) -> None:
    before = gated.weights.clone()
    gated.saver.start(3, RunMemory(quarantine=(4, 5)))
    gated.change_weights()
    gated.saver.poll()
    assert gated.store.names() == []
    gated.store.gate.set()
    gated.saver.wait()
    (saved,) = gated.events
    assert isinstance(saved, Saved)
    assert saved.step == 3
    assert 0 < saved.blocked_s <= saved.seconds
    assert not torch.equal(gated.weights, before)
    restored = gated.saver.restore()
    assert restored is not None
    assert restored.memory == RunMemory(quarantine=(4, 5))
    assert torch.equal(gated.weights, before)


def test_a_save_that_is_due_too_early_waits_for_the_one_before(gated: Gated) -> None:
    gated.saver.start(1, RunMemory())
    gated.change_weights()
    opener = threading.Timer(0.2, gated.store.gate.set)
    opener.start()
    gated.saver.start(2, RunMemory())
    gated.saver.wait()
    opener.join()
    assert gated.store.names() == ["step-00000002", "step-00000001"]
    first, second = (
        gated.store.manifest(name).files["rank-00000.safetensors"].sha256
        for name in gated.store.names()
    )
    assert first != second
    assert [event.step for event in gated.events if isinstance(event, Saved)] == [1, 2]


def test_going_back_forgets_what_came_later(gated: Gated) -> None:
    gated.store.gate.set()
    for step in (1, 2):
        gated.saver.start(step, RunMemory())
    restored = gated.saver.restore(at_most=1)
    assert restored is not None
    assert restored.step == 1
    assert gated.store.names() == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nobody may mount a disk here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_costs_checkpoints_and_neither_training_nor_the_previous_one(
    make_config: MakeConfig, digits: Dataset, small_disk: Path
) -> None:
    filler = small_disk / "filler"
    events: list[Event] = []
    left: list[list[str]] = []

    def tell(event: Event) -> None:
        events.append(event)
        if isinstance(event, Saved) and event.step == 2:
            fill(filler)
        if isinstance(event, Fault):
            names = [path.name for path in (small_disk / "checkpoints").iterdir()]
            left.append(sorted(name for name in names if not name.startswith(".partial")))
            filler.unlink(missing_ok=True)

    config = make_config(checkpoint={"every_steps": 2}, steps=12)
    run_worker(WorkerJob(config, digits.directory, small_disk), tell)
    faults = [event for event in events if isinstance(event, Fault)]
    assert {event.kind for event in faults} == {"checkpoint_failed"}
    assert "was not saved" in faults[0].text
    assert "No space left on device" in faults[0].text
    assert left[0] == ["latest", "step-00000002"]
    assert len({event.step for event in faults}) == len(faults)
    saved = [event.step for event in events if isinstance(event, Saved)]
    assert saved[0] == 2
    assert saved[-1] == 12
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, 13))
    names = {path.name for path in (small_disk / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step-{step:08d}" for step in saved[-2:])}


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def train_and_stall(job: WorkerJob, half_written: Any) -> None:
    """Saves step 2, and hangs when half of step 4 is written."""
    write = FolderStore.write

    def stall(store: FolderStore, save: str, file: str, chunks: Iterable[Chunk]) -> None:
        if save.startswith("step-00000002"):
            return write(store, save, file, chunks)
        data = b"".join(bytes(chunk) for chunk in chunks)
        write(store, save, file, [data[: len(data) // 2]])
        half_written.set()
        time.sleep(600)

    FolderStore.write = stall  # type: ignore[method-assign]
    run_worker(job, lambda _event: None)


def test_a_kill_while_a_checkpoint_is_written_costs_that_one(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(checkpoint={"every_steps": 2}, steps=6)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    half_written = context.Event()
    job = WorkerJob(config, digits.directory, tmp_path / "run")
    worker = context.Process(target=train_and_stall, args=(job, half_written))
    worker.start()
    try:
        assert half_written.wait(120)
    finally:
        worker.kill()
        worker.join()
    checkpoints = tmp_path / "run/checkpoints"
    assert len(list(checkpoints.glob(".partial-*"))) == 1
    events = train(config, digits, tmp_path / "run")
    assert first_step(events) == 2
    unbroken = train(config, digits, tmp_path / "unbroken")
    assert losses(events) == {step: loss for step, loss in losses(unbroken).items() if step > 2}
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", "step-00000004", "step-00000006"]


def train(config: TrainConfig, dataset: Dataset, run_dir: Path) -> list[Event]:
    events: list[Event] = []
    run_worker(WorkerJob(config, dataset.directory, run_dir), events.append)
    return events


def losses(events: list[Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, Progress)}


def first_step(events: list[Event]) -> int:
    return next(event.first_step for event in events if isinstance(event, Started))


@pytest.fixture
def location(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on the S3 server, with its key in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return s3_root.replace("test:test@", "").replace("/root?", f"/{uuid.uuid4().hex}?")


def train_with_a_key(job: WorkerJob) -> list[Event]:
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    return train_all({"": job})[""]


def test_a_run_whose_home_is_lost_goes_on_from_the_object_store(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, location: str
) -> None:
    def config(steps: int, stage: int) -> TrainConfig:
        return make_config(
            model={"family": "cnn", "channels": [4], "hidden_size": 16, "dropout": 0.0},
            steps=steps,
            schedule={"kind": "constant"},
            checkpoint={"every_steps": 1, "keep": 2, "location": location},
            deepspeed={"zero_optimization": {"stage": stage}},
        )

    job = WorkerJob(config(3, 2), digits.directory, tmp_path / "lost/tiny-abc")
    run_ranks(train_with_a_key, job, 2)
    assert not (tmp_path / "lost/tiny-abc/checkpoints").exists()
    storage = Storage.open(location)
    keys = storage.list()
    # The newest two, each with a file per worker.
    assert [key.split("/")[1][:13] for key in keys] == ["step-00000002"] * 3 + ["step-00000003"] * 3
    newest = keys[-1].rpartition("/")[0]
    assert [key for key in keys if key.startswith(newest)] == [
        f"{newest}/{file}"
        for file in (MANIFEST_FILE, "rank-00000.safetensors", "rank-00001.safetensors")
    ]
    storage.write_bytes(f"{newest}/rank-00001.safetensors", b"damaged")
    storage.write_bytes(f"{newest[:-4]}half/rank-00000.safetensors", b"left by a crash")
    events = train(config(4, 3), digits, tmp_path / "fresh/tiny-abc")
    assert first_step(events) == 2
    (fault,) = (event for event in events if isinstance(event, Fault))
    assert fault.kind == "checkpoint_corrupt"
    assert "rank-00001.safetensors has the wrong size" in fault.text
    unbroken = train(
        config(4, 0).model_copy(
            update={"checkpoint": config(4, 0).checkpoint.model_copy(update={"location": ""})}
        ),
        digits,
        tmp_path / "unbroken",
    )
    expected = {step: loss for step, loss in losses(unbroken).items() if step > 2}
    assert losses(events) == pytest.approx(expected, rel=1e-5)
    kept = storage.list()
    assert f"{newest}/corrupt.json" in kept
    assert not any("half/" in key for key in kept)
    assert list((tmp_path / "fresh/tiny-abc").glob("fetched/*")) == []
