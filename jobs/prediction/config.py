"""What to predict from what, by which model: what `jobs.predict` reads.

PredictConfig(model="digits@champion", input="rows.parquet", output="storage://predictions/rows")
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cluster.config import StrictModel

MAX_DEFAULT_TOKENS = 1024


class GenerationConfig(StrictModel):
    """How a language model continues; a row's own value of the same name goes before these."""

    max_tokens: int | None = Field(None, ge=1)
    """None means what the context has room for, at most 1024."""
    temperature: float = Field(0.0, ge=0, le=2)
    """0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the most likely tokens whose probabilities add up to this."""
    top_k: int = Field(0, ge=0)
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this probable, as a share of the most likely one's probability."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from a token's logit for each time that the answer has it already."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logit of every token that the answer has already."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    """Divides positive, and multiplies negative, logits of tokens in the prompt or the answer."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Token id → what is added to its logit."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Each row draws with a seed of its own, which this and its number give."""
    stop: tuple[str, ...] = Field((), max_length=16)
    """The text ends before the first of these."""
    json_schema: str | None = None
    """The text is JSON that this schema, itself a text, describes."""
    regex: str | None = None
    """The text matches this regular expression from beginning to end."""


class PredictConfig(StrictModel):
    """One prediction of one model version over one input."""

    model: str
    """NAME, NAME@ALIAS or NAME/VERSION."""
    input: str
    """JSONL or Parquet: a file, a folder, a pattern, a URL, or `storage://KEY` in our storage."""
    output: str
    """A folder, s3://BUCKET/PATH, gs://BUCKET/PATH, or `storage://KEY` in our storage."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The model's input → the column that holds it, where their names differ."""
    tokens: str = ""
    """Column with the number of tokens that a row is charged; a language model counts its own."""
    keep: tuple[str, ...] = ()
    """Columns that are copied into the output, and to what is said of bad rows."""
    generation: GenerationConfig = GenerationConfig()
    rows_per_part: int = Field(1000, ge=1, le=1_000_000)
    """Rows that are written together, and lost together where the job is killed."""
    batch_size: int = Field(32, ge=1, le=65_536)
    """Rows that the model works on at once."""
    num_threads: int = Field(1, ge=1, le=256)
    """CPU threads of each worker."""
    num_gpus: float = Field(0, ge=0, le=1)
    """GPU of each worker, or the share of one."""
    num_workers: int = Field(1, ge=1, le=1024)
    """Workers on the cluster, each with the model in its memory."""
    num_cpus: float = Field(1, ge=0, le=256)
    """CPUs that each worker reserves."""
    nice: int = Field(0, ge=0, le=19)
    """How far workers stand back for others on the same CPUs: 19 leaves them nearly everything."""
    max_bad_rows: int | None = Field(100, ge=0)
    """More rows than this that cannot be predicted end the job; None never does."""
    tenant: str = "local"
    """Who is charged."""
    api_key_id: str = ""
    """The key on which it is charged, within its tenant's budget for the month: a row without room
    is a bad one. Empty means the MLflow run."""
    experiment: str = "predict"
    """MLflow experiment."""

    def identity(self) -> dict[str, Any]:
        """What decides every byte of the output, beside the model and the input."""
        return self.model_dump(mode="json", include=_DECIDES)


# Adding up in another order changes the last digits: batches, threads and devices count too.
_DECIDES = {
    "columns", "keep", "generation", "rows_per_part", "batch_size", "num_threads", "num_gpus",
}  # fmt: skip
