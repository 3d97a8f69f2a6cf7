"""The manifest round-trips, and hostile bytes are an error, never a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ForbiddenFileError, NewerFormatError, PackageError
from cluster.model_package import FORMAT_VERSION, FileEntry, Golden, Lineage, Manifest

json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
file_names = st.from_regex(r"model/[a-z0-9_][a-zA-Z0-9_.+-]{0,20}\.(json|onnx|md)", fullmatch=True)
lines = st.text(st.characters(exclude_categories=("Cc", "Cs")))
manifests = st.builds(
    Manifest,
    kind=st.sampled_from(["language_model", "graph", "adapter"]),
    name=lines,
    created_at=lines,
    files=st.dictionaries(
        file_names,
        st.builds(
            FileEntry,
            sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
            size_bytes=st.integers(0, 2**60),
        ),
        max_size=3,
    ),
    golden=st.builds(
        Golden,
        inputs=st.dictionaries(st.text(), json_values, max_size=2),
        outputs=st.dictionaries(st.text(), json_values, max_size=2),
        tolerance=st.floats(0, 1),
    ),
    metrics=st.dictionaries(lines, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    lineage=st.builds(Lineage, source=lines, git_commit=lines),
)


def values(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "graph",
        "name": "n",
        "created_at": "now",
        "files": {},
        "golden": {"inputs": {}, "outputs": {}},
        **changes,
    }


@given(manifests)
def test_a_manifest_comes_back_from_its_bytes(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    assert Manifest.from_bytes(data).to_bytes() == data
    assert Manifest.from_bytes(data).digest == manifest.digest


@given(st.binary() | json_values.map(lambda v: json.dumps(v).encode()))
def test_bytes_that_are_no_manifest_are_a_package_error(data: bytes) -> None:
    with pytest.raises(PackageError):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        json.dumps(values()).encode()[:-1] + b',"golden":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        json.dumps(values()).encode()[:-1] + b',"name":"again"}',
        json.dumps(values(metrics={"x": float("nan")})).encode(),
        json.dumps(values(format_version=0)).encode(),
        json.dumps(values(format_version=True)).encode(),
        json.dumps(values(kind="code")).encode(),
        b'{"format_version":' + b"9" * 5000 + b"}",
        json.dumps(values(files={"model/a.json": {"sha256": "0" * 63, "size_bytes": 1}})).encode(),
        json.dumps(values(files={"model/a.json": {"sha256": "0" * 64, "size_bytes": -1}})).encode(),
    ],
)
def test_hostile_manifests_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(PackageError) as caught:
        Manifest.from_bytes(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "../model/a.json", "model/../a.json", "/etc/a.json", "model//a.json", "model/./a.json",
        "model\\a.json", "model/a.py", "model/weights.bin", "model/.hidden.json", "manifest.json",
        "a.json", "model/a\0.json", "model/a\n.json", "model/ä.json",
        "model/" + "d/" * 9 + "a.json",
    ],
)  # fmt: skip
def test_file_names_that_leave_the_package_or_are_code_are_forbidden(name: str) -> None:
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    with pytest.raises(ForbiddenFileError):
        Manifest.from_bytes(json.dumps(values(files={name: entry})).encode())


def test_a_newer_format_says_so_whatever_else_it_holds() -> None:
    data = json.dumps({"format_version": FORMAT_VERSION + 1, "unknown": []}).encode()
    with pytest.raises(NewerFormatError, match="upgrade"):
        Manifest.from_bytes(data)
