"""Reading request bodies: JSON with finite numbers, and one clear error for what is wrong.

values = parse_object(await request.body())
completion = validate(CompletionRequest, values)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.errors import InputError

ModelType = TypeVar("ModelType", bound=BaseModel)
ResultType = TypeVar("ResultType")

_LARGE_BODY_BYTES = 128 * 1024


async def off_loop_if_large(size_bytes: int, work: Callable[[], ResultType]) -> ResultType:
    """Do work that grows with the body; in a thread where it takes about a millisecond or more."""
    if size_bytes < _LARGE_BODY_BYTES:
        return work()
    return await asyncio.to_thread(work)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InputError: it is not JSON, not an object, too deep, or has NaN or infinity.
    """
    try:
        # Strictly UTF-8: json would let halves of surrogate pairs pass, as their own bytes do.
        values = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if b"\\u" in body:
            _refuse_half_characters(values)
    except (ValueError, RecursionError) as error:
        shown = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(
            f"the request body is not valid JSON: {shown}", hint="send a JSON object"
        ) from None
    if not isinstance(values, dict):
        raise InputError(
            f"the request body is a JSON {type(values).__name__}", hint="send a JSON object"
        )
    return values


def validate(model_type: type[ModelType], values: dict[str, Any]) -> ModelType:
    """Typed values; the first thing wrong is reported by its name."""
    try:
        return model_type.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model_type.model_fields))
            raise InputError(
                f"parameter '{name}' is not known here", hint=f"known are: {known}", param=name
            ) from None
        if first["type"] == "missing":
            raise InputError(f"parameter '{name}' is missing", param=name) from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(f"parameter '{name}': {message}", param=name) from None


def _is_union_branch(part: int | str) -> bool:
    """Pydantic names the tried type in a location, as in `stop.list[str].0`."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def _refuse_half_characters(values: Any) -> None:
    """What cannot be encoded cannot be answered or stored: half a surrogate pair, as an escape."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
