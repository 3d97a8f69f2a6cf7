"""`EngineRunner`: drives one engine in a thread and gives each caller its own stream of tokens.

Knows asyncio and engines; nothing of Ray or HTTP.

    runner = EngineRunner(engine)
    async for output in runner.generate(request):
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable

from cluster.errors import HeliostatError, InputError, OverloadedError, UpstreamFailedError
from serve_apps.llm.engine import Engine, EngineRequest, EngineStats, StepOutput, TokenOutput
from serve_apps.llm.mailbox import Mailbox

logger = logging.getLogger(__name__)


class EngineRunner:
    """Owns an engine: its thread, its streams and its failure."""

    def __init__(self, engine: Engine, *, max_requests: int = 256) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._mailboxes: dict[str, Mailbox[TokenOutput]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: HeliostatError | None = None
        """Why the engine stopped; None while it works."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """The request's tokens as they come. Leaving early frees its place in the engine.

        Raises:
            InputError: the engine refuses the request, or its grammar on the way.
            OverloadedError: too many requests are in flight.
            UpstreamFailedError: the engine broke down.
        """
        self._start()
        if self.failure is not None:
            raise self.failure
        if len(self._mailboxes) >= self._max_requests:
            raise OverloadedError(
                f"{len(self._mailboxes)} requests are in flight, the most this replica takes",
                hint="try again in a moment",
            )
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        finished = False
        try:
            self._engine.add(request)
            while not finished:
                output = _as_one(await mailbox.take())
                finished = output.finish_reason is not None
                if output.finish_reason == "error":
                    raise UpstreamFailedError(output.error or "the engine failed")
                if output.finish_reason == "refused":
                    raise InputError(output.error or "the request is impossible")
                yield output
        finally:
            del self._mailboxes[request.request_id]
            if not finished:
                self._engine.abort(request.request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._closing.set()
        self._engine.close()

    def _start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def _run(self) -> None:
        """The engine's thread: step and hand over, one hand-over per step."""
        while not self._closing.is_set():
            try:
                outputs = self._engine.step()
            except Exception as error:
                self._fail(error)
                return
            if outputs:
                self._in_loop(functools.partial(self._deliver, outputs))
        self._fail(UpstreamFailedError("the engine was closed"))

    def _in_loop(self, action: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(action)

    def _deliver(self, outputs: StepOutput) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.put(output)

    def _fail(self, error: Exception) -> None:
        if not self._closing.is_set():
            logger.error("engine stopped", exc_info=error)
        known = error if isinstance(error, HeliostatError) else None
        self.failure = known or UpstreamFailedError(f"the engine stopped: {error}")
        self._in_loop(self._fail_all)

    def _fail_all(self) -> None:
        for request_id, mailbox in self._mailboxes.items():
            mailbox.put(TokenOutput(request_id, (), "error", str(self.failure)))


def _as_one(outputs: list[TokenOutput]) -> TokenOutput:
    """A slow reader gets fewer, larger ones."""
    if len(outputs) == 1:
        return outputs[0]
    tokens = tuple(token for output in outputs for token in output.token_ids)
    logprobs = tuple(entry for output in outputs for entry in output.logprobs)
    last = outputs[-1]
    return TokenOutput(last.request_id, tokens, last.finish_reason, last.error, logprobs)
