"""Preparing a corpus on the cluster, as a user submits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from tests.stack import Stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 MB, enough for the cluster to be asked; nearly all of them duplicates, to be quick."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": f"{number} " + "the sun turns " * 400}) for number in range(200)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(65):
            file.write("\n".join(lines) + "\n")
    return path


def write_config(path: Path, corpus: Path) -> DataConfig:
    config = DataConfig(
        name="large",
        source={"kind": "jsonl", "paths": [str(corpus)]},
        text={"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 64},
    )
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return config


def test_the_cluster_prepares_the_same_dataset_and_names_a_broken_line(
    stack: Stack, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "large.yaml", corpus)
    run = stack.run_cli("submit", "prepare", "--config", tmp_path / "large.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "preparing on the cluster's" in run.stdout
    assert "left out: duplicate 12,800" in run.stdout
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("result: ")]
    storage = Storage.open(str(tmp_path / "storage"))
    here, _ = DatasetCatalog(storage, tmp_path / "cache").ensure(config)
    assert json.loads(line.removeprefix("result: "))["digest"] == here.info.digest

    with corpus.open("a", encoding="utf-8") as file:
        file.write('{"text": "cut')
    broken = stack.run_cli("submit", "prepare", "--config", tmp_path / "large.yaml")
    assert broken.returncode == 1
    assert "corpus.jsonl:13001' is not JSON" in broken.stdout
    assert "Traceback" not in broken.stdout + broken.stderr
