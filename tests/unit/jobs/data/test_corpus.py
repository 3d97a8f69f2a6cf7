"""A corpus becomes rows: nothing is lost, duplicates are, and memory stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.errors import InputError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import DOCUMENT_STARTS, TOKENS, Dataset
from jobs.data.preparation import prepare_into, read_source
from jobs.data.progress import Progress
from jobs.data.splits import SPLITS
from tests.unit.jobs.data.conftest import WriteTexts

TEXT = {"tokenizer": {"kind": "bpe", "vocab_size": 280}, "sequence_length": 8}
NO_SPLIT = {"validation": 0, "test": 0}


def config_of(path: Path | str, **values: Any) -> DataConfig:
    source = {"kind": "jsonl", "paths": [str(path)]}
    splits = {"validation": 0.2, "test": 0.2}
    return DataConfig(
        **{"name": "corpus", "source": source, "text": TEXT, "splits": splits, **values}
    )


def documents_of(dataset: Dataset, split: str) -> list[str]:
    """The texts that rows of a stream hold, as its columns say; the last may be cut."""
    rows = dataset.rows(split)
    found = rows.read(np.arange(len(rows)))
    size = dataset.text.sequence_length + 1
    starts = np.unpackbits(found[DOCUMENT_STARTS], axis=1, count=size).astype(bool)
    # Rows overlap by one token.
    tokens = np.concatenate([found[TOKENS][:1, 0], found[TOKENS][:, 1:].reshape(-1)])
    begins = np.concatenate([starts[:1, 0], starts[:, 1:].reshape(-1)])
    assert begins[0]
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    texts = np.split(tokens, np.flatnonzero(begins)[1:])
    for text in texts[:-1]:
        assert text[-1] == dataset.text.end_id
    return [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in texts]


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=3, max_size=12, unique=True),
    by_character=st.booleans(),
)
def test_no_token_of_a_stream_is_lost(texts: list[str], by_character: bool) -> None:
    texts = [*texts, "the last one fills what is left of the last row" * 2]
    tokenizer = {"kind": "characters"} if by_character else TEXT["tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        text = {"tokenizer": tokenizer, "sequence_length": 8}
        config = config_of(path, text=text, splits=NO_SPLIT)
        directory = Path(folder) / "dataset"
        directory.mkdir()
        prepare_into(directory, config, read_source(config))
        dataset = Dataset.open(directory)
        found = documents_of(dataset, "train")
        assert found[:-1] == texts[:-1]
        assert texts[-1].startswith(found[-1].rstrip("\ufffd"))
        lost = dataset.text.num_tokens["train"] - 1 - 8 * dataset.info.num_rows["train"]
        assert 0 <= lost < 8


def test_documents_are_in_one_split_each(catalog: DatasetCatalog, write_texts: WriteTexts) -> None:
    texts = [f"document {number} about number {number * 7}" for number in range(100)]
    dataset, _ = catalog.ensure(config_of(write_texts("jsonl", texts)))
    found = [text for split in SPLITS for text in documents_of(dataset, split)[:-1]]
    assert len(set(found)) == len(found)
    assert set(found) <= set(texts)
    counts = dataset.text.num_documents
    assert sum(counts.values()) == dataset.text.num_read == 100
    assert counts["validation"] == pytest.approx(20, abs=2)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_same_texts_give_the_same_rows_from_any_format(
    catalog: DatasetCatalog, write_texts: WriteTexts, kind: str
) -> None:
    texts = [f"document {number} about number {number * 7}" for number in range(60)]
    first, _ = catalog.ensure(config_of(write_texts("jsonl", texts)))
    source = {"kind": kind, "paths": [str(write_texts(kind, texts))]}
    second, _ = catalog.ensure(config_of("", source=source))
    assert first.info.source_digest == second.info.source_digest
    for name in ("train.arrow", "test.arrow", "tokenizer/tokenizer.json"):
        assert first.info.files[name] == second.info.files[name]


def test_duplicates_and_what_is_too_short_or_too_long_are_left_out_and_counted(
    catalog: DatasetCatalog, write_texts: WriteTexts, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [f"document {number} about number {number * 7}" for number in range(30)]
    texts = [*kept, kept[3], "short", "short", "x" * 200, kept[0], "", kept[3]]
    text = {**TEXT, "min_characters": 6, "max_characters": 100}
    config = config_of(write_texts("jsonl", texts), text=text, splits=NO_SPLIT)
    dataset, _ = catalog.ensure(config)
    assert documents_of(dataset, "train")[:-1] == kept[:-1]
    assert dataset.text.left_out == {"duplicate": 3, "too_short": 3, "too_long": 1}
    shown = list(dataset.text.lines())
    assert shown[0] == "documents 37 read: train 30, validation 0, test 0"
    assert shown[1] == "left out: duplicate 3, too short 3, too long 1"
    repeated = {**text, "deduplicate": False}
    dataset, _ = catalog.ensure(config.model_copy(update={"text": repeat(config, repeated)}))
    assert dataset.text.num_documents["train"] == 33


def repeat(config: DataConfig, text: dict[str, Any]) -> Any:
    return type(config.text).model_validate(text)


def test_a_source_without_a_document_is_refused(
    catalog: DatasetCatalog, write_texts: WriteTexts
) -> None:
    with pytest.raises(InputError, match="source 'jsonl' of dataset 'corpus' holds no document"):
        catalog.ensure(config_of(write_texts("jsonl", [])))
    with pytest.raises(InputError, match="holds no document: too short 2"):
        catalog.ensure(config_of(write_texts("jsonl", ["", ""])))


def test_merges_are_learnt_from_a_share_of_the_train_split(
    catalog: DatasetCatalog, write_texts: WriteTexts
) -> None:
    texts = [f"zqx{number} " + chr(ord("a") + number % 26) * 500 for number in range(200)]
    tokenizer = {"kind": "bpe", "vocab_size": 600, "train_bytes": 20_000}
    config = config_of(write_texts("jsonl", texts), text={**TEXT, "tokenizer": tokenizer})
    few, _ = catalog.ensure(config)
    tokenizer = {**tokenizer, "train_bytes": 10**6}
    config = config_of(write_texts("jsonl", texts), text={**TEXT, "tokenizer": tokenizer})
    many, _ = catalog.ensure(config)
    assert few.text.num_tokens["train"] > many.text.num_tokens["train"]
    assert few.text.num_documents == many.text.num_documents


def test_one_long_text_is_cut_by_position_and_known_by_its_characters(
    catalog: DatasetCatalog, tmp_path: Path
) -> None:
    lines = [f"line {number}: 定日镜 turns\n" for number in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    config = DataConfig(
        name="one",
        source={"kind": "text", "paths": [str(tmp_path / "a.txt")]},
        splits={"by": "position", "validation": 0.1, "test": 0},
        text={"tokenizer": {"kind": "characters"}, "sequence_length": 16},
    )
    dataset, _ = catalog.ensure(config)
    assert dataset.text.vocab_size == len(set("".join(lines))) + 1
    (train,), (validation,) = (documents_of(dataset, s) for s in ("train", "validation"))
    whole = "".join(lines)
    assert whole.startswith(train)
    assert validation in whole
    assert len(validation) == pytest.approx(0.1 * len(whole), abs=30)
    assert dataset.text.num_documents == {"train": 1, "validation": 1, "test": 0}


def test_a_character_that_only_held_out_text_has_is_refused(
    catalog: DatasetCatalog, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("abc\n" * 900 + "z\n" * 100)
    values: dict[str, Any] = {
        "name": "one",
        "source": {"kind": "text", "paths": [str(tmp_path / "a.txt")]},
        "splits": {"by": "position", "validation": 0.1, "test": 0},
    }
    text = {"tokenizer": {"kind": "characters"}, "sequence_length": 16}
    with pytest.raises(InputError, match=r"a\.txt': character 'z' is held out"):
        catalog.ensure(DataConfig(**values, text=text))
    text = {"tokenizer": {"kind": "characters", "more": "z"}, "sequence_length": 16}
    assert catalog.ensure(DataConfig(**values, text=text))[0].text.vocab_size == 6


def test_a_file_is_not_read_again_unless_it_changed(
    catalog: DatasetCatalog, write_texts: WriteTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_texts("jsonl", [f"document {number} goes on" for number in range(60)])
    settled_s = path.stat().st_mtime - 100
    os.utime(path, (settled_s, settled_s))
    config = config_of(path)
    first, _ = catalog.ensure(config)

    def refuse(*_arguments: object, **_named: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.data.catalog.read_source", refuse)
        again, is_new = catalog.ensure(config)
        assert (again.info.digest, is_new) == (first.info.digest, False)
        os.utime(path, (settled_s + 1, settled_s + 1))
        with pytest.raises(AssertionError, match="read again"):
            catalog.ensure(config)
    # The content is the same, so the dataset is.
    assert not catalog.ensure(config)[1]


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, write_texts: WriteTexts) -> None:
    path = write_texts("jsonl", [f"document {number} goes on" for number in range(60)])
    config = config_of(path)
    content = read_source(config)
    path.write_text(path.read_text().replace("document 59", "document 95"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"changed while it was prepared; run the same"):
        prepare_into(tmp_path / "out", config, content)


def test_progress_is_said_every_few_seconds_at_most() -> None:
    now_s = 0.0
    said: list[str] = []
    progress = Progress("encoding", total_bytes=4_000_000, say=said.append, clock=lambda: now_s)
    for _ in range(20):
        now_s += 0.5
        progress.add(documents=1000, size_bytes=100_000, tokens=25_000)
    assert said == [
        "encoding: 10,000 documents, 1.0 MB (25%), 250,000 tokens (50,000/s)",
        "encoding: 20,000 documents, 2.0 MB (50%), 500,000 tokens (50,000/s)",
    ]


_MEASURE = """
import resource, sys
from pathlib import Path
from jobs.data.config import DataConfig
from jobs.data.preparation import prepare_into, read_source

def prepare(path):
    config = DataConfig(
        name="big", source={"kind": "jsonl", "paths": [path]},
        splits={"validation": 0.1, "test": 0},
        text={"tokenizer": {"kind": "characters"}, "sequence_length": 512},
    )
    directory = Path(path + ".out")
    directory.mkdir()
    prepare_into(directory, config, read_source(config))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = prepare(sys.argv[1])
print(prepare(sys.argv[2]) - before)
"""


@pytest.mark.parametrize("num_documents", [30_000, pytest.param(300_000, marks=pytest.mark.soak)])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, num_documents: int) -> None:
    """The text alone is several times what preparing it adds to the process's peak.

    The first, small corpus takes what any preparation takes, libraries included.
    """
    small, big = tmp_path / "small.jsonl", tmp_path / "big.jsonl"
    for path, count in ((small, 6_000), (big, num_documents)):
        with path.open("w") as file:
            for number in range(count):
                file.write(f'{{"text": "{number} {"the sun turns " * 140}"}}\n')
    size_bytes = big.stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, small, big], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < size_bytes / 3, f"{int(run.stdout):,} of {size_bytes:,}"


def test_storage_and_sources_may_lie_in_an_object_store(
    tmp_path: Path,
    write_texts: WriteTexts,
    s3_root: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    storage = Storage.open(s3_root.replace("/root?", "/prepared?"))
    bucket, _, options = s3_root.replace("test:test@", "").partition("/root?")
    digests = set()
    for kind in ("jsonl", "parquet", "arrow"):
        for part in range(2):
            texts = [f"document {number} says 你好" for number in range(part * 40, part * 40 + 40)]
            path = write_texts(kind, texts, name=f"part{part}")
            storage.write_bytes(f"corpus/{kind}/{path.name}", path.read_bytes())
        location = f"{bucket}/prepared/corpus/{kind}/*.{kind}?{options}"
        config = config_of("", source={"kind": kind, "paths": [location]})
        catalog = DatasetCatalog(storage, tmp_path / "cache")
        dataset, is_new = catalog.ensure(config)
        assert is_new
        assert not DatasetCatalog(storage, tmp_path / "other").ensure(config)[1]
        assert dataset.text.num_read == 80
        digests.add(dataset.info.files["train.arrow"].sha256)
    assert len(digests) == 1
    for path in dataset.tokenizer_dir.iterdir():
        storage.write_bytes(f"tokenizer/{path.name}", path.read_bytes())
    tokenizer = {"kind": "existing", "path": f"{bucket}/prepared/tokenizer?{options}"}
    text = {**TEXT, "tokenizer": tokenizer}
    again, _ = catalog.ensure(config.model_copy(update={"text": repeat(config, text)}))
    assert again.info.files["train.arrow"].sha256 in digests
    missing = config_of("", source={"kind": "jsonl", "paths": [f"{bucket}/none/*.jsonl?{options}"]})
    with pytest.raises(InputError, match=r"data file 's3://bucket/none/") as caught:
        catalog.ensure(missing)
    assert "\n" not in str(caught.value)


def test_a_place_that_nothing_reaches_is_refused(catalog: DatasetCatalog) -> None:
    with pytest.raises(InputError, match=r"ftp://… cannot be opened: .*; expected a path, s3://"):
        catalog.ensure(config_of("ftp://host/a.jsonl"))


@pytest.mark.parametrize("user", ["me:secret@bucket", "me@bucket", "me:sec/ret@bucket", "me:x"])
def test_credentials_in_a_location_are_refused(user: str) -> None:
    with pytest.raises(ValueError, match="credentials belong in the environment"):
        config_of(f"s3://{user}/a.jsonl")


@pytest.mark.parametrize("location", ["s3://bucket/a@b:c.jsonl", "hdfs://host:80/a", "a/b@c:d/*"])
def test_a_location_without_credentials_is_taken(location: str) -> None:
    assert config_of(location)
