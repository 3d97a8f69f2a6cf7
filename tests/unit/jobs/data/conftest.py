"""What tests of data share: a catalogue, and files of every format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog


@pytest.fixture
def catalog(tmp_path: Path) -> DatasetCatalog:
    return DatasetCatalog(Storage.open(str(tmp_path / "storage")), tmp_path / "cache")


class WriteTexts(Protocol):
    """Writes texts to a file of a format; returns the file."""

    def __call__(self, kind: str, texts: Sequence[Any], name: str = "data") -> Path: ...


@pytest.fixture
def write_texts(tmp_path: Path) -> WriteTexts:
    def write(kind: str, texts: Sequence[Any], name: str = "data") -> Path:
        path = tmp_path / f"{name}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            return path
        table = pa.table({"id": list(range(len(texts))), "text": list(texts)})
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=7)
        else:
            new_writer = pa.ipc.new_stream if kind == "arrows" else pa.ipc.new_file
            with new_writer(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        return path

    return write
