"""From a space to points: which values each trial gets. Pure; the same seed, the same points.

Random and grid search never look at results, so all points are drawn before the first trial: each
can be validated up front, and a sweep that goes on after a crash draws the same ones.

    for point in draw_points(config):
        point["optimizer.learning_rate"]
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from cluster.errors import ConfigError
from jobs.tuning.config import Dimension, TuneConfig

Point = dict[str, JsonValue]
"""A value for each field of the space."""

MAX_TRIALS = 1000
# In a small space most draws are repeats; after so many in a row nothing is left to find.
_MAX_REPEATS = 200


def draw_points(config: TuneConfig) -> list[Point]:
    """All different; fewer than `num_trials` if a space without ranges has no more.

    Raises:
        ConfigError: the grid has more points than a sweep may have trials.
    """
    num_combinations = math.prod(
        _num_listed(dimension, config) for dimension in config.space.values()
    )
    if num_combinations * (config.num_trials or 1) > MAX_TRIALS:
        raise ConfigError(
            f"the space's grid has {num_combinations:,} combinations"
            + (f" for {config.num_trials} trials each" if config.num_trials else "")
            + f", and a sweep has at most {MAX_TRIALS} trials",
            hint="list fewer values, or use choice with search random",
            param="space",
        )
    listed = {name: _listed(dimension, config) for name, dimension in config.space.items()}
    grids = {name: values for name, values in listed.items() if values is not None}
    combinations = [
        dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())
    ]
    points = [
        {name: ({**draw, **combination})[name] for name in config.space}
        for draw in _draws(config, {*config.space} - {*grids})
        for combination in combinations
    ]
    return _without_repeats(points)


def candidates(dimension: Dimension) -> Sequence[JsonValue]:
    """The values to validate a field with: all, or the ends of a range."""
    return (
        dimension.choice
        or dimension.grid
        or dimension.uniform
        or dimension.loguniform
        or dimension.integers
        or ()
    )


def with_values(config: Mapping[str, Any], values: Mapping[str, JsonValue]) -> dict[str, Any]:
    """A nested mapping with some of its dotted fields changed.

    Raises:
        ConfigError: a field lies below a single value.
    """
    changed = copy.deepcopy(dict(config))
    for field, value in values.items():
        *path, last = field.split(".")
        node = changed
        for part in path:
            if node.get(part) is None:
                node[part] = {}
            if not isinstance(node[part], dict):
                raise ConfigError(
                    f"field '{field}' does not exist: '{part}' is a single value",
                    hint=f"name '{part}' itself",
                    param=field,
                )
            node = node[part]
        node[last] = copy.deepcopy(value)
    return changed


def describe(values: Mapping[str, JsonValue]) -> str:
    """`optimizer.learning_rate=0.0021 schedule={kind: wsd}`"""
    return " ".join(f"{name}={show(value)}" for name, value in values.items())


def show(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)


def _listed(dimension: Dimension, config: TuneConfig) -> Sequence[JsonValue] | None:
    """Values that are all tried; None if one is drawn."""
    if config.search == "grid" and dimension.integers is not None:
        low, high = dimension.integers
        return range(low, high + 1)
    return dimension.grid or (dimension.choice if config.search == "grid" else None)


def _num_listed(dimension: Dimension, config: TuneConfig) -> int:
    """How many `_listed` has, 1 for none; a range may have more than can be counted by `len`."""
    if config.search == "grid" and dimension.integers is not None:
        low, high = dimension.integers
        return high - low + 1
    return len(_listed(dimension, config) or (None,))


def _draws(config: TuneConfig, fields: set[str]) -> Iterable[Point]:
    """One empty draw where every field is listed."""
    if not fields:
        yield {}
        return
    # A stream for each field: adding one does not change what the others draw.
    streams = {name: random.Random(f"{config.seed}/{name}") for name in config.space}  # noqa: S311
    seen: set[str] = set()
    num_repeats = 0
    while len(seen) < (config.num_trials or 1) and num_repeats < _MAX_REPEATS:
        point = {name: _draw(config.space[name], streams[name]) for name in sorted(fields)}
        if (key := _key(point)) in seen:
            num_repeats += 1
            continue
        seen.add(key)
        num_repeats = 0
        yield point


def _draw(dimension: Dimension, stream: random.Random) -> JsonValue:
    if dimension.choice is not None:
        return stream.choice(dimension.choice)
    if dimension.uniform is not None:
        return stream.uniform(*dimension.uniform)
    if dimension.integers is not None:
        return stream.randint(*dimension.integers)
    assert dimension.loguniform is not None
    low, high = dimension.loguniform
    return min(max(math.exp(stream.uniform(math.log(low), math.log(high))), low), high)


def _without_repeats(points: Iterable[Point]) -> list[Point]:
    return list({_key(point): point for point in points}.values())


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)
