"""A graph that gives embeddings, and what it takes.

One input of text, token ids or numbers, one vector for each; which of the three, its package
declares: BYTES [any], integers [any, any] (with an `attention_mask` and `token_type_ids` beside
them if it likes), or floats [any, F]. Text becomes token ids where the package holds a tokenizer.
Token ids of unequal length are never padded.

    graph = EmbeddingGraph.of(model)
    prepared = graph.prepare(["first", "second"], TextLimits())
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import InputError
from cluster.processing import TensorSpec, public_inputs, public_outputs
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.openai.prompts import check_length
from serve_apps.gateway.openai.schema import TextLimits

_MASK, _TYPES = "attention_mask", "token_type_ids"
"""What goes with token ids by the names that Hugging Face gave them."""
_OUTPUT_NAMES = ("embedding", "embeddings", "sentence_embedding")
"""Which of several vectors is meant."""
_MAX_TOKEN_ID = 2**31 - 1

Items = Sequence[str | Sequence[float]]


@dataclass(frozen=True)
class Prepared:
    """Inputs as the graph takes them."""

    groups: Sequence[tuple[Sequence[int], Arrays]]
    """Inputs that fit into one array, with their places in the request."""
    num_tokens: int
    """0 where the graph knows no tokens."""


@dataclass(frozen=True)
class EmbeddingGraph:
    """A graph with one input for a vector each."""

    model: ServedModel
    main: TensorSpec
    companions: tuple[TensorSpec, ...]
    output: TensorSpec

    @classmethod
    def of(cls, model: ServedModel) -> EmbeddingGraph:
        """Raises InputError for a model that is none."""
        manifest, name = model.manifest, model.served.name
        if manifest.kind != "graph":
            raise InputError(
                f"model '{name}' is a language model, it gives no embeddings",
                hint="name a graph, or call /v1/completions",
                param="model",
            )
        sent = [s for s in public_inputs(manifest) if s.name not in manifest.processing.raw_inputs]
        companions = tuple(spec for spec in sent if spec.name in (_MASK, _TYPES))
        main = [spec for spec in sent if spec not in companions]
        outputs = [
            spec
            for spec in public_outputs(manifest)
            if spec.datatype.startswith("FP") and len(spec.shape) == 2
        ]
        named = [spec for spec in outputs if spec.name in _OUTPUT_NAMES]
        chosen = named if len(outputs) > 1 else outputs
        if len(main) != 1 or len(chosen) != 1 or not _is_understood(main[0]):
            raise InputError(
                f"model '{name}' gives no embeddings: that takes one input of text, token ids or "
                "numbers, and one vector for each, called 'embedding' if there are several",
                hint=f"call /v2/models/{name}/infer",
                param="model",
            )
        return cls(model, main[0], companions, chosen[0])

    @property
    def takes_tokens(self) -> bool:
        """Whether what it takes are token ids."""
        return self.main.datatype.startswith("INT")

    def check_dimensions(self, dimensions: int | None) -> None:
        given = self.output.shape[1]
        if dimensions not in (None, given):
            raise InputError(
                f"parameter 'dimensions' is {dimensions}, which is not supported: this model "
                f"gives {given if given > 0 else 'its own number'}",
                hint="leave it out",
                param="dimensions",
            )

    def prepare(self, items: Items, limits: TextLimits) -> Prepared:
        """Raises InputError for what the graph does not take, or the limits forbid."""
        _check_items(items, limits)
        if self.main.datatype == "BYTES":
            return Prepared([(range(len(items)), self._texts(items, limits))], 0)
        if self.main.datatype.startswith("FP"):
            return Prepared([(range(len(items)), self._numbers(items))], 0)
        tokens = [self._tokens(index, item, limits) for index, item in enumerate(items)]
        return Prepared(list(self._by_length(tokens)), sum(map(len, tokens)))

    def _texts(self, items: Items, limits: TextLimits) -> Arrays:
        array = np.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            if not isinstance(item, str):
                raise _wrong(index, f"is no text, and model '{self.model.served.name}' takes text")
            if len(item) > limits.max_prompt_characters:
                raise _wrong(
                    index,
                    f"has {len(item)} characters, at most {limits.max_prompt_characters} are "
                    "allowed",
                )
            array[index] = item.encode()
        return {self.main.name: array.reshape(-1, *([1] * (len(self.main.shape) - 1)))}

    def _numbers(self, items: Items) -> Arrays:
        wanted = self.main.shape[1]
        size = wanted if wanted > 0 else len(items[0])
        for index, item in enumerate(items):
            if isinstance(item, str):
                raise _wrong(index, f"is text, and model '{self.model.served.name}' takes numbers")
            if len(item) != size:
                raise _wrong(index, f"has {len(item)} numbers, expected {size}")
        with np.errstate(over="ignore"):  # infinity is refused with the other values
            return {self.main.name: np.array(items, dtype=self.main.numpy_dtype)}

    def _tokens(
        self, index: int, item: str | Sequence[float], limits: TextLimits
    ) -> Sequence[float]:
        limit = limits.max_embedding_tokens
        if isinstance(item, str):
            text = self.model.text
            if text is None:
                raise _wrong(
                    index,
                    f"is text, and model '{self.model.served.name}', which has no tokenizer, takes "
                    "token ids",
                )
            check_length(len(item), text, limit, limits, param=f"input.{index}")
            item = text.encode(item)
        if len(item) > limit:
            raise _wrong(index, f"has {len(item)} tokens, at most {limit} are allowed")
        for token in item:
            if not isinstance(token, int) or not 0 <= token <= _MAX_TOKEN_ID:
                raise _wrong(index, f"holds {token!r:.30}, which is no token id")
        return item

    def _by_length(
        self, tokens: Sequence[Sequence[float]]
    ) -> Iterator[tuple[Sequence[int], Arrays]]:
        places: dict[int, list[int]] = {}
        for index, item in enumerate(tokens):
            places.setdefault(len(item), []).append(index)
        for indexes in places.values():
            ids = np.array([tokens[index] for index in indexes])
            arrays = {self.main.name: ids.astype(self.main.numpy_dtype)}
            for spec in self.companions:
                fill = 1 if spec.name == _MASK else 0
                arrays[spec.name] = np.full(ids.shape, fill, dtype=spec.numpy_dtype)
            yield indexes, arrays


def _check_items(items: Items, limits: TextLimits) -> None:
    if not 0 < len(items) <= limits.max_embedding_inputs:
        raise InputError(
            f"parameter 'input' has {len(items)} inputs, expected 1 to "
            f"{limits.max_embedding_inputs}",
            param="input",
        )
    for index, item in enumerate(items):
        if len(item) == 0:
            raise _wrong(index, "is empty")


def _is_understood(spec: TensorSpec) -> bool:
    if spec.datatype == "BYTES":
        return spec.shape in ((-1,), (-1, 1))
    is_matrix = len(spec.shape) == 2 and spec.shape[0] == -1
    return is_matrix and (spec.datatype.startswith("FP") or spec.datatype in ("INT32", "INT64"))


def _wrong(index: int, what: str) -> InputError:
    return InputError(f"input {index} {what}", param=f"input.{index}")
