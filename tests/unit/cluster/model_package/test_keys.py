"""Keys are made once and kept private; who may sign is what the directory says at this moment."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cluster.errors import (
    ConflictError,
    InputError,
    MachineError,
    NotFoundError,
    RevokedKeyError,
    SignatureError,
    UnknownKeyError,
    UsageError,
)
from cluster.model_package import (
    LocalSigner,
    PublishedPackage,
    SigningKeys,
    TrustStore,
    ensure_local_key,
    open_package,
    signing,
)
from cluster.model_package.pem import read_pem
from cluster.storage import Storage


@pytest.fixture
def keys(keys_dir: Path) -> SigningKeys:
    return SigningKeys(keys_dir)


def public_key_of(directory: Path) -> bytes:
    """The PEM of somebody else's new key."""
    return (directory / f"trusted/{ensure_local_key(directory)}.pub").read_bytes()


def test_the_key_is_private_and_made_once(tmp_path: Path) -> None:
    first = ensure_local_key(tmp_path / "k")
    key = (tmp_path / "k/signing_key.pem").read_bytes()
    assert ensure_local_key(tmp_path / "k") == first
    assert (tmp_path / "k/signing_key.pem").read_bytes() == key
    assert stat.S_IMODE((tmp_path / "k/signing_key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o700
    assert TrustStore(tmp_path / "k").fingerprints() == [first]
    assert {p.name for p in (tmp_path / "k").iterdir()} == {"signing_key.pem", "trusted"}


def test_processes_that_start_together_get_the_same_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        fingerprints = pool.map(ensure_local_key, [tmp_path / "k"] * 8)
    assert len(set(fingerprints)) == 1
    assert TrustStore(tmp_path / "k").fingerprints() == [fingerprints[0]]


def test_a_lost_public_key_is_written_again(keys_dir: Path) -> None:
    (fingerprint,) = TrustStore(keys_dir).fingerprints()
    (keys_dir / f"trusted/{fingerprint}.pub").unlink()
    assert ensure_local_key(keys_dir) == fingerprint
    assert TrustStore(keys_dir).fingerprints() == [fingerprint]


def test_a_revoked_key_is_refused_with_its_reason(
    published: PublishedPackage, storage: Storage, keys: SigningKeys, trust: TrustStore,
    cache_dir: Path, tmp_path: Path,
) -> None:  # fmt: skip
    def reopen(cache: Path) -> None:
        open_package(published.digest, storage=storage, trust=trust, cache_dir=cache)

    reopen(cache_dir)
    (fingerprint,) = trust.fingerprints()
    keys.revoke(fingerprint, reason="stolen\nlaptop")
    keys.revoke(fingerprint, reason="said again")
    for cache in (cache_dir, tmp_path / "fresh"):
        with pytest.raises(RevokedKeyError, match="stolen laptop") as caught:
            reopen(cache)
        assert fingerprint in str(caught.value)
        assert "\n" not in str(caught.value)
    assert trust.fingerprints() == []
    assert [(key.state, key.is_local) for key in keys.known()] == [("revoked", True)]


def test_revocation_is_for_ever(keys: SigningKeys, keys_dir: Path) -> None:
    (key,) = keys.known()
    pem = (keys_dir / f"trusted/{key.fingerprint}.pub").read_bytes()
    keys.revoke(key.fingerprint, reason="lost")
    with pytest.raises(ConflictError, match="lost"):
        keys.trust(pem)
    ensure_local_key(keys_dir)
    with pytest.raises(RevokedKeyError, match="keys rotate"):
        LocalSigner(keys_dir)
    (keys_dir / f"trusted/{key.fingerprint}.revoked").write_bytes(b"\xff")
    with pytest.raises(RevokedKeyError):
        keys.public_key(key.fingerprint)


def test_a_key_can_be_revoked_before_anybody_trusted_it(keys: SigningKeys, tmp_path: Path) -> None:
    pem = public_key_of(tmp_path / "other")
    fingerprint = SigningKeys(tmp_path / "other").local()
    with pytest.raises(UnknownKeyError):
        keys.public_key(fingerprint)
    keys.revoke(keys.find(fingerprint), reason="")
    with pytest.raises(RevokedKeyError):
        keys.public_key(fingerprint)
    with pytest.raises(ConflictError):
        keys.trust(pem)


def test_a_new_key_leaves_old_signatures_good_until_the_old_one_is_revoked(
    published: PublishedPackage, storage: Storage, keys: SigningKeys, keys_dir: Path,
    trust: TrustStore, cache_dir: Path, tmp_path: Path,
) -> None:  # fmt: skip
    old = keys.local()
    secret = keys.private_key.read_bytes()
    new = keys.rotate_local()
    assert LocalSigner(keys_dir).fingerprint == new != old
    assert keys.private_key.read_bytes() != secret
    assert stat.S_IMODE(keys.private_key.stat().st_mode) == 0o600
    assert trust.fingerprints() == sorted([old, new])
    opened = open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)
    assert opened.signer == old
    keys.revoke(old, reason="done")
    with pytest.raises(RevokedKeyError):
        open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)
    signed = tmp_path / "signed"
    signed.mkdir()
    (signed / "a.json").write_text("1")
    LocalSigner(keys_dir).sign(signed)
    assert trust.verify(signed).fingerprint == new


def test_a_rotation_that_was_killed_leaves_no_private_key_for_long(
    keys: SigningKeys, keys_dir: Path
) -> None:
    old, new = keys_dir / ".new-old", keys_dir / ".new-new"
    for path in (old, new):
        path.write_text("private")
    os.utime(old, (1, 1))
    keys.rotate_local()
    assert not old.exists()
    assert new.exists(), "another process may be about to use it"


def test_a_signer_looks_at_its_key_each_time(
    keys: SigningKeys, keys_dir: Path, tmp_path: Path
) -> None:
    signer, directory = LocalSigner(keys_dir), tmp_path / "signed"
    directory.mkdir()
    (directory / "a.json").write_text("1")
    assert signer.fingerprint == keys.local()
    keys.revoke(keys.local(), reason="stolen meanwhile")
    with pytest.raises(RevokedKeyError, match="stolen meanwhile"):
        signer.sign(directory)
    assert [path.name for path in directory.iterdir()] == ["a.json"]
    new = keys.rotate_local()
    signer.sign(directory)
    assert signer.fingerprint == new == TrustStore(keys_dir).verify(directory).fingerprint


def test_a_key_that_is_revoked_while_files_are_hashed_signs_nothing(
    keys: SigningKeys, keys_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = signing._hashed

    def revoked_meanwhile(*arguments: Any) -> Any:
        keys.revoke(keys.local(), reason="stolen meanwhile")
        return hashed(*arguments)

    (tmp_path / "signed").mkdir()
    monkeypatch.setattr(signing, "_hashed", revoked_meanwhile)
    with pytest.raises(RevokedKeyError, match="stolen meanwhile"):
        LocalSigner(keys_dir).sign(tmp_path / "signed")


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())]
)
def test_only_a_key_of_the_right_kind_signs(
    tmp_path: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "signing_key.pem").write_bytes(pem)
    for act in (lambda: ensure_local_key(tmp_path), lambda: LocalSigner(tmp_path)):
        with pytest.raises(SignatureError, match="EC P-256") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "trusted").glob("*.pub"))


def test_a_broken_key_of_ones_own_hides_no_other(keys: SigningKeys, keys_dir: Path) -> None:
    (key,) = keys.known()
    keys.private_key.write_text("broken")
    (found,) = keys.known()
    assert (found.fingerprint, found.is_local) == (key.fingerprint, False)
    keys.revoke(keys.find(key.fingerprint[:8]), reason="lost")
    keys.rotate_local()
    assert [(key.state, key.is_local) for key in keys.known()] == [
        ("trusted", True),
        ("revoked", False),
    ]


def test_a_pipe_is_no_key(keys: SigningKeys, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no plain file"):
        read_pem(tmp_path / "pipe")
    keys.private_key.unlink()
    os.mkfifo(keys.private_key)
    with pytest.raises(SignatureError, match="cannot be read"):
        keys.local()


def test_a_strangers_key_can_be_trusted(keys: SigningKeys, tmp_path: Path) -> None:
    pem = public_key_of(tmp_path / "other")
    other = SigningKeys(tmp_path / "other").local()
    # However it was copied, it is the same key.
    assert keys.trust(pem.replace(b"\n", b"\r\n")) == other
    assert keys.public_key(other).read_bytes() == pem


def test_only_public_keys_of_the_right_kind_can_be_trusted(
    keys: SigningKeys, keys_dir: Path
) -> None:
    def pem(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
        return key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    for wrong, message in (
        ((keys_dir / "signing_key.pem").read_bytes(), "private key"),
        (pem(ec.generate_private_key(ec.SECP384R1()).public_key()), "EC P-256"),
        (pem(rsa.generate_private_key(65537, 2048).public_key()), "EC P-256"),
        (b"", "EC P-256"),
    ):
        with pytest.raises(InputError, match=message):
            keys.trust(wrong)


def test_a_key_is_found_by_its_first_digits(keys: SigningKeys) -> None:
    (key,) = keys.known()
    assert keys.find(key.fingerprint[:8]) == key.fingerprint
    for wrong, error in (
        (key.fingerprint[:7], UsageError),
        ("../../etc/passwd", UsageError),
        ("0" * 8, NotFoundError),
    ):
        with pytest.raises(error):
            keys.find(wrong)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/trusted").write_text("a file")
    keys = SigningKeys(tmp_path / "keys")
    for act in (keys.ensure_local, keys.rotate_local, lambda: keys.revoke("0" * 64, reason="")):
        with pytest.raises(MachineError, match="HELIOSTAT_HOME"):
            act()
