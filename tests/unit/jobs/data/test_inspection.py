"""A quick look at a source before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from jobs.data.config import DataConfig
from jobs.data.inspection import expected_vocab_size, inspect
from tests.unit.jobs.data.conftest import WriteTexts


def config_of(kind: str, path: Path, **text: object) -> DataConfig:
    return DataConfig(name="x", source={"kind": kind, "paths": [str(path)]}, text=text)


def test_only_the_beginning_is_read(write_texts: WriteTexts) -> None:
    path = write_texts("jsonl", ["the sun turns " * 1000] * 400)
    with path.open("a") as file:
        file.write("no JSON")
    lines = list(inspect(config_of("jsonl", path)))
    assert lines[0].startswith("source 'jsonl': files 1, 5.6 MB")
    assert lines[1].startswith("the first 72 documents hold 1,008,000 bytes")


def test_the_first_documents_must_be_right(write_texts: WriteTexts) -> None:
    source = {"kind": "jsonl", "paths": [str(write_texts("jsonl", ["a"]))], "text_field": "body"}
    config = DataConfig(name="x", source=source)
    with pytest.raises(InputError, match=r"jsonl:1' has no field 'body', it has: text"):
        list(inspect(config))


def test_a_vocabulary_is_expected_without_reading_the_corpus(write_texts: WriteTexts) -> None:
    path = write_texts("parquet", ["abc", "cd"])
    bpe = {"tokenizer": {"kind": "bpe", "vocab_size": 777}}
    assert expected_vocab_size(config_of("parquet", path, **bpe)) == 777
    characters = {"tokenizer": {"kind": "characters", "more": "xy"}}
    assert expected_vocab_size(config_of("parquet", path, **characters)) == 7
