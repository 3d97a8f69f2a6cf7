"""YAML as configs use it: mappings, lists, text, numbers, truth values, and nothing else.

Stricter than PyYAML's safe loader: a key given twice is an error, a date stays text, and a small
file cannot become a large value by aliases. It knows nothing of what the values mean.

    parse_yaml("steps: 10")      # {'steps': 10}
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

MAX_VALUES = 100_000
MAX_DEPTH = 50
_LARGEST_INTEGER = 2**63
_ALLOWED_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")
}


class _Loader(yaml.SafeLoader):
    """PyYAML's, without dates and with unique keys."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _ALLOWED_TAGS and node.tag != "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(
                None, None, f"there is a value of type {node.tag}", node.start_mark
            )
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: it is no YAML, with the line if one is to blame.
        ValueError: it holds something that no config has a use for.
        RecursionError: it is nested too deeply.
    """
    value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    for number, _leaf in enumerate(_checked(value, "", 0)):
        if number >= MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} values")
    return value


def _checked(value: Any, name: str, depth: int) -> Iterator[Any]:
    """Every value inside, refused by name if no config has a use for it."""
    if depth > MAX_DEPTH:
        raise RecursionError
    yield value
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_text(str(key), name)
            yield from _checked(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _checked(inner, f"{name}.{number}", depth + 1)
    elif isinstance(value, str):
        _check_text(value, name)
    elif isinstance(value, float) and not math.isfinite(value):
        shown = f"'{name}'" if name else "it"
        raise ValueError(f"{shown} is {value}, expected a finite number")
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"'{name}' is a number of more than 64 bits")


def _check_text(text: str, name: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"'{name}' holds a character that is no text")
