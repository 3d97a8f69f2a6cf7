"""Preparing datasets and finding them again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import parse_config
from cluster.errors import ConfigError, InputError, NotFoundError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig


@pytest.fixture
def catalog(tmp_path: Path) -> DatasetCatalog:
    return DatasetCatalog(Storage.open(str(tmp_path / "storage")), tmp_path / "cache")


def text_config(*paths: Path, **values: Any) -> DataConfig:
    return DataConfig(
        name="text",
        source={"kind": "text", "paths": [str(path) for path in paths]},
        **{
            "text": {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 16},
            **values,
        },
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(10):
        text = f"document {number} says 你好 to number {number * 7}\n" * 20
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_same_config_and_source_are_prepared_once(
    catalog: DatasetCatalog, corpus: Path
) -> None:
    config = text_config(corpus / "*.txt")
    first, is_new = catalog.ensure(config)
    second, is_new_again = catalog.ensure(config)
    assert (is_new, is_new_again) == (True, False)
    assert first.info.digest == second.info.digest


def test_a_changed_source_is_another_dataset(catalog: DatasetCatalog, corpus: Path) -> None:
    config = text_config(corpus / "*.txt")
    first, _ = catalog.ensure(config)
    (corpus / "3.txt").write_text("something else entirely\n" * 30, encoding="utf-8")
    second, is_new = catalog.ensure(config)
    assert is_new
    assert first.info.digest != second.info.digest


def test_preparing_again_gives_the_same_digest(tmp_path: Path, corpus: Path) -> None:
    digests = set()
    for number in range(2):
        storage = Storage.open(str(tmp_path / f"storage{number}"))
        dataset, _ = DatasetCatalog(storage, tmp_path).ensure(text_config(corpus / "*.txt"))
        digests.add(dataset.info.digest)
    assert len(digests) == 1


def test_the_tokenizer_sees_only_the_train_split(catalog: DatasetCatalog, tmp_path: Path) -> None:
    text = "aaaa bbbb cccc\n" * 300 + "zqxjzqxj zqxjzqxj\n" * 200
    (tmp_path / "one.txt").write_text(text)
    splits = {"by": "position", "validation": 0.1, "test": 0.4}
    dataset, _ = catalog.ensure(text_config(tmp_path / "one.txt", splits=splits))
    assert "zqxj" not in dataset.tokenizer_path.read_text()


def test_digits_hold_out_a_fifth(catalog: DatasetCatalog) -> None:
    config = DataConfig(
        name="digits", source={"kind": "sklearn", "dataset": "digits"}, splits={"test": 0.2}
    )
    dataset, _ = catalog.ensure(config)
    assert dataset.info.num_rows == {"train": 1258, "validation": 180, "test": 359}
    row = dataset.rows("test").read(np.array([0]))
    assert row["pixels"].shape == (1, 8, 8)
    assert row["pixels"].max() <= 16


def test_a_dataset_is_found_by_its_digest(catalog: DatasetCatalog, corpus: Path) -> None:
    dataset, _ = catalog.ensure(text_config(corpus / "*.txt"))
    assert catalog.find(dataset.info.digest).directory == dataset.directory
    with pytest.raises(NotFoundError, match="dataset sha256:00 is not in"):
        catalog.find("sha256:00")


def test_a_changed_file_is_noticed(catalog: DatasetCatalog, corpus: Path) -> None:
    config = text_config(corpus / "*.txt")
    dataset, _ = catalog.ensure(config)
    with (dataset.directory / "train.arrow").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(InputError, match=r"train\.arrow' has changed since it was prepared"):
        catalog.ensure(config)


def test_a_deleted_dataset_is_prepared_anew(catalog: DatasetCatalog, corpus: Path) -> None:
    config = text_config(corpus / "*.txt")
    dataset, _ = catalog.ensure(config)
    shutil.rmtree(dataset.directory)
    assert catalog.ensure(config)[1]


def test_a_dataset_without_its_description_is_prepared_anew(
    catalog: DatasetCatalog, corpus: Path
) -> None:
    config = text_config(corpus / "*.txt")
    dataset, _ = catalog.ensure(config)
    (dataset.directory / "dataset.json").unlink()
    again, is_new = catalog.ensure(config)
    assert is_new
    assert again.info.digest == dataset.info.digest
    assert not catalog.ensure(config)[1]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../x", b"sha256:../x", b"sha256:0"])
def test_a_note_of_what_was_prepared_that_says_nothing_is_written_anew(
    catalog: DatasetCatalog, corpus: Path, tmp_path: Path, content: bytes
) -> None:
    config = text_config(corpus / "*.txt")
    dataset, _ = catalog.ensure(config)
    for note in (tmp_path / "storage/datasets/text/prepared").iterdir():
        note.write_bytes(content)
    assert catalog.ensure(config)[1]
    again, is_new = catalog.ensure(config)
    assert (again.info.digest, is_new) == (dataset.info.digest, False)


def test_a_missing_file_is_named(catalog: DatasetCatalog, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data file '.*absent\.txt' does not exist"):
        catalog.ensure(text_config(tmp_path / "absent.txt"))


def test_a_file_that_is_not_text_is_named(catalog: DatasetCatalog, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match=r"bad\.txt' is not UTF-8 text \(byte 3\)"):
        catalog.ensure(text_config(tmp_path / "bad.txt"))


def test_rows_longer_than_the_data_are_refused(catalog: DatasetCatalog, corpus: Path) -> None:
    config = text_config(
        corpus / "*.txt",
        text={"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 10_000},
    )
    with pytest.raises(InputError, match=r"fewer than one row of sequence_length \+ 1 = 10001"):
        catalog.ensure(config)


def test_one_document_cannot_be_split_by_row(catalog: DatasetCatalog, corpus: Path) -> None:
    with pytest.raises(InputError, match=r"is empty: 1 document.*data\.splits\.by=position"):
        catalog.ensure(text_config(corpus / "1.txt"))


def test_nothing_is_left_behind_by_a_failure(
    catalog: DatasetCatalog, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        catalog.ensure(text_config(corpus / "1.txt"))
    assert not [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {
                "source": {"kind": "sklearn", "dataset": "digits"},
                "text": {"tokenizer": {"kind": "bpe", "vocab_size": 300}},
            },
            "text",
        ),
        ({"source": {"kind": "python_topics"}, "splits": {"test": 0.9}}, "nothing to train on"),
        (
            {
                "source": {"kind": "python_topics"},
                "text": {"tokenizer": {"kind": "bpe", "vocab_size": 99}},
            },
            "text.tokenizer",
        ),
        ({"source": {"kind": "sklearn", "dataset": "moons"}}, "dataset"),
        ({"source": {"kind": "python_topics"}, "name": "../up"}, "name"),
    ],
)
def test_a_wrong_config_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({"name": "x", **values}, DataConfig, source="data.yaml")
    assert "\n" not in str(caught.value)
