"""Checkpoints in an object store: the manifest is uploaded last, and is the commit.

    step-00000100-ATTEMPT/rank-00000.safetensors …     every worker uploads its own
    step-00000100-ATTEMPT/checkpoint.json              without it, nothing is there
    step-00000100-ATTEMPT/corrupt.json                 was checkpoint.json of one that is set aside

There is no rename there, so attempts have names of their own. It knows nothing of training.

    store = ObjectStore(Storage.open("s3://bucket/runs/tiny-abc"), keep=2)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import HeliostatError
from cluster.storage import Storage
from jobs.training.checkpointing import Chunk, is_name, to_prune
from jobs.training.manifest import MANIFEST_FILE, Manifest

_CORRUPT_FILE = "corrupt.json"


class ObjectStore:
    """See `jobs.training.checkpointing.CheckpointStore`."""

    def __init__(self, storage: Storage, *, keep: int) -> None:
        self._storage = storage
        self._keep = keep

    def write(self, save: str, file: str, chunks: Iterable[Chunk]) -> None:
        self._storage.write_chunks(f"{save}/{file}", chunks)

    def commit(self, save: str, manifest: Manifest, *, best_step: int) -> None:
        try:
            self._storage.write_bytes(f"{save}/{MANIFEST_FILE}", manifest.to_bytes())
        except HeliostatError:
            self.abandon(save)
            raise
        for name in to_prune(self.names(), keep=self._keep, best_step=best_step):
            self.remove(name)

    def abandon(self, save: str) -> None:
        with contextlib.suppress(HeliostatError):
            self.remove(save)

    def tidy(self) -> None:
        heads = self._heads()
        for name in {key.split("/")[0] for key in self._storage.list()} - set(heads):
            self._storage.delete_dir(name)

    def names(self) -> list[str]:
        whole = (name for name, file in self._heads().items() if file == MANIFEST_FILE)
        return sorted(filter(is_name, whole), reverse=True)

    def manifest(self, name: str) -> Manifest:
        return Manifest.from_bytes(self._storage.read_bytes(f"{name}/{MANIFEST_FILE}"))

    def fetch(self, name: str, files: Iterable[str], scratch: Path) -> Path:
        scratch.mkdir(parents=True, exist_ok=True)
        present = set(self._storage.list(name))
        for file in files:
            # One that is missing is noticed by whoever compares digests.
            if f"{name}/{file}" in present:
                self._storage.get_file(f"{name}/{file}", scratch / file)
        return scratch

    def set_aside(self, name: str) -> str:
        data = self._storage.read_bytes(f"{name}/{MANIFEST_FILE}")
        self._storage.write_bytes(f"{name}/{_CORRUPT_FILE}", data)
        self._storage.delete_file(f"{name}/{MANIFEST_FILE}")
        return self._storage.path(f"{name}/{_CORRUPT_FILE}")

    def remove(self, name: str) -> None:
        # The manifest first: what is half deleted must not be taken for corrupt.
        self._storage.delete_file(f"{name}/{MANIFEST_FILE}")
        self._storage.delete_dir(name)

    def _heads(self) -> dict[str, str]:
        """By directory, the file that says what it is; crashes leave directories without one."""
        heads: dict[str, str] = {}
        for key in self._storage.list():
            name, _, file = key.partition("/")
            if file in (MANIFEST_FILE, _CORRUPT_FILE) and heads.get(name) != MANIFEST_FILE:
                heads[name] = file
        return heads
