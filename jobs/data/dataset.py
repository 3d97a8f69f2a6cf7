"""A prepared dataset: a directory of rows per split, described and sealed by `dataset.json`.

    dataset.json                 what it holds, and the digest of every other file
    train.arrow  validation.arrow  test.arrow
    tokenizer/                   for text: a Hugging Face tokenizer's files

It knows nothing about where the data came from or how it will be used.

    dataset = Dataset.open(directory)
    dataset.rows("train").read(np.array([0, 1]))
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from cluster.config import StrictModel
from cluster.errors import InputError, NotFoundError
from jobs.data.config import DataConfig
from jobs.data.rows import Rows
from jobs.data.table_info import TableInfo
from jobs.data.tokenizer_files import TOKENIZER_FILE as TOKENIZER_FILE

DATASET_FILE = "dataset.json"
TOKENIZER_DIR = "tokenizer"
FORMAT_VERSION = 2

TOKENS, DOCUMENT_STARTS, LOSS_MASK = "tokens", "document_starts", "loss_mask"
"""Columns of tokenised text. The last two hold one bit per token (`numpy.packbits`): whether a
document begins there, and, for conversations alone, whether the token is to be predicted."""


class DataFile(StrictModel):
    sha256: str
    size_bytes: int = Field(ge=0)


class ColumnInfo(StrictModel):
    dtype: str
    shape: tuple[int, ...]
    """Shape of one row."""


class TextInfo(StrictModel):
    """What is particular to tokenised text."""

    tokenizer: Literal["bpe", "characters", "existing"]
    vocab_size: int
    end_id: int
    """Token that ends a document."""
    pad_id: int
    """Token that fills rows up, where any are."""
    chat_template_sha256: str = ""
    sequence_length: int
    has_loss_mask: bool = False
    num_read: int
    """Documents of the source."""
    left_out: dict[str, int]
    """Documents that are in no split, by reason: duplicate, too_short, too_long (in characters),
    too_many_tokens, no_answer (nothing to learn from)."""
    num_cut: int = 0
    """Conversations of which only the beginning is kept."""
    num_documents: dict[str, int]
    """Documents of each split; cut by position, a document counts in each that it has a part of."""
    num_tokens: dict[str, int]
    """Tokens of each split, before packing."""
    unigram_entropy: float
    """Nats per predicted token of the validation split under the train split's frequencies."""

    def lines(self) -> Iterator[str]:
        """What a user must know of what became of the documents."""
        kept = ", ".join(f"{split} {count:,}" for split, count in self.num_documents.items())
        yield f"documents {self.num_read:,} read: {kept}"
        if self.left_out:
            yield f"left out: {shown_reasons(self.left_out)}"
        if self.num_cut:
            yield f"conversations cut to {self.sequence_length + 1} tokens: {self.num_cut:,}"
        yield "tokens: " + ", ".join(f"{s} {count:,}" for s, count in self.num_tokens.items())


def shown_reasons(left_out: dict[str, int]) -> str:
    """`too short 3, duplicate 1`."""
    return ", ".join(
        f"{reason.replace('_', ' ')} {count:,}" for reason, count in left_out.items() if count
    )


class DatasetInfo(StrictModel):
    """The content of `dataset.json`."""

    format_version: int = FORMAT_VERSION
    name: str
    kind: Literal["tokens", "arrays"]
    config: DataConfig
    source_digest: str
    num_rows: dict[str, int]
    columns: dict[str, ColumnInfo]
    text: TextInfo | None = None
    table: TableInfo | None = None
    class_names: tuple[str, ...] = ()
    files: dict[str, DataFile]

    @property
    def digest(self) -> str:
        """Identity of the whole: of its description, which holds every file's digest."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Dataset:
    """An opened dataset directory."""

    def __init__(self, directory: Path, info: DatasetInfo) -> None:
        self.directory = directory
        self.info = info

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> Dataset:
        """Raises InputError if it is not a dataset or a file has changed since it was prepared."""
        path = directory / DATASET_FILE
        try:
            info = DatasetInfo.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise NotFoundError(
                f"'{directory}' is not a prepared dataset: it has no {DATASET_FILE}",
                hint="run jobs.prepare",
            ) from None
        except ValidationError as error:
            raise InputError(
                f"'{path}' is not a dataset description: {error.errors()[0]['msg']}",
                hint="delete the directory and run jobs.prepare again",
            ) from None
        if verify:
            _verify_files(directory, info)
        return cls(directory, info)

    @functools.cache  # noqa: B019 - datasets live as long as their process
    def rows(self, split: str) -> Rows:
        return Rows.open(self.directory / f"{split}.arrow")

    @property
    def tokenizer_dir(self) -> Path:
        """A Hugging Face tokenizer's files, as an exported model is to have them."""
        return self.directory / TOKENIZER_DIR

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer_dir / TOKENIZER_FILE

    @property
    def text(self) -> TextInfo:
        """Raises InputError for arrays."""
        if self.info.text is None:
            raise InputError(
                f"dataset '{self.info.name}' holds arrays, and this model family needs text",
                hint="choose a text source, or another model.family",
                param="model.family",
            )
        return self.info.text


def describe_files(directory: Path) -> dict[str, DataFile]:
    """Digest and size of every file but the description."""
    return {
        path.relative_to(directory).as_posix(): DataFile(
            sha256=hash_file(path), size_bytes=path.stat().st_size
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / DATASET_FILE
    }


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_info(directory: Path, info: DatasetInfo) -> None:
    text = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (directory / DATASET_FILE).write_text(text + "\n", encoding="utf-8")


def _verify_files(directory: Path, info: DatasetInfo) -> None:
    found: dict[str, Any] = describe_files(directory)
    for name, expected in info.files.items():
        if found.get(name) != expected:
            state = "is missing" if name not in found else "has changed since it was prepared"
            raise InputError(
                f"dataset '{info.name}': '{directory / name}' {state}",
                hint="delete the directory and run jobs.prepare again",
            )
