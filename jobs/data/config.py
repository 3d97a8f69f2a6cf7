"""What a dataset is made of: the `data` section of every job, and the whole of `jobs.prepare`'s.

It knows nothing about files, tokenisers or models; it only says what is wanted.

    DataConfig(name="python_topics", source={"kind": "python_topics"})
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.config import StrictModel
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


class PythonTopicsSource(StrictModel):
    """The help texts that ship with Python (`pydoc_data.topics`): English, about 0.5 MB."""

    kind: Literal["python_topics"]


class TextSource(StrictModel):
    """UTF-8 text files; each file is one document."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or glob patterns (`corpus/**/*.txt`), relative to where the job runs."""


class SklearnSource(StrictModel):
    """A classification set that ships with scikit-learn."""

    kind: Literal["sklearn"]
    dataset: Literal["digits"]


Source = Annotated[PythonTopicsSource | TextSource | SklearnSource, Field(discriminator="kind")]


class SplitConfig(StrictModel):
    """Which share is held out. The choice depends on `seed` alone, never on the order of files."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share measured while training."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share never looked at while training."""
    by: Literal["row", "position"] = "row"
    """`row` holds out whole documents (or array rows), drawn at random; `position` cuts every
    document into a first part to train on, then validation, then test (for a single long text)."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_is_left(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        return self


class TextConfig(StrictModel):
    """How text becomes rows of token ids."""

    vocab_size: int = Field(4096, ge=257, le=2**24)
    """Tokens of the byte-level BPE trained on the train split: 256 bytes, the end-of-text token and
    merges; smaller if the corpus has fewer merges to give."""
    sequence_length: int = Field(256, ge=2)
    """Tokens predicted per row; a row stores one more, to predict from."""


class DataConfig(StrictModel):
    """A dataset: where it comes from, how it is split and how it is laid out."""

    name: Name
    source: Source
    splits: SplitConfig = SplitConfig()
    text: TextConfig = TextConfig()
    """For text sources only."""

    @model_validator(mode="after")
    def _text_options_need_text(self) -> DataConfig:
        if self.source.kind == "sklearn" and self.text != TextConfig():
            raise ValueError("'text' applies to text sources, and this one holds arrays")
        if self.source.kind == "sklearn" and self.splits.by != "row":
            raise ValueError("arrays can only be split by row")
        return self
