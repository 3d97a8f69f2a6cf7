"""The same promises hold in a folder and in an object store."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import pytest

from cluster.errors import ConfigError, MachineError, NotFoundError, NotRunningError
from cluster.storage import Storage, open_filesystem


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


def test_what_does_not_fit_where_it_is_fetched_to_is_no_fault_of_storage(
    storage: Storage, source: Path, small_disk: Path
) -> None:
    (source / "big").write_bytes(bytes(200_000))
    storage.put_dir(source, "x")
    with pytest.raises(MachineError, match=rf"no space left on the disk of {small_disk}/copy"):
        storage.get_dir("x", small_disk / "copy")


def test_a_full_disk_leaves_nothing_behind(source: Path, small_disk: Path) -> None:
    storage = Storage.open(str(small_disk))
    (source / "big").write_bytes(bytes(200_000))
    with pytest.raises(MachineError, match="no space left"):
        storage.put_dir(source, "x")
    assert storage.list() == []
    assert not storage.exists("x")


@pytest.mark.parametrize(
    "root",
    [
        "s3://me:sec/ret@bucket/x",
        "s3://me:secret@buc ket/x",
        "s3://me:secret%zz@bucket/x",
        "s3://me:secret@bucket:99999999/x",
        "S3://me:secret@bucket/x",
        "https://me:secret@bucket/x",
        "s3:/me:secret@bucket/x",
        "s3://me:secret@",
    ],
)
def test_a_root_that_cannot_be_opened_does_not_show_its_credentials(root: str) -> None:
    """The keys of AWS often hold a slash, which a URL does not take as it is."""
    with pytest.raises(ConfigError, match=r"expected a folder, s3://BUCKET") as caught:
        Storage.open(root)
    assert "sec" not in str(caught.value)
    if "://" in root and not root.endswith("@"):
        with pytest.raises(ConfigError) as caught:
            open_filesystem(root)
        assert "sec" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_named(s3_root: str) -> None:
    Storage.open(s3_root).require_root()
    missing = Storage.open(s3_root.replace("@bucket/", "@bucke/"))
    assert missing.list() == []
    with pytest.raises(
        NotRunningError, match=r"bucket 'bucke' of storage s3://bucke/root does not"
    ):
        missing.require_root()


def test_a_file_that_is_replaced_is_the_old_or_the_new_one(
    storage: Storage, tmp_path: Path
) -> None:
    """Stopped at any moment, as by Ctrl-C."""

    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    new, old = tmp_path / "new", os.urandom(6 * 1024**2)
    new.write_bytes(bytes(20 * 1024**2))
    before = signal.signal(signal.SIGALRM, stop)
    stopped = 0
    try:
        for milliseconds in (1, 4, 16):
            storage.write_bytes("file", old)
            try:
                signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
                storage.put_file(new, "file")
            except Stopped:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert storage.read_bytes("file") in (old, new.read_bytes())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stopped


def test_lines_are_read_a_block_at_a_time_and_no_longer_than_allowed(storage: Storage) -> None:
    long = b"x" * 600_000
    storage.write_bytes("a", b"\n".join([b"first", b"", long, b"y" * 1000, b"last\r"]))
    assert list(storage.lines("a", max_bytes=10**6)) == [
        b"first",
        b"",
        long,
        b"y" * 1000,
        b"last\r",
    ]
    assert list(storage.lines("a", max_bytes=1000)) == [
        b"first", b"", b"x" * 1001, b"y" * 1000, b"last\r",
    ]  # fmt: skip
    storage.write_bytes("a", b"ends\n")
    assert list(storage.lines("a", max_bytes=10)) == [b"ends"]
