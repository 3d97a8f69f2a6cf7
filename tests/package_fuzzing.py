"""Sign, mutate, verify: every change to a package ends in a named refusal or in the same content.

A case is its seed: it changes a signed package a little, on disk, in its JSON or before signing,
and opens it. Whoever has the key may still mean harm, so manifests and statements that are hostile
but properly signed are among the cases.

    fuzzer = PackageFuzzer(Path("tests/contract/v1/graph"), scratch)
    outcome = fuzzer.run(1234)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.errors import NotFoundError, PackageError
from cluster.model_package import (
    LocalSigner,
    Manifest,
    ModelPackage,
    SigningKeys,
    TrustStore,
    golden,
    open_package,
    package_key,
    verify_directory,
)
from cluster.model_package import reader as reader_module
from cluster.model_package.card import model_card, version_tags
from cluster.model_package.manifest import digest_of
from cluster.storage import Storage

Outcome = Literal["refused", "same", "accepted"]
Bytes = dict[str, bytes]

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
_NAMES = (
    "x.json", "x.py", "x.pkl", "model.onnx", ".x", "x", "X.JSON", "..json", "ü.json", "a b.json",
    "n" * 201 + ".json", "x.safetensors", "manifest.json", "signature.json", "tokenizer.json",
    "adapter_config.json", "config.json", "x.json\n", "x.aead",
)  # fmt: skip
_TEXTS = (
    b"", b"null", b"[]", b'""', b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"-1e999", b"NaN",
    b"Infinity", b"9" * 5_000, b"0." + b"9" * 5_000, b'"\\ud800"', b'"\\u0000"', b"\xff", b"\0",
    b'{"kind":"graph","kind":"adapter"}', b'{"a":1}', b"{}", b" ", b"\xef\xbb\xbf",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, 2**31, 2**63, -(2**63), 10**30, 1e308, 1e-320, -0.0, "",
    "0", "x" * 10_000, "\0", "\n\x1b[2J", "\ud800", "../../etc/passwd", "model/../manifest.json",
    "/etc/passwd", "sha256:" + "0" * 64, "0" * 64, "graph", "adapter", "language_model", [], {},
    [[]], {"": None}, [0] * 1_000, {"model/x.json": {"sha256": "0" * 64, "size_bytes": 1}},
    json.loads("[" * 60 + "]" * 60),
)  # fmt: skip


class PackageFuzzer:
    """Cases on one package, which is signed anew with a key of the fuzzer's own."""

    def __init__(self, package: Path, scratch: Path) -> None:
        self._scratch = scratch
        self._keys = SigningKeys(scratch / "keys")
        self._keys.ensure_local()
        self._signer = LocalSigner(scratch / "keys")
        self._trust = TrustStore(scratch / "keys")
        self._original = scratch / "original"
        shutil.copytree(package, self._original)
        self._sign(self._original)
        self._genuine = contents_of(self._original)
        self._digest = digest_of(self._genuine[MANIFEST])
        self.outcomes: Counter[Outcome] = Counter()

    def run_all(self, seeds: Iterable[int]) -> None:
        """Raises AssertionError naming the seed of the first case that ends in anything else."""
        for seed in seeds:
            try:
                self.outcomes[self.run(seed)] += 1
            except Exception as error:
                raise AssertionError(
                    f"{self._original.name} package, seed {seed}: {type(error).__name__}: {error}"
                ) from error

    def run(self, seed: int) -> Outcome:
        """One case. Raises whatever is neither a refusal nor right."""
        chance = random.Random(seed)
        case = chance.choice((self._on_disk, self._on_disk, self._hostile, self._fetched))
        work = self._scratch / "case"
        try:
            return case(chance, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _on_disk(self, chance: random.Random, work: Path) -> Outcome:
        """What anybody may do who can write to a directory that is verified in place."""
        copy = self._mutant(chance, work / "package")
        return self._judge(lambda: verify_directory(copy, self._trust, digest=self._digest))

    def _fetched(self, chance: random.Random, work: Path) -> Outcome:
        """The same in storage, or in the cache."""
        storage, cache = Storage.open(str(work / "storage")), work / "cache"
        stored = work / "storage" / package_key(self._digest)
        stored.parent.mkdir(parents=True)
        if chance.random() < 0.5:
            self._mutant(chance, stored)
        else:
            shutil.copytree(self._original, stored)
            cache.mkdir()
            self._mutant(chance, cache / stored.name)
        return self._judge(
            lambda: open_package(self._digest, storage=storage, trust=self._trust, cache_dir=cache)
        )

    def _hostile(self, chance: random.Random, work: Path) -> Outcome:
        """A manifest or a statement that its signer meant to be wrong."""
        copy = work / "package"
        shutil.copytree(self._original, copy)
        data = self._genuine[MANIFEST]
        if chance.random() < 0.7:
            data = mutate_json(data, chance)
            (copy / MANIFEST).write_bytes(data)
            self._sign(copy)
        else:
            self._sign_statement(copy, chance)

        def verify() -> ModelPackage:
            package = verify_directory(copy, self._trust, digest=digest_of(data))
            # What a replica does with it, and what people are shown of it.
            if package.manifest.kind == "graph":
                golden.replay(package)
            model_card(package.digest, package.manifest)
            version_tags(package.digest, package.manifest, "")
            return package

        return self._judge(verify, signed=data)

    def _judge(self, opening: Callable[[], ModelPackage], signed: bytes | None = None) -> Outcome:
        expected = self._genuine[MANIFEST] if signed is None else signed
        parse = Manifest.from_bytes

        def parse_verified(data: bytes) -> Manifest:
            assert data == expected, "a manifest was parsed that nobody signed"
            return parse(data)

        with mock.patch.object(reader_module.Manifest, "from_bytes", parse_verified):
            try:
                package = opening()
            except (PackageError, NotFoundError) as error:
                return self._refused(str(error))
        found = contents_of(package.path)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
        declared = {name: entry.sha256 for name, entry in package.manifest.files.items()}
        assert found[MANIFEST] == expected
        assert digests == declared | {name: digests[name] for name in (MANIFEST, SIGNATURE)}
        assert Manifest.from_bytes(package.manifest.to_bytes()) == package.manifest
        if expected != self._genuine[MANIFEST]:
            return "accepted"
        assert {**found, SIGNATURE: b""} == {**self._genuine, SIGNATURE: b""}
        return "same"

    def _refused(self, message: str) -> Outcome:
        assert not re.search(r"[\x00-\x1f\x7f]", message), f"not one line of text: {message!r}"
        return "refused"

    def _mutant(self, chance: random.Random, target: Path) -> Path:
        shutil.copytree(self._original, target)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            mutate_files(target, chance)
        return target

    def _sign(self, directory: Path) -> None:
        (directory / SIGNATURE).unlink(missing_ok=True)
        self._signer.sign(directory)

    def _sign_statement(self, directory: Path, chance: random.Random) -> None:
        """Sign a statement that says anything."""
        bundle = json.loads((directory / SIGNATURE).read_bytes())
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
        statement = json.loads(payload)
        if chance.random() < 0.5:
            resource = chance.choice(statement["predicate"]["resources"])
            resource[chance.choice(list(resource))] = chance.choice(_VALUES)
            payload = json.dumps(statement).encode()
        else:
            payload = mutate_json(payload, chance)
        key = serialization.load_pem_private_key(self._keys.private_key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(
            key.sign(signed, ec.ECDSA(hashes.SHA256()))
        ).decode()
        (directory / SIGNATURE).write_text(json.dumps(bundle))


def contents_of(directory: Path) -> Bytes:
    """Every file's bytes, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def mutate_files(directory: Path, chance: random.Random) -> None:
    """One change to the files below a directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())
    if not files:
        return
    path, other = chance.choice(files), chance.choice(files)
    beside = path.with_name(chance.choice(_NAMES))
    match chance.randrange(12):
        case 0:
            path.unlink()
        case 1 if not beside.exists() and len(beside.name) < 200:
            path.rename(beside)
        case 2 if not beside.exists() and len(beside.name) < 200:
            shutil.copyfile(path, beside)
        case 3:
            first, second = path.read_bytes(), other.read_bytes()
            path.write_bytes(second)
            other.write_bytes(first)
        case 4:
            shutil.copyfile(path, target := path.with_name("elsewhere"))
            target.rename(directory.parent / "elsewhere")
            path.unlink()
            # A link to the right bytes is still a link.
            path.symlink_to(directory.parent / "elsewhere")
        case 5:
            path.unlink()
            path.mkdir()
        case 6:
            path.unlink()
            os.mkfifo(path)
        case 7:
            deep = path.parent.joinpath(*chance.choice((["d"], ["d"] * 12, ["d e"], [".git"])))
            deep.mkdir(parents=True, exist_ok=True)
            if chance.random() < 0.7:
                (deep / "x.json").write_text("{}")
        case 8 if not path.with_name("linked").is_symlink():
            path.with_name("linked").symlink_to(chance.choice((path.name, "/", "missing")))
        case 9 if path.suffix == ".json":
            path.write_bytes(mutate_json(path.read_bytes(), chance))
        case 10 if path.name == SIGNATURE:
            _mutate_payload(path, chance)
        case _:
            path.write_bytes(mutate_bytes(path.read_bytes(), chance))


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """One change to some bytes."""
    position = chance.randrange(len(data) or 1)
    length = chance.choice((1, 2, 16, 300))
    match chance.randrange(6):
        case 0:
            flipped = bytes([data[position] ^ 1 << chance.randrange(8)]) if data else b"x"
            return data[:position] + flipped + data[position + 1 :]
        case 1:
            return data[:position]
        case 2:
            return data[:position] + data[position + length :]
        case 3:
            return data + chance.randbytes(length)
        case 4:
            return data[:position] + data[position : position + length] * 2 + data[position:]
        case _:
            return data[:position] + chance.choice(_TEXTS) + data[position:]


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """One change to a JSON document, which may leave it none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, chance)
    parents = list(_containers(document))
    if not parents or chance.random() < 0.05:
        return chance.choice(_TEXTS)
    parent = chance.choice(parents)
    key = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    marker, text = "\ue000", b""
    match chance.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[chance.choice(("", "x", "format_version", "adapter", "files"))] = parent[key]
        case 2 if isinstance(parent, dict):
            # The key twice, with another value.
            copies = {k: json.dumps(v) for k, v in parent.items()}
            text = json.dumps(chance.choice(_VALUES)).encode()
            pairs = [f"{json.dumps(k)}:{v}".encode() for k, v in copies.items()]
            text = b"{" + b",".join([*pairs, json.dumps(key).encode() + b":" + text]) + b"}"
            return _with(document, parent, text)
        case 3:
            parent[key], text = marker, chance.choice(_TEXTS)
            return json.dumps(document).encode().replace(json.dumps(marker).encode(), text, 1)
        case _:
            parent[key] = chance.choice(_VALUES)
    return json.dumps(document).encode()


def _with(document: Any, part: Any, text: bytes) -> bytes:
    """The document's text with `part` written as `text`."""
    if document is part:
        return text
    if isinstance(document, dict):
        pairs = (json.dumps(k).encode() + b":" + _with(v, part, text) for k, v in document.items())
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(document, list):
        return b"[" + b",".join(_with(item, part, text) for item in document) + b"]"
    return json.dumps(document).encode()


def _containers(value: Any) -> Iterable[Any]:
    """Every object and list in a document that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _mutate_payload(path: Path, chance: random.Random) -> None:
    """Another statement under the old signature."""
    try:
        bundle = json.loads(path.read_bytes())
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
        changed = base64.b64encode(mutate_json(payload, chance)).decode()
        bundle["dsseEnvelope"]["payload"] = changed
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    path.write_text(json.dumps(bundle))
