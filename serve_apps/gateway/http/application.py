"""Starlette's routes and lifespan, under our own layers alone.

Starlette catches errors in four places, each with a wrapper around `send`. Here one does, just
around the routes, so that every layer sees an error's answer as it sees any other.

    app = Application(routes, layers=[Middleware(RequestContext, telemetry=telemetry)], …)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import HeliostatError
from serve_apps.gateway.http.errors import MethodNotAllowedError, render
from serve_apps.gateway.telemetry.telemetry import current_request

Endpoint = Callable[[Request], Awaitable[Response]]


class Application(Starlette):
    """An application whose first layer is the outermost and has to answer what nobody expected."""

    def __init__(self, routes: Sequence[Route], layers: Sequence[Middleware], **options: Any):
        for route in routes:
            route.app = _Plain(route.endpoint)
        super().__init__(routes=routes, middleware=layers, **options)
        # A path with a slash at its end is another path, which is not there.
        self.router.redirect_slashes = False

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = _Answers(self.router)
        for layer, arguments, options in reversed(self.user_middleware):
            app = layer(app, *arguments, **options)
        return app


class _Plain:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


class _Answers:
    """Answers the errors that endpoints raise on purpose."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router(scope, receive, send)
        except (HeliostatError, HTTPException) as error:
            record = current_request()
            if record is None or record.status is not None:
                raise  # the answer has begun
            await render(self._told(error, scope), scope["path"])(scope, receive, send)

    def _told(self, error: Exception, scope: Scope) -> Exception:
        """The error; one of methods with those of all routes of the path: Starlette's knows those
        of the first."""
        if not isinstance(error, HTTPException) or error.status_code != 405:
            return error
        methods = {
            method
            for route in self._router.routes
            if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE
            for method in route.methods or ()
        }
        return MethodNotAllowedError(", ".join(sorted(methods)))
