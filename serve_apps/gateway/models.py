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
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any

from cluster.errors import InvalidReferenceError, NotFoundError, UpstreamFailedError
from cluster.model_package.manifest import Manifest
from cluster.model_ref import ModelRef
from cluster.processing import Array, is_batchable, postprocess, preprocess
from serve_apps.gateway.access.callers import answered, current_caller, metered
from serve_apps.gateway.backend import Arrays, ModelBackend
from serve_apps.gateway.batcher import Batcher, BatchLimits
from serve_apps.gateway.catalogue import ModelCatalogue, ServedModel
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.routing_table import Routes, RoutingTable, ServedVersion
from serve_apps.gateway.streams import StreamPlaces, read_ahead
from serve_apps.gateway.telemetry.telemetry import Telemetry, note_model
from serve_apps.llm.engine import EngineRequest, TokenOutput

# As long as the release controller leaves an application up that is no longer routed to.
_DRAIN_S = 2.0


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
        drift: DriftWatch | None = None,
    ) -> None:
        self._table = table
        self._catalogue = catalogue
        self._backend = backend
        self._telemetry = telemetry or Telemetry()
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
        served = await self._version_named(text)
        note_model(served)
        return await self._catalogue.get(served)

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
        manifest = model.manifest
        with self._telemetry.model_call(model.served):
            if not inputs.keys().isdisjoint(manifest.processing.raw_inputs):
                # Decoding images takes milliseconds: not in the event loop.
                arrays = await asyncio.to_thread(preprocess, manifest, inputs)
            else:
                arrays = preprocess(manifest, inputs)
            outputs = postprocess(manifest, await self._batcher(model).submit(arrays))
        answered(model.served)
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
        tokens = self._drift.stream(model, request, self._generate(model, request))
        return metered(model.served, request, tokens)

    async def _generate(
        self, model: ServedModel, request: EngineRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        if model.served.options.shares_base:
            request = dataclasses.replace(request, adapter=model.served.digest)
        self._application_of(model)  # where there is none, trying again would be in vain
        with self._telemetry.stream(model.served, request) as watch:
            # Timed where tokens come from the replica, whenever a client reads them.
            outputs = read_ahead(
                lambda asked: watch.outputs(
                    self._backend.generate(self._application_of(model), asked)
                ),
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
            return await self._table.resolve(ref)
        except NotFoundError:
            if caller.identity.models is None:
                raise
            raise caller.no_such_model(ref.name) from None

    def _application_of(self, model: ServedModel) -> str:
        """Whose replicas answer: an adapter's base, where it is said to share it."""
        if not model.served.options.shares_base:
            return model.served.application
        info = model.manifest.adapter
        for served in self.routes.served.values():
            if info is not None and served.digest == info.base_digest:
                return served.application
        raise UpstreamFailedError(
            f"the base of adapter {model.served} is not served", hint="deploy the base again"
        )

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
