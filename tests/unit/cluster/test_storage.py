"""The same promises hold in a folder and in an object store."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from cluster.errors import ConfigError, MachineError, NotFoundError, NotRunningError
from cluster.storage import Storage


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage.open(str(tmp_path / "root"))
    root: str = request.getfixturevalue("s3_root")
    return Storage.open(root.replace("/root?", f"/{uuid.uuid4().hex}?"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_text("one")
    (directory / "sub" / "b.txt").write_text("two")
    return directory


def test_a_directory_comes_back_as_it_went(storage: Storage, source: Path, tmp_path: Path) -> None:
    assert not storage.exists("things/x")
    assert storage.put_dir(source, "things/x")
    assert storage.exists("things/x")
    storage.get_dir("things/x", tmp_path / "copy")
    assert (tmp_path / "copy/a.txt").read_text() == "one"
    assert (tmp_path / "copy/sub/b.txt").read_text() == "two"
    assert storage.list("things") == ["things/x/a.txt", "things/x/sub/b.txt"]
    assert storage.list() == storage.list("things")


def test_what_is_published_is_not_replaced(storage: Storage, source: Path) -> None:
    assert storage.put_dir(source, "x")
    (source / "a.txt").write_text("changed")
    assert not storage.put_dir(source, "x")
    assert storage.read_bytes("x/a.txt") == b"one"


def test_a_stage_may_be_moved_into_place_and_leaves_nothing(storage: Storage) -> None:
    with storage.staging() as stage:
        (stage / "a.txt").write_text("one")
        assert storage.put_dir(stage, "x", move=True)
    assert storage.list() == ["x/a.txt"]
    assert not stage.exists()


def test_files_are_written_whole_and_replaced(storage: Storage) -> None:
    storage.write_bytes("f/one", b"1")
    storage.write_bytes("f/one", b"2")
    assert storage.read_bytes("f/one") == b"2"
    assert storage.exists("f/one")


def test_missing_things_are_named(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing/here"):
        storage.get_dir("nothing/here", tmp_path / "copy")
    with pytest.raises(NotFoundError, match="nothing/here"):
        storage.read_bytes("nothing/here")
    assert storage.list("nothing") == []


def test_a_deleted_directory_is_gone_and_deleting_twice_is_fine(
    storage: Storage, source: Path
) -> None:
    storage.put_dir(source, "x")
    storage.delete_dir("x")
    storage.delete_dir("x")
    assert not storage.exists("x")
    assert storage.list() == []
    assert storage.put_dir(source, "x")


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "a//b", "a/.", "a\0b"])
def test_keys_that_leave_the_root_are_refused(storage: Storage, key: str) -> None:
    with pytest.raises(ConfigError, match="not a relative path"):
        storage.read_bytes(key)


def test_a_half_uploaded_directory_does_not_exist(s3_root: str, tmp_path: Path) -> None:
    storage = Storage.open(s3_root)
    storage.write_bytes("half/a.txt", b"one")
    assert not storage.exists("half")
    with pytest.raises(NotFoundError):
        storage.get_dir("half", tmp_path / "copy")


def test_an_unreachable_store_is_one_line(tmp_path: Path) -> None:
    storage = Storage.open(
        "s3://me:secret@bucket/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1%3A1"
    )
    with pytest.raises(NotRunningError, match="s3://") as caught:
        storage.read_bytes("y")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value) + storage.root


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="ftp"):
        Storage.open("ftp://host/x")


def test_a_full_disk_leaves_nothing_behind(source: Path, small_disk: Path) -> None:
    storage = Storage.open(str(small_disk))
    (source / "big").write_bytes(bytes(200_000))
    with pytest.raises(MachineError, match="no space left"):
        storage.put_dir(source, "x")
    assert storage.list() == []
    assert not storage.exists("x")
