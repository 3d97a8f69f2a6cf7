"""TensorFlow Serving's REST: predictions, the state of versions, and metadata.

Paths are https://www.tensorflow.org/tfx/serving/api_rest; a label is one of our aliases. The state
of a model without a version is a path of OpenAI's as well: `openai/routes.py` answers both at once.

    routes = build_routes(models)           # before OpenAI's, whose path of a model takes any
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import NotFoundError
from cluster.processing import TensorSpec, public_inputs, public_outputs
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.openapi import JSON, describes
from serve_apps.gateway.http.paths import MODEL, WORD
from serve_apps.gateway.http.requests import off_loop_if_large
from serve_apps.gateway.http.responses import write_json
from serve_apps.gateway.models import Models
from serve_apps.gateway.open_inference.requests import reference
from serve_apps.gateway.tensorflow_serving.answers import (
    ModelMetadata,
    ModelStatus,
    Prediction,
    VersionState,
)
from serve_apps.gateway.tensorflow_serving.bodies import (
    SIGNATURE,
    PredictBody,
    read_predict,
    write_predict,
)

_REFUSED_VERBS = ("classify", "regress")
_TYPES = {"FP16": "DT_HALF", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING"}


def build_routes(models: Models) -> list[Route]:
    """The routes of TensorFlow Serving's clients."""

    @describes("Tensors in, tensors out", scopes=("infer",), body=PredictBody, answer=Prediction)
    async def predict(request: Request) -> Response:
        require_any(request, "infer")

        async def work(model: ServedModel) -> Response:
            model.require_graph()
            body = await request.body()
            asked = await off_loop_if_large(len(body), lambda: read_predict(body, model))
            outputs = await models.infer(model, asked.inputs)
            size_bytes = sum(array.nbytes for array in outputs.values())
            content = await off_loop_if_large(
                size_bytes, lambda: write_json(write_predict(asked, model, outputs))
            )
            return Response(content, media_type=JSON)

        return await models.answer(_reference(request), work)

    @describes("Not offered", scopes=("infer",))
    async def refuse(request: Request) -> Response:
        require_any(request, "infer")
        verb = request.url.path.rpartition(":")[2]
        raise NotFoundError(
            f"there is no ':{verb}' here, which takes TensorFlow's own examples",
            hint="call ':predict', and ask for the label or the scores",
        )

    @describes("The state of a version", scopes=("models:read", "infer"), answer=ModelStatus)
    async def show_status(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        model = await _find(models, request)
        return JSONResponse({"model_version_status": [_status(model.served.version)]})

    @describes("Inputs and outputs", scopes=("models:read", "infer"), answer=ModelMetadata)
    async def show_metadata(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        model = await _find(models, request)
        model.require_graph()
        return JSONResponse(_metadata(model))

    name = f"/v1/models/{{name:{WORD}}}"
    pinned = (f"{name}/versions/{{version:{WORD}}}", f"{name}/labels/{{alias:{WORD}}}")
    # Last and with slashes, so that a name which is none is not found.
    which = (*pinned, f"/v1/models/{{name:{MODEL}}}")
    return [
        *(Route(f"{path}:predict", predict, methods=["POST"]) for path in which),
        *(
            Route(f"{path}:{verb}", refuse, methods=["POST"])
            for path in which
            for verb in _REFUSED_VERBS
        ),
        *(Route(f"{path}/metadata", show_metadata) for path in (*pinned, name)),
        *(Route(path, show_status) for path in pinned),
    ]


def version_status(models: Models, model: ServedModel, asked: str) -> ModelStatus:
    """What TensorFlow Serving's clients look for in the answer to GET /v1/models/NAME: all served
    versions, or the one that `asked` names."""
    served = model.served
    versions = models.routes.versions(asked) if asked == served.name else [served.version]
    return {"model_version_status": [_status(version) for version in versions]}


def _status(version: int) -> VersionState:
    """Only what answers is known here, so every state is the same."""
    return {
        "version": str(version),
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }


async def _find(models: Models, request: Request) -> ServedModel:
    """The model that a path names."""
    return await models.find(_reference(request))


def _reference(request: Request) -> str:
    name, alias = request.path_params["name"], request.path_params.get("alias")
    if alias is None:
        return reference(name, request.path_params.get("version", ""))
    if "@" in name or "/" in name:
        raise NotFoundError(f"model '{name}' has a version already", param="model")
    return f"{name}@{alias}"


def _metadata(model: ServedModel) -> ModelMetadata:
    manifest = model.manifest
    signature = {
        "inputs": _describe(public_inputs(manifest)),
        "outputs": _describe(public_outputs(manifest)),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {
            "name": model.served.name,
            "signature_name": "",
            "version": str(model.served.version),
        },
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def _describe(specs: list[TensorSpec]) -> dict[str, Any]:
    return {
        spec.name: {
            "name": spec.name,
            "dtype": _TYPES.get(spec.datatype, f"DT_{spec.datatype}"),
            "tensor_shape": {
                "dim": [{"size": str(size), "name": ""} for size in spec.shape],
                "unknown_rank": False,
            },
        }
        for spec in specs
    }
