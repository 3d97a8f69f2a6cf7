"""OpenAI's batches: made of an uploaded file, answered within a day at low priority.

routes = batch_routes(driver, max_file_bytes=200 * 1024**2)
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.batches import Batch
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.tenant_files import TenantFile
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.batches.driver import BatchDriver, BatchParts
from serve_apps.gateway.batches.files import PAGE, ObjectList, page_of
from serve_apps.gateway.batches.files import build_routes as files_routes
from serve_apps.gateway.batches.lines import ENDPOINTS, MAX_LINE_BYTES, read_request
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.http.requests import parse_object, validate
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.embedding_graph import EmbeddingGraph

_MAX_LISTED = 100
_MAX_BLANK_LINES = 1000
"""Before the first request."""
_NoteName = Annotated[str, Field(max_length=64)]
_Note = Annotated[str, Field(max_length=512)]
_CAN_CANCEL = ("validating", "in_progress")


class CreateBatch(BaseModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=64)
    endpoint: str = Field(max_length=64)
    completion_window: Literal["24h"]
    metadata: dict[_NoteName, _Note] | None = Field(None, max_length=16)


def batch_routes(driver: BatchDriver, max_file_bytes: int) -> list[Route]:
    """The routes below /v1/files and /v1/batches."""
    parts, models = driver.parts, driver.models
    return [*files_routes(parts.files, max_bytes=max_file_bytes), *_routes(parts, driver, models)]


def _routes(parts: BatchParts, driver: BatchDriver, models: Models) -> list[Route]:
    store, files = parts.store, parts.files

    @describes("Have the requests of a file answered", scopes=("infer",), body=CreateBatch)
    async def create(request: Request) -> Response:
        identity = require_any(request, "infer")
        asked = validate(CreateBatch, parse_object(await request.body()))
        if asked.endpoint not in ENDPOINTS:
            raise InputError(
                f"endpoint '{asked.endpoint}' takes no batches",
                hint=f"expected one of: {', '.join(ENDPOINTS)}",
                param="endpoint",
            )
        file = await asyncio.to_thread(_find_file, asked.input_file_id, identity.tenant)
        name = await asyncio.to_thread(_first_model, file, asked.endpoint)
        model = await models.find_settled(name)
        _check_kind(model, asked.endpoint)
        created = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=identity.tenant,
            api_key_id=identity.key_id,
            endpoint=asked.endpoint,
            model=name,
            version=str(model.served),
            input_file_id=file.id,
            notes=asked.metadata or {},
            moments={
                "created_at": created,
                "expires_at": created + int(parts.options.completion_window_s),
            },
        )
        await asyncio.to_thread(store.add, batch)
        driver.hurry()
        return JSONResponse(_to_json(batch))

    @describes("One batch", scopes=("infer",))
    async def retrieve(request: Request) -> Response:
        identity = require_any(request, "infer")
        batch_id = request.path_params["batch_id"]
        batch = await asyncio.to_thread(store.get, identity.tenant, batch_id)
        return JSONResponse(_to_json(batch))

    @describes("Batches, newest first", scopes=("infer",), answer=ObjectList, query=PAGE)
    async def list_batches(request: Request) -> Response:
        identity = require_any(request, "infer")
        after, limit = page_of(request, default=20, most=_MAX_LISTED)
        found = await asyncio.to_thread(store.list, identity.tenant, after=after, limit=limit + 1)
        page = found[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [_to_json(batch) for batch in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": len(found) > limit,
            }
        )

    @describes("End a batch early", scopes=("infer",))
    async def cancel(request: Request) -> Response:
        identity = require_any(request, "infer")
        batch_id = request.path_params["batch_id"]
        batch = await asyncio.to_thread(_cancel, identity.tenant, batch_id)
        driver.hurry()
        return JSONResponse(_to_json(batch))

    def _find_file(file_id: str, tenant: str) -> TenantFile:
        try:
            file = files.get(tenant, file_id)
        except NotFoundError as error:
            raise NotFoundError(error.message, hint=error.hint, param="input_file_id") from None
        if file.purpose != "batch":
            raise InputError(
                f"file {file.id} has purpose '{file.purpose}', expected 'batch'",
                param="input_file_id",
            )
        return file

    def _first_model(file: TenantFile, endpoint: str) -> str:
        """The model that the first request names; the others must name it too."""
        first = itertools.islice(files.lines(file, max_bytes=MAX_LINE_BYTES), _MAX_BLANK_LINES)
        for number, line in enumerate(first, start=1):
            if line.strip():
                return read_request(number, line, endpoint=endpoint).model
        raise InputError(
            f"file {file.id} has no requests in its first lines", param="input_file_id"
        )

    def _cancel(tenant: str, batch_id: str) -> Batch:
        while True:
            batch = store.get(tenant, batch_id)
            if batch.status in ("cancelling", "cancelled"):
                return batch
            if batch.status not in _CAN_CANCEL:
                raise ConflictError(
                    f"batch {batch.id} is {batch.status} and cannot be cancelled any more"
                )
            try:
                return store.change(batch, status="cancelling")
            except ConflictError:
                continue  # its driver was first: look again

    one = "/v1/batches/{batch_id}"
    return [
        Route("/v1/batches", create, methods=["POST"]),
        Route("/v1/batches", list_batches),
        Route(f"{one}/cancel", cancel, methods=["POST"]),
        Route(one, retrieve),
    ]


def _check_kind(model: ServedModel, endpoint: str) -> None:
    if not ENDPOINTS[endpoint].is_text:
        EmbeddingGraph.of(model)
        return
    text, _ = model.require_text()
    if endpoint == "/v1/chat/completions" and text.chat_template is None:
        raise InputError(
            f"model '{model.served.name}' has no chat template, so it cannot answer messages",
            hint="use the endpoint /v1/completions",
            param="endpoint",
        )


def _to_json(batch: Batch) -> dict[str, Any]:
    names = (
        "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at",
        "failed_at", "expired_at", "cancelling_at", "cancelled_at",
    )  # fmt: skip
    counts = batch.counts
    values: dict[str, Any] = {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "request_counts": {name: counts.get(name, 0) for name in ("total", "completed", "failed")},
        "metadata": batch.notes or None,
        **{name: batch.moments.get(name) for name in names},
    }
    if "prompt_tokens" in counts:
        prompt, completion = counts["prompt_tokens"], counts["completion_tokens"]
        values["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }
    return values
