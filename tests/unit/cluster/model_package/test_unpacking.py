"""A verified package's model comes out as plain files, whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cluster.errors import InputError, MachineError
from cluster.model_package import ModelPackage, PublishedPackage, TrustStore, open_package
from cluster.model_package.unpacking import unpack
from cluster.storage import Storage


@pytest.fixture
def package(
    published: PublishedPackage, storage: Storage, trust: TrustStore, cache_dir: Path
) -> ModelPackage:
    return open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)


@pytest.mark.parametrize("exists", [True, False])
def test_the_models_files_come_out_as_they_went_in(
    package: ModelPackage, graph_dir: Path, tmp_path: Path, exists: bool
) -> None:
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    unpack(package, target)
    for path in graph_dir.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
        # The cache's copies are read-only; these are the user's own.
        (target / path.name).write_bytes(b"mine")
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_what_is_there_already_stays(package: ModelPackage, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "full":
        target.mkdir()
        (target / "mine").touch()
    elif kind == "file":
        target.write_text("mine")
    else:
        (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="not an empty directory"):
        unpack(package, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_half_written_is_left(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.model_package.unpacking.copy_files", fails)
    (tmp_path / "place").mkdir()
    with pytest.raises(MachineError, match="No space left"):
        unpack(package, tmp_path / "place" / "out")
    assert not list((tmp_path / "place").iterdir())


def test_a_mount_point_is_left_with_the_way_round(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(InputError, match="is a mount point") as caught:
        unpack(package, tmp_path / "out")
    assert f"{tmp_path}/out/model" in str(caught.value.hint)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_of_its_own_takes_a_directory_in_it(package: ModelPackage, small_disk: Path) -> None:
    if small_disk.is_mount():
        with pytest.raises(InputError, match="is a mount point"):
            unpack(package, small_disk)
    unpack(package, small_disk / "model")
    assert (small_disk / "model/model.onnx").is_file()


def test_the_cache_is_no_place_for_an_export(
    package: ModelPackage, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(cache_dir)
    before = sorted(cache_dir.rglob("*"))
    for target in (cache_dir / "out", package.path / "out", tmp_path / "link/out"):
        with pytest.raises(InputError, match="lies in the package cache"):
            unpack(package, target)
    assert sorted(cache_dir.rglob("*")) == before
