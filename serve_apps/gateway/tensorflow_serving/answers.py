"""How the answers of TensorFlow Serving's REST look.

`write_predict` of bodies.py makes a Prediction.
"""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict


class Prediction(TypedDict):
    """`predictions` if rows were sent, `outputs` if columns were."""

    predictions: NotRequired[list[Any]]
    outputs: NotRequired[Any]


class StateDetails(TypedDict):
    error_code: str
    error_message: str


class VersionState(TypedDict):
    version: str
    state: str
    status: StateDetails


class ModelStatus(TypedDict):
    model_version_status: list[VersionState]


class ModelSpec(TypedDict):
    name: str
    signature_name: str
    version: str


class ModelMetadata(TypedDict):
    model_spec: ModelSpec
    metadata: dict[str, Any]
