"""Every route is described, and keeps to what its description says."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import from_schema
from schemathesis.engine.events import EngineFinished, FatalError, NonFatalError, ScenarioFinished
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_apps.gateway.access.authentication import PUBLIC_PATHS
from serve_apps.gateway.http.openapi import describe, describes, undescribed

_MAX_EXAMPLES = 8
_CHECKS = {
    # A list that is long, or too long, may be a body that is too long.
    "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409", "413"]},
    "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "413"]},
}
_OPERATIONS = [
    # Options depend on each other, which no schema says.
    {
        "include-name": "POST /admin/deployments",
        "checks": {"positive_data_acceptance": {"enabled": False}},
    },
]


async def described(gateway: Any) -> dict[str, Any]:
    answer = await gateway.client.get("/openapi.json", headers=gateway.headers("infer"))
    assert answer.status_code == 200
    values: dict[str, Any] = answer.json()
    return values


async def test_every_route_is_described(gateway: Any) -> None:
    assert undescribed(gateway.app.routes) == []
    document = await described(gateway)
    found = {(path, method) for path, item in document["paths"].items() for method in item}
    assert found == {
        (route.path_format, method.lower())
        for route in gateway.app.routes
        for method in route.methods - {"HEAD"}
    }
    names = [
        values["operationId"] for item in document["paths"].values() for values in item.values()
    ]
    assert len(set(names)) == len(names)


def test_a_route_without_a_description_is_found() -> None:
    async def plain(request: Request) -> Response:
        return Response()

    @describes("Said")
    async def said(request: Request) -> Response:
        return Response()

    routes = [Route("/plain", plain), Route("/said", said)]
    assert undescribed(routes) == ["/plain"]
    assert set(describe(routes)["paths"]) == {"/said"}


async def test_what_is_public_is_said_to_be_and_nothing_else(gateway: Any) -> None:
    document = await described(gateway)
    assert document["security"] == [{"key": []}]
    operations = [
        (path, values) for path, item in document["paths"].items() for values in item.values()
    ]
    assert {path for path, values in operations if values.get("security") == []} == PUBLIC_PATHS
    assert "Scope: infer." in document["paths"]["/v1/completions"]["post"]["description"]


async def test_errors_are_described_in_the_protocols_shape(gateway: Any) -> None:
    paths = (await described(gateway))["paths"]
    for path, method, name in [
        ("/v1/completions", "post", "ErrorObject"),
        ("/v2/models/{name}/infer", "post", "ErrorMessage"),
    ]:
        schema = paths[path][method]["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}


def with_served_models(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the names of models that there are, so that requests reach them."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": ["talker", "mute", "classes/1"]}
    for path, item in document["paths"].items():
        for operation in item.values() if not path.startswith("/admin") else ():
            for parameter in operation["parameters"]:
                if parameter["name"] == "name":
                    parameter["schema"] = {"enum": ["classes", "talker"]}
    return document


def violations(document: dict[str, Any], url: str, key: str, checks: dict[str, Any]) -> list[str]:
    config = SchemathesisConfig.from_dict(
        {
            "base-url": url,
            "headers": {"Authorization": f"Bearer {key}"},
            "generation": {"max-examples": _MAX_EXAMPLES, "deterministic": True, "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},
            "checks": _CHECKS | checks,
            "operations": _OPERATIONS,
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    found: list[str] = []
    num_cases = 0
    for event in from_schema(schema).execute():
        if isinstance(event, ScenarioFinished):
            num_cases += len(event.recorder.cases)
            for case_id, checks_of_case in event.recorder.checks.items():
                for check in checks_of_case:
                    if check.failure_info is not None:
                        case = event.recorder.cases[case_id].value
                        failure = check.failure_info.failure
                        found.append(f"{check.name}: {case.as_curl_command()}: {failure}")
        elif isinstance(event, FatalError):
            raise event.exception
        elif isinstance(event, NonFatalError):
            found.append(f"{event.label}: {event.value}")
        elif isinstance(event, EngineFinished):
            assert num_cases > 100
    return found


@pytest.mark.parametrize("is_served", [False, True])
async def test_no_request_breaks_the_contract(
    gateway: Any, server_url: str, is_served: bool
) -> None:
    document = await described(gateway)
    checks: dict[str, Any] = {}
    if is_served:
        document = with_served_models(document)
        # What a model can hold is not for a schema to say.
        checks = {"positive_data_acceptance": {"enabled": False}}
    key = gateway.headers()["authorization"].removeprefix("Bearer ")
    found = await asyncio.to_thread(violations, document, server_url, key, checks)
    assert not found, "\n".join(found)
