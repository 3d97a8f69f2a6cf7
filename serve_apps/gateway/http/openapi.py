"""What every route takes and gives, as OpenAPI 3.1: `GET /openapi.json`.

A route is described where it is built, by a decorator on its endpoint; a test finds those that are
not. Bodies and answers are pydantic models or typed dictionaries, the very ones that are used.

    @describes("The models that are served", scopes=("models:read", "infer"), answer=ModelList)
    async def list_models(request: Request) -> Response: ...
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from typing_extensions import TypedDict

from cluster.errors import HeliostatError
from serve_apps.gateway.access.authentication import PUBLIC_PATHS
from serve_apps.gateway.http.errors import body_for

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

_SCHEME = "key"
_NAME = {"type": "string", "minLength": 1}
_VERSION = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
_DESCRIPTION = (
    "A key (`hst_…`, made by `heliostat keys create`) goes into the header `Authorization: Bearer "
    "KEY`; each operation says which scopes open it, any one of them. Models are named NAME, "
    "NAME@ALIAS or NAME/VERSION."
)

EndpointType = TypeVar("EndpointType", bound=Callable[..., Any])


class ErrorDetails(TypedDict):
    message: str
    type: str
    code: str
    param: str | None


class ErrorObject(TypedDict):
    """What OpenAI's clients expect."""

    error: ErrorDetails


class ErrorMessage(TypedDict):
    """What the clients of the other protocols expect."""

    error: str


@dataclass(frozen=True)
class Operation:
    """What one method of one path does."""

    summary: str
    scopes: tuple[str, ...] = ()
    """Any one of them opens it; empty where any key does."""
    body: Any = None
    """Type of the request body, None where there is none."""
    body_types: tuple[str, ...] = (JSON,)
    answer: Any = dict[str, Any]
    answer_types: tuple[str, ...] = (JSON,)
    """All but JSON are described as text or bytes."""
    status: int = 200
    query: Mapping[str, Any] = field(default_factory=dict)
    """Types of the parameters after the `?`; none is required."""


def describes(
    summary: str,
    *,
    scopes: tuple[str, ...] = (),
    body: Any = None,
    body_types: tuple[str, ...] = (JSON,),
    answer: Any = dict[str, Any],
    answer_types: tuple[str, ...] = (JSON,),
    status: int = 200,
    query: Mapping[str, Any] | None = None,
) -> Callable[[EndpointType], EndpointType]:
    """Attach an Operation to an endpoint."""
    operation = Operation(
        summary, scopes, body, body_types, answer, answer_types, status, dict(query or {})
    )

    def attach(endpoint: EndpointType) -> EndpointType:
        endpoint.operation = operation  # type: ignore[attr-defined]
        return endpoint

    return attach


def build_route(routes: Sequence[BaseRoute]) -> Route:
    """The route that describes these, and itself."""
    written: list[bytes] = []

    @describes("This description")
    async def show(_request: Request) -> Response:
        if not written:
            written.append(await asyncio.to_thread(lambda: orjson.dumps(describe(every))))
        return Response(written[0], media_type=JSON)

    route = Route("/openapi.json", show)
    every = [*routes, route]
    return route


def undescribed(routes: Iterable[BaseRoute]) -> list[str]:
    """Paths whose endpoint lacks a description, or that are no plain routes."""
    return [getattr(route, "path", repr(route)) for route in routes if _operation(route) is None]


def describe(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    described = [
        (route, operation)
        for route in routes
        if isinstance(route, Route) and (operation := _operation(route)) is not None
    ]
    schemas, components = _schemas([operation for _, operation in described])
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in described:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            values = _describe(route, operation, schemas)
            values["operationId"] = _operation_id(method, route.path_format)
            paths.setdefault(route.path_format, {})[method.lower()] = values
    return {
        "openapi": "3.1.0",
        "info": {"title": "Heliostat", "version": "1", "description": _DESCRIPTION},
        "security": [{_SCHEME: []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {_SCHEME: {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: BaseRoute) -> Operation | None:
    return getattr(getattr(route, "endpoint", None), "operation", None)


_Schemas = Mapping[tuple[str, JsonSchemaMode], dict[str, Any]]


def _schemas(operations: Sequence[Operation]) -> tuple[_Schemas, dict[str, Any]]:
    """Schemas of all types by their names, and what they refer to."""
    modes: dict[tuple[str, JsonSchemaMode], TypeAdapter[Any]] = {}
    for kind in (ErrorObject, ErrorMessage, *(operation.answer for operation in operations)):
        modes[_key(kind, "serialization")] = TypeAdapter(kind)
    for operation in operations:
        for kind in (operation.body, *operation.query.values()):
            if kind is not None:
                modes[_key(kind, "validation")] = TypeAdapter(kind)
    inputs = [(name, mode, adapter) for (name, mode), adapter in modes.items()]
    found, definitions = TypeAdapter.json_schemas(
        inputs, ref_template="#/components/schemas/{model}"
    )
    return found, definitions.get("$defs", {})


def _key(kind: Any, mode: JsonSchemaMode) -> tuple[str, JsonSchemaMode]:
    return f"{getattr(kind, '__module__', '')}.{kind!r}", mode


def _describe(route: Route, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    content = {
        kind: {"schema": schemas[_key(operation.answer, "serialization")] if kind == JSON else {}}
        for kind in operation.answer_types
    }
    error = {
        "description": "What is wrong, which field it is about, and what to do.",
        "content": {JSON: {"schema": schemas[_error_key(route.path_format)]}},
    }
    values: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [*_path_parameters(route), *_query_parameters(operation, schemas)],
        "responses": {
            str(operation.status): {"description": "Done.", "content": content},
            "4XX": error,
            "5XX": error,
        },
    }
    if route.path in PUBLIC_PATHS:
        values["security"] = []
    elif operation.scopes:
        values["description"] = f"Scope: {' or '.join(operation.scopes)}."
    if operation.body is not None:
        body = schemas[_key(operation.body, "validation")]
        values["requestBody"] = {
            "required": True,
            "content": {
                kind: {"schema": body if kind == JSON else {}} for kind in operation.body_types
            },
        }
    return values


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _VERSION if name == "version" else _NAME,
        }
        for name in route.param_convertors
    ]


def _query_parameters(operation: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "schema": schemas[_key(kind, "validation")]}
        for name, kind in operation.query.items()
    ]


def _error_key(path: str) -> tuple[str, JsonSchemaMode]:
    is_plain = isinstance(body_for(HeliostatError(""), path)["error"], str)
    return _key(ErrorMessage if is_plain else ErrorObject, "serialization")


def _operation_id(method: str, path: str) -> str:
    words = re.findall(r"[A-Za-z0-9]+", path)
    return "_".join([method.lower(), *words])
