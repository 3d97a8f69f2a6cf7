"""OpenAI's protocol: models, completions and chat, whole or streamed.

routes = build_routes(models)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cluster.errors import HeliostatError
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.errors import server_sent
from serve_apps.gateway.http.openapi import EVENT_STREAM, JSON, describes
from serve_apps.gateway.http.paths import MODEL
from serve_apps.gateway.http.requests import off_loop_if_large
from serve_apps.gateway.http.responses import JsonResponse
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.answer_formats import check_formats
from serve_apps.gateway.openai.answers import (
    AnswerShape,
    ChatCompletion,
    ChatShape,
    Completion,
    CompletionShape,
    ModelCard,
    ModelList,
    event,
    model_card,
)
from serve_apps.gateway.openai.prompts import begin_chat, begin_completion, echo_of
from serve_apps.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    TextLimits,
    read_chat,
    read_completion,
)
from serve_apps.gateway.openai.text_generation import Piece, TextAnswers
from serve_apps.gateway.tensorflow_serving.routes import version_status


def build_routes(models: Models, limits: TextLimits) -> list[Route]:
    """The routes below /v1."""

    @describes("The models that are served", scopes=("models:read", "infer"), answer=ModelList)
    async def list_models(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        found = [await _find_or_none(models, name) for name in models.routes.names()]
        cards = [model_card(model) for model in found if model is not None]
        return JsonResponse({"object": "list", "data": cards})

    @describes("One model", scopes=("models:read", "infer"), answer=ModelCard)
    async def show_model(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        name = request.path_params["name"]
        model = await models.find(name)
        return JsonResponse(model_card(model, name) | version_status(models, model, name))

    @describes(
        "Continue a text",
        scopes=("infer",),
        body=CompletionRequest,
        answer=Completion,
        answer_types=(JSON, EVENT_STREAM),
    )
    async def complete(request: Request) -> Response:
        require_any(request, "infer")
        body = await request.body()
        asked = await off_loop_if_large(len(body), lambda: read_completion(body))

        async def work(model: ServedModel) -> Response:
            await check_formats(asked.response_format, asked.structured_outputs)
            answers = await off_loop_if_large(
                len(body), lambda: begin_completion(models, model, asked, limits), tokenises=True
            )
            shape = CompletionShape(asked, echo_of(asked, model))
            return await _respond(request, shape, answers)

        return await models.answer(asked.model, work, user=asked.user)

    @describes(
        "Answer a conversation",
        scopes=("infer",),
        body=ChatRequest,
        answer=ChatCompletion,
        answer_types=(JSON, EVENT_STREAM),
    )
    async def chat(request: Request) -> Response:
        require_any(request, "infer")
        body = await request.body()
        asked = await off_loop_if_large(len(body), lambda: read_chat(body))

        async def work(model: ServedModel) -> Response:
            await check_formats(asked.response_format, asked.structured_outputs)
            answers = await off_loop_if_large(
                len(body), lambda: begin_chat(models, model, asked, limits), tokenises=True
            )
            return await _respond(request, ChatShape(asked), answers)

        return await models.answer(asked.model, work, user=asked.user)

    return [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route(f"/v1/models/{{name:{MODEL}}}", show_model),
    ]


_Pieces = AsyncGenerator[tuple[int, Piece | None], None]


@dataclass
class _Started:
    """A stream whose first piece is here, so that what can fail early has."""

    first: tuple[int, Piece | None] | None
    rest: _Pieces

    async def pieces(self) -> _Pieces:
        try:
            if self.first is not None:
                yield self.first
                async for piece in self.rest:
                    yield piece
        finally:
            await self.rest.aclose()


async def _respond(request: Request, shape: AnswerShape, answers: TextAnswers) -> Response:
    if not shape.asked.stream:
        pieces = await answers.whole()
        return JsonResponse(shape.whole(answers, pieces))
    rest = answers.pieces()
    first = await anext(rest, None)
    events = _events(shape, answers, _Started(first, rest), request.url.path)
    headers = {"cache-control": "no-cache"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    shape: AnswerShape, answers: TextAnswers, started: _Started, path: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an error after the beginning is the last event before [DONE]."""
    pieces = started.pieces()
    try:
        for index in range(len(answers.answers)):
            opening = shape.opening(index)
            if opening is not None:
                yield event(opening)
        async for index, piece in pieces:
            if piece is not None:
                yield event(shape.chunk(index, piece))
            else:
                yield event(shape.closing(index, answers.answers[index].finish_reason))
        if shape.asked.includes_usage:
            yield event(shape.usage_chunk(answers))
    except Exception as error:
        yield server_sent(error, path).encode()
    finally:
        await pieces.aclose()
    yield b"data: [DONE]\n\n"


async def _find_or_none(models: Models, name: str) -> ServedModel | None:
    """One broken package must not hide the other models from a list."""
    try:
        return await models.look_up(name)
    except HeliostatError:
        return None
