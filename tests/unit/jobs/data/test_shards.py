"""Reading documents from files of every format, in pieces."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from jobs.data.config import (
    ChatSource,
    ColumnarSource,
    JsonLinesSource,
    LanguageSource,
    TextSource,
)
from jobs.data.locations import SourceFile, list_files, opened, read_location
from jobs.data.shards import Plan, plan_shards, read_shard
from tests.unit.jobs.data.conftest import WriteTexts

TEXTS = [f"document {number}, 定日镜" + "\n" * (number % 3) for number in range(50)]


def source_of(path: Path | str, **values: Any) -> LanguageSource:
    kind = {".jsonl": "jsonl", ".gz": "jsonl", ".parquet": "parquet"}.get(
        Path(path).suffix, "arrow"
    )
    if kind == "jsonl":
        return JsonLinesSource(kind="jsonl", paths=(str(path),), **values)
    return ColumnarSource(kind=kind, paths=(str(path),), **values)


def read_all(source: LanguageSource, plan: Plan) -> list[str]:
    return [document.text for shard in plan.shards for document in read_shard(source, shard)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "arrows"])
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20])
def test_every_format_gives_every_document_in_order(
    write_texts: WriteTexts, kind: str, shard_bytes: int
) -> None:
    source = source_of(write_texts(kind, TEXTS))
    plan = plan_shards(source, shard_bytes)
    assert read_all(source, plan) == TEXTS
    assert len(plan.shards) == 1 or shard_bytes < 1 << 20


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    shard_bytes=st.integers(1, 90),
    end=st.sampled_from(["", "\n", "\n\n  \n"]),
)
def test_a_line_is_read_once_wherever_ranges_cut(
    tmp_path: Path, texts: list[str], shard_bytes: int, end: str
) -> None:
    path = tmp_path / "cut.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + end, encoding="utf-8", newline="")
    source = source_of(path)
    assert read_all(source, plan_shards(source, shard_bytes)) == texts


def test_a_compressed_file_is_one_shard(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "a%d"}\n' % n for n in range(999))))
    source = source_of(path)
    plan = plan_shards(source, 10)
    assert read_all(source, plan) == [f"a{number}" for number in range(999)]
    assert len(plan.shards) == 1


def test_files_are_taken_in_the_order_of_the_patterns_and_once(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "deep/e.md"):
        (tmp_path / name).write_text(name)
    patterns = (f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt", f"file://{tmp_path}/**/*.md")
    source = TextSource(kind="text", paths=patterns)
    expected = ["b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "deep/e.md"]
    assert read_all(source, plan_shards(source)) == expected
    remote = TextSource(kind="text", paths=(f"file://{tmp_path}/**/*.txt",))
    assert read_all(remote, plan_shards(remote)) == sorted(expected[:4])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"bad\.jsonl:31' is not JSON: Expecting ',' delimiter"),
        ("[1]", r"bad\.jsonl:31' is a list, expected a JSON object"),
        ('{"body": "a"}', r"bad\.jsonl:31' has no field 'text', it has: body; correct"),
        ('{"text": null}', r"bad\.jsonl:31': field 'text' is null, expected a text"),
        ('{"text": 3}', r"bad\.jsonl:31': field 'text' is a number, expected a text"),
        (f'{{"n": {"9" * 5000}}}', r"bad\.jsonl:31' is not JSON: Exceeds the limit \(4300 digits"),
    ],
)
@pytest.mark.parametrize("shard_bytes", [50, 1 << 20])
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str, shard_bytes: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' * 30 + line + '\n{"text": "fine"}\n')
    source = source_of(path)
    with pytest.raises(InputError, match=message) as caught:
        read_all(source, plan_shards(source, shard_bytes))
    assert "\n" not in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "a\xff"}\n')
    source = source_of(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"bad\.jsonl:2' is not UTF-8 text \(byte 11 of the line"):
        read_all(source, plan_shards(source))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_that_is_missing_or_no_text_is_named(write_texts: WriteTexts, kind: str) -> None:
    path = write_texts(kind, TEXTS)
    with pytest.raises(InputError, match="has no field 'body', it has: id, text"):
        plan_shards(source_of(path, text_field="body"))
    with pytest.raises(InputError, match="field 'id' holds int64, expected text"):
        plan_shards(source_of(path, text_field="id"))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_an_empty_cell_is_named_by_row(write_texts: WriteTexts, kind: str) -> None:
    source = source_of(write_texts(kind, [*TEXTS[:9], None, "b"]))
    with pytest.raises(InputError, match=r"row (10|3 from record batch 1)': field 'text' is null"):
        read_all(source, plan_shards(source, 1))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_a_truncated_file_is_refused_in_one_line(write_texts: WriteTexts, kind: str) -> None:
    path = write_texts(kind, TEXTS)
    path.write_bytes(path.read_bytes()[:-40])
    source = source_of(path)
    with pytest.raises(InputError, match=r"is not a whole (Parquet|Arrow) file") as caught:
        read_all(source, plan_shards(source))
    assert "\n" not in str(caught.value)


def write_table(path: Path, table: pa.Table) -> LanguageSource:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return source_of(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_cell_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    cells = pa.array([b"fine", b"a\xff"], pa.binary()).view(pa.string())
    source = write_table(tmp_path / name, pa.table({"text": cells}))
    with pytest.raises(InputError, match=rf"{name}, row 2': field 'text' is not UTF-8 .*byte 1\)"):
        read_all(source, plan_shards(source))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_field_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    source = write_table(tmp_path / name, pa.table([["a"], ["b"]], names=["text", "text"]))
    with pytest.raises(InputError, match=rf"{name}' has 2 fields named 'text', expected one"):
        plan_shards(source)


def test_a_stream_without_its_end_mark_is_refused(write_texts: WriteTexts) -> None:
    path = write_texts("arrows", TEXTS)
    path.write_bytes(path.read_bytes()[:-8])
    source = source_of(path)
    with pytest.raises(InputError, match="is not a whole Arrow file: it ends too early"):
        read_all(source, plan_shards(source))


def test_a_truncated_gz_file_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{n * n} {n**7}"}) + "\n" for n in range(999))
    path.write_bytes(gzip.compress(lines.encode())[:-20])
    source = source_of(path)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz' is not a whole gzip file: \w") as caught:
        read_all(source, plan_shards(source))
    assert "permissions" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_file_that_becomes_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    file = SourceFile(str(path), "", str(path), 9, 0)
    with pytest.raises(InputError, match=rf"{name}' is no regular file"), opened(file):
        pass
    with pytest.raises(InputError, match="is no regular file"):
        read_location(str(path), "data.text.tokenizer.chat_template")


@pytest.mark.parametrize("pattern", ["[ac]*.txt", "[!b].txt", "[a-c][!0-9].txt", "**/[[]d].txt"])
def test_a_class_of_characters_means_the_same_in_a_path_and_a_url(
    tmp_path: Path, pattern: str
) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "c1.txt", "cx.txt", "[d].txt", "[.txt"):
        (tmp_path / name).write_text(name)
    names = [
        sorted(Path(file.path).name for file in list_files([f"{prefix}{tmp_path}/{pattern}"]))
        for prefix in ("", "file://")
    ]
    assert names[0] == names[1] != []


def test_text_taken_for_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no table at all, only text that goes on\n" * 9)
    with pytest.raises(InputError, match="is not a whole Parquet file"):
        plan_shards(source_of(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", r"field 'messages' is no list of messages"),
        ([], r"field 'messages' is no list of messages"),
        (["hi"], r"message 1 is no object, expected a list of messages"),
        ([{"role": "user"}], r"'content' of message 1 is missing"),
        (
            [{"role": "user", "content": ["a"]}],
            r"'content' of message 1 is a list, expected a text",
        ),
        ([{"role": "user", "content": None}], r"'content' of message 1 is null, expected a text"),
        ([{"role": 3, "content": "a"}], r"'role' of message 1 is a number"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "c.jsonl").write_text("\n" + json.dumps({"messages": value}))
    source = ChatSource(kind="chat", paths=(str(tmp_path / "c.jsonl"),))
    with pytest.raises(InputError, match=r"c\.jsonl:2': " + message):
        read_all(source, plan_shards(source))
