"""Packages of every format version verify for ever. The packages here are never written anew."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.model_package import Keyset, TrustStore, golden, open_package, verify_directory
from cluster.model_package.manifest import Kind
from cluster.processing import postprocess, preprocess
from cluster.runtimes.onnx import OnnxRuntime
from cluster.storage import Storage

V1 = Path(__file__).parent / "v1"
KINDS = ("graph", "language_model", "adapter")
V1_DIGEST = "sha256:10131a9004ec23853d0d2a8fe751062749af583a7d1a529d3fc6562a5dfb9257"
V1_SIGNER = "439d611c116f923a1aded3139e4a82cccc9884536f79c7700d10acc4ab53e603"
V1_LANGUAGE_MODEL = "sha256:219a538453d6353387c84b4c06e1be82ab60df3047e7b8f3248951b7527e2458"
V1_ADAPTER = "sha256:a5cdc2da48f00d7e975e17b9db34971cfc4bea41c07a9c58c6934356ca0ad51b"


def test_a_version_1_package_verifies_and_replays() -> None:
    package = verify_directory(V1 / "graph", TrustStore(V1 / "keys"), digest=V1_DIGEST)
    assert (package.digest, package.signer) == (V1_DIGEST, V1_SIGNER)
    assert package.manifest.format_version == 1
    golden.replay(package)


def test_a_version_1_package_opens_from_storage_and_answers(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "storage"))
    storage.put_dir(V1 / "graph", f"packages/{V1_DIGEST.removeprefix('sha256:')}")
    package = open_package(
        V1_DIGEST, storage=storage, trust=TrustStore(V1 / "keys"), cache_dir=tmp_path / "cache"
    )
    inputs = preprocess(package.manifest, {"image_features": np.zeros((1, 2, 2), np.float32)})
    outputs = postprocess(package.manifest, OnnxRuntime(package.graph_path).run(inputs))
    assert set(outputs) == {"scores", "probabilities", "label"}


def test_a_version_1_language_model_and_its_adapter_verify_and_replay() -> None:
    trust = TrustStore(V1 / "keys")
    base = verify_directory(V1 / "language_model", trust, digest=V1_LANGUAGE_MODEL)
    adapter = verify_directory(V1 / "adapter", trust, digest=V1_ADAPTER)
    assert adapter.manifest.adapter is not None
    assert adapter.manifest.adapter.base_digest == base.digest
    golden.replay(base)
    golden.replay(adapter, base)


def test_every_kind_has_a_package_that_is_kept() -> None:
    kept = {verify_directory(V1 / kind, TrustStore(V1 / "keys")).manifest.kind for kind in KINDS}
    assert kept == set(get_args(Kind))


def test_a_version_1_package_decrypts(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "storage"))
    storage.put_dir(V1 / "graph_encrypted", f"packages/{V1_DIGEST.removeprefix('sha256:')}")
    package = open_package(
        V1_DIGEST, storage=storage, trust=TrustStore(V1 / "keys"), cache_dir=tmp_path / "cache",
        keyset=Keyset(V1 / "keys/encryption_keyset.json"),
    )  # fmt: skip
    assert package.graph_path.read_bytes() == (V1 / "graph/model/model.onnx").read_bytes()


def verify_as_a_stranger(package: Path, key_dir: Path, digest: str) -> dict[str, Any]:
    """FORMAT.md section 6 with nothing but hashes and elliptic curves; the manifest."""
    bundle = json.loads((package / "signature.json").read_bytes())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    pem = (key_dir / f"{hint}.pub").read_bytes()
    assert hashlib.sha256(pem).hexdigest() == hint
    key = serialization.load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    envelope = bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    statement = json.loads(payload)
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    listed = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
    root = hashlib.sha256(b"".join(bytes.fromhex(listed[name]) for name in sorted(listed)))
    assert statement["subject"][0]["digest"]["sha256"] == root.hexdigest()
    found = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*")
        if path.is_file() and path.name != "signature.json"
    }
    assert found == listed
    assert digest == f"sha256:{found.pop('manifest.json')}"
    manifest: dict[str, Any] = json.loads((package / "manifest.json").read_bytes())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    return manifest


def test_the_specification_is_enough_to_write_a_verifier() -> None:
    manifest = verify_as_a_stranger(V1 / "graph", V1 / "keys/trusted", V1_DIGEST)
    assert manifest["kind"] == "graph"


def test_the_strangers_verifier_notices_another_key(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / f"{V1_SIGNER}.pub").write_bytes(
        other.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises((AssertionError, InvalidSignature)):
        verify_as_a_stranger(V1 / "graph", tmp_path, V1_DIGEST)
