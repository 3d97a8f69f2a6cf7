"""Typed configuration: one parse, defaults in code, one generic override.

A config is a frozen model that knows every key it accepts; a YAML file states only what deviates.

    class TrainConfig(StrictModel):
        steps: int = 100

    config = load_config(Path("configs/train/digits.yaml"), TrainConfig, ["steps=200"])
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError
from cluster.yaml_files import parse_yaml


class StrictModel(BaseModel):
    """Base of every config and record: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        return refuse_truth_for_numbers(cls, values)


def first_problem(error: ValidationError) -> str:
    """What pydantic found, in one line: 'step: Field required'."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def refuse_truth_for_numbers(model_type: type[BaseModel], values: Any) -> Any:
    """Return `values`, unless one is true or false (also yes and no) where a number belongs.

    Pydantic would take it for 1 or 0.
    """
    fields = model_type.model_fields
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, bool) and name in fields:
            wanted = {fields[name].annotation, *typing.get_args(fields[name].annotation)}
            if wanted & {int, float} and bool not in wanted:
                raise ValueError(f"'{name}' is {str(value).lower()}, expected a number")
    return values


ConfigType = TypeVar("ConfigType", bound=BaseModel)

# PyYAML raises ValueError on numbers of thousands of digits.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
_MAX_SHOWN = 200
_MAX_FILE_BYTES = 4 * 1024**2

CONFIDENTIAL = "confidential"
"""Type of a `PydanticCustomError` about a value that is not to be shown."""


def load_config(
    path: Path | str, config_type: type[ConfigType], overrides: Sequence[str] = ()
) -> ConfigType:
    """Read a YAML file, apply `a.b=c` overrides and validate.

    Raises:
        ConfigError: one line naming the file, the key, what was found and what was expected.
    """
    path = Path(path)
    values = read_mapping(path)
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, config_type, source=str(path))


def parse_config(
    values: dict[str, Any],
    config_type: type[ConfigType],
    *,
    source: str,
    hint: str = "correct that key, or override it with --set KEY=VALUE",
) -> ConfigType:
    """Validate plain values as `config_type`; `source` names them in errors."""
    try:
        config = config_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{source}: {_describe(error, values, config_type)}",
            hint=hint,
        ) from None
    # Pydantic takes the text 1e999 for a number.
    for key, value in _numbers(config.model_dump(mode="python"), ""):
        if not math.isfinite(value):
            raise ConfigError(
                f"{source}: key '{key}' is {value}, expected a finite number", hint=hint
            )
    return config


def _numbers(values: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(values, float):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _numbers(value, f"{key}.{number}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, not validated; an empty file is an empty mapping."""
    try:
        text = _read_text(path)
    except FileNotFoundError:
        raise ConfigError(
            f"config file '{path}' does not exist", hint=_nearby_configs(path)
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config file '{path}' cannot be read: {error}", hint="expected a YAML text file"
        ) from None
    try:
        values = parse_yaml(text)
    except _YAML_ERRORS as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where is not None else ""
        line += _why(error)
        raise ConfigError(
            f"config file '{path}' is not valid YAML{line}",
            hint="check its indentation and quotes",
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file '{path}' holds a {type(values).__name__}, expected a mapping of keys",
            hint="write 'key: value' lines",
        )
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(
                f"config file '{path}' has the key {key!r}, expected text", hint="quote it"
            )
    return values


def _read_text(path: Path) -> str:
    """A plain file's text: reading a pipe would wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("it is no plain file")
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES:,} bytes")
    return data.decode("utf-8")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return ": it is nested too deeply"
    if isinstance(error, yaml.constructor.ConstructorError) and error.problem:
        return f": {error.problem}"
    return f": {error}" if isinstance(error, ValueError) else ""


def _nearby_configs(path: Path) -> str:
    siblings = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return "there are: " + ", ".join(siblings) if siblings else "check the path"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"--set '{override}' is not an override, expected KEY=VALUE", hint="e.g. --set steps=10"
        )
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set '{override}': '{part}' is a single value, it has no keys below it",
                hint=f"set '{part}' itself",
            )
        node = child
    try:
        node[parts[-1]] = parse_yaml(text)
    except _YAML_ERRORS as error:
        wrong = "cannot be taken" if isinstance(error, ValueError) else "is not valid YAML"
        raise ConfigError(
            f"--set '{_short(override)}': the value {wrong}{_why(error)}",
            hint="correct or quote it",
        ) from None


def _describe(error: ValidationError, values: Any, config_type: type[BaseModel]) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key is also a missing one.
    first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    location = _written(first, values)
    name = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(config_type, first["loc"][:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        guess = f"; did you mean '{close[0]}'?" if close else ""
        expected = f", expected one of: {', '.join(known)}" if known and not close else ""
        return f"unknown key '{name}'{guess}{expected}{more}"
    if first["type"] == "missing":
        return f"key '{name}' is missing{more}"
    text = first["msg"].removeprefix("Value error, ")  # pydantic's words before a check of ours
    message = text[:1].lower() + text[1:]
    if not name:
        return message + more
    found = first.get("input")
    is_plain = (
        isinstance(found, (str, int, float, bool, type(None))) and first["type"] != CONFIDENTIAL
    )
    shown = _short(f"{found!r}") if is_plain else None
    return f"key '{name}'" + (f" is {shown}: " if shown is not None else ": ") + message + more


def _written(error: ErrorDetails, values: Any) -> list[int | str]:
    """Where an error is, in keys that stand in the config, and the one that is missing.

    Pydantic also puts the kinds of unions and the names of validators there.
    """
    *path, last = error["loc"] or ("",)
    keys: list[int | str] = []
    for part in (*path, last):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or part is not last:
                continue
        keys.append(part)
    return keys


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _known_keys(config_type: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model at `location`, as far as annotations tell."""
    models = [config_type]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_inside(field.annotation)]
        elif isinstance(part, str):
            # The kind of a union: that member's name in one of its literals.
            models = [model for model in models if _is_of_kind(model, part)] or models
    return sorted({name for model in models for name in model.model_fields})


def _models_inside(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inside = (_models_inside(argument) for argument in typing.get_args(annotation))
    return [model for models in inside for model in models]


def _is_of_kind(model: type[BaseModel], kind: str) -> bool:
    return any(kind in typing.get_args(field.annotation) for field in model.model_fields.values())
