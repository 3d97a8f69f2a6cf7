"""Reading request bodies: JSON with finite numbers, and one clear error for what is wrong.

What JSON allows and readers disagree about is refused here: the same key twice, numbers beyond a
double, halves of surrogate pairs. So is what would take memory or time out of all proportion.

    values = parse_object(await request.body())
    completion = validate(CompletionRequest, values)
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import InputError, PayloadTooLargeError

ModelType = TypeVar("ModelType", bound=BaseModel)
ResultType = TypeVar("ResultType")

MAX_DEPTH = 64
"""Lists and objects inside each other."""
MAX_VALUES = 4_000_000
"""Numbers, texts, lists and objects together: an empty list takes 28 times its two bytes."""

_LARGE_BODY_BYTES = 128 * 1024
_LARGE_TEXT_BYTES = 8 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_MAX_SHOWN = 100
_JSON_WORDS: dict[type, str] = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


async def off_loop_if_large(
    size_bytes: int, work: Callable[[], ResultType], *, tokenises: bool = False
) -> ResultType:
    """Do work that grows with the body; in a thread where it takes about a millisecond or more."""
    if size_bytes < (_LARGE_TEXT_BYTES if tokenises else _LARGE_BODY_BYTES):
        return work()
    return await asyncio.to_thread(work)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InputError: it is not JSON, not an object, nested too deeply, has a key twice, or a number
            that a double does not hold.
        PayloadTooLargeError: it holds more values than the limit.
    """
    body = body.removeprefix(_BYTE_ORDER_MARK)
    outside = _outside_of_strings(body)
    num_values = outside.count(b",") + outside.count(b"[") + outside.count(b"{")
    if num_values > MAX_VALUES:
        raise PayloadTooLargeError(
            f"the request body holds about {num_values} values, the most allowed are {MAX_VALUES}",
            hint="send fewer samples in each request",
        )
    try:
        values = orjson.loads(body)
        _refuse_deep_nesting(outside)
        _refuse_duplicate_keys(values, outside)
    except ValueError as error:
        raise InputError(
            f"the request body is not valid JSON: {error}",
            hint="send a JSON object",
            param=_field_at_fault(body, outside),
        ) from None
    if not isinstance(values, dict):
        raise InputError(
            f"the request body is {_JSON_WORDS[type(values)]}", hint="send a JSON object"
        )
    return values


def validate(model_type: type[ModelType], values: dict[str, Any]) -> ModelType:
    """Typed values; the first thing wrong is reported by its name."""
    try:
        return model_type.model_validate(values, strict=True)
    except ValidationError as error:
        first = _most_telling(error.errors(include_url=False, include_input=False))
        name = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
        name = name[:_MAX_SHOWN]
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model_type.model_fields))
            raise InputError(
                f"parameter '{name}' is not known here", hint=f"known are: {known}", param=name
            ) from None
        if first["type"] == "missing":
            raise InputError(f"parameter '{name}' is missing", param=name) from None
        message = first["msg"].replace(" after validation", "").removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        raise InputError(f"parameter '{name}': {message}", param=name) from None


def as_whole_numbers(value: Any) -> Any:
    """2 for 2.0, also in lists: to JSON they are the same number. What is no whole one is left."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and not {float, list}.isdisjoint(map(type, value)):
        return [as_whole_numbers(item) for item in value]
    return value


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first, unless it only says that a value is not of the first type that it might be."""
    same = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return next((error for error in same if not error["type"].endswith("_type")), same[0])


def _is_union_branch(part: int | str) -> bool:
    """Pydantic names the tried type in a location, as in `stop.list[str].0`."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "constrained-str", "constrained-int") or "[" in part
    )


def _outside_of_strings(body: bytes) -> bytes:
    """A valid JSON text without its strings; of another one, whatever."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(body.split(b'"')[::2])


def _field_at_fault(body: bytes, outside: bytes) -> str | None:
    """The parameter with half of a surrogate pair, or with what JSON has no number for; another
    reader of JSON lets both through."""
    try:
        _refuse_deep_nesting(outside)
        found = _first_broken("", json.loads(body))
    except ValueError:
        return None
    return found[:_MAX_SHOWN] if found else None


def _first_broken(name: str, value: Any) -> str | None:
    """The name of the first broken value in this one, or of what holds a broken key."""
    if not isinstance(value, dict | list):
        return name if _is_broken(value) else None
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if _is_broken(key):
            return name
        if isinstance(item, dict | list) or _is_broken(item):
            found = _first_broken(f"{name}.{key}".lstrip("."), item)
            if found is not None:
                return found
    return None


def _is_broken(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, int):
        return value.bit_length() > sys.float_info.max_exp
    return isinstance(value, float) and not math.isfinite(value)


def _refuse_deep_nesting(outside: bytes) -> None:
    brackets = outside.translate(None, _NOT_BRACKETS)
    if len(brackets) <= 2 * MAX_DEPTH:
        return
    codes = np.frombuffer(brackets, dtype=np.uint8)
    opens = (codes == ord("[")) | (codes == ord("{"))
    if np.where(opens, 1, -1).cumsum().max() > MAX_DEPTH:
        raise ValueError(f"it is nested too deeply, at most {MAX_DEPTH} levels are allowed")


def _refuse_duplicate_keys(values: Any, outside: bytes) -> None:
    """Two readers of one body must not see two requests."""
    num_objects, num_keys = outside.count(b"{"), outside.count(b":")
    level = [values]
    # Level by level, so that all objects are found before long lists of numbers are searched. What
    # a key held before it came again is gone, and its objects are never found.
    while num_objects and level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                num_objects -= 1
                num_keys -= len(value)
                below.extend(item for item in value.values() if isinstance(item, dict | list))
            elif num_objects:
                below.extend(item for item in value if isinstance(item, dict | list))
        level = below
    if num_keys:
        raise ValueError("an object has the same key twice")
