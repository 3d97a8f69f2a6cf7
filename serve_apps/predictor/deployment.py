"""Serves a graph: arrays in, arrays out, after its golden inputs gave its golden outputs.

Pre- and post-processing happen in the gateway. No `__call__`, so Serve's own HTTP port of this
application answers nobody.

    application = build_predictor("sha256:…", DeploymentOptions(num_threads=2))
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from cluster.model_package import golden
from cluster.observability.tracing import open_tracing
from cluster.processing import Array
from cluster.runtimes.onnx import OnnxRuntime, RunStop
from cluster.settings import load_settings
from serve_apps.description import Description
from serve_apps.options import DeploymentOptions
from serve_apps.replicas import deploy_with, describe_replica, open_package_of


class Predictor:
    """One replica."""

    def __init__(self, digest: str, options: dict[str, Any]) -> None:
        package = open_package_of(digest)
        parsed = DeploymentOptions.model_validate(options)
        self._runtime = OnnxRuntime(
            package.graph_path, parsed.num_threads, use_gpu=parsed.num_gpus > 0
        )
        self._description = describe_replica(package, parsed, self._runtime.device)
        self._tracing = open_tracing(load_settings(), "predictor")
        golden.check_graph(package.manifest, self._runtime.run)

    async def predict(
        self, arrays: dict[str, Array], traceparent: str | None = None
    ) -> dict[str, Array]:
        """Run the graph, off the event loop, as a part of the caller's trace.

        Being cancelled ends the run.
        """
        if traceparent is None:
            return await self._run(arrays)
        attributes = {"heliostat.package_digest": self._description.digest}
        with self._tracing.span(
            "run graph", kind="server", traceparent=traceparent, attributes=attributes
        ):
            return await self._run(arrays)

    async def _run(self, arrays: dict[str, Array]) -> dict[str, Array]:
        stop = RunStop()
        try:
            return await asyncio.to_thread(self._runtime.run, arrays, stop)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def describe(self) -> Description:
        """What this replica serves; answered only once it is ready."""
        return self._description


def build_predictor(digest: str, options: DeploymentOptions) -> serve.Application:
    """A Serve application for one package."""
    return deploy_with(Predictor, "predictor", digest, options)
