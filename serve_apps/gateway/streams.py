"""Streams of tokens between a language model's replicas and their readers.

A stream that breaks before its first token is begun once more, on whichever replica is there. It is
read as fast as it comes, so that a slow reader holds memory here and no place at the model.

    places = StreamPlaces(options)
    outputs = read_ahead(lambda request: backend.generate("talker.v1", request), request, places)
    async for output in outputs:
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator

from cluster.errors import OverloadedError, UpstreamFailedError, UpstreamTimeoutError
from serve_apps.gateway.admission import Admission
from serve_apps.llm.engine import EngineRequest, TokenOutput
from serve_apps.options import DeploymentOptions

logger = logging.getLogger(__name__)

Generate = Callable[[EngineRequest], AsyncGenerator[TokenOutput, None]]


class StreamPlaces:
    """Who may begin a stream: as many as the replicas run, and those who need not wait long."""

    def __init__(self, options: DeploymentOptions) -> None:
        self.options = options
        self._max_running = options.max_streams
        self._admission = Admission(
            max_queued=options.max_queued_requests,
            max_batch_size=1,
            max_parallel=self._max_running,
            max_wait_s=options.max_queue_wait_s,
        )
        self.num_open = 0

    @contextlib.contextmanager
    def take(self) -> Iterator[Callable[[], None]]:
        """A place, to be told of each output.

        Raises:
            OverloadedError: too many streams are open, or it would begin too late.
        """
        waiting = max(0, self.num_open - self._max_running)
        is_running = self.num_open < self._max_running
        decision = self._admission.ask(
            time.monotonic(),
            1,
            # With a free place it does not queue, even where nobody may.
            num_queued=-1 if is_running else waiting,
            samples_ahead=waiting,
        )
        if not decision.admits:
            raise OverloadedError(decision.reason, hint="try again in a moment")
        # One that has to wait in the engine begins with its first token.
        begun_s = time.monotonic() if is_running else None

        def note() -> None:
            nonlocal begun_s
            begun_s = begun_s or time.monotonic()

        self.num_open += 1
        try:
            yield note
        finally:
            self.num_open -= 1
            if begun_s is not None:
                self._admission.times.observe(1, time.monotonic() - begun_s)


async def read_ahead(
    generate: Generate, request: EngineRequest, places: StreamPlaces
) -> AsyncGenerator[TokenOutput, None]:
    """The tokens of one request; closing the generator ends the work.

    Raises:
        OverloadedError: there is no place for it.
        UpstreamTimeoutError: no token came in time.
        UpstreamFailedError: a replica failed after the first token, or two did before it.
    """
    # Holds what one answer has at most.
    arrived: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()

    async def fetch() -> None:
        try:
            with places.take() as note:
                async for output in _from_replica(generate, request, places.options):
                    note()
                    arrived.put_nowait(output)
            arrived.put_nowait(UpstreamFailedError("the model's stream ended early"))
        except Exception as error:
            arrived.put_nowait(error)

    task = asyncio.create_task(fetch())
    try:
        while True:
            output = await arrived.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                return
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _from_replica(
    generate: Generate, request: EngineRequest, options: DeploymentOptions
) -> AsyncGenerator[TokenOutput, None]:
    """The tokens of a replica, or of a second one where the first fails before it gave any."""
    has_begun = False
    try:
        async for output in _with_timeouts(generate(request), options):
            has_begun = True
            yield output
        return
    except UpstreamFailedError as error:
        if has_begun:
            raise
        logger.info("stream %s failed before its first token: %s", request.request_id, error)
    # The first replica may still know the old id.
    again = dataclasses.replace(request, request_id=f"{request.request_id}-again")
    async for output in _with_timeouts(generate(again), options):
        yield output


async def _with_timeouts(
    outputs: AsyncGenerator[TokenOutput, None], options: DeploymentOptions
) -> AsyncGenerator[TokenOutput, None]:
    timeout_s = options.answer_timeout_s
    try:
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    output = await anext(outputs)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise UpstreamTimeoutError(
                    f"the model gave no token within {timeout_s:g} s", hint="try again later"
                ) from None
            yield output
            if output.finish_reason is not None:
                return
            timeout_s = options.request_timeout_s
    finally:
        await outputs.aclose()
