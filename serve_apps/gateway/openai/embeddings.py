"""OpenAI's embeddings, from graphs.

routes = build_routes(models, TextLimits())
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict

from cluster.errors import InputError, UpstreamFailedError
from cluster.processing import Array
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.access.callers import reading_tokens
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.http.requests import off_loop_if_large, parse_object, validate
from serve_apps.gateway.http.responses import JsonResponse
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.embedding_graph import EmbeddingGraph, Items, Prepared
from serve_apps.gateway.openai.schema import WHOLE, Many, ModelName, Tag, TextLimits
from serve_apps.gateway.telemetry.telemetry import note_embedded


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    input: Annotated[
        str | Many[str] | Many[int] | Many[Many[int]] | Many[float] | Many[Many[float]], WHOLE
    ]
    """Text, token ids or numbers; one or several."""
    encoding_format: Literal["float", "base64"] | None = None
    """In base64 are 32-bit floats, lowest byte first."""
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Supported where it is the number that the model gives."""
    user: Tag | None = None

    @property
    def items(self) -> Items:
        found = self.input
        if isinstance(found, str):
            return [found]
        is_one = bool(found) and isinstance(found[0], int | float)
        return cast(Items, [found] if is_one else found)


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def build_routes(models: Models, limits: TextLimits) -> list[Route]:
    """The one route."""

    @describes(
        "Vectors of texts, token ids or numbers",
        scopes=("infer",),
        body=EmbeddingRequest,
        answer=EmbeddingList,
    )
    async def embed(request: Request) -> Response:
        require_any(request, "infer")
        body = await request.body()
        asked = await off_loop_if_large(
            len(body), lambda: validate(EmbeddingRequest, parse_object(body))
        )

        async def work(model: ServedModel) -> Response:
            graph = EmbeddingGraph.of(model)
            graph.check_dimensions(asked.dimensions)
            prepared = await off_loop_if_large(
                len(body), lambda: graph.prepare(asked.items, limits), tokenises=True
            )
            async with reading_tokens(model.served, prepared.num_tokens):
                vectors = await _vectors(models, model, graph, prepared)
            note_embedded(prepared.num_tokens)
            return await off_loop_if_large(
                sum(vector.nbytes for vector in vectors),
                lambda: JsonResponse(_answer(asked, vectors, prepared.num_tokens)),
            )

        return await models.answer(asked.model, work, user=asked.user)

    return [Route("/v1/embeddings", embed, methods=["POST"])]


async def _vectors(
    models: Models, model: ServedModel, graph: EmbeddingGraph, prepared: Prepared
) -> list[Array]:
    """One for each input, in their order; asked for in batches that the model is made for."""
    vectors: dict[int, Array] = {}
    step = model.served.options.max_batch_size
    for indexes, arrays in prepared.groups:
        for start in range(0, len(indexes), step):
            part = {name: array[start : start + step] for name, array in arrays.items()}
            try:
                outputs = await models.infer(model, part)
            except InputError as error:
                error.param = "input"
                raise
            found = outputs[graph.output.name]
            if not np.isfinite(found).all():
                raise UpstreamFailedError(f"output '{graph.output.name}' holds NaN or infinity")
            vectors.update(zip(indexes[start : start + step], found, strict=True))
    return [vectors[index] for index in range(len(vectors))]


def _answer(asked: EmbeddingRequest, vectors: Sequence[Array], num_tokens: int) -> dict[str, Any]:
    is_base64 = asked.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _to_base64(vector) if is_base64 else np.ascontiguousarray(vector),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": asked.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _to_base64(vector: Array) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
