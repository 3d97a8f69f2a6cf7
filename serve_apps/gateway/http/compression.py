"""Bodies that clients sent compressed, unpacked piece by piece as they come.

A small body can unpack to a thousand times its size, so the limit on bodies holds for what comes
out too, and no more than one piece beyond it is ever made.

    app = Decompression(inner, max_bytes=32 * 1024**2)
"""

from __future__ import annotations

import asyncio
import zlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import InputError, PayloadTooLargeError, UsageError
from serve_apps.gateway.http.headers import header_of

# zlib's words for the two formats; HTTP's "deflate" is the one with zlib's own header.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_PIECE_BYTES = 1024**2


class UnsupportedEncodingError(UsageError):
    """The body is compressed in a way that is not understood here."""

    code = "unsupported_content_encoding"
    http_status = 415


class Decompression:
    """Unpacks the bodies whose `Content-Encoding` is gzip or deflate, and refuses any other."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            encoding = header_of(scope, b"content-encoding").strip().lower()
            if encoding not in ("", "identity"):
                receive = _Unpacked(receive, encoding, self._max_bytes)
        await self._app(scope, receive, send)


class _Unpacked:
    """Receives what another receives, unpacked."""

    def __init__(self, receive: Receive, encoding: str, max_bytes: int) -> None:
        if encoding not in _WINDOW_BITS:
            raise UnsupportedEncodingError(
                f"a body with Content-Encoding '{encoding:.100}' is not understood here",
                hint=f"send it as it is, or as {' or '.join(_WINDOW_BITS)}",
            )
        self._receive = receive
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
        self._packed = b""
        self._comes_more = True
        self._has_ended = False
        self._num_bytes = 0

    async def __call__(self) -> Message:
        while not self._has_ended:
            if not self._packed and self._comes_more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._packed = message.get("body", b"")
                self._comes_more = message.get("more_body", False)
            piece = await asyncio.to_thread(self._unpack)
            self._has_ended = not self._packed and not self._comes_more
            if self._has_ended:
                self._check_end()
            if piece or self._has_ended:
                more = not self._has_ended
                return {"type": "http.request", "body": piece, "more_body": more}
        return await self._receive()

    def _unpack(self) -> bytes:
        try:
            piece = self._unpacker.decompress(self._packed, _PIECE_BYTES)
        except zlib.error:
            raise self._broken("is no such") from None
        if self._unpacker.unused_data:
            raise self._broken("goes on after the end of such")
        self._packed = self._unpacker.unconsumed_tail
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes:
            raise PayloadTooLargeError(
                f"the request body unpacks to more than {self._max_bytes} bytes, the most allowed",
                hint="send fewer samples or a shorter text in each request",
            )
        return piece

    def _check_end(self) -> None:
        if not self._unpacker.eof:
            raise self._broken("ends before the end of such")

    def _broken(self, how: str) -> InputError:
        return InputError(
            f"the request body {how} data, its Content-Encoding is {self._encoding}",
            hint="compress the body once, as a whole",
        )
