"""How the answers of the Open Inference Protocol look.

`describe_model` of routes.py makes a ModelMetadata.
"""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict


class Live(TypedDict):
    live: bool


class Ready(TypedDict):
    ready: bool


class ModelReady(TypedDict):
    name: str
    ready: bool


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(TensorMetadata):
    data: NotRequired[list[Any]]
    parameters: NotRequired[dict[str, Any]]


class Inference(TypedDict):
    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    parameters: NotRequired[dict[str, Any]]
