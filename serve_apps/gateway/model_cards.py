"""GET /v1/catalogue: every served version with its card, its traffic and what it takes.

What the page shows, for any client; `/v1/models` is OpenAI's and says less.

    routes = build_routes(models)
"""

from __future__ import annotations

from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.config import StrictModel
from cluster.errors import GoneError, HeliostatError, NotFoundError
from cluster.model_package.card import model_card
from cluster.model_package.manifest import Kind, Manifest
from cluster.processing import Labels, Softmax, TensorSpec, public_inputs, public_outputs
from serve_apps.gateway.access.authentication import require_any
from serve_apps.gateway.http.openapi import describes
from serve_apps.gateway.models import Models
from serve_apps.gateway.routing_table import Routes, ServedVersion


class PictureClasses(StrictModel):
    """How to send a picture and where the class probabilities are in the answer."""

    input: str
    width: int
    height: int
    is_dark_on_light: bool
    probabilities: str
    labels: tuple[str, ...]
    """Empty where the classes have only numbers."""


class CatalogueVersion(StrictModel):
    """One served version; what its package does not have is left out."""

    version: int
    state: str
    share: float
    """Of the traffic that names no version or alias, from 0 to 1."""
    aliases: list[str]
    digest: str
    error: str | None = None
    """Why its package cannot be opened; then nothing below is there."""
    kind: Kind | None = None
    card: str | None = None
    """Markdown."""
    max_model_len: int | None = None
    has_chat_template: bool | None = None
    inputs: list[TensorSpec] | None = None
    outputs: list[TensorSpec] | None = None
    picture: PictureClasses | None = None


class CatalogueModel(StrictModel):
    id: str
    """Its name, as in /v1/models."""
    versions: list[CatalogueVersion]
    """Newest first."""


class Catalogue(StrictModel):
    """What is served, as far as the key may see it."""

    object: Literal["list"] = "list"
    data: list[CatalogueModel]


def build_routes(models: Models) -> list[Route]:
    """The one route."""

    @describes(
        "Every served version, with its card and its share of the traffic",
        scopes=("models:read", "infer"),
        answer=Catalogue,
    )
    async def catalogue(request: Request) -> Response:
        require_any(request, "models:read", "infer")
        names = sorted({name for name, _ in models.routes.served})
        found = [await _model(models, name) for name in names]
        answer = Catalogue(data=[model for model in found if model.versions])
        return JSONResponse(answer.model_dump(mode="json", exclude_none=True))

    return [Route("/v1/catalogue", catalogue)]


async def _model(models: Models, name: str) -> CatalogueModel:
    routes = models.routes
    served = [routes.served[name, version] for version in reversed(routes.versions(name))]
    versions = [await _version(models, routes, version) for version in served]
    return CatalogueModel(id=name, versions=[found for found in versions if found is not None])


async def _version(
    models: Models, routes: Routes, served: ServedVersion
) -> CatalogueVersion | None:
    """A version in words; None if it is gone, or not for this key."""
    try:
        content = _content(served, (await models.look_up(str(served))).manifest)
    except (NotFoundError, GoneError):
        return None
    except HeliostatError as error:  # must not hide the others
        content = {"error": str(error)}
    weights = routes.weights.get(served.name, {})
    total = sum(weights.values())
    return CatalogueVersion(
        version=served.version,
        state=served.state,
        share=weights.get(served.version, 0) / total if total else 0,
        aliases=sorted(
            alias
            for (name, alias), version in routes.aliases.items()
            if (name, version) == (served.name, served.version)
        ),
        digest=served.digest,
        **content,
    )


def _content(served: ServedVersion, manifest: Manifest) -> dict[str, Any]:
    """What a version's package says."""
    content: dict[str, Any] = {
        "kind": manifest.kind,
        "card": model_card(served.digest, manifest, ref=str(served)),
    }
    if manifest.language_model is not None:
        content["max_model_len"] = manifest.language_model.max_context_tokens
        content["has_chat_template"] = manifest.language_model.has_chat_template
    if manifest.kind == "graph":
        content["inputs"] = public_inputs(manifest)
        content["outputs"] = public_outputs(manifest)
        content["picture"] = picture_classes(manifest)
    return content


def picture_classes(manifest: Manifest) -> PictureClasses | None:
    """None where a model takes no picture or gives no probabilities."""
    processing = manifest.processing
    softmax = next((step for step in processing.post if isinstance(step, Softmax)), None)
    if softmax is None or not processing.raw_inputs:
        return None
    name, image = next(iter(processing.raw_inputs.items()))
    labels = next((step.labels for step in processing.post if isinstance(step, Labels)), ())
    return PictureClasses(
        input=name,
        width=image.width,
        height=image.height,
        is_dark_on_light=image.invert,
        probabilities=softmax.into or softmax.tensor,
        labels=labels,
    )
