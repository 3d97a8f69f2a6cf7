"""The page at `/`: static files, served to everyone under a strict policy.

They hold no data and no secret: the key is typed into the page, which calls the gateway with it as
any client does. Each file is a route of its own, so no path can lead elsewhere.

    routes = build_routes()
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.page.files import PAGE_FILES, PageFile

_HEADERS = {
    # No other origin, nothing inline, and no text can become HTML or code (trusted types).
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # Asked for anew each time and mostly answered 304, so that files of two releases never mix.
    "cache-control": "no-cache",
}


def build_routes() -> list[Route]:
    """One route for each file."""
    return [_route(file) for file in PAGE_FILES]


def _route(file: PageFile) -> Route:
    headers = {**_HEADERS, "etag": file.etag}

    @describes(
        "The page" if file.path == "/" else "A file of the page", answer_types=(file.media_type,)
    )
    async def serve(request: Request) -> Response:
        if _names(request.headers.get("if-none-match", ""), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)

    return Route(file.path, serve)


def _names(if_none_match: str, etag: str) -> bool:
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in (etag, "*") for tag in tags)
