"""From a model's name to its answer: the part that every protocol shares.

Resolves references, keeps a batcher for each graph and the places of each language model.
Knows nothing of HTTP.

    models = Models(table, catalogue, backend)
    model = await models.find("digits@champion")
    outputs = await models.infer(model, {"pixels": pixels})
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from cluster.errors import (
    HeliostatError,
    InputError,
    InvalidReferenceError,
    NotFoundError,
    PackageError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    first_line,
)
from cluster.model_package.manifest import Manifest
from cluster.model_ref import ModelRef
from cluster.processing import Array, is_batchable, postprocess, preprocess
from serve_apps.gateway.access.callers import answered, current_caller, metered
from serve_apps.gateway.backend import Arrays, ModelBackend
from serve_apps.gateway.batcher import Batcher, BatchLimits
from serve_apps.gateway.catalogue import ModelCatalogue, ServedModel
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.shadow import Means
from serve_apps.gateway.releases.stream_waits import WatchedBackend
from serve_apps.gateway.releases.watch import ReleaseWatch
from serve_apps.gateway.releases.watched import WatchedRelease
from serve_apps.gateway.routing_table import Routes, RoutingTable, ServedVersion
from serve_apps.gateway.streams import StreamPlaces, read_ahead
from serve_apps.gateway.telemetry.telemetry import Telemetry, note_model
from serve_apps.llm.engine import EngineRequest, TokenOutput

logger = logging.getLogger(__name__)

AnswerType = TypeVar("AnswerType")

# As long as the release controller leaves an application up that is no longer routed to.
_DRAIN_S = 2.0


class OutOfTimeError(UpstreamTimeoutError):
    """The request itself allows no more time."""


def can_join(manifest: Manifest) -> bool:
    """Whether requests to a graph may share a call without changing each other's answers."""
    # Scaled by the largest value in the call, it would round everybody else's after an outlier.
    is_scaled_by_call = manifest.quantisation.get("method") == "int8_dynamic"
    return is_batchable(manifest) and not is_scaled_by_call


class Models:
    """Every model that is served."""

    def __init__(
        self,
        table: RoutingTable,
        catalogue: ModelCatalogue,
        backend: ModelBackend,
        telemetry: Telemetry | None = None,
        *,
        evidence: Evidence | None = None,
        drift: DriftWatch | None = None,
    ) -> None:
        self._table = table
        self._catalogue = catalogue
        self._telemetry = telemetry or Telemetry()
        means = Means(
            open=catalogue.get,
            predict=lambda model, arrays: backend.predict(model.served.application, arrays),
            stream=lambda model, request: self._stream(
                backend, model, _for_adapter(model, request)
            ),
            has_room=self._has_room,
        )
        self._releases = ReleaseWatch(evidence or Evidence(lambda _deltas: None), means)
        self._backend = WatchedBackend(backend, self._releases.observer_of)
        self._drift = drift or DriftWatch(self._telemetry.instruments)
        self._batchers: dict[ServedVersion, Batcher] = {}
        self._places: dict[ServedVersion, StreamPlaces] = {}
        self._applications: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        table.on_change.append(self._follow)

    @property
    def routes(self) -> Routes:
        return self._table.current

    @property
    def is_ready(self) -> bool:
        return self._table.is_ready

    async def find(self, text: str) -> ServedModel:
        """The model behind NAME, NAME@ALIAS or NAME/VERSION, which the request is now about.

        Raises:
            NotFoundError: nothing is served under it, it is not for the caller's key, or it is no
                reference at all.
        """
        return await self.answer(text, _itself)

    async def find_settled(self, text: str) -> ServedModel:
        """As `find`, for work that outlasts a release: a name alone is its champion."""
        served = await self._version_named(text)
        watched = self._releases.of(served)
        if watched is not None and text == served.name:
            served = watched.champion
        self._note(served)
        return await self._catalogue.get(served)

    async def answer(
        self,
        text: str,
        work: Callable[[ServedModel], Awaitable[AnswerType]],
        *,
        user: str | None = None,
    ) -> AnswerType:
        """What `work` makes of the model that `find` finds, for the request's user if it has one.

        A canary that fails has not failed the customer: the champion does the work once more.
        """
        if user is not None:
            current_caller().user = user
        served = await self._version_named(text)
        self._note(served)
        watched = self._releases.of(served)
        if watched is None or served != watched.candidate or text != served.name:
            return await work(await self._catalogue.get(served))
        return await self._try_canary(watched, work)

    async def _try_canary(
        self, watched: WatchedRelease, work: Callable[[ServedModel], Awaitable[AnswerType]]
    ) -> AnswerType:
        caller, counts, is_open = current_caller(), True, False
        caller.hold_bill()
        try:
            model = await self._catalogue.get(watched.candidate)
            is_open = True
            return await work(model)
        except Exception as error:
            if not _may_be_the_versions_fault(error):
                raise
            counts, failure = False, error
        finally:
            caller.settle_bill(counts=counts)
        logger.info("%s failed a request: %s", watched.candidate, first_line(failure))
        self._note(watched.champion)
        answer = await work(await self._catalogue.get(watched.champion))
        # Failures of a request are observed where they happen, unless the client seemed to blame.
        is_observed = is_open and _status_of(failure) >= 500
        watched.failed_over(is_observed=is_observed)
        return answer

    async def look_up(self, text: str) -> ServedModel:
        """As `find`, for a request that is about no model or several."""
        return await self._catalogue.get(await self._version_named(text))

    async def open(self, version: str) -> ServedModel:
        """NAME/VERSION, for work whose caller was let in before and is not there any more.

        Raises:
            NotFoundError: it is not served any more.
        """
        return await self._catalogue.get(await self._table.resolve(ModelRef.parse(version)))

    async def _version_named(self, text: str) -> ServedVersion:
        try:
            ref = ModelRef.parse(text)
        except InvalidReferenceError as error:
            raise NotFoundError(error.message, hint=error.hint, param="model") from None
        return await self._resolve(ref)

    async def infer(self, model: ServedModel, inputs: Mapping[str, Array]) -> Arrays:
        """Answer a graph's client: pre-process, batch, post-process.

        Raises:
            InputError: the inputs are not what the package declares; `param` names the input.
        """
        model.require_graph()
        watched = self._releases.of(model.served)
        if watched is None:
            outputs = await self._infer(model, inputs)
        else:
            outputs = await watched.infer(model, inputs, self._infer)
        answered(model.served)
        return outputs

    async def _infer(self, model: ServedModel, inputs: Mapping[str, Array]) -> Arrays:
        manifest = model.manifest
        with self._telemetry.model_call(model.served):
            if not inputs.keys().isdisjoint(manifest.processing.raw_inputs):
                # Decoding images takes milliseconds: not in the event loop.
                arrays = await asyncio.to_thread(preprocess, manifest, inputs)
            else:
                arrays = preprocess(manifest, inputs)
            outputs = postprocess(manifest, await self._batcher(model).submit(arrays))
        self._drift.count(model, arrays, outputs)
        return outputs

    def generate(
        self, model: ServedModel, request: EngineRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        """A language model's tokens; closing the generator frees its place.

        Raises:
            RateLimitedError: the caller's tenant has too little left.
            OverloadedError: too many streams are open.
            UpstreamTimeoutError: no token came in time.
            UpstreamFailedError: replicas failed, and none could go on.
        """
        # Engines let tenants take turns.
        request = dataclasses.replace(request, tenant=current_caller().identity.tenant)
        watched = self._releases.of(model.served)
        if watched is None:
            outputs = self._generate(model, request)
        else:
            outputs = watched.generate(model, request, self._generate)
        return metered(model.served, request, self._drift.stream(model, request, outputs))

    async def _generate(
        self, model: ServedModel, request: EngineRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        request = _for_adapter(model, request)
        self._answers_for(model)  # where nobody does, trying again would be in vain
        with self._telemetry.stream(model.served, request) as watch:
            # Timed where tokens come from the replica, whenever a client reads them.
            outputs = read_ahead(
                lambda asked: watch.outputs(self._stream(self._backend, model, asked)),
                watch.request,
                self._places_of(model.served),
                watch.continued,
            )
            try:
                async for output in outputs:
                    yield output
            finally:
                await outputs.aclose()

    async def _resolve(self, ref: ModelRef) -> ServedVersion:
        """The version that answers the current caller, who is not told what else there is."""
        caller = current_caller()
        caller.require_model(ref.name)
        try:
            return await self._table.resolve(ref, caller.customer)
        except NotFoundError:
            if caller.identity.models is None:
                raise
            raise caller.no_such_model(ref.name) from None

    def _stream(
        self, backend: ModelBackend, model: ServedModel, request: EngineRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        """Tokens from one of the replicas that answer for a model just now."""
        served = self._answers_for(model)
        return backend.generate(served.application, request, drain_s=served.options.drain_s)

    def _answers_for(self, model: ServedModel) -> ServedVersion:
        """Whose replicas answer: an adapter's base, where it is said to share it."""
        if not model.served.options.shares_base:
            return model.served
        info = model.manifest.adapter
        for served in self.routes.served.values():
            if info is not None and served.digest == info.base_digest:
                return served
        raise UpstreamFailedError(
            f"the base of adapter {model.served} is not served", hint="deploy the base again"
        )

    def close(self) -> None:
        """End what is done beside the requests."""
        self._releases.follow(Routes())

    def _note(self, served: ServedVersion) -> None:
        note_model(served, self.routes.notices.get((served.name, served.version)))

    def _has_room(self, served: ServedVersion) -> bool:
        """Whether a version's customers leave anything over just now."""
        batcher, places = self._batchers.get(served), self._places.get(served)
        is_idle = batcher is None or not (batcher.num_waiting or batcher.num_in_flight)
        return is_idle and (places is None or 2 * places.num_open < served.options.max_streams)

    def _places_of(self, served: ServedVersion) -> StreamPlaces:
        places = self._places.get(served)
        if places is None:
            places = self._places[served] = StreamPlaces(served.options)
        return places

    def _batcher(self, model: ServedModel) -> Batcher:
        batcher = self._batchers.get(model.served)
        if batcher is None:
            application, options = model.served.application, model.served.options
            limits = BatchLimits(
                max_batch_size=options.max_batch_size,
                max_queued=options.max_queued_requests,
                max_in_flight=options.max_batches_in_flight,
                max_wait_s=options.max_queue_wait_s,
                timeout_s=options.answer_timeout_s,
                can_join=can_join(model.manifest),
            )
            batcher = Batcher(
                self._telemetry.calls_of(
                    model.served, lambda arrays: self._backend.predict(application, arrays)
                ),
                limits,
                self._telemetry.batches_of(model.served),
            )
            self._telemetry.watch_queue(model.served, lambda: batcher.num_waiting)
            self._batchers[model.served] = batcher
        return batcher

    def _follow(self, routes: Routes) -> None:
        """Let go of what is no longer served, before its application is deleted."""
        self._catalogue.follow(routes)
        self._telemetry.follow(routes)
        self._releases.follow(routes)
        self._drift.follow(routes)
        current = set(routes.served.values())
        closing = [self._batchers.pop(gone) for gone in set(self._batchers) - current]
        for gone in set(self._places) - current:
            del self._places[gone]
        applications = {served.application for served in current}
        gone_applications = self._applications - applications
        for served in current:
            # Not one that may be at rest, with no replica: it would be woken.
            if served.application not in self._applications and served.options.min_replicas:
                self._in_background(self._backend.prepare(served.application))
        self._applications = applications
        if closing or gone_applications:
            self._in_background(self._let_go(closing, gone_applications))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _let_go(self, batchers: Sequence[Batcher], applications: set[str]) -> None:
        """Answer what waits while the applications drain, then drop their handles."""
        await asyncio.gather(*(batcher.close(_DRAIN_S) for batcher in batchers))
        for application in applications - self._applications:
            self._backend.forget(application)


def _for_adapter(model: ServedModel, request: EngineRequest) -> EngineRequest:
    """The request, to an adapter where that is served by its base's replicas."""
    if not model.served.options.shares_base:
        return request
    return dataclasses.replace(request, adapter=model.served.digest)


def _may_be_the_versions_fault(error: Exception) -> bool:
    """Also where it says that the request is wrong: another version may not."""
    if isinstance(error, OutOfTimeError):
        return False
    # Not found: an adapter that the replicas do not hold.
    is_its_own = isinstance(error, InputError | PackageError | NotFoundError)
    return is_its_own or _status_of(error) >= 500


def _status_of(error: Exception) -> int:
    return error.http_status if isinstance(error, HeliostatError) else HeliostatError.http_status


async def _itself(model: ServedModel) -> ServedModel:
    return model
