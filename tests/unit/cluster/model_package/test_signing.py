"""Signatures hold for exactly the files that were signed, whoever made them."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.errors import (
    ChangedFileError,
    ExtraFileError,
    MissingFileError,
    NotRunningError,
    SignatureError,
    UnknownKeyError,
)
from cluster.model_package import LocalSigner, Signer, SigningKeys, TrustStore, ensure_local_key


@pytest.fixture
def signed(tmp_path: Path, keys_dir: Path) -> Path:
    directory = tmp_path / "signed"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.json").write_text("1")
    (directory / "sub/b.json").write_text("2")
    LocalSigner(keys_dir).sign(directory)
    return directory


def test_without_a_key_the_signer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="heliostat up"):
        LocalSigner(tmp_path)


def test_a_signature_names_its_key_and_every_file(signed: Path, trust: TrustStore) -> None:
    verified = trust.verify(signed)
    assert [verified.fingerprint] == trust.fingerprints()
    assert sorted(verified.digests) == ["a.json", "sub/b.json"]


def test_each_kind_of_tampering_has_its_error(signed: Path, trust: TrustStore) -> None:
    (signed / "extra.json").write_text("3")
    with pytest.raises(ExtraFileError, match=r"extra\.json"):
        trust.verify(signed)
    (signed / "extra.json").unlink()
    (signed / "a.json").write_text("9")
    with pytest.raises(ChangedFileError, match=r"a\.json"):
        trust.verify(signed)
    (signed / "a.json").unlink()
    with pytest.raises(MissingFileError, match=r"a\.json"):
        trust.verify(signed)
    (signed / "signature.json").unlink()
    with pytest.raises(SignatureError, match="not signed"):
        trust.verify(signed)


def test_git_files_are_not_overlooked(signed: Path, trust: TrustStore) -> None:
    (signed / ".gitattributes").write_text("x")
    with pytest.raises(ExtraFileError):
        trust.verify(signed)


def test_a_strangers_key_is_not_trusted(signed: Path, tmp_path: Path) -> None:
    ensure_local_key(tmp_path / "other")
    with pytest.raises(UnknownKeyError, match="not trusted here"):
        TrustStore(tmp_path / "other").verify(signed)


def test_a_stranger_cannot_sign_in_our_name(
    signed: Path, trust: TrustStore, tmp_path: Path
) -> None:
    ours = json.loads((signed / "signature.json").read_text())["verificationMaterial"]
    ensure_local_key(tmp_path / "other")
    (signed / "signature.json").unlink()
    LocalSigner(tmp_path / "other").sign(signed)
    forged = json.loads((signed / "signature.json").read_text())
    (signed / "signature.json").write_text(json.dumps({**forged, "verificationMaterial": ours}))
    with pytest.raises(SignatureError, match="does not verify"):
        trust.verify(signed)


def test_a_signature_cannot_narrow_what_is_looked_at(
    signed: Path, trust: TrustStore, keys_dir: Path
) -> None:
    from model_signing import hashing, signing

    (signed / "signature.json").unlink()
    narrow = hashing.Config().set_ignored_paths(paths=["signature.json", "a.json"])
    config = signing.Config().use_elliptic_key_signer(private_key=keys_dir / "signing_key.pem")
    config.set_hashing_config(narrow).sign(signed, signed / "signature.json")
    with pytest.raises(ExtraFileError, match=r"a\.json"):
        trust.verify(signed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"verificationMaterial": {"publicKey": {"hint": "../../x"}}}',
        '{"verificationMaterial": {"publicKey": {"hint": 7}}}',
        '{"verificationMaterial": []}',
    ],
)
def test_a_broken_signature_file_is_one_line(signed: Path, trust: TrustStore, text: str) -> None:
    (signed / "signature.json").write_text(text)
    with pytest.raises(SignatureError) as caught:
        trust.verify(signed)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_signatures_does_not_verify(signed: Path, trust: TrustStore) -> None:
    bundle = json.loads((signed / "signature.json").read_text())
    bundle["dsseEnvelope"]["signatures"] = []
    (signed / "signature.json").write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match="does not verify"):
        trust.verify(signed)


class RemoteSigner:
    """Signs as a KMS does: the private key never leaves it, and no file holds it."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.public = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.fingerprint = hashlib.sha256(self.public).hexdigest()

    def sign(self, directory: Path) -> None:
        digests = {
            path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        root = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in sorted(digests)))
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": "package", "digest": {"sha256": root.hexdigest()}}],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": ["signature.json"],
                },
                "resources": [
                    {"name": name, "algorithm": "sha256", "digest": digests[name]}
                    for name in sorted(digests)
                ],
            },
        }
        payload = json.dumps(statement).encode()
        signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
        signature = self._key.sign(signed, ec.ECDSA(hashes.SHA256()))
        bundle = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": self.fingerprint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": "application/vnd.in-toto+json",
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
        (directory / "signature.json").write_text(json.dumps(bundle))


def test_a_signer_needs_no_key_file(tmp_path: Path, keys_dir: Path, trust: TrustStore) -> None:
    """The format, not the library, is what a signer must fit."""
    remote = RemoteSigner()
    signer: Signer = remote
    directory = tmp_path / "package"
    (directory / "model").mkdir(parents=True)
    (directory / "model/config.json").write_text("{}")
    signer.sign(directory)
    with pytest.raises(UnknownKeyError):
        trust.verify(directory)
    assert SigningKeys(keys_dir).trust(remote.public) == signer.fingerprint
    assert trust.verify(directory).fingerprint == signer.fingerprint
    (directory / "model/config.json").write_text("[]")
    with pytest.raises(ChangedFileError):
        trust.verify(directory)
