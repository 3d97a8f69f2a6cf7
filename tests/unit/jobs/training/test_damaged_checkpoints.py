"""Checkpoints that somebody damaged, edited or put there: set aside or refused in one line, and
never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConflictError
from cluster.storage import Storage
from jobs.data.dataset import Dataset
from jobs.training.checkpointing import CheckpointStore, FolderStore
from jobs.training.engine import Engine
from jobs.training.events import Event, Fault
from jobs.training.manifest import MANIFEST_FILE, Manifest
from jobs.training.memory import RunMemory
from jobs.training.object_checkpoints import ObjectStore
from jobs.training.saving import Saver
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.test_resharding import make_engine

FILE = "rank-00000.safetensors"
OLD, NEW = "step-00000001", "step-00000002"


@dataclass
class Run:
    """A small model with the checkpoints of steps 1 and 2."""

    engine: Engine
    arguments: tuple[Any, ...]
    root: Path

    def saver(self, root: Path, tell: Callable[[Event], None], **values: Any) -> Saver:
        return self.over(FolderStore(root, keep=2), root, tell, **values)

    def over(
        self, store: CheckpointStore, root: Path, tell: Callable[[Event], None], **values: Any
    ) -> Saver:
        return Saver(self.engine, store, *self.arguments, tell, scratch=root / "scratch", **values)


def make_run(make_config: MakeConfig, digits: Dataset, root: Path, hidden_size: int) -> Run:
    model = {"family": "cnn", "channels": [2], "hidden_size": hidden_size}
    engine, *arguments = make_engine(make_config(model=model), digits.directory)
    run = Run(engine, tuple(arguments), root)
    saver = run.saver(root, lambda _event: None, dataset_digest="sha256:one", blocking=True)
    for step in (1, 2):
        saver.start(step, RunMemory(quarantine=(step,)))
    return run


@pytest.fixture(scope="module")
def run(make_config: MakeConfig, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(make_config, digits, tmp_path_factory.mktemp("run"), hidden_size=8)


def weights(engine: Engine) -> torch.Tensor:
    return torch.cat([one.part_of(one.stepped).clone() for one in engine.state().holdings])


def rewrite(checkpoint: Path, **values: Any) -> None:
    """Edit a manifest so that its digest matches."""
    path = checkpoint / MANIFEST_FILE
    found = json.loads(path.read_bytes())
    del found["sha256"]
    found.update(values)
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**found, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def replace_files(checkpoint: Path, data: bytes) -> None:
    """Put other bytes in place of what a worker saved, and their digest into the manifest."""
    (checkpoint / FILE).write_bytes(data)
    record = json.loads((checkpoint / MANIFEST_FILE).read_bytes())["files"][FILE]
    record |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(checkpoint, files={FILE: record})


def as_directory(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    (checkpoint / MANIFEST_FILE).mkdir()


def as_pipe(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    os.mkfifo(checkpoint / MANIFEST_FILE)


def as_pipe_of_weights(checkpoint: Path) -> None:
    (checkpoint / FILE).unlink()
    os.mkfifo(checkpoint / FILE)


def as_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("no directory")


def as_link_to_itself(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(checkpoint.name)


def with_weights_of_another_shape(checkpoint: Path) -> None:
    old = (checkpoint / FILE).read_bytes()
    length = int.from_bytes(old[:8], "little")
    header = json.loads(old[8 : 8 + length])
    name = next(name for name in header if name.startswith("master/"))
    header["master/renamed"] = header.pop(name)
    text = json.dumps(header).encode()
    replace_files(checkpoint, len(text).to_bytes(8, "little") + text + old[8 + length :])


def nest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).write_text("[" * 200_000)


def with_engine(checkpoint: Path, **values: Any) -> None:
    engine = json.loads((checkpoint / MANIFEST_FILE).read_bytes())["engine"]
    rewrite(checkpoint, engine=engine | values)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nested too deeply": nest,
    "it is no plain file": as_directory,
    "its manifest cannot be read: it is no plain file": as_pipe,
    f"{FILE} cannot be read: it is no plain file": as_pipe_of_weights,
    "Not a directory": as_file,
    "Too many levels of symbolic links": as_link_to_itself,
    "nope: Extra inputs": lambda checkpoint: rewrite(checkpoint, memory={"nope": 1}),
    "counters: Field required": lambda checkpoint: rewrite(checkpoint, engine={}),
    "0 groups of parameters": lambda checkpoint: with_engine(checkpoint, groups=[]),
    f"{FILE} is no file of fragments": lambda checkpoint: replace_files(checkpoint, b"none"),
    f"{FILE} does not hold its range": with_weights_of_another_shape,
    "its manifest is of step -5": lambda checkpoint: rewrite(checkpoint, step=-5),
    "its manifest is of step 1000000000000000": lambda checkpoint: rewrite(checkpoint, step=10**15),
    "step: Input should be": lambda checkpoint: rewrite(checkpoint, step="abc"),
}


@pytest.mark.parametrize(("expected", "damage"), DAMAGES.items(), ids=list(DAMAGES))
def test_a_damaged_newest_is_set_aside_with_a_line_and_the_one_before_is_used(
    run: Run, tmp_path: Path, expected: str, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    damage(root / NEW)
    events: list[Event] = []
    restored = run.saver(root, events.append).restore()
    assert restored is not None
    assert (restored.step, restored.memory.quarantine) == (1, (1,))
    (fault,) = events
    assert isinstance(fault, Fault)
    assert (fault.step, fault.kind) == (2, "checkpoint_corrupt")
    assert expected in fault.text
    assert "\n" not in fault.text
    assert os.path.lexists(root / f"corrupt-{NEW}")


def test_if_all_are_damaged_there_is_none_and_nothing_has_been_loaded(
    run: Run, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    for name in (OLD, NEW):
        with_weights_of_another_shape(root / name)
    for holding in run.engine.state().holdings:
        holding.part_of(holding.stepped).add_(1.0)
    before = weights(run.engine)
    assert run.saver(root, lambda _event: None).restore() is None
    assert torch.equal(weights(run.engine), before)


@pytest.mark.parametrize("name", ["step-foo", "step-", "step-3", "step-0000000x"])
def test_what_is_not_named_like_a_checkpoint_is_left_alone(
    run: Run, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    (root / name).mkdir()
    events: list[Event] = []
    restored = run.saver(root, events.append).restore()
    assert restored is not None
    assert restored.step == 2
    assert events == []
    assert (root / name).is_dir()


def test_a_damaged_newest_in_an_object_store_is_set_aside_too(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "objects"
    shutil.copytree(run.root, root)
    rewrite(root / NEW, step=10**15)
    (root / "step-foo").mkdir()
    shutil.copy(root / OLD / MANIFEST_FILE, root / "step-foo")
    events: list[Event] = []
    store = ObjectStore(Storage.open(str(root)), keep=2)
    restored = run.over(store, tmp_path, events.append).restore()
    assert restored is not None
    assert restored.step == 1
    assert [event.kind for event in events if isinstance(event, Fault)] == ["checkpoint_corrupt"]
    assert (root / NEW / "corrupt.json").is_file()


@pytest.mark.parametrize(("theirs", "ours"), [(8, 5), (5, 8)])
def test_weights_of_a_larger_or_smaller_model_are_refused(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, theirs: int, ours: int
) -> None:
    make_run(make_config, digits, tmp_path / "theirs", theirs)
    run = make_run(make_config, digits, tmp_path / "ours", ours)
    before = weights(run.engine)
    with pytest.raises(ConflictError, match=r"is of another model: its '.*' has .* values"):
        run.saver(tmp_path / "theirs", lambda _event: None).restore()
    assert torch.equal(weights(run.engine), before)
    assert (tmp_path / "theirs" / NEW).is_dir()


def test_a_checkpoint_with_more_parameters_is_refused(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    record = json.loads((root / NEW / MANIFEST_FILE).read_bytes())["files"][FILE]
    record["ranges"]["extra.weight"] = [0, 4]
    rewrite(root / NEW, files={FILE: record})
    with pytest.raises(ConflictError, match="it has 1 parameters more, 'extra"):
        run.saver(root, lambda _event: None).restore()


def test_another_format_is_refused_and_kept(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    rewrite(root / NEW, format="fragments/99", unheard_of=1)
    with pytest.raises(ConflictError, match=f"{NEW} cannot be read by this version.*fragments/99"):
        run.saver(root, lambda _event: None).restore()
    assert (root / NEW).is_dir()


def test_a_checkpoint_of_other_data_is_refused(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(run.root, root)
    saver = run.saver(root, lambda _event: None, dataset_digest="sha256:two")
    with pytest.raises(ConflictError, match=r"on other data \(sha256:one, and .* sha256:two\)"):
        saver.restore()
    # Those of earlier versions do not name theirs.
    rewrite(root / NEW, dataset_digest="")
    assert saver.restore() is not None
    assert Manifest.from_bytes((root / NEW / MANIFEST_FILE).read_bytes()).step == 2
