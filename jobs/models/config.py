"""What a model is made of: the `model` section of a training config, one type per family.

It loads no torch; `jobs.models.families` builds what is described here.

    CausalLmConfig(family="causal_lm", hidden_size=256, num_layers=6)
    PretrainedLmConfig(family="causal_lm", base="pydoc-lm@champion", lora={"rank": 8})
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from cluster.config import StrictModel
from jobs.data.config import Location

Metric = Literal[
    "loss", "perplexity", "next_token_accuracy",
    "accuracy", "precision", "recall", "f1",
    "mse", "rmse", "mae", "r2",
]  # fmt: skip
"""What a family may measure on held-out rows."""

HIGHER_IS_BETTER: frozenset[Metric] = frozenset(
    {"next_token_accuracy", "accuracy", "precision", "recall", "f1", "r2"}
)


class DistillationConfig(StrictModel):
    """Learn from a larger model's distribution over the next token, beside the text itself."""

    teacher: str = Field(min_length=1)
    """A registered language model: NAME, NAME@ALIAS or NAME/VERSION, with the data's tokenizer."""
    teacher_digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """What its package must have; empty takes what is there, and the run records it."""
    temperature: float = Field(2.0, gt=0)
    """Both distributions are softened by it."""
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss that the teacher has; the rest is the text's own cross-entropy."""


class LanguageModelConfig(StrictModel):
    """What holds for every language model, whether its weights are fresh or given."""

    family: Literal["causal_lm"]
    mask_documents: bool = False
    """Each document of a packed row sees itself alone, and its positions begin at 0."""
    loss_chunk_tokens: int = Field(512, ge=0)
    """Tokens whose logits exist at a time, in training and evaluation; 0 makes all at once."""
    distillation: DistillationConfig | None = None
    """None learns from the text alone. All logits of a micro-batch exist at once, twice."""


class CausalLmConfig(LanguageModelConfig):
    """A Llama-shaped decoder with fresh weights; vocabulary and row length come from the
    dataset."""

    hidden_size: int = Field(256, ge=8, le=2**18)
    num_layers: int = Field(6, ge=1, le=1000)
    num_heads: int = Field(8, ge=1, le=2**12)
    num_key_value_heads: int | None = Field(None, ge=1)
    """Fewer than `num_heads` shares keys and values among heads; None means as many."""
    intermediate_size: int | None = Field(None, ge=8, le=2**20)
    """Width of the feed-forward layers; None means 8/3 of `hidden_size`, rounded up to 32."""
    tie_embeddings: bool = True
    """One matrix for reading and for predicting tokens."""
    max_context_tokens: int | None = Field(None, ge=2)
    """Longest text the served model accepts; None means the row length it was trained on."""

    @property
    def feed_forward_size(self) -> int:
        """`intermediate_size`, settled."""
        return self.intermediate_size or -(-self.hidden_size * 8 // 96) * 32

    @model_validator(mode="after")
    def _heads_divide(self) -> CausalLmConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of "
                f"2 * num_heads = {2 * self.num_heads}"
            )
        if self.num_key_value_heads and self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class LoraConfig(StrictModel):
    """Train small matrices beside the base's, which stay as they are (LoRA, Hu et al. 2021).

    What is made is an adapter package, deployable wherever its base is registered.
    """

    rank: int = Field(8, ge=1)
    """Inner size of the added matrices."""
    alpha: float = Field(16, gt=0)
    """What they add is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into them."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Last names of the matrices they are added to (`[q_proj, v_proj]`); all-linear means every
    matrix of attention and feed-forward layers."""
    merge: bool = False
    """Add the trained matrices to the base's and package a whole language model."""

    @field_validator("target_modules")
    @classmethod
    def _names_of_inner_matrices(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("names nothing; leave it out for all of them")
        outer = {"lm_head", "embed_tokens"} & set(value if isinstance(value, tuple) else ())
        if outer:
            raise ValueError(f"'{min(outer)}' lies outside the layers, and stays as it is")
        return value


class PretrainedLmConfig(LanguageModelConfig):
    """A language model whose weights go on from `base`, which also decides its shape."""

    base: Location
    """A registered version (NAME, NAME@ALIAS, NAME/VERSION), or a Hugging Face causal-LM directory:
    a path with a slash, or s3://BUCKET/PREFIX."""
    base_digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """What the base must have; empty takes what is there, and the run records it."""
    lora: LoraConfig | None = None
    """None trains every weight."""
    keep_zeros: bool = False
    """Weights of matrices that are zero in the base stay zero: one that was pruned stays so."""

    @model_validator(mode="after")
    def _lora_leaves_the_base_alone(self) -> PretrainedLmConfig:
        if self.lora is not None and self.keep_zeros:
            raise ValueError("keep_zeros is for training the base's own weights: leave out lora")
        return self

    @model_validator(mode="before")
    @classmethod
    def _shape_is_the_bases(cls, values: Any) -> Any:
        own = CausalLmConfig.model_fields.keys() - cls.model_fields.keys()
        if isinstance(values, dict) and (given := sorted(own & values.keys())):
            raise ValueError(f"'{given[0]}' is decided by 'base': leave out one of the two")
        return values


class CnnConfig(StrictModel):
    """A small convolutional classifier of single-channel images."""

    family: Literal["cnn"]
    channels: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field((32, 64), min_length=1)
    """Output channels of the 3 × 3 convolutions; the last is followed by 2 × 2 max-pooling."""
    hidden_size: int = Field(128, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    feature: str = "pixels"
    """Column that holds the images."""
    label: str = "label"
    """Column that holds class numbers."""
    value_max: float = Field(16.0, gt=0)
    """Brightest value in the data; images are divided by it."""


class LinearRegressionConfig(StrictModel):
    """A number as a weighted sum of features."""

    family: Literal["linear_regression"]


class LogisticRegressionConfig(StrictModel):
    """Class scores as weighted sums of features, for two or more classes."""

    family: Literal["logistic_regression"]


class MlpConfig(StrictModel):
    """A multilayer perceptron: a classifier if the data's target is a class, else a regression."""

    family: Literal["mlp"]
    hidden_sizes: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = Field((64,), min_length=1)
    """Widths of the layers, each followed by ReLU and dropout."""
    dropout: float = Field(0.0, ge=0, lt=1)


def _weights(values: Any) -> str:
    given = "base" in values if isinstance(values, dict) else isinstance(values, PretrainedLmConfig)
    return "pretrained" if given else "fresh"


AnyLmConfig = Annotated[
    Annotated[CausalLmConfig, Tag("fresh")] | Annotated[PretrainedLmConfig, Tag("pretrained")],
    Discriminator(_weights),
]

ModelConfig = Annotated[
    AnyLmConfig | CnnConfig | LinearRegressionConfig | LogisticRegressionConfig | MlpConfig,
    Field(discriminator="family"),
]
