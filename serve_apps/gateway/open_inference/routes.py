"""The Open Inference Protocol, version 2, over HTTP: tensors as JSON or as raw bytes.

Specification: https://github.com/kserve/open-inference-protocol. A file (an image, say) is a BYTES
input where the package declares it: base64 text in JSON, itself as raw bytes.

    routes = build_routes(models)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import NotRunningError
from cluster.processing import TensorSpec, public_inputs, public_outputs
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.headers import header_of
from serve_apps.gateway.http.openapi import JSON, describes
from serve_apps.gateway.http.requests import off_loop_if_large
from serve_apps.gateway.models import Models
from serve_apps.gateway.open_inference import answers
from serve_apps.gateway.open_inference.bodies import (
    BINARY,
    JSON_LENGTH_HEADER,
    InferenceBody,
    read_body,
    write_body,
)
from serve_apps.gateway.open_inference.requests import answer, reference

SERVER_NAME = "heliostat"
EXTENSIONS = ("binary_tensor_data",)
_JSON_LENGTH = JSON_LENGTH_HEADER.encode()


def build_routes(models: Models) -> list[Route]:
    """The routes below /v2; only the two health routes are public."""

    @describes("Whether the gateway is up", answer=answers.Live)
    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    @describes("Whether the gateway knows what is served", answer=answers.Ready)
    async def ready(_request: Request) -> Response:
        if not models.is_ready:
            raise NotRunningError(
                "the gateway has not read its routes yet", hint="try again in a moment"
            )
        return JSONResponse({"ready": True})

    @describes("The server", scopes=("models:read", "infer"), answer=answers.ServerMetadata)
    async def server_metadata(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        return JSONResponse(
            {"name": SERVER_NAME, "version": server_version(), "extensions": EXTENSIONS}
        )

    @describes(
        "Inputs and outputs of a model",
        scopes=("models:read", "infer"),
        answer=answers.ModelMetadata,
    )
    async def metadata(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        return JSONResponse(describe_model(models, await _find(models, request)))

    @describes(
        "Whether a model is served", scopes=("models:read", "infer"), answer=answers.ModelReady
    )
    async def model_ready(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        model = await _find(models, request)
        return JSONResponse({"name": model.served.name, "ready": True})

    @describes(
        "Tensors in, tensors out",
        scopes=("infer",),
        body=InferenceBody,
        body_types=(JSON, BINARY),
        answer=answers.Inference,
        answer_types=(JSON, BINARY),
    )
    async def infer(request: Request) -> Response:
        require_any(request, "infer")

        async def work(model: ServedModel) -> Response:
            model.require_graph()
            body = await request.body()
            json_length = header_of(request.scope, _JSON_LENGTH) or None
            asked = await off_loop_if_large(len(body), lambda: read_body(body, json_length, model))
            outputs = await answer(models, model, asked)
            size_bytes = sum(output.array.nbytes for output in outputs)
            content, headers = await off_loop_if_large(
                size_bytes, lambda: write_body(asked, model, outputs)
            )
            return Response(content, headers=headers)

        return await models.answer(_reference(request), work)

    name, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    return [
        Route(f"{name}/infer", infer, methods=["POST"]),
        Route(f"{version}/infer", infer, methods=["POST"]),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route(f"{name}/ready", model_ready),
        Route(f"{version}/ready", model_ready),
        Route(name, metadata),
        Route(version, metadata),
        Route("/v2", server_metadata),
    ]


def describe_model(models: Models, model: ServedModel) -> dict[str, Any]:
    """A model's metadata, in the protocol's words."""
    manifest, name = model.manifest, model.served.name
    is_graph = manifest.kind == "graph"
    return {
        "name": name,
        "versions": [str(v) for v in models.routes.versions(name)],
        "platform": "onnx" if is_graph else "heliostat_language_model",
        "inputs": [_describe(spec) for spec in public_inputs(manifest)] if is_graph else [],
        "outputs": [_describe(spec) for spec in public_outputs(manifest)] if is_graph else [],
    }


def server_version() -> str:
    """The version of this code, "0" where it is not installed."""
    try:
        return version_of("heliostat")
    except PackageNotFoundError:
        return "0"


async def _find(models: Models, request: Request) -> ServedModel:
    """The model that a path names."""
    return await models.find(_reference(request))


def _reference(request: Request) -> str:
    return reference(request.path_params["name"], request.path_params.get("version", ""))


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
