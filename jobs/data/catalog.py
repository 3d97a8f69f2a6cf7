"""The catalogue of prepared datasets in storage: each is made once and found again by its digest.

    datasets/NAME/HEX/…             a dataset directory, named by its digest
    datasets/NAME/prepared/KEY      the digest that a config and source came to

A source is known by its content; files also by size and time of change, so that a large corpus is
not read again to find what was made of it.

It knows nothing about how datasets are made or used.

    catalog = DatasetCatalog(storage, cache_dir, say=print)
    dataset, is_new = catalog.ensure(config)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from cluster.errors import NotFoundError
from cluster.storage import Storage
from jobs.data.config import DataConfig
from jobs.data.corpus import Say, existing_tokenizer, plan_corpus
from jobs.data.dataset import DATASET_FILE, FORMAT_VERSION, Dataset
from jobs.data.execution import Executor, in_process
from jobs.data.preparation import Content, prepare_into, read_numbers, read_source
from jobs.data.shards import Plan

_ROOT = "datasets"
_PREPARED = "prepared"
_SETTLED_NS = 2_000_000_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class DatasetCatalog:
    """Datasets under one storage root.

    Args:
        cache_dir: holds copies where the root is not a folder.
        choose_executor: where to read and encode text of that many bytes.
        say: takes lines of progress.
    """

    def __init__(
        self,
        storage: Storage,
        cache_dir: Path,
        *,
        choose_executor: Callable[[int], Executor] = lambda _size_bytes: in_process,
        say: Say = lambda _line: None,
    ) -> None:
        self._storage = storage
        self._cache_dir = cache_dir
        self._choose_executor = choose_executor
        self._say = say

    def ensure(self, config: DataConfig) -> tuple[Dataset, bool]:
        """The dataset for a config, and whether it had to be prepared."""
        if config.kind != "text":
            return self._ensure(config, read_numbers(config))
        plan = plan_corpus(config)
        listing_key = _listing_key(config, plan)
        if listing_key and (found := self._known(config, listing_key)):
            return found, False
        execute = self._choose_executor(plan.size_bytes)
        content = read_source(config, plan=plan, execute=execute, say=self._say)
        dataset, is_new = self._ensure(config, content)
        if listing_key:
            self._remember(config, listing_key, dataset.info.digest)
        return dataset, is_new

    def _ensure(self, config: DataConfig, content: Content) -> tuple[Dataset, bool]:
        key = preparation_key(config, content.digest)
        if found := self._known(config, key):
            return found, False
        with self._storage.staging() as stage:
            directory = stage / "dataset"
            directory.mkdir()
            digest = prepare_into(directory, config, content).digest
            target = _directory(config.name, digest)
            if self._storage.exists(target) and not self._is_described(target):
                self._storage.delete_dir(target)
            self._storage.put_dir(directory, target, move=True)
        self._remember(config, key, digest)
        return self.open(config.name, digest), True

    def _known(self, config: DataConfig, key: str) -> Dataset | None:
        """What was prepared under this key, if it is still there."""
        name = f"{_ROOT}/{config.name}/{_PREPARED}/{key}"
        if not self._storage.exists(name):
            return None
        digest = self._storage.read_bytes(name).decode("utf-8", errors="replace")
        if not _DIGEST.fullmatch(digest):
            return None
        directory = _directory(config.name, digest)
        if not (self._storage.exists(directory) and self._is_described(directory)):
            return None
        return self.open(config.name, digest)

    def _is_described(self, directory: str) -> bool:
        return self._storage.exists(f"{directory}/{DATASET_FILE}")

    def _remember(self, config: DataConfig, key: str, digest: str) -> None:
        name = f"{_ROOT}/{config.name}/{_PREPARED}/{key}"
        self._storage.write_bytes(name, digest.encode())

    def open(self, name: str, digest: str) -> Dataset:
        """Raises NotFoundError if it is not in storage, InputError if it has been damaged."""
        key = _directory(name, digest)
        return Dataset.open(self._storage.local_path(key) or self._cached(key))

    def find(self, digest: str) -> Dataset:
        """The dataset of this digest, whatever its name.

        Raises:
            NotFoundError: there is none.
        """
        ending = f"/{_hex(digest)}/{DATASET_FILE}"
        for key in self._storage.list(_ROOT):
            if key.endswith(ending):
                return self.open(key.split("/")[-3], digest)
        raise NotFoundError(
            f"dataset {digest or '(unknown)'} is not in {self._storage.root}",
            hint="give a 'data' section, which prepares it",
        )

    def _cached(self, key: str) -> Path:
        local = self._cache_dir / key
        if not (local / DATASET_FILE).is_file():
            shutil.rmtree(local, ignore_errors=True)
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


def _listing_key(config: DataConfig, plan: Plan) -> str | None:
    """Stands for the content of files as long as their sizes and times of change do.

    None where a change could go unnoticed: a file that was written just now may be written again
    within the resolution of its time.
    """
    newest_ns = max((file.mtime_ns for file in plan.files), default=0)
    if not newest_ns or time.time_ns() - newest_ns < _SETTLED_NS:
        return None
    files = [(file.name, file.path, file.size_bytes, file.mtime_ns) for file in plan.files]
    tokenizer = existing_tokenizer(config)
    parts = [files, tokenizer.digest if tokenizer else ""]
    return preparation_key(config, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def _directory(name: str, digest: str) -> str:
    return f"{_ROOT}/{name}/{_hex(digest)}"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
