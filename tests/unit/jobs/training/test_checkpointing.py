"""Checkpoints are whole or not there, whatever happens while one is written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.training.checkpointing import STATE_DIR, CheckpointStore

SIZE_BYTES = 200_000


def save(store: CheckpointStore, step: int) -> Path:
    partial = store.begin(step)
    for name in ("model.pt", "optim.pt"):
        (partial / STATE_DIR / name).write_bytes(step.to_bytes(4, "big") * (SIZE_BYTES // 4))
    return store.commit(partial, step, world_size=2).path


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


class Notices(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def test_the_newest_is_found_and_old_ones_are_deleted(store: CheckpointStore) -> None:
    for step in (5, 10, 100_000_000):
        save(store, step)
    found = store.newest(notify=Notices())
    assert found is not None
    assert (found.step, found.world_size) == (100_000_000, 2)
    assert found.size_bytes == 2 * SIZE_BYTES
    names = sorted(path.name for path in store.root.iterdir())
    assert names == ["latest", "step-00000010", "step-100000000"]
    assert (store.root / "latest").read_text() == "step-100000000\n"


def test_an_empty_store_has_none(store: CheckpointStore) -> None:
    assert store.newest(notify=Notices()) is None


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / STATE_DIR / "optim.pt", SIZE_BYTES // 2)


def flip_a_bit(checkpoint: Path) -> None:
    with (checkpoint / STATE_DIR / "model.pt").open("r+b") as file:
        file.seek(777)
        byte = file.read(1)[0]
        file.seek(777)
        file.write(bytes([byte ^ 1]))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / STATE_DIR / "model.pt").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").unlink()


def scribble_on_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text('{"files": [')


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, lose_a_file, lose_the_manifest, scribble_on_the_manifest],
    ids=lambda damage: damage.__name__,
)
def test_a_corrupt_newest_is_set_aside_and_the_previous_used(
    store: CheckpointStore, damage: Callable[[Path], None]
) -> None:
    save(store, 1)
    damage(save(store, 2))
    notices = Notices()
    found = store.newest(notify=notices)
    assert found is not None
    assert found.step == 1
    assert len(notices) == 1
    assert "step-00000002 is corrupt" in notices[0]
    assert (store.root / "corrupt-step-00000002").is_dir()
    assert store.newest(notify=notices) == found
    assert len(notices) == 1


def test_training_goes_on_past_a_step_that_was_set_aside(store: CheckpointStore) -> None:
    save(store, 1)
    for _ in range(2):
        truncate(save(store, 2))
        found = store.newest(notify=Notices())
        assert found is not None
        assert found.step == 1


def test_what_a_crash_left_is_cleared_away(store: CheckpointStore) -> None:
    save(store, 1)
    leftover = store.begin(2)
    (leftover / STATE_DIR / "model.pt").write_bytes(b"half")
    found = store.newest(notify=Notices())
    assert found is not None
    assert found.step == 1
    save(store, 3)
    assert not leftover.exists()


def test_a_full_disk_costs_only_the_new_checkpoint(store: CheckpointStore) -> None:
    save(store, 1)
    partial = store.begin(2)
    (partial / STATE_DIR / "model.pt").write_bytes(b"fits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The manifest does not fit any more: the kernel refuses the write as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.commit(partial, 2, world_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000001"]


WRITER = """
import sys
from pathlib import Path
from tests.unit.jobs.training.test_checkpointing import save
from jobs.training.checkpointing import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep=2)
step = int(sys.argv[2])
while True:
    step += 1
    save(store, step)
    print(step, flush=True)
"""


def test_killing_the_writer_at_any_moment_leaves_a_whole_newest(store: CheckpointStore) -> None:
    random_delay = random.Random(0)
    last = 0
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.root), str(last)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random_delay.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        committed = [int(line) for line in writer.communicate()[0].split()]
        notices = Notices()
        found = store.newest(notify=notices)
        assert found is not None
        assert found.step >= max([last + 1, *committed])
        assert notices == []
        last = found.step


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("this kernel lets nobody mount here")
    try:
        store = CheckpointStore(disk / "checkpoints", keep=2)
        save(store, 1)
        save(store, 2)
        partial = store.begin(3)
        with pytest.raises(OSError, match="No space left"):
            (partial / STATE_DIR / "model.pt").write_bytes(bytes(4 * SIZE_BYTES))
        store.abandon(partial)
        found = store.newest(notify=Notices())
        assert found is not None
        assert found.step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
