"""What a request of the Open Inference Protocol asks for, however it came: over HTTP or gRPC.

asked = InferenceRequest(id="7", inputs={"pixels": pixels}, outputs=None, timeout_s=None)
outputs = await answer(models, model, asked)     # [Output(spec, array, is_binary), …]
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError, NotFoundError
from cluster.processing import Array, TensorSpec, public_outputs
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models, OutOfTimeError

_MOST_INPUTS = 1024
_SHARED_MEMORY = "shared_memory_"
_REASONS = {
    "classification": "classes are not ranked here; ask for the label or the scores instead",
    "sequence_id": "models keep no state between requests",
    "sequence_start": "models keep no state between requests",
    "sequence_end": "models keep no state between requests",
    "priority": "requests are answered in the order in which they come",
}


@dataclass(frozen=True)
class WantedOutput:
    """An output that a client asked for by name."""

    name: str
    is_binary: bool = True


@dataclass(frozen=True)
class InferenceRequest:
    """One request with its tensors as arrays."""

    id: str | None
    inputs: Arrays
    outputs: Sequence[WantedOutput] | None
    """None asks for all."""
    is_binary: bool = True
    """How outputs travel that are not asked for by name."""
    timeout_s: float | None = None


@dataclass(frozen=True)
class Output:
    """An output to send."""

    spec: TensorSpec
    array: Array
    is_binary: bool


async def answer(models: Models, model: ServedModel, asked: InferenceRequest) -> list[Output]:
    """Ask the model and give what was wanted of its outputs, in the order asked for.

    Raises:
        InputError: an unknown output, or inputs that are not the model's; `param` names it.
        OutOfTimeError: no answer within the request's own time.
    """
    wanted = _wanted(model, asked)
    if asked.timeout_s is None:
        found = await models.infer(model, asked.inputs)
    else:
        found = await _infer_within(asked.timeout_s, models, model, asked.inputs)
    return [Output(spec, found[spec.name], is_binary) for spec, is_binary in wanted]


async def _infer_within(
    timeout_s: float, models: Models, model: ServedModel, inputs: Arrays
) -> Arrays:
    try:
        async with asyncio.timeout(timeout_s):
            return await models.infer(model, inputs)
    except TimeoutError:
        raise OutOfTimeError(
            f"no answer within the {timeout_s:g} s that the request allows",
            hint="allow more in its parameter 'timeout', in microseconds",
        ) from None


async def find_model(models: Models, name: str, version: str) -> ServedModel:
    """The model that a name and a version, which may be empty, stand for.

    Raises:
        NotFoundError: nothing is served under them.
    """
    return await models.find(reference(name, version))


def reference(name: str, version: str) -> str:
    """What a name and a version, which may be empty, stand for.

    Raises:
        NotFoundError: the name has a version itself.
    """
    if version and ("@" in name or "/" in name):
        raise NotFoundError(f"model '{name}' has a version already", param="model")
    return f"{name}/{version}" if version else name


def add_input(inputs: Arrays, name: str, array: Array) -> None:
    """Raises InputError if there is one of this name already, or too many."""
    if name in inputs:
        raise InputError(f"input '{name}' is given twice", param=name)
    if len(inputs) >= _MOST_INPUTS:
        raise InputError(f"the request has more than {_MOST_INPUTS} inputs", param="inputs")
    inputs[name] = array


def check_parameters(parameters: Mapping[str, Any], known: Sequence[str], of: str) -> None:
    """Refuse by name what is not understood: nothing that is sent is ignored.

    Raises:
        InputError: `param` names the parameter.
    """
    for name in parameters:
        if name in known:
            continue
        reason = _REASONS.get(name)
        if name.startswith(_SHARED_MEMORY):
            reason = "memory is not shared with clients; send the values"
        raise InputError(
            f"parameter '{name}' of {of} is not supported here",
            hint=reason or f"known are: {', '.join(known) or 'none'}",
            param=name,
        )


def read_timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """The request's own limit, which the protocol's clients give in microseconds; 0 is none.

    Raises:
        InputError: it is no number of microseconds.
    """
    timeout_us = parameters.get("timeout", 0)
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
        raise InputError(
            f"parameter 'timeout' is {timeout_us!r:.100}",
            hint="expected microseconds, a whole number",
            param="timeout",
        )
    return timeout_us / 1e6 if timeout_us else None


def read_flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Raises InputError unless the parameter is true, false or absent."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"parameter '{name}' is {value!r:.100}", hint="expected true or false",
                         param=name)  # fmt: skip
    return value


def _wanted(model: ServedModel, asked: InferenceRequest) -> list[tuple[TensorSpec, bool]]:
    specs = {spec.name: spec for spec in public_outputs(model.manifest)}
    if asked.outputs is None:
        return [(spec, asked.is_binary) for spec in specs.values()]
    wanted: dict[str, tuple[TensorSpec, bool]] = {}
    for output in asked.outputs:
        if output.name not in specs:
            raise InputError(
                f"unknown output '{output.name}'",
                hint=f"there are: {', '.join(specs)}",
                param=output.name,
            )
        if output.name in wanted:
            raise InputError(f"output '{output.name}' is asked for twice", param=output.name)
        wanted[output.name] = specs[output.name], output.is_binary
    return list(wanted.values())
