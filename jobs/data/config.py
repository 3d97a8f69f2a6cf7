"""What a dataset is made of: the `data` section of every job, and the whole of `jobs.prepare`'s.

It knows nothing about files, tokenisers or models; it only says what is wanted.

    DataConfig(name="python_topics", source={"kind": "python_topics"})
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cluster.config import CONFIDENTIAL, StrictModel
from cluster.errors import InvalidReferenceError
from cluster.model_ref import check_name


def _usable_as_a_folder(value: str) -> str:
    try:
        return check_name(value)
    except InvalidReferenceError as error:
        # pydantic reports a ValueError with the key it belongs to.
        raise ValueError(error.hint) from None


Name = Annotated[str, AfterValidator(_usable_as_a_folder)]
"""A name of a dataset, run or model: also a folder's."""

Column = str | int
"""A column's name, or its number from 0; -1 is the last."""

# A secret key may hold slashes: what follows a colon there is a port or no part of a host.
_CREDENTIALS = re.compile(r"[^:/]+://([^/?]*@|[^/?@]*:(?!\d*([/?]|$)))")


class PythonTopicsSource(StrictModel):
    """The help texts that ship with Python (`pydoc_data.topics`): English, about 0.5 MB."""

    kind: Literal["python_topics"]


def refuse_credentials(location: str) -> str:
    """Return a location, unless it is a URL that names a user or a key before its host."""
    if _CREDENTIALS.match(location):
        # The config is stored with the dataset and shown with every run.
        raise PydanticCustomError(
            CONFIDENTIAL, "credentials belong in the environment (AWS_ACCESS_KEY_ID, …)"
        )
    return location


Location = Annotated[str, AfterValidator(refuse_credentials), Field(min_length=1)]
"""A path relative to where the job runs, or a URL: `s3://bucket/path`, `gs://…`, `file://…`;
options of an object store follow a question mark (`?region=…&endpoint_override=…`)."""

Locations = Annotated[tuple[Location, ...], Field(min_length=1)]
"""Files or glob patterns: `corpus/**/*.jsonl`, `s3://bucket/corpus/*.parquet`."""


class TextSource(StrictModel):
    """UTF-8 text files; each file is one document."""

    kind: Literal["text"]
    paths: Locations


class JsonLinesSource(StrictModel):
    """A JSON object per line, each one document; files may end in .gz, .bz2 or .zst."""

    kind: Literal["jsonl"]
    paths: Locations
    text_field: str = "text"


class ChatSource(StrictModel):
    """A conversation per line: JSON with a list of `{"role": …, "content": …}`.

    Roles go to the tokenizer's chat template as they are, and it may refuse some; the turns of
    `assistant` are learnt.
    """

    kind: Literal["chat"]
    paths: Locations
    messages_field: str = "messages"


class PythonHelpSource(StrictModel):
    """What Python's functions do, asked and answered from their help: conversations that ship with
    Python, about 1,700 of one question each."""

    kind: Literal["python_help"]


class ColumnarSource(StrictModel):
    """Parquet files, or Arrow files (IPC file or stream format); each row is one document."""

    kind: Literal["parquet", "arrow"]
    paths: Locations
    text_field: str = "text"


class SklearnSource(StrictModel):
    """A set that ships with scikit-learn: digits are images, the others are tables."""

    kind: Literal["sklearn"]
    dataset: Literal["digits", "breast_cancer", "diabetes", "iris", "wine"]


class TableSource(StrictModel):
    """A table in one file: `.csv`, `.parquet`, or a `.txt` matrix with blanks between its cells.

    The first line of a CSV or text file names the columns if no cell of it is a number; otherwise
    they are called 0, 1, …
    """

    kind: Literal["table"]
    path: Location
    """Relative to where the job runs."""
    target: Column
    """The column to predict."""
    task: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()
    """For classification: the labels that may occur; empty means those that do."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """For CSV."""

    @model_validator(mode="after")
    def _classes_are_for_classification(self) -> TableSource:
        if self.classes and self.task == "regression":
            raise ValueError("'classes' applies to task classification")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("'classes' names a class twice")
        return self


ConversationSource = ChatSource | PythonHelpSource
LanguageSource = (
    PythonTopicsSource | TextSource | JsonLinesSource | ColumnarSource | ConversationSource
)
Source = Annotated[LanguageSource | SklearnSource | TableSource, Field(discriminator="kind")]


class TableConfig(StrictModel):
    """How a table's cells become numbers. Every statistic is of the train split alone, and what was
    changed is counted, printed and logged."""

    features: tuple[Column, ...] = ()
    """Columns to predict from; empty means all but the target."""
    exclude: tuple[Column, ...] = ()
    """Columns to leave out."""
    missing: Literal["refuse", "drop", "impute_mean", "impute_median"] = "refuse"
    """What an empty cell (also NA, NaN, null, None, ?) means: an error, its row left out of every
    split, or the feature's mean or median in its place."""
    missing_target: Literal["refuse", "drop"] = "refuse"
    """What an empty target means, unless `missing` is drop: it is never made up."""
    outliers: Literal["keep", "drop", "clip"] = "keep"
    """What to do with training rows that lie outside a feature's fences: nothing, leave them out,
    or move them to the fence. Validation and test rows stay as they are, as requests do."""
    outlier_iqr: float = Field(3.0, gt=0)
    """The fences are Q1 - k * IQR and Q3 + k * IQR with this k (Tukey); a feature whose quartiles
    are equal has none."""


class SplitConfig(StrictModel):
    """Which share is held out. The choice depends on `seed` alone, never on the order of files."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share measured while training."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share never looked at while training."""
    by: Literal["row", "position"] = "row"
    """`row` holds out whole documents (or array rows), drawn at random; `position` cuts every
    document into a first part to train on, then validation, then test (for a single long text)."""
    seed: int = Field(0, ge=0, lt=2**63)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Splits that must not be empty."""
        shares = {"train": 1.0, "validation": self.validation, "test": self.test}
        return tuple(split for split, share in shares.items() if share > 0)

    @model_validator(mode="after")
    def _something_is_left(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        return self


class BpeTokenizer(StrictModel):
    """A byte-level BPE trained on the train split: it can write any text."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257, le=2**24)
    """256 bytes, the end-of-text token and merges; smaller if the corpus has fewer to give."""
    train_bytes: int = Field(100_000_000, ge=1)
    """Most text to learn merges from; documents are drawn evenly from the train split."""


class CharacterTokenizer(StrictModel):
    """A token for each character of the train split, and one that ends documents."""

    kind: Literal["characters"]
    more: str = ""
    """Characters to know besides those. Any other in the data is refused by name; in a prompt it is
    passed over."""


class ExistingTokenizer(StrictModel):
    """A Hugging Face tokenizer as it is: `tokenizer.json`, its configuration and chat template.
    Code that comes with it is refused, never run."""

    kind: Literal["existing"]
    path: Location
    """Directory."""
    chat_template: Location | None = None
    """A Jinja file to use, and to keep, in place of the tokenizer's own."""


TokenizerConfig = Annotated[
    BpeTokenizer | CharacterTokenizer | ExistingTokenizer, Field(discriminator="kind")
]


class TextConfig(StrictModel):
    """How text becomes rows of token ids."""

    tokenizer: TokenizerConfig = BpeTokenizer()
    deduplicate: bool = True
    """Keep the first of documents that are equal in every character."""
    min_characters: int = Field(1, ge=0)
    """Shorter documents are left out."""
    max_characters: int | None = Field(None, ge=1)
    """Longer documents are left out."""
    long_conversations: Literal["cut", "drop"] = "cut"
    """What to do with a conversation of more than `sequence_length` + 1 tokens."""
    sequence_length: int = Field(256, ge=2, le=2**17)
    """Tokens predicted per row; a row stores one more, to predict from. The limit is
    the context of today's open models; planning a longer row would take minutes."""


class DataConfig(StrictModel):
    """A dataset: where it comes from, how it is split and how it is laid out."""

    name: Name
    source: Source
    splits: SplitConfig = SplitConfig()
    text: TextConfig = TextConfig()
    """For text sources only."""
    table: TableConfig = TableConfig()
    """For tables only."""

    @property
    def kind(self) -> Literal["text", "images", "table"]:
        if self.source.kind == "table":
            return "table"
        if self.source.kind == "sklearn":
            return "images" if self.source.dataset == "digits" else "table"
        return "text"

    @property
    def is_chat(self) -> bool:
        """Whether the source holds conversations, of which the answers are learnt."""
        return isinstance(self.source, ConversationSource)

    @property
    def source_of_text(self) -> LanguageSource:
        assert not isinstance(self.source, SklearnSource | TableSource)
        return self.source

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> DataConfig:
        if self.kind != "text" and self.text != TextConfig():
            raise ValueError("'text' applies to text sources, and this one holds arrays")
        if self.kind != "text" and self.splits.by != "row":
            raise ValueError("arrays can only be split by row")
        if self.is_chat and self.splits.by != "row":
            raise ValueError("conversations can only be split by row")
        if self.is_chat and self.text.tokenizer.kind != "existing":
            raise ValueError(
                "conversations need text.tokenizer of kind 'existing', with a chat template"
            )
        if self.kind != "table" and self.table != TableConfig():
            raise ValueError(f"'table' applies to tables, and this source holds {self.kind}")
        return self
