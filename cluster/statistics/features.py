"""A model's tensors as features to watch: one array of values, one per sample, for each.

The same in training and in serving, so that both count the same things.

    input_features(arrays, feature_names=("age", "bmi"))    # {"age": …, "bmi": …}
    output_features({"probabilities": probabilities_BC})    # {"probabilities.max": …}
    text_features([ids, more_ids])                          # {"length": …, "tokens": …}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.statistics.profile import MAX_FEATURES, Array

LENGTH, TOKENS = "length", "tokens"


def input_features(
    arrays: Mapping[str, Array], feature_names: Sequence[str] = ()
) -> dict[str, Array]:
    """Of what a graph takes: each value of a sample, or mean and spread where those are many.

    Args:
        feature_names: of the values of a table's rows.
    """
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        rows = array.reshape(len(array), -1)
        width = rows.shape[1]
        if width == 1:
            found[name] = rows[:, 0]
        elif array.dtype.kind == "O":
            continue
        elif len(arrays) == 1 and width == len(feature_names) <= MAX_FEATURES:
            found |= {feature: rows[:, i] for i, feature in enumerate(feature_names)}
        elif width <= MAX_FEATURES:
            found |= {f"{name}[{i}]": rows[:, i] for i in range(width)}
        else:
            found |= {f"{name}.mean": rows.mean(axis=1), f"{name}.spread": rows.std(axis=1)}
    return found


def output_features(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Of what a client gets: labels and numbers as they are, of several scores the largest."""
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        rows = array.reshape(len(array), -1)
        if rows.shape[1] == 1:
            found[name] = rows[:, 0]
        elif rows.shape[1] and array.dtype.kind != "O":
            found[f"{name}.max"] = rows.max(axis=1)
    return found


def text_features(texts: Sequence[Array]) -> dict[str, Array]:
    """Of the token ids of some texts, at least one."""
    return {LENGTH: np.array([len(ids) for ids in texts]), TOKENS: np.concatenate(texts)}
