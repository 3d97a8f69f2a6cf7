"""Who is asking: a key on every path but health and the page's own files.

Keys are looked up in a thread and remembered for less than a second, so that a revoked key ends
within one on every replica. One that is in use is looked up again before that, so nobody waits.

    app = Authentication(inner, KeyCache(ApiKeys(engine).verify))
    identity_of(request).require("infer")
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    AuthenticationError,
    HeliostatError,
    OverloadedError,
    PermissionDeniedError,
    first_line,
)
from cluster.security.api_keys import Identity
from serve_apps.gateway.access.callers import Caller, Callers
from serve_apps.gateway.http.errors import render
from serve_apps.gateway.http.headers import header_of
from serve_apps.gateway.page.files import PAGE_PATHS
from serve_apps.gateway.stickiness import SESSION_HEADER

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"}) | PAGE_PATHS
"""Health, and the files of the page that the key is typed into; everything else needs a key,
unknown paths included."""

_SESSION = SESSION_HEADER.encode()
_REMEMBER_S = 0.8
_LOOK_AGAIN_S = 0.4
_MAX_REMEMBERED = 10_000
_NUM_THREADS = 4

Verify = Callable[[str], Identity]


class KeyCache:
    """Remembers verified keys, by their hash, for a moment."""

    def __init__(self, verify: Verify, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._verify = verify
        self._clock = clock
        self._known: dict[bytes, tuple[float, Identity]] = {}
        self._asking: dict[bytes, asyncio.Task[Identity]] = {}
        # Of its own: in those that all share, keys would wait behind whatever customers send.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="keys")

    async def identify(self, key: str) -> Identity:
        """Who the key stands for.

        Raises:
            AuthenticationError: it is missing, unknown, expired or revoked.
            OverloadedError: that cannot be found out now.
        """
        digest = hashlib.sha256(key.encode()).digest()
        # The age counts from before the look-up: its answer may be that old already.
        asked_at = self._clock()
        found = self._known.get(digest)
        age_s = _REMEMBER_S if found is None else asked_at - found[0]
        task = self._asking.get(digest)
        if task is None and age_s >= _LOOK_AGAIN_S:
            # One look-up for all who wait; shielded, because any of them may leave.
            task = asyncio.create_task(self._look_up(key, digest, asked_at))
            self._asking[digest] = task
            task.add_done_callback(lambda done: self._looked_up(digest, done))
        if found is not None and age_s < _REMEMBER_S:
            return found[1]
        assert task is not None
        return await asyncio.shield(task)

    def _looked_up(self, digest: bytes, task: asyncio.Task[Identity]) -> None:
        self._asking.pop(digest, None)
        if not task.cancelled():
            task.exception()  # nobody may have waited for it

    async def _look_up(self, key: str, digest: bytes, asked_at: float) -> Identity:
        try:
            loop = asyncio.get_running_loop()
            identity = await loop.run_in_executor(self._threads, self._verify, key)
        except AuthenticationError:
            self._known.pop(digest, None)
            raise
        except HeliostatError:
            raise
        # Whatever the database raises.
        except Exception as error:
            logger.warning("keys cannot be looked up: %s", first_line(error))
            raise OverloadedError(
                "keys cannot be looked up now", hint="try again in a moment"
            ) from None
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[digest] = (asked_at, identity)
        return identity


class Authentication:
    """Lets nobody pass without a good key, nor beyond their tenant's limit of requests."""

    def __init__(self, app: ASGIApp, keys: KeyCache, callers: Callers) -> None:
        self._app = app
        self._keys = keys
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Websockets: there are none here, and none may slip past the keys. Closed before it
            # was accepted, one is answered with 403; without an answer it would be a 500.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"] not in PUBLIC_PATHS:
            try:
                identity = await self._keys.identify(_sent_key(scope))
            except AuthenticationError as error:
                await render(error, scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})["identity"] = identity
            caller = self._callers.make(identity, functools.partial(_session_in, scope))
            if caller.is_limited:
                await self._call_limited(caller, scope, receive, send)
                return
            with caller.entered():
                await self._app(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _call_limited(
        self, caller: Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """As for everybody, with `x-ratelimit-…` on every answer."""
        has_started = False

        async def send_with_limits(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message["headers"], *caller.limit_headers()]
            await send(message)

        try:
            # What asks for work; looking at it, and administration, are not limited.
            if scope["method"] == "POST" and not scope["path"].startswith("/admin/"):
                await caller.count_request()
            with caller.entered():
                await self._app(scope, receive, send_with_limits)
        except Exception as error:
            if has_started:
                raise
            await render(error, scope["path"])(scope, receive, send_with_limits)


def _sent_key(scope: Scope) -> str:
    return bearer_key(header_of(scope, b"authorization"))


def _session_in(scope: Scope) -> str:
    return header_of(scope, _SESSION)


def identity_of(request: Request) -> Identity:
    """Who sent this request."""
    return cast(Identity, request.state.identity)


def require_any(request: Request, *scopes: str) -> Identity:
    """The caller, who must have one of these scopes.

    Raises:
        PermissionDeniedError: the key has none of them.
    """
    identity = identity_of(request)
    require_scope(identity, *scopes)
    return identity


def require_scope(identity: Identity, *scopes: str) -> None:
    """Raises PermissionDeniedError unless the caller has one of these scopes."""
    if not identity.scopes.intersection(scopes):
        identity.require(scopes[0])
        raise PermissionDeniedError(f"this key lacks the scope '{scopes[0]}'")


def bearer_key(header: str) -> str:
    """The key in the value of an Authorization header; empty if there is none."""
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
