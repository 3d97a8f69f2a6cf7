"""Checkpoints are whole or not there, whatever happens while one is written."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.training.checkpointing import FolderStore, name_of, problem_of, to_prune
from jobs.training.manifest import MANIFEST_FILE, FileRecord, Manifest

SIZE_BYTES = 200_000
FILES = ("rank-00000.safetensors", "rank-00001.safetensors")


def content(step: int) -> bytes:
    return step.to_bytes(4, "big") * (SIZE_BYTES // 4)


def save(store: FolderStore, step: int) -> Path:
    attempt = name_of(step, f"{time.time_ns():x}")
    for file in FILES:
        store.write(attempt, file, [content(step)[:1000], content(step)[1000:]])
    store.commit(attempt, manifest_of(step), best_step=0)
    return store.root / name_of(step)


def manifest_of(step: int) -> Manifest:
    digest = hashlib.sha256(content(step)).hexdigest()
    record = FileRecord(size_bytes=SIZE_BYTES, sha256=digest, part=0, ranges={"weight": (0, 8)})
    return Manifest(step=step, world_size=2, files=dict.fromkeys(FILES, record))


def problem_with(store: FolderStore, step: int) -> str:
    """What whoever reads the checkpoint of a step finds."""
    directory = store.root / name_of(step)
    try:
        manifest = store.manifest(directory.name)
    except (OSError, ValueError) as error:
        return str(error)
    problems = [problem_of(directory / file, record) for file, record in manifest.files.items()]
    return next(filter(None, problems), "")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "checkpoints", keep=2)


def test_the_newest_come_first_and_old_ones_are_deleted(store: FolderStore) -> None:
    for step in (5, 10, 100_000_000):
        save(store, step)
    assert store.names() == ["step-100000000", "step-00000010"]
    manifest = store.manifest("step-100000000")
    assert (manifest.step, manifest.world_size, manifest.size_bytes) == (
        100_000_000, 2, 2 * SIZE_BYTES,
    )  # fmt: skip
    names = sorted(path.name for path in store.root.iterdir())
    assert names == ["latest", "step-00000010", "step-100000000"]
    assert (store.root / "latest").read_text() == "step-100000000\n"


def test_an_empty_store_has_none(store: FolderStore) -> None:
    assert store.names() == []


def test_the_best_is_kept_and_of_one_step_only_the_last_attempt() -> None:
    names = [
        "step-00000004-b",
        "step-00000004-a",
        "step-00000003",
        "step-00000002",
        "step-00000001",
    ]
    assert to_prune(names, keep=2, best_step=1) == ["step-00000004-a", "step-00000002"]


def test_a_step_that_is_saved_again_replaces_what_was_there(store: FolderStore) -> None:
    save(store, 1)
    (save(store, 1) / "mark").touch()
    save(store, 1)
    assert not (store.root / name_of(1) / "mark").exists()
    assert problem_with(store, 1) == ""


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / FILES[1], SIZE_BYTES // 2)


def flip_a_bit(checkpoint: Path) -> None:
    with (checkpoint / FILES[0]).open("r+b") as file:
        file.seek(777)
        byte = file.read(1)[0]
        file.seek(777)
        file.write(bytes([byte ^ 1]))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / FILES[0]).unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()


def scribble_on_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).write_text('{"files": [')


def change_a_number_in_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_FILE
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lose_a_file,
        lose_the_manifest,
        scribble_on_the_manifest,
        change_a_number_in_the_manifest,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_noticed_and_can_be_set_aside(
    store: FolderStore, damage: Callable[[Path], None]
) -> None:
    save(store, 1)
    for aside in ("corrupt-step-00000002", "corrupt-step-00000002.2"):
        damage(save(store, 2))
        assert problem_with(store, 2) != ""
        assert store.set_aside("step-00000002") == str(store.root / aside)
        assert store.names() == ["step-00000001"]
    assert problem_with(store, 1) == ""


def test_what_a_crash_left_is_cleared_away(store: FolderStore) -> None:
    save(store, 1)
    store.write(name_of(2, "a"), FILES[0], [b"half"])
    (leftover,) = store.root.glob(".partial-*")
    assert store.names() == ["step-00000001"]
    store.tidy()
    assert not leftover.exists()


def test_a_full_disk_costs_only_the_new_checkpoint(store: FolderStore) -> None:
    save(store, 1)
    store.write(name_of(2, "a"), FILES[0], [b"fits"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The manifest does not fit any more: the kernel refuses the write as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.commit(name_of(2, "a"), manifest_of(2), best_step=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000001"]


WRITER = """
import sys
from pathlib import Path
from tests.unit.jobs.training.test_checkpointing import save
from jobs.training.checkpointing import FolderStore
store = FolderStore(Path(sys.argv[1]), keep=2)
step = int(sys.argv[2])
while True:
    step += 1
    save(store, step)
    print(step, flush=True)
"""


def test_killing_the_writer_at_any_moment_leaves_a_whole_newest(store: FolderStore) -> None:
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
        newest = store.manifest(store.names()[0]).step
        assert newest >= max([last + 1, *committed])
        assert problem_with(store, newest) == ""
        last = newest
