"""OpenAI's protocol: models, completions and chat, whole or streamed.

router = build_router(models)
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.errors import HeliostatError, InputError, UsageError
from serve_apps.gateway.authentication import require_any
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.errors import server_sent
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai_answers import (
    AnswerShape,
    ChatShape,
    CompletionShape,
    event,
    model_card,
)
from serve_apps.gateway.openai_schema import (
    CompletionRequest,
    Generation,
    read_chat,
    read_completion,
)
from serve_apps.gateway.requests import off_loop_if_large
from serve_apps.gateway.text_generation import TextAnswer
from serve_apps.llm.engine import EngineRequest, Sampling, check_request

MODEL_VERSION_HEADER = "x-model-version"
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default."""
_DEFAULT_CHAT_TOKENS = 1024

ResultType = TypeVar("ResultType")


class ClientGoneError(UsageError):
    """The client closed the connection before its answer was ready; nobody reads this."""

    code = "client_closed_request"
    http_status = 499


def build_routes(models: Models) -> list[Route]:
    """The routes below /v1."""

    async def list_models(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        found = [await _find_or_none(models, name) for name in models.routes.names()]
        cards = [model_card(model) for model in found if model is not None]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        name = request.path_params["name"]
        return JSONResponse(model_card(await models.find(name), name))

    async def complete(request: Request) -> Response:
        require_any(request, "infer")
        body = await request.body()
        asked = await off_loop_if_large(len(body), lambda: read_completion(body))
        model = await models.find(asked.model)
        prompt_ids = await off_loop_if_large(len(body), lambda: _completion_prompt(asked, model))
        answer = _begin(models, model, asked, prompt_ids, asked.max_tokens)
        return await _respond(request, CompletionShape(asked), answer, model)

    async def chat(request: Request) -> Response:
        require_any(request, "infer")
        body = await request.body()
        asked = await off_loop_if_large(len(body), lambda: read_chat(body))
        model = await models.find(asked.model)
        text, info = model.require_text()
        messages = [message.for_template() for message in asked.messages]
        prompt_ids = await off_loop_if_large(len(body), lambda: text.encode_chat(messages))
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        if max_tokens is None:
            room = info.max_context_tokens - len(prompt_ids)
            max_tokens = max(1, min(room, _DEFAULT_CHAT_TOKENS))
        answer = _begin(models, model, asked, prompt_ids, max_tokens)
        return await _respond(request, ChatShape(asked), answer, model)

    return [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
    ]


@dataclass
class _Started:
    """A stream whose first piece is here, so that what can fail early has."""

    first: str | None
    rest: AsyncGenerator[str, None]

    async def pieces(self) -> AsyncGenerator[str, None]:
        try:
            if self.first is not None:
                yield self.first
                async for piece in self.rest:
                    yield piece
        finally:
            await self.rest.aclose()


async def _respond(
    request: Request, shape: AnswerShape, answer: TextAnswer, model: ServedModel
) -> Response:
    headers = {MODEL_VERSION_HEADER: str(model.served)}
    if not shape.asked.stream:
        text = await _unless_client_leaves(request, answer.whole)
        return JSONResponse(shape.whole(text, answer), headers=headers)
    pieces = answer.pieces()
    first = await _unless_client_leaves(request, lambda: anext(pieces, None))
    events = _events(shape, answer, _Started(first, pieces), request.url.path)
    headers["cache-control"] = "no-cache"
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    shape: AnswerShape, answer: TextAnswer, started: _Started, path: str
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error after the beginning is the last event before [DONE]."""
    pieces = started.pieces()
    try:
        opening = shape.opening()
        if opening is not None:
            yield event(shape.chunk(opening, None))
        async for piece in pieces:
            yield event(shape.chunk(shape.text_delta(piece), None))
        yield event(shape.chunk(shape.closing(), answer.finish_reason))
        if shape.asked.includes_usage:
            yield event(shape.usage_chunk(answer))
    except Exception as error:
        yield server_sent(error, path)
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


async def _unless_client_leaves(
    request: Request, work: Callable[[], Awaitable[ResultType]]
) -> ResultType:
    """The result of `work`, which is cancelled when the client closes the connection."""
    task = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("the client closed the connection")
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _completion_prompt(asked: CompletionRequest, model: ServedModel) -> list[int]:
    text, _ = model.require_text()
    prompt = asked.single_prompt()
    prompt_ids = text.encode(prompt) if isinstance(prompt, str) else prompt
    if not prompt_ids:
        raise InputError(
            "parameter 'prompt' is empty, and this model has no beginning-of-text token",
            hint="send at least one character",
            param="prompt",
        )
    return prompt_ids


def _begin(
    models: Models,
    model: ServedModel,
    asked: Generation,
    prompt_ids: list[int],
    max_tokens: int | None,
) -> TextAnswer:
    _, info = model.require_text()
    sampling = Sampling(
        max_tokens=max_tokens or _DEFAULT_COMPLETION_TOKENS,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(0, asked.top_k or 0),
        seed=asked.seed,
        eos_token_ids=info.eos_token_ids,
    )
    # The engine's request id is ours: a client's may not be unique.
    request = EngineRequest(uuid.uuid4().hex, tuple(prompt_ids), sampling)
    check_request(request, max_context_tokens=info.max_context_tokens, vocab_size=info.vocab_size)
    return TextAnswer(models, model, request, stops=asked.stops)


async def _find_or_none(models: Models, name: str) -> ServedModel | None:
    """One broken package must not hide the other models from a list."""
    try:
        return await models.find(name)
    except HeliostatError:
        return None
