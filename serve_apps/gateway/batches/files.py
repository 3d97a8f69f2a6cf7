"""OpenAI's files: what batches read and write. A tenant sees its own alone.

routes = build_routes(files, max_bytes=200 * 1024**2)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import IO, Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typing_extensions import TypedDict
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from cluster.errors import (
    InputError,
    MachineError,
    NotFoundError,
    NotRunningError,
    OverloadedError,
    PayloadTooLargeError,
    first_line,
)
from cluster.tenant_files import KEPT_S, TenantFile, TenantFiles
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.http.openapi import describes

logger = logging.getLogger(__name__)

_PURPOSE = "batch"
_MAX_LISTED = 10_000
_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 8
_IN_MEMORY_BYTES = 1024**2


class ObjectList(TypedDict):
    """A page of files or batches."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


PAGE: dict[str, Any] = {"after": str, "limit": int}
"""Parameters of a list."""
_ORDER: dict[str, Any] = {"order": Literal["asc", "desc"], "purpose": str}


def build_routes(files: TenantFiles, *, max_bytes: int) -> list[Route]:
    """The routes below /v1/files."""

    @describes("Upload a file", scopes=("infer",), body=bytes, body_types=("multipart/form-data",))
    async def upload(request: Request) -> Response:
        identity = require_any(request, "infer")
        with _storage_named(), tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as body:
            form = await _read_form(request, body, max_bytes)
            if form.purpose != _PURPOSE:
                raise InputError(
                    f"purpose is {form.purpose[:80]!r}, expected '{_PURPOSE}'", param="purpose"
                )
            body.seek(0)
            file = await asyncio.to_thread(
                files.add, identity.tenant, form.file_name, _PURPOSE, _blocks(body)
            )
        return JSONResponse(_to_json(file))

    @describes("Files", scopes=("infer",), answer=ObjectList, query=PAGE | _ORDER)
    async def list_files(request: Request) -> Response:
        identity = require_any(request, "infer")
        after, limit = page_of(request, default=_MAX_LISTED, most=_MAX_LISTED)
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InputError(f"order is {order[:80]!r}, expected asc or desc", param="order")
        found = await asyncio.to_thread(
            files.list,
            identity.tenant,
            purpose=request.query_params.get("purpose"),
            after=after,
            limit=limit + 1,
            ascending=order == "asc",
        )
        page = found[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [_to_json(file) for file in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": len(found) > limit,
            }
        )

    @describes("One file", scopes=("infer",))
    async def retrieve(request: Request) -> Response:
        return JSONResponse(_to_json(await _find(request)))

    @describes("A file's bytes", scopes=("infer",), answer_types=("application/octet-stream",))
    async def content(request: Request) -> Response:
        file = await _find(request)
        blocks = files.read(file)
        # What fails at once is an error, not half an answer.
        with _storage_named(file.id):
            first = await asyncio.to_thread(next, blocks, b"")
        return StreamingResponse(
            _from_threads(first, blocks),
            media_type="application/octet-stream",
            headers={
                "content-length": str(file.num_bytes),
                "content-disposition": "attachment",
                "x-content-type-options": "nosniff",
            },
        )

    @describes("Delete a file", scopes=("infer",))
    async def delete(request: Request) -> Response:
        identity = require_any(request, "infer")
        file_id = request.path_params["file_id"]
        with _storage_named():
            await asyncio.to_thread(files.delete, identity.tenant, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _find(request: Request) -> TenantFile:
        identity = require_any(request, "infer")
        file_id = request.path_params["file_id"]
        return await asyncio.to_thread(files.get, identity.tenant, file_id)

    one = "/v1/files/{file_id}"
    return [
        Route("/v1/files", upload, methods=["POST"]),
        Route("/v1/files", list_files),
        Route(f"{one}/content", content),
        Route(one, retrieve),
        Route(one, delete, methods=["DELETE"]),
    ]


@contextlib.contextmanager
def _storage_named(file_id: str = "") -> Iterator[None]:
    """What is wrong with disks, told to the client without where they are.

    Raises:
        OverloadedError: there is no room, or storage is away.
        NotFoundError: the bytes of a file are not there.
    """
    try:
        yield
    except (MachineError, NotRunningError, OSError) as error:
        logger.error("files cannot be kept or read: %s", first_line(error))
        raise OverloadedError(
            "files cannot be kept or read now", hint="try again later, or tell the operator"
        ) from None
    except NotFoundError as error:
        if not file_id:
            raise
        logger.error("the bytes of file %s are gone: %s", file_id, error)
        raise NotFoundError(
            f"the bytes of file {file_id} are gone", hint="upload it again", param="file_id"
        ) from None


def page_of(request: Request, *, default: int, most: int) -> tuple[str | None, int]:
    """`after` and `limit` of a list.

    Raises:
        InputError: limit is no number from 1 to `most`.
    """
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise InputError(f"limit is {text[:80]!r}, expected 1 to {most}", param="limit")
    return request.query_params.get("after"), int(text)


class _Form:
    """What a form has said so far."""

    def __init__(self) -> None:
        self.purpose = ""
        self.file_name: str = ""
        self.has_file = False


async def _read_form(request: Request, body: IO[bytes], max_bytes: int) -> _Form:
    """The fields of a multipart form; the file goes to `body` as it comes.

    Raises:
        InputError: it is no such form, or has no file.
        PayloadTooLargeError: the file has more than `max_bytes`.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not boundary:
        raise _no_form("its content type is not multipart/form-data with a boundary")
    decoder = MultipartDecoder(
        boundary.encode("latin-1", "replace"),
        max_form_memory_size=2 * _IN_MEMORY_BYTES,
        max_parts=_MAX_PARTS,
    )
    form, reader = _Form(), _FormReader(body, max_bytes)
    try:
        async for block in request.stream():
            decoder.receive_data(block or None)
            await asyncio.to_thread(reader.take, decoder, form)
    except (ValueError, HTTPException) as error:
        raise _no_form(getattr(error, "description", None) or str(error)) from None
    if not reader.is_whole:
        raise _no_form("it ends too early")
    if not form.has_file:
        raise InputError("the form has no field 'file'", hint="send one file", param="file")
    return form


class _FormReader:
    """Takes a decoder's events in, whichever thread it is called in."""

    def __init__(self, body: IO[bytes], max_bytes: int) -> None:
        self._body = body
        self._max_bytes = max_bytes
        self._size = 0
        self._field = ""
        self.is_whole = False

    def take(self, decoder: MultipartDecoder, form: _Form) -> None:
        while not isinstance(event := decoder.next_event(), NeedData):
            match event:
                case File(name="file", filename=str(name)) if not form.has_file:
                    form.has_file, form.file_name, self._field = True, name, "file"
                case Field(name="purpose") if not form.purpose:
                    self._field = "purpose"
                case File() | Field():
                    raise InputError(
                        f"field {str(event.name)[:80]!r} is not known here",
                        hint="send file and purpose, once each",
                        param=str(event.name)[:80],
                    )
                case Data():
                    self._take_data(event.data, form)
                case Epilogue():
                    self.is_whole = True
                    return

    def _take_data(self, data: bytes, form: _Form) -> None:
        if self._field == "file":
            self._size += len(data)
            if self._size > self._max_bytes:
                raise PayloadTooLargeError(
                    f"the file has more than {self._max_bytes} bytes, the most allowed",
                    hint="send several files",
                    param="file",
                )
            self._body.write(data)
            return
        form.purpose += data.decode("utf-8", "replace")
        if len(form.purpose) > _MAX_FIELD_BYTES:
            raise InputError(f"purpose is too long, expected '{_PURPOSE}'", param="purpose")


def _no_form(reason: str) -> InputError:
    return InputError(
        f"the request body is no form: {reason}",
        hint="send multipart/form-data with the fields file and purpose",
    )


def _blocks(body: IO[bytes]) -> Iterator[bytes]:
    while block := body.read(_IN_MEMORY_BYTES):
        yield block


async def _from_threads(first: bytes, blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    block = first
    while block:
        yield block
        block = await asyncio.to_thread(next, blocks, b"")


def _to_json(file: TenantFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at_s),
        "expires_at": int(file.created_at_s + KEPT_S),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }
