"""Keys are made once and kept private; signatures hold for exactly the files that were signed."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from cluster.errors import (
    ChangedFileError,
    ExtraFileError,
    MissingFileError,
    NotRunningError,
    SignatureError,
    UnknownKeyError,
)
from cluster.model_package import LocalSigner, TrustStore, ensure_local_key


@pytest.fixture
def signed(tmp_path: Path, keys_dir: Path) -> Path:
    directory = tmp_path / "signed"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.json").write_text("1")
    (directory / "sub/b.json").write_text("2")
    LocalSigner(keys_dir).sign(directory)
    return directory


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
