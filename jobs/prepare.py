"""Prepare a dataset: split it, tokenise text or clean a table, and publish it whole in storage.

    python -m jobs.prepare --config configs/prepare/python_topics.yaml
    python -m jobs.prepare --config configs/prepare/jsonl.yaml --check

Much text is read and tokenised on the cluster, if one is up, and in this process otherwise.
A dataset that has been prepared from the same config and the same source is found, not made again.
"""

from __future__ import annotations

import json

from cluster.errors import NotRunningError
from cluster.settings import Settings
from cluster.storage import Storage
from jobs._entrypoint import run_job
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import DatasetInfo
from jobs.data.execution import Executor, in_process
from jobs.data.inspection import inspect

# Below this, tasks would cost more than they save.
_CLUSTER_BYTES = 64 * 1024**2


def prepare(config: DataConfig, settings: Settings) -> None:
    """Make or find the dataset, and say what it is."""
    dataset, is_new = open_catalog(settings, may_use_cluster=True).ensure(config)
    print(f"{'prepared' if is_new else 'already prepared'} {describe(dataset.info)}")
    print(f"in {dataset.directory}")
    print("result: " + json.dumps({"name": config.name, "digest": dataset.info.digest}))


def check(config: DataConfig, settings: Settings) -> None:
    """Look at the source without preparing it; of text, only the beginning is read."""
    del settings
    for line in inspect(config):
        print(line)
    print(f"config of '{config.name}' is valid")


def open_catalog(settings: Settings, *, may_use_cluster: bool = False) -> DatasetCatalog:
    """The catalogue in the storage that the settings name.

    Args:
        may_use_cluster: much text is then read and tokenised by tasks of the Ray cluster.
    """

    def choose_executor(size_bytes: int) -> Executor:
        if not may_use_cluster or size_bytes < _CLUSTER_BYTES:
            return in_process
        return _on_cluster(settings) or in_process

    return DatasetCatalog(
        Storage.open(settings.storage_root),
        settings.home / "cache",
        choose_executor=choose_executor,
        say=_say,
    )


def _on_cluster(settings: Settings) -> Executor | None:
    from jobs.data.ray_execution import RayExecutor
    from jobs.training.ray_trainer import connected

    try:
        ray = connected(settings)
    except NotRunningError:
        _say("no cluster is up: preparing in this process")
        return None
    _say(f"preparing on the cluster's {ray.cluster_resources().get('CPU', 0):g} CPUs")
    return RayExecutor()


def _say(line: str) -> None:
    print(line, flush=True)


def describe(info: DatasetInfo) -> str:
    """Name, digest and rows by split in one line; what became of documents or cells in others."""
    rows = ", ".join(f"{split} {count:,}" for split, count in info.num_rows.items())
    line = f"dataset {info.name} ({info.digest[:19]}…): rows {rows}"
    if info.text:
        line += (
            f"; {info.text.sequence_length} tokens a row, vocabulary {info.text.vocab_size:,}, "
            f"unigram entropy {info.text.unigram_entropy:.3f} nats"
        )
        return "\n".join([line, *info.text.lines()])
    if info.table:
        line += f"; {len(info.table.feature_names)} features, target '{info.table.target_name}'"
        line += f" ({len(info.class_names)} classes)" if info.class_names else ""
        return "\n".join([line, *info.table.lines()])
    return line


if __name__ == "__main__":
    run_job(
        DataConfig,
        verb="prepare",
        description="Split a dataset, tokenise its text or clean its table.",
        run=prepare,
        check=check,
    )
