"""The catalogue of prepared datasets in storage: each is made once and found again by its digest.

    datasets/NAME/HEX/…             a dataset directory, named by its digest
    datasets/NAME/prepared/KEY      the digest that a config and source came to

It knows nothing about how datasets are made or used.

    catalog = DatasetCatalog(storage, cache_dir)
    dataset, is_new = catalog.ensure(config)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from cluster.errors import NotFoundError
from cluster.storage import Storage
from jobs.data.config import DataConfig
from jobs.data.dataset import FORMAT_VERSION, Dataset
from jobs.data.preparation import prepare_into, read_source

_ROOT = "datasets"
_PREPARED = "prepared"


class DatasetCatalog:
    """Datasets under one storage root; `cache_dir` holds copies where the root is not a folder."""

    def __init__(self, storage: Storage, cache_dir: Path) -> None:
        self._storage = storage
        self._cache_dir = cache_dir

    def ensure(self, config: DataConfig) -> tuple[Dataset, bool]:
        """The dataset for a config, and whether it had to be prepared."""
        content = read_source(config)
        key = preparation_key(config, content.digest)
        known = f"{_ROOT}/{config.name}/{_PREPARED}/{key}"
        if self._storage.exists(known):
            digest = self._storage.read_bytes(known).decode()
            if self._storage.exists(_directory(config.name, digest)):
                return self.open(config.name, digest), False
        with self._storage.staging() as stage:
            directory = stage / "dataset"
            directory.mkdir()
            digest = prepare_into(directory, config, content).digest
            self._storage.put_dir(directory, _directory(config.name, digest), move=True)
        self._storage.write_bytes(known, digest.encode())
        return self.open(config.name, digest), True

    def open(self, name: str, digest: str) -> Dataset:
        """Raises NotFoundError if it is not in storage, InputError if it has been damaged."""
        key = _directory(name, digest)
        return Dataset.open(self._storage.local_path(key) or self._cached(key))

    def find(self, digest: str) -> Dataset:
        """The dataset of this digest, whatever its name.

        Raises:
            NotFoundError: there is none.
        """
        ending = f"/{_hex(digest)}/dataset.json"
        for key in self._storage.list(_ROOT):
            if key.endswith(ending):
                return self.open(key.split("/")[-3], digest)
        raise NotFoundError(
            f"dataset {digest or '(unknown)'} is not in {self._storage.root}",
            hint="give a 'data' section, which prepares it",
        )

    def _cached(self, key: str) -> Path:
        local = self._cache_dir / key
        if not local.is_dir():
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f".{local.name}.{os.getpid()}")
            self._storage.get_dir(key, partial)
            try:
                partial.rename(local)
            except OSError:
                # Another process was faster.
                shutil.rmtree(partial, ignore_errors=True)
        return local


def preparation_key(config: DataConfig, source_digest: str) -> str:
    """Digest of all that decides the bytes of a dataset."""
    values = {
        "config": config.model_dump(mode="json"),
        "source": source_digest,
        "format": FORMAT_VERSION,
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _directory(name: str, digest: str) -> str:
    return f"{_ROOT}/{name}/{_hex(digest)}"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
