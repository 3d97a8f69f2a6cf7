"""Prepare a dataset: split it, tokenise text or clean a table, and publish it whole in storage.

    python -m jobs.prepare --config configs/prepare/python_topics.yaml

A dataset that has been prepared from the same config and the same source is found, not made again.
"""

from __future__ import annotations

import json

from cluster.settings import Settings
from cluster.storage import Storage
from jobs._entrypoint import run_job
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import DatasetInfo
from jobs.data.preparation import read_source


def prepare(config: DataConfig, settings: Settings) -> None:
    """Make or find the dataset, and say what it is."""
    dataset, is_new = open_catalog(settings).ensure(config)
    print(f"{'prepared' if is_new else 'already prepared'} {describe(dataset.info)}")
    print(f"in {dataset.directory}")
    print("result: " + json.dumps({"name": config.name, "digest": dataset.info.digest}))


def check(config: DataConfig, settings: Settings) -> None:
    """Read the source, and nothing more."""
    del settings
    content = read_source(config)
    print(f"config is valid; source of '{config.name}' has digest sha256:{content.digest}")


def open_catalog(settings: Settings) -> DatasetCatalog:
    return DatasetCatalog(Storage.open(settings.storage_root), settings.home / "cache")


def describe(info: DatasetInfo) -> str:
    """Name, digest and rows by split in one line; for a table, what was changed in others."""
    rows = ", ".join(f"{split} {count:,}" for split, count in info.num_rows.items())
    line = f"dataset {info.name} ({info.digest[:19]}…): rows {rows}"
    if info.text:
        line += (
            f"; {info.text.sequence_length} tokens a row, vocabulary {info.text.vocab_size:,}, "
            f"unigram entropy {info.text.unigram_entropy:.3f} nats"
        )
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
