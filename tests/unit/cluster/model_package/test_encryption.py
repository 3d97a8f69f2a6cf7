"""Encrypted at rest: the same package, nothing of it in storage, and no file in another's place."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cluster.errors import (
    ChangedFileError,
    ConflictError,
    DecryptionError,
    ForbiddenFileError,
    NotRunningError,
    PackageError,
)
from cluster.model_package import (
    Keyset,
    LocalSigner,
    ModelPackage,
    PublishedPackage,
    TrustStore,
    open_package,
    write_package,
)
from cluster.model_package import stored as stored_module
from cluster.model_package.encryption import bound_to
from cluster.rekeying import Rekeyed, rekey
from cluster.storage import Storage

Open = Callable[..., ModelPackage]


@pytest.fixture
def keyset(keys_dir: Path) -> Keyset:
    keyset = Keyset(keys_dir / "encryption_keyset.json")
    keyset.ensure()
    return keyset


@pytest.fixture
def seal(graph_dir: Path, storage: Storage, keys_dir: Path, keyset: Keyset) -> Callable[..., Any]:
    def write(**options: Any) -> PublishedPackage:
        values = {"storage": storage, "keyset": keyset, **options}
        signer = LocalSigner(keys_dir)
        return write_package(graph_dir, name="linear", kind="graph", signer=signer, **values)

    return write


@pytest.fixture
def sealed(seal: Callable[..., PublishedPackage]) -> PublishedPackage:
    return seal()


@pytest.fixture
def reopen(storage: Storage, trust: TrustStore, keyset: Keyset, tmp_path: Path) -> Open:
    def read(published: PublishedPackage, keys: Keyset | None = keyset) -> ModelPackage:
        """Without a cache, so that it comes from storage."""
        cache = tmp_path / "cold"
        shutil.rmtree(cache, ignore_errors=True)
        return open_package(
            published.digest, storage=storage, trust=trust, cache_dir=cache, keyset=keys
        )

    return read


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_what_lies_in_storage_tells_nothing(
    sealed: PublishedPackage, graph_dir: Path, reopen: Open
) -> None:
    stored = files_below(Path(sealed.location))
    assert {name for name in stored if not name.endswith(".aead")} == {"encryption.json"}
    assert all(
        secret not in data
        for data in stored.values()
        for secret in (b"MatMul", b"# Linear", b'format_version":1,"golden', b"dsseEnvelope")
    )
    package = reopen(sealed)
    assert package.manifest == sealed.manifest
    assert package.graph_path.read_bytes() == (graph_dir / "model.onnx").read_bytes()


def decrypt_as_a_stranger(sealed: bytes, keyset: dict[str, Any], bound: bytes) -> bytes:
    """FORMAT.md section 7 with nothing but HKDF and AES-GCM."""
    (key,) = keyset["key"]
    # Protocol buffer: version 0 is left out; field 2 (parameters), then field 3, of 32 bytes.
    material = base64.b64decode(key["keyData"]["value"])[-32:]
    length, salt, prefix = sealed[0], sealed[1:33], sealed[33:40]
    assert length == 40
    derived = HKDF(hashes.SHA256(), 32, salt, bound).derive(material)
    plain, start, number = b"", length, 0
    while True:
        end = min((number + 1) * 1024**2, len(sealed))
        is_last = end == len(sealed)
        nonce = prefix + number.to_bytes(4, "big") + bytes([is_last])
        plain += AESGCM(derived).decrypt(nonce, sealed[start:end], b"")
        if is_last:
            return plain
        start, number = end, number + 1


@pytest.mark.parametrize("size", [0, 1, 1024**2 - 56, 1024**2 - 55, 2_500_000])
def test_the_specification_is_enough_to_decrypt(size: int, keyset: Keyset) -> None:
    plain, sealed = random.Random(size).randbytes(size), io.BytesIO()
    bound = bound_to("sha256:" + "1" * 64, "model/model.onnx")
    with keyset.open().encrypting(sealed, bound) as stream:
        stream.write(plain)
    values = json.loads(keyset.path.read_text())
    assert bound == b"heliostat model package\nsha256:" + b"1" * 64 + b"\nmodel/model.onnx"
    assert decrypt_as_a_stranger(sealed.getvalue(), values, bound) == plain


def test_the_keyset_is_private_and_made_once(keyset: Keyset) -> None:
    before = keyset.path.read_bytes()
    keyset.ensure()
    assert keyset.path.read_bytes() == before
    assert stat.S_IMODE(keyset.path.stat().st_mode) == 0o600


def test_an_empty_file_and_one_of_several_segments_come_back(
    llama_dir: Path, storage: Storage, keyset: Keyset, tmp_path: Path
) -> None:
    directory = tmp_path / "package"
    (directory / "model").mkdir(parents=True)
    contents = {"model/empty.txt": b"", "model/large.data": bytes(range(256)) * 10_000}
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    digest = "sha256:" + "1" * 64
    stored_module.publish(directory, digest, storage, keyset)
    stored_module.fetch(digest, storage, tmp_path / "fetched", keyset)
    assert files_below(tmp_path / "fetched") == contents


def test_without_the_right_key_there_is_one_line(
    sealed: PublishedPackage, reopen: Open, keyset: Keyset, tmp_path: Path
) -> None:
    other = Keyset(tmp_path / "other.json")
    for wrong in (None, other):
        with pytest.raises(DecryptionError, match="no keyset"):
            reopen(sealed, wrong)
    other.ensure()
    with pytest.raises(DecryptionError, match="does not hold"):
        reopen(sealed, other)
    secret = json.loads(keyset.path.read_text())["key"][0]["keyData"]["value"]
    for text in ("", "{}", '{"primaryKeyId": 1, "key": []}', f'{{"key": "{secret}"}}'):
        other.path.write_text(text)
        with pytest.raises(DecryptionError) as caught:
            reopen(sealed, other)
        assert "\n" not in str(caught.value)
        assert secret not in str(caught.value)
    reopen(sealed)


def test_a_writer_without_a_keyset_publishes_nothing(
    seal: Callable[..., PublishedPackage], storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(NotRunningError, match="heliostat up"):
        seal(keyset=Keyset(tmp_path / "none.json"))
    assert storage.list() == []


def test_no_file_stands_for_another(
    sealed: PublishedPackage, seal: Callable[..., PublishedPackage], reopen: Open
) -> None:
    """Of the same package, of another one, or cut short."""
    place, other = Path(sealed.location), Path(seal().location)
    graph, readme = place / "model/model.onnx.aead", place / "model/README.md.aead"
    genuine = graph.read_bytes()
    for replacement in (
        readme.read_bytes(),
        (other / "model/model.onnx.aead").read_bytes(),
        genuine[:-1],
        genuine[:40],
        b"",
        genuine + b"x",
        bytes([genuine[0] ^ 1]) + genuine[1:],
    ):
        graph.write_bytes(replacement)
        with pytest.raises(ChangedFileError, match=r"model/model\.onnx"):
            reopen(sealed)
    graph.write_bytes(genuine)
    reopen(sealed)


def test_files_that_may_not_be_in_a_package_are_not_decrypted_either(
    sealed: PublishedPackage, reopen: Open
) -> None:
    place = Path(sealed.location)
    shutil.copyfile(place / "model/model.onnx.aead", place / "model/code.py.aead")
    with pytest.raises(ForbiddenFileError):
        reopen(sealed)
    (place / "model/code.py.aead").unlink()
    (place / "model/README.md.aead").unlink()
    (place / "model/README.md.aead").symlink_to(place / "model/model.onnx.aead")
    with pytest.raises(ForbiddenFileError, match="link"):
        reopen(sealed)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"format_version": 2}',
     '{"algorithm": "ROT13", "format_version": 1, "key_id": 1}',
     '{"algorithm": "AES256_GCM_HKDF_1MB", "format_version": 1, "key_id": "1"}',
     '{"algorithm": "AES256_GCM_HKDF_1MB", "format_version": true, "key_id": 1}',
     '{"algorithm": "AES256_GCM_HKDF_1MB", "format_version": 1, "key_id": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_a_broken_note_of_the_encryption_is_one_line(
    sealed: PublishedPackage, reopen: Open, text: str
) -> None:
    (Path(sealed.location) / "encryption.json").write_text(text)
    with pytest.raises(PackageError) as caught:
        reopen(sealed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("is_left", [[], ["model/README.md"]])
def test_without_the_note_of_its_key_a_package_is_left_as_it_is(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open,
    is_left: list[str],
) -> None:  # fmt: skip
    packages = [seal(), seal()]
    place = Path(packages[0].location)
    note = (place / "encryption.json").read_bytes()
    (place / "encryption.json").unlink()
    for name in is_left:
        (place / name).write_text("plain")
    before, ids = files_below(place), keyset.open().ids
    for _ in range(3):
        with pytest.raises(PackageError, match=r"1 of 1 .* its encryption\.json is missing"):
            rekey(storage, keyset, say=lambda _: None)
    assert files_below(place) == before
    assert keyset.open().ids == ids
    with pytest.raises(DecryptionError, match=r"its encryption\.json is missing"):
        reopen(packages[0])
    for name in is_left:
        (place / name).unlink()
    (place / "encryption.json").write_bytes(note)
    assert rekey(storage, keyset, say=lambda _: None).num_packages == 2
    assert reopen(packages[0]).digest == packages[0].digest


def test_a_file_that_is_a_directory_too_is_one_line(sealed: PublishedPackage, reopen: Open) -> None:
    graph = Path(sealed.location) / "model/model.onnx.aead"
    (graph.parent / "model.onnx").mkdir()
    shutil.copyfile(graph, graph.parent / "model.onnx/z.json.aead")
    with pytest.raises(ForbiddenFileError, match="is a file and a directory"):
        reopen(sealed)


def test_packages_in_an_object_store_are_encrypted_too(
    s3_root: str, seal: Callable[..., PublishedPackage], keyset: Keyset, trust: TrustStore,
    cache_dir: Path,
) -> None:  # fmt: skip
    storage = Storage.open(s3_root)
    sealed = seal(storage=storage)
    rekey(storage, keyset, say=lambda _: None)
    package = open_package(
        sealed.digest, storage=storage, trust=trust, cache_dir=cache_dir, keyset=keyset
    )
    assert package.manifest == sealed.manifest


def test_rekeying_changes_every_stored_byte_and_no_identity(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open
) -> None:
    packages = [seal(), seal(keyset=None), seal()]
    first, before = keyset.open(), files_below(Path(packages[0].location))
    # A plain package is unfinished work: no new key is needed to do it.
    assert rekey(storage, keyset, say=lambda _: None) == Rekeyed(first.primary_id, False, 1)
    done = rekey(storage, keyset, say=lambda _: None)
    assert (done.is_new, done.num_packages) == (True, 3)
    assert keyset.open().primary_id == done.key_id != first.primary_id
    after = files_below(Path(packages[0].location))
    assert after.keys() == before.keys()
    assert not any(after[name] == before[name] for name in before)
    for published in packages:
        assert reopen(published).digest == published.digest
        assert not list(Path(published.location).rglob("*.onnx"))
    # The last key stays for what is being written now; the one before it goes.
    assert keyset.open().ids == {first.primary_id, done.key_id}
    again = rekey(storage, keyset, say=lambda _: None)
    assert keyset.open().ids == {done.key_id, again.key_id}


def test_an_interrupted_rekeying_leaves_all_readable_and_goes_on(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    packages = [seal(), seal(keyset=None)]
    writes_left = 0

    def interrupting(original: Callable[..., None]) -> Callable[..., None]:
        def write(*arguments: Any) -> None:
            nonlocal writes_left
            writes_left -= 1
            if writes_left == 0:
                raise KeyboardInterrupt
            original(*arguments)

        return write

    for method in ("put_file", "write_bytes", "delete_file"):
        monkeypatch.setattr(Storage, method, interrupting(getattr(Storage, method)))
    interrupted = 0
    for number in range(1, 14):
        writes_left = number
        try:
            rekey(storage, keyset, say=lambda _: None)
        except KeyboardInterrupt:
            interrupted += 1
            for published in packages:
                assert reopen(published).digest == published.digest
    assert interrupted > 5
    assert all(not list(Path(p.location).rglob("*.onnx")) for p in packages)


def test_what_a_killed_rekeying_left_plain_is_removed_by_the_next(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed when the first was encrypted, and its plain files were not yet removed."""
    packages = sorted((seal(keyset=None) for _ in range(3)), key=lambda made: made.digest)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rekey(storage, keyset, say=lambda _: None)
    first = Path(packages[0].location)
    assert (first / "encryption.json").exists()
    assert (first / "model/model.onnx").exists()
    assert rekey(storage, keyset, say=lambda _: None).num_packages == 3
    assert not [path for made in packages for path in Path(made.location).rglob("*.onnx")]
    assert all(reopen(made).digest == made.digest for made in packages)


def test_the_keys_of_packages_that_are_not_there_are_kept(
    sealed: PublishedPackage, storage: Storage, keyset: Keyset, reopen: Open, tmp_path: Path
) -> None:
    """Their disk is not mounted, and somebody rekeys what is in its place: nothing."""
    said: list[str] = []
    Path(sealed.location).rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert rekey(storage, keyset, listed={sealed.digest}, say=said.append).num_packages == 0
    assert said == ["1 registered packages are not in storage: all their keys are kept"] * 3
    (tmp_path / "elsewhere").rename(sealed.location)
    assert reopen(sealed).manifest == sealed.manifest
    assert rekey(storage, keyset, listed={sealed.digest}, say=said.append).num_packages == 1


class Failing(io.BytesIO):
    """A stream on a disk that fills up, or of a server that goes away, or at which Ctrl-C hits."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 1024**2:
            raise self.error
        return super().read(size)

    def write(self, data: Any) -> int:
        if self.tell() > 1024**2:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "no space"), NotRunningError("the server is gone"), KeyboardInterrupt()],
    ids=["full", "gone", "stopped"],
)
def test_what_goes_wrong_beside_the_encryption_is_not_taken_for_a_changed_file(
    keyset: Keyset, error: BaseException
) -> None:
    """Nobody is to delete a good package because a disk was full."""
    keys, plain, sealed = keyset.open(), random.Random(1).randbytes(3_000_000), io.BytesIO()
    with pytest.raises(type(error)), keys.encrypting(Failing(b"", error), b"") as stream:
        stream.write(plain)
    with keys.encrypting(sealed, b"") as stream:
        stream.write(plain)
    with pytest.raises(type(error)):
        keys.decrypt(Failing(sealed.getvalue(), error), io.BytesIO(), b"", name="x")
    sealed.seek(0)
    with pytest.raises(type(error)), keys.encrypting(Failing(b"", error), b"") as again:
        keys.decrypt(sealed, again, b"", name="x")
    sealed.seek(0)
    keys.decrypt(sealed, back := io.BytesIO(), b"", name="x")
    assert back.getvalue() == plain


def test_a_damaged_package_does_not_hold_up_the_others(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open
) -> None:
    packages = [seal(), seal()]
    damaged = Path(packages[0].location) / "model/model.onnx.aead"
    damaged.write_bytes(b"x" * 100)
    with pytest.raises(PackageError, match="1 of 2 packages"):
        rekey(storage, keyset, say=lambda _: None)
    assert reopen(packages[1]).digest == packages[1].digest
    primary = keyset.open().primary_id
    shutil.rmtree(packages[0].location)
    assert rekey(storage, keyset, say=lambda _: None).is_new
    assert primary != keyset.open().primary_id


def test_a_broken_note_of_the_key_is_written_anew(
    sealed: PublishedPackage, storage: Storage, keyset: Keyset, reopen: Open
) -> None:
    (Path(sealed.location) / "encryption.json").write_text("?")
    assert rekey(storage, keyset, say=lambda _: None).num_packages == 1
    assert reopen(sealed).manifest == sealed.manifest


def test_two_rekeyings_do_not_run_at_once(
    sealed: PublishedPackage, storage: Storage, keyset: Keyset
) -> None:
    def meanwhile(_: str) -> None:
        with pytest.raises(ConflictError, match="another process"):
            rekey(storage, keyset, say=lambda _: None)

    assert rekey(storage, keyset, say=meanwhile).num_packages == 1


def test_what_is_encrypted_while_it_is_fetched_arrives(
    seal: Callable[..., PublishedPackage], storage: Storage, keyset: Keyset, reopen: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = seal(keyset=None)
    copy = Storage.get_dir

    def copy_slowly(self: Storage, key: str, local: Path) -> None:
        stored_module.reencrypt(plain.digest, storage, keyset.open())
        copy(self, key, local)

    monkeypatch.setattr(Storage, "get_dir", copy_slowly)
    assert reopen(plain).manifest == plain.manifest


def test_keys_do_not_show_their_secrets(keyset: Keyset) -> None:
    secret = json.loads(keyset.path.read_text())["key"][0]["keyData"]["value"]
    keys = keyset.open()
    assert secret not in repr(keys)
    assert secret not in repr(dataclasses.asdict(dataclasses.replace(keys, _primitive=None)))
