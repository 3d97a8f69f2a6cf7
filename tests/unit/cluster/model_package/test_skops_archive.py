"""A skops file that would fill the memory is refused before anything in it is loaded."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import skops.io
from sklearn.linear_model import LinearRegression

from cluster.errors import PackageError
from cluster.model_package import skops_archive
from cluster.model_package.skops_archive import check_archive

MIB = 1024**2


def array(size: int) -> bytes:
    """A .npy file with `size` zero bytes."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(size, np.uint8))
    return stream.getvalue()


def sparse(size: int) -> bytes:
    stream = io.BytesIO()
    scipy.sparse.save_npz(stream, scipy.sparse.csr_array((1, size), dtype=np.uint8))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", array(size))
    return stream.getvalue()


def pack(
    path: Path, schema: Any = (), method: int = zipfile.ZIP_DEFLATED, **members: bytes
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("schema.json", json.dumps(schema))
    return path


def understate(path: Path, size: int) -> Path:
    """Every member says that it has 100 bytes in place of `size`."""
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", 100)))
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_skops_writes_is_let_through(tmp_path: Path, compression: int) -> None:
    value = [LinearRegression().fit(np.eye(3), [1, 2, 3]), scipy.sparse.eye_array(1000).tocsr()]
    skops.io.dump(value, tmp_path / "m.skops", compression=compression)
    check_archive(tmp_path / "m.skops")


def test_what_grows_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skops_archive, "_ALWAYS_BYTES", 4 * MIB)
    check_archive(pack(tmp_path / "zeros", a=array(3 * MIB)))
    twice = [{"file": "a", "__id__": 1}, {"x": {"file": "a", "__id__": 2}}]
    for path in (
        pack(tmp_path / "one", a=array(5 * MIB)),
        pack(tmp_path / "sum", a=array(3 * MIB), b=array(3 * MIB)),
        pack(tmp_path / "sparse", a=sparse(5 * MIB)),
        pack(tmp_path / "twice", twice, a=array(3 * MIB)),
    ):
        with pytest.raises(PackageError, match="when it is unpacked"):
            check_archive(path)
    monkeypatch.setattr(skops_archive, "_MAX_SCHEMA_BYTES", MIB)
    with pytest.raises(PackageError, match=r"'schema\.json' has more than"):
        check_archive(pack(tmp_path / "schema", "x" * 2 * MIB))


def test_sizes_are_those_of_the_data(tmp_path: Path) -> None:
    size = len(array(5 * MIB))
    for path in (
        understate(pack(tmp_path / "packed", a=array(5 * MIB)), size),
        pack(tmp_path / "more", a=array(10) + b"x"),
        pack(tmp_path / "less", a=array(10)[:-1]),
    ):
        with pytest.raises((PackageError, zipfile.BadZipFile)):
            check_archive(path)
    with pytest.raises(ValueError, match="not packed with deflate"):
        check_archive(pack(tmp_path / "bz2", method=zipfile.ZIP_BZIP2, a=array(10)))
