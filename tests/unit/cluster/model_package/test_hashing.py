"""Digests are those of the standard library, whatever a file's size."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from cluster.model_package.hashing import sha256_file, sha256_files

PIECE = 256 * 1024
SIZES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 16 * 1024**2 - 1, 33 * 1024**2 + 7)


@pytest.mark.parametrize("size", SIZES)
def test_a_files_digest_does_not_depend_on_how_it_is_read(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_each_file_gets_its_own_digest(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * number)
    assert sha256_files(paths) == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert sha256_files([]) == {}
