"""Where a run's checkpoints lie: its own directory, another folder, or an object store.

It is the one place that chooses between the stores; it knows nothing of what they hold.

    store = open_store(config.checkpoint, run_dir, dataset.info.digest)
"""

from __future__ import annotations

from pathlib import Path

from cluster.storage import Storage
from jobs.training.checkpointing import CheckpointStore, FolderStore
from jobs.training.config import CheckpointConfig
from jobs.training.object_checkpoints import ObjectStore

CHECKPOINTS_DIR = "checkpoints"


def open_store(config: CheckpointConfig, run_dir: Path, dataset_digest: str) -> CheckpointStore:
    """The checkpoints of the run of this directory on this data.

    Raises:
        ConfigError: `checkpoint.location` is no place that can be written to.
    """
    if not config.location:
        return FolderStore(run_dir / CHECKPOINTS_DIR, keep=config.keep)
    name = store_name(run_dir, dataset_digest)
    place, mark, options = config.location.partition("?")
    storage = Storage.open(f"{place.rstrip('/')}/{name}{mark}{options}")
    folder = storage.local_path(CHECKPOINTS_DIR)
    if folder is not None:
        return FolderStore(folder, keep=config.keep)
    return ObjectStore(storage, keep=config.keep)


def store_name(run_dir: Path, dataset_digest: str) -> str:
    """What a run's checkpoints are called in `checkpoint.location`.

    There no run.json tells whether the data has changed, so the name does.
    """
    return f"{run_dir.name}-{dataset_digest.removeprefix('sha256:')[:12]}"


def forget(store: CheckpointStore) -> None:
    """Remove the checkpoints of a run that starts anew."""
    for name in store.names():
        store.remove(name)
    store.tidy()
