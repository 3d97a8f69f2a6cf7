"""Streams of tokens between a language model's replicas and their readers.

A stream that breaks goes on at another replica, from the tokens that were given already: its reader
sees one answer, the same as if nothing had happened. It is read as fast as it comes, so that a slow
reader holds memory here and no place at the model.

    places = StreamPlaces(options)
    generate = lambda asked: backend.generate("talker.v1", asked, drain_s=60)
    outputs = read_ahead(generate, request, places)
    async for output in outputs:
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator

from cluster.errors import (
    HeliostatError,
    OverloadedError,
    ReplicaLeavingError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)
from serve_apps.gateway.admission import Admission
from serve_apps.llm.engine import EngineRequest, TokenOutput
from serve_apps.options import DeploymentOptions

logger = logging.getLogger(__name__)

Generate = Callable[[EngineRequest], AsyncGenerator[TokenOutput, None]]
OnContinuation = Callable[[str], None]
"""Told why, 'failed' or 'moved', each time that an answer goes on elsewhere."""

PAUSES_S = (0.05, 1.0, 5.0)
"""Before each continuation in a row that brought no token; then the answer is given up. A replica
whose engine broke is replaced within seconds, and one that is asked too soon is asked in vain."""
_MAX_MOVES = 200
MAX_FAILURES = 10
"""Of one answer, however much each replica generated: it may be what kills them."""


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
    generate: Generate,
    request: EngineRequest,
    places: StreamPlaces,
    on_continuation: OnContinuation = lambda reason: None,
) -> AsyncGenerator[TokenOutput, None]:
    """The tokens of one request; closing the generator ends the work.

    Raises:
        OverloadedError: there is no place for it.
        UpstreamTimeoutError: no token came in time.
        UpstreamFailedError: replicas failed, and none could go on.
    """
    # Holds what one answer has at most.
    arrived: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()

    async def fetch() -> None:
        answer = _Answer(generate, request, places.options, on_continuation)
        try:
            with places.take() as note:
                async for output in answer.outputs():
                    note()
                    arrived.put_nowait(output)
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


class _Answer:
    """One answer, whichever replicas generate it."""

    def __init__(
        self,
        generate: Generate,
        request: EngineRequest,
        options: DeploymentOptions,
        on_continuation: OnContinuation,
    ) -> None:
        self._generate = generate
        self._request = with_settled_seed(request)
        self._options = options
        self._on_continuation = on_continuation
        self._token_ids: list[int] = []
        self._num_tries = self._num_failures = self._num_in_vain = self._num_moves = 0

    async def outputs(self) -> AsyncGenerator[TokenOutput, None]:
        while True:
            try:
                found = _with_timeouts(self._generate(self._next()), self._options)
                async with contextlib.aclosing(found) as outputs:
                    async for output in outputs:
                        if output.token_ids:
                            self._token_ids.extend(output.token_ids)
                            self._num_in_vain = 0
                        yield output
                        if output.finish_reason is not None:
                            return
                raise UpstreamFailedError("the model's stream ended early")
            except (UpstreamFailedError, OverloadedError) as error:
                await self._pause_after(error)

    def _next(self) -> EngineRequest:
        """The request for what is still to be generated, under an id of its own: a replica may
        still know the old one."""
        self._num_tries += 1
        if self._num_tries == 1:
            return self._request
        return dataclasses.replace(
            self._request,
            request_id=f"{self._request.request_id}-{self._num_tries}",
            answer_ids=(*self._request.answer_ids, *self._token_ids),
        )

    async def _pause_after(self, error: HeliostatError) -> None:
        """Raises the error where the answer is not to go on."""
        has_moved = isinstance(error, ReplicaLeavingError)
        if has_moved:
            # Nobody is at fault: however often it has to move on, that is no try in vain.
            self._num_moves += 1
        else:
            self._num_failures += 1
            self._num_in_vain += 1
        # Without a token it is a new request, which is tried once more; a replica without room
        # refuses it at once.
        is_begun = bool(self._token_ids)
        allowed = len(PAUSES_S) if is_begun else int(not isinstance(error, OverloadedError))
        is_hopeless = self._num_in_vain > allowed or self._num_failures > MAX_FAILURES
        if is_hopeless or self._num_moves > _MAX_MOVES:
            raise error
        reason = "moved" if has_moved else "failed"
        logger.info(
            "stream %s goes on elsewhere after %d tokens: %s",
            self._request.request_id,
            len(self._token_ids),
            error,
        )
        self._on_continuation(reason)
        await asyncio.sleep(PAUSES_S[0 if has_moved else self._num_in_vain - 1])


def with_settled_seed(request: EngineRequest) -> EngineRequest:
    """With a seed: every replica that generates a part of the answer draws the same noise."""
    sampling = request.sampling
    if sampling.is_greedy or sampling.seed is not None:
        return request
    drawn = dataclasses.replace(sampling, seed=secrets.randbits(62))
    return dataclasses.replace(request, sampling=drawn)


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
