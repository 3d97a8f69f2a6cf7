"""Nothing is parsed before it is verified, and what was verified is what is used."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import (
    ChangedFileError,
    ExtraFileError,
    ForbiddenFileError,
    MissingFileError,
    NewerFormatError,
    NotFoundError,
    PackageError,
    SignatureError,
    TamperedPackageError,
    UnknownKeyError,
)
from cluster.model_package import (
    LocalSigner,
    Manifest,
    ModelPackage,
    PublishedPackage,
    TrustStore,
    ensure_local_key,
    open_package,
    verify_directory,
)
from cluster.model_package import reader as reader_module
from cluster.model_package.manifest import digest_of
from cluster.storage import Storage

Open = Callable[[], ModelPackage]


@pytest.fixture
def reopen(
    published: PublishedPackage, storage: Storage, trust: TrustStore, cache_dir: Path
) -> Open:
    return lambda: open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)


def resign(package_dir: Path, keys_dir: Path, manifest: bytes) -> str:
    """What somebody with the key, but with bad intentions, could publish; its digest."""
    (package_dir / "manifest.json").write_bytes(manifest)
    (package_dir / "signature.json").unlink()
    LocalSigner(keys_dir).sign(package_dir)
    return digest_of(manifest)


def test_a_published_package_opens(
    reopen: Open, published: PublishedPackage, cache_dir: Path, trust: TrustStore
) -> None:
    package = reopen()
    assert package.manifest == published.manifest
    assert package.digest == published.digest
    assert [package.signer] == trust.fingerprints()
    assert package.path.parent == cache_dir
    assert package.graph_path.is_file()
    assert reopen() == package


def test_an_unknown_digest_is_not_found(
    storage: Storage, trust: TrustStore, cache_dir: Path
) -> None:
    for digest, error in (
        ("sha256:" + "0" * 64, NotFoundError),
        ("sha256:../../x", PackageError),
        ("md5:0", PackageError),
    ):
        with pytest.raises(error):
            open_package(digest, storage=storage, trust=trust, cache_dir=cache_dir)


def test_each_kind_of_tampering_has_its_error(reopen: Open, package_dir: Path) -> None:
    graph = package_dir / "model/model.onnx"
    original = graph.read_bytes()
    graph.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ChangedFileError, match=r"model/model\.onnx"):
        reopen()
    graph.write_bytes(original)
    (package_dir / "model/extra.json").write_text("{}")
    with pytest.raises(ExtraFileError, match=r"model/extra\.json"):
        reopen()
    (package_dir / "model/extra.json").unlink()
    (package_dir / "model/code.py").write_text("")
    with pytest.raises(ForbiddenFileError, match="no code"):
        reopen()
    (package_dir / "model/code.py").unlink()
    reopen()


def test_missing_files_have_their_error(
    package_dir: Path, trust: TrustStore, tmp_path: Path
) -> None:
    for name in ("model/model.onnx", "manifest.json"):
        copy = tmp_path / "copy"
        shutil.copytree(package_dir, copy)
        (copy / name).unlink()
        with pytest.raises(MissingFileError, match=name):
            verify_directory(copy, trust)
        shutil.rmtree(copy)


def test_an_unsigned_package_needs_to_be_allowed(
    package_dir: Path, reopen: Open, published: PublishedPackage, storage: Storage,
    trust: TrustStore, cache_dir: Path,
) -> None:  # fmt: skip
    (package_dir / "signature.json").unlink()
    with pytest.raises(SignatureError, match="not signed"):
        reopen()
    allowed = open_package(
        published.digest, storage=storage, trust=trust, cache_dir=cache_dir, allow_unsigned=True
    )
    assert allowed.signer is None
    # What was cached while it was allowed is no way in later.
    with pytest.raises(SignatureError):
        reopen()


def test_even_unsigned_files_must_be_those_of_the_manifest(
    package_dir: Path, published: PublishedPackage, storage: Storage, trust: TrustStore,
    cache_dir: Path,
) -> None:  # fmt: skip
    (package_dir / "signature.json").unlink()
    (package_dir / "model/README.md").write_text("changed")
    with pytest.raises(ChangedFileError, match=r"README\.md"):
        open_package(
            published.digest, storage=storage, trust=trust, cache_dir=cache_dir, allow_unsigned=True
        )


def test_a_strangers_package_is_refused(
    published: PublishedPackage, storage: Storage, cache_dir: Path, tmp_path: Path
) -> None:
    ensure_local_key(tmp_path / "other")
    with pytest.raises(UnknownKeyError):
        open_package(
            published.digest,
            storage=storage,
            trust=TrustStore(tmp_path / "other"),
            cache_dir=cache_dir,
        )


def test_another_package_in_its_place_is_noticed(
    publish: Callable[[], PublishedPackage], package_dir: Path, reopen: Open, keys_dir: Path
) -> None:
    manifest = json.loads((package_dir / "manifest.json").read_bytes())
    resign(package_dir, keys_dir, json.dumps({**manifest, "name": "other"}).encode())
    with pytest.raises(ChangedFileError, match="expected sha256"):
        reopen()


@pytest.mark.parametrize("kind", ["symlink", "directory link", "fifo"])
def test_links_and_devices_are_refused_before_they_are_read(
    package_dir: Path, reopen: Open, tmp_path: Path, kind: str
) -> None:
    if kind == "fifo":
        os.mkfifo(package_dir / "model/pipe.json")
    elif kind == "symlink":
        (tmp_path / "secret.json").write_text("{}")
        (package_dir / "model/link.json").symlink_to(tmp_path / "secret.json")
    else:
        (package_dir / "model/sub").symlink_to(tmp_path)
    with pytest.raises(ForbiddenFileError, match="link or a device"):
        reopen()


def test_no_parser_sees_bytes_that_are_not_verified(
    package_dir: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tampered manifest would crash a parser; the spies would notice any."""
    parsed: list[bytes] = []
    original = Manifest.from_bytes
    monkeypatch.setattr(Manifest, "from_bytes", lambda data: parsed.append(data) or original(data))
    monkeypatch.setattr(
        reader_module, "refuse_code_references", lambda *_: parsed.append(b"configuration")
    )
    (package_dir / "manifest.json").write_bytes(b"[" * 1_000_000)
    with pytest.raises(ChangedFileError, match=r"manifest\.json"):
        reopen()
    (package_dir / "signature.json").write_text("{}")
    with pytest.raises(SignatureError):
        reopen()
    assert parsed == []


def test_a_signed_manifest_may_still_be_refused(
    package_dir: Path, keys_dir: Path, trust: TrustStore
) -> None:
    values = json.loads((package_dir / "manifest.json").read_bytes())
    files = values["files"]
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    cases: list[tuple[object, type[PackageError]]] = [
        ({**values, "format_version": 2}, NewerFormatError),
        ({**values, "files": {**files, "model/../../x.json": entry}}, ForbiddenFileError),
        ({**values, "files": {**files, "model/x.json": entry}}, MissingFileError),
        ({**values, "files": {}}, ExtraFileError),
        ({**values, "files": dict.fromkeys(files, entry)}, ChangedFileError),
        ({**values, "unknown": 1}, PackageError),
        ([], PackageError),
    ]
    for manifest, error in cases:
        digest = resign(package_dir, keys_dir, json.dumps(manifest).encode())
        with pytest.raises(error):
            verify_directory(package_dir, trust, digest=digest)
    resign(package_dir, keys_dir, b'{"golden":' * 100_000)
    with pytest.raises(PackageError, match="not JSON"):
        verify_directory(package_dir, trust)


def test_a_manifest_of_many_megabytes_is_not_read(
    package_dir: Path, keys_dir: Path, trust: TrustStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(PackageError, match="bytes"):
        verify_directory(package_dir, trust)


def test_a_tampered_cache_is_dropped_and_fetched_again(
    reopen: Open, caplog: pytest.LogCaptureFixture
) -> None:
    package = reopen()
    original = package.graph_path.read_bytes()
    package.graph_path.chmod(0o644)
    package.graph_path.write_bytes(b"evil")
    with caplog.at_level(logging.WARNING):
        again = reopen()
    assert again.graph_path.read_bytes() == original
    assert "to be fetched again" in caplog.text
    assert [p.name for p in again.path.parent.iterdir()] == [again.path.name]


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling", "elsewhere"])
def test_a_cache_entry_that_is_no_directory_is_dropped_and_fetched_again(
    reopen: Open, tmp_path: Path, kind: str
) -> None:
    entry = reopen().path
    entry.rename(tmp_path / "elsewhere")
    if kind == "file":
        entry.write_text("x")
    elif kind == "pipe":
        os.mkfifo(entry)
    else:
        entry.symlink_to(tmp_path / kind)
    again = reopen()
    assert again.path == entry
    assert entry.is_dir()
    assert not entry.is_symlink()
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]
    assert (tmp_path / "elsewhere/manifest.json").exists()


def test_readers_that_start_together_share_one_copy(reopen: Open) -> None:
    with ThreadPoolExecutor(6) as pool:
        packages = list(pool.map(lambda _: reopen(), range(12)))
    assert len({package.path for package in packages}) == 1
    assert len(list(packages[0].path.parent.iterdir())) == 1


def test_a_failed_fetch_leaves_nothing_in_the_cache(
    reopen: Open, package_dir: Path, cache_dir: Path
) -> None:
    (package_dir / "model/README.md").write_text("x")
    with pytest.raises(TamperedPackageError):
        reopen()
    assert list(cache_dir.iterdir()) == []
