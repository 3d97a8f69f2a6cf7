"""A backup brings the whole state back elsewhere, or nothing of it."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sqlite3
import tarfile
import threading
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import pytest
import sqlalchemy as sa
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from cluster import backup, database
from cluster.backup import write_backup
from cluster.cli.app import app
from cluster.database import model_versions, open_database
from cluster.errors import ConflictError, InputError, MachineError, NotRunningError
from cluster.model_package import (
    Keyset,
    LocalSigner,
    ensure_local_key,
    open_keyset,
    open_version,
    write_package,
)
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.rekeying import rekey
from cluster.restore import restore_backup
from cluster.security.api_keys import ApiKeys
from cluster.settings import Settings
from cluster.storage import Storage


def load(home: Path) -> Settings:
    return Settings(home=home)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home with a signed package, a key, a run and an MLflow database."""
    settings = Settings(home=tmp_path / "home")
    fill(settings, tmp_path)
    return settings


def fill(settings: Settings, tmp_path: Path) -> None:
    home = settings.home
    ensure_local_key(settings.keys_dir)
    key = ApiKeys(open_database(settings.database)).create("local", ("infer",), actor="test").key
    settings.api_key_path.touch(mode=0o600)
    settings.api_key_path.write_text(key)
    package(settings, tmp_path / "graph")
    (home / "mlflow" / "artifacts" / "1").mkdir(parents=True)
    (home / "mlflow" / "artifacts" / "1" / "config.json").write_text("{}")
    with sqlite3.connect(home / "mlflow" / "mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")
        connection.execute("INSERT INTO runs VALUES ('r1')")
    checkpoints = home / "runs" / "digits" / "checkpoints"
    (checkpoints / "step-10").mkdir(parents=True)
    (checkpoints / "step-10" / "state").write_bytes(b"state")
    (checkpoints / ".partial-step-20").mkdir()
    (checkpoints / ".partial-step-20" / "state").write_bytes(b"half")
    (home / "runs" / "digits" / "lock").touch()
    (settings.keys_dir / ".new-abc").write_text("the private key of a rotation that was killed")


def package(settings: Settings, directory: Path) -> None:
    directory.mkdir()
    weights = numpy_helper.from_array(np.eye(2, 3, dtype=np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    published = write_package(
        directory,
        name="linear",
        kind="graph",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    )
    row = {
        "name": "linear",
        "version": 1,
        "digest": published.digest,
        "location": published.location,
        "kind": "graph",
        "created_at": database.now(),
    }
    with open_database(settings.database).begin() as connection:
        connection.execute(sa.insert(model_versions).values(row))
    ModelRegistry.open(settings).set_alias("linear", "champion", 1, actor="a\u2028b", reason="é")


def check(restored: Settings, key: str) -> None:
    """All that `fill` made is there, and works."""
    registry = ModelRegistry.open(restored)
    version = registry.resolve(ModelRef.parse("linear@champion"))
    assert version.location.startswith(Storage.open(restored.storage_root).root)
    assert open_version(version, restored).signer is not None
    assert [change.actor for change in registry.history("linear")] == ["a\u2028b"]
    assert ApiKeys(open_database(restored.database)).verify(key).tenant == "local"
    with sqlite3.connect(restored.home / "mlflow" / "mlflow.db") as connection:
        assert connection.execute("SELECT id FROM runs").fetchall() == [("r1",)]
    assert (restored.home / "mlflow/artifacts/1/config.json").read_text() == "{}"
    found = {path.name for path in (restored.home / "runs").rglob("*") if path.is_file()}
    assert found == {"state"}
    assert not list(restored.keys_dir.glob(".new-*"))
    assert (restored.home / "runs/digits/checkpoints/step-10/state").read_bytes() == b"state"
    assert restored.keys_dir.stat().st_mode & 0o777 == 0o700
    assert restored.api_key_path.stat().st_mode & 0o777 == 0o600
    # What is written from now on does not collide with what was restored.
    registry.set_alias("linear", "champion", None, actor="test", reason="later")


def test_everything_comes_back_in_another_place(settings: Settings, tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    key = settings.api_key_path.read_text()
    assert archive.stat().st_mode & 0o777 == 0o600
    settings.home.rename(tmp_path / "gone")
    other = tmp_path / "elsewhere"
    restore_backup(archive, other, load)
    check(load(other), key)
    assert not list(tmp_path.glob(".*"))


def test_storage_may_lie_in_an_object_store(tmp_path: Path, s3_root: str) -> None:
    def load_s3(home: Path) -> Settings:
        url = s3_root.replace("/root?", f"/{bucket_prefix}?")
        return Settings(home=home, storage_url=url)

    bucket_prefix = uuid.uuid4().hex
    settings = load_s3(tmp_path / "home")
    fill(settings, tmp_path)
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    with pytest.raises(ConflictError, match="is not empty"):
        restore_backup(archive, tmp_path / "other", load_s3)
    with pytest.raises(ConflictError, match="an object store"):
        restore_backup(archive, tmp_path / "other", load)
    assert not (tmp_path / "other").exists()
    bucket_prefix = uuid.uuid4().hex
    restore_backup(archive, tmp_path / "other", load_s3)
    check(load_s3(tmp_path / "other"), settings.api_key_path.read_text())


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "no_tar", "newer"])
def test_a_damaged_backup_changes_nothing(settings: Settings, tmp_path: Path, damage: str) -> None:
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    data = bytearray(archive.read_bytes())
    if damage == "cut":
        del data[-20_000:]
    elif damage == "flipped":
        data[data.rindex(b"state", 0, data.index(b"backup.json")) + 1] ^= 1
    elif damage == "renamed":
        start = data.index(b"home/runs/digits")
        data[start : start + 4] = b"/etc"
    elif damage == "no_tar":
        data[:] = b"no archive at all"
    else:
        data = data.replace(b'"format_version": 1', b'"format_version": 9')
    archive.write_bytes(data)
    with pytest.raises(InputError) as caught:
        restore_backup(archive, tmp_path / "other", load)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tables/audit_log.jsonl", b"{"),
        ("tables/audit_log.jsonl", b"\xff"),
        ("tables/audit_log.jsonl", b"[1]"),
        ("tables/audit_log.jsonl", b"[" * 100_000),
        ("tables/audit_log.jsonl", b'{"colour": "red"}'),
        ("tables/audit_log.jsonl", b'{"actor": {"a": 1}}'),
        ("tables/audit_log.jsonl", b'{"id": 9' + b"9" * 30 + b"}"),
        ("tables/tenants.jsonl", b'{"name": "a"}'),
        ("backup.json", b"[" * 100_000),
        ("backup.json", b"\xff"),
        ("backup.json", b"[]"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    members = {} if name == "backup.json" else {name: content}
    index = backup.BackupIndex(
        created_at="",
        storage_root="",
        storage_is_folder=True,
        members={
            name: backup.MemberInfo(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in members.items()
        },
    )
    files = {"backup.json": index.model_dump_json().encode(), **members, name: content}
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match="is not a whole backup") as caught:
        restore_backup(tmp_path / "backup.tar", tmp_path / "other", load)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["backup.tar"]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_restore_that_fails_leaves_storage_elsewhere_empty(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = str(tmp_path / "elsewhere")
    if kind == "s3":
        template: str = request.getfixturevalue("s3_root")
        root = template.replace("/root?", f"/{uuid.uuid4().hex}?")

    def load_elsewhere(home: Path) -> Settings:
        return Settings(home=home, storage_url=root)

    settings = load_elsewhere(tmp_path / "home")
    fill(settings, tmp_path)
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    (packages,) = {key.split("/")[0] for key in Storage.open(root).list()}
    Storage.open(root).delete_dir(packages)
    written: list[str] = []
    real = Storage.write_file

    def fail_later(self: Storage, key: str, source: BinaryIO) -> None:
        real(self, key, source)
        written.append(key)
        if len(written) == 2:
            raise MachineError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_file", fail_later)
        with pytest.raises(MachineError, match="full"):
            restore_backup(archive, tmp_path / "other", load_elsewhere)
    assert Storage.open(root).contents() == []
    assert not Storage.open(root).exists(packages)
    assert not (tmp_path / "other").exists()
    restore_backup(archive, tmp_path / "other", load_elsewhere)
    assert len(Storage.open(root).contents()) > len(written)


def test_only_a_file_is_restored_and_what_lies_beside_the_home_stays(
    settings: Settings, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="is no regular file"):
            restore_backup(path, tmp_path / "other", load)
    theirs = tmp_path / ".other.restoring" / "file"
    theirs.parent.mkdir()
    theirs.touch()
    write_backup(settings, tmp_path / "backup.tar")
    restore_backup(tmp_path / "backup.tar", tmp_path / "other", load)
    assert theirs.exists()


def test_a_storage_that_is_not_there_is_no_backup_without_packages(
    settings: Settings, tmp_path: Path, s3_root: str
) -> None:
    (settings.home / "storage").rename(tmp_path / "unmounted")
    with pytest.raises(NotRunningError, match=r"storage folder .* is not there"):
        write_backup(settings, tmp_path / "backup.tar")
    elsewhere = settings.model_copy(update={"storage_url": s3_root.replace("@bucket", "@bucke")})
    with pytest.raises(NotRunningError, match="bucket 'bucke'"):
        write_backup(elsewhere, tmp_path / "backup.tar")
    assert not list(tmp_path.glob("*backup*"))


def test_a_home_with_state_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    with pytest.raises(ConflictError, match="not empty"):
        restore_backup(archive, settings.home, load)
    with pytest.raises(ConflictError, match="exists already"):
        write_backup(settings, archive)
    with pytest.raises(InputError, match="does not exist"):
        restore_backup(tmp_path / "none.tar", tmp_path / "other", load)


def test_what_was_planted_beside_a_backup_gets_nothing_of_it(
    settings: Settings, tmp_path: Path
) -> None:
    victim, planted = tmp_path / "victim", tmp_path / ".backup.tar.partial"
    victim.write_text("precious")
    planted.symlink_to(victim)
    write_backup(settings, tmp_path / "backup.tar")
    assert victim.read_text() == "precious"
    assert planted.is_symlink()
    with pytest.raises(MachineError, match="is no directory"):
        write_backup(settings, tmp_path / "none" / "backup.tar")


def test_of_two_backups_of_one_name_one_is_whole_and_the_other_says_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, together, real = tmp_path / "backup.tar", threading.Barrier(2), backup._Writer.run

    def run(writer: backup._Writer) -> backup.BackupIndex:
        together.wait(30)
        return real(writer)

    monkeypatch.setattr(backup._Writer, "run", run)
    outcomes: list[str] = []

    def write() -> None:
        try:
            write_backup(settings, archive)
            outcomes.append("written")
        except ConflictError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [f"{archive} exists already", "written"]
    restore_backup(archive, tmp_path / "other", load)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_no_backup(settings: Settings, small_disk: Path) -> None:
    (settings.home / "runs" / "digits" / "checkpoints" / "step-10" / "more").write_bytes(
        b"x" * 4 * shutil.disk_usage(small_disk).total
    )
    with pytest.raises(MachineError, match="space"):
        write_backup(settings, small_disk / "backup.tar")
    assert list(small_disk.iterdir()) == []


def test_encrypted_packages_come_back_with_their_keys(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", encrypt_packages=True)
    keyset = open_keyset(settings)
    keyset.ensure()
    fill(settings, tmp_path)
    rekey(Storage.open(settings.storage_root), keyset, say=lambda _: None)
    archive = tmp_path / "backup.tar"
    write_backup(settings, archive)
    settings.home.rename(tmp_path / "gone")
    restore_backup(archive, tmp_path / "elsewhere", load)
    restored = load(tmp_path / "elsewhere")
    assert list((restored.home / "storage").rglob("*.aead"))
    assert open_keyset(restored).path.stat().st_mode & 0o777 == 0o600
    check(restored, restored.api_key_path.read_text())


def test_a_keyset_outside_the_home_is_missed_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HELIOSTAT_ENCRYPTION_KEYSET", str(tmp_path / "elsewhere.json"))
    Keyset(tmp_path / "elsewhere.json").ensure()
    result = CliRunner().invoke(app, ["backup", str(tmp_path / "b.tar")], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(tmp_path / "elsewhere.json") in result.stderr
