"""Load an estimator that somebody saved with skops, if nothing in it can do harm.

skops knows which types are harmless. It leaves out decision trees, whose compiled code follows the
node numbers of the file without looking: those are looked at here, before any tree is used.

    estimator, warnings = load_estimator(Path("model.skops"))
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ForbiddenFileError, HeliostatError, PackageError, first_line
from cluster.model_package.skops_archive import check_archive

# scikit-learn's own, that hold numbers and are built without running anything.
_TREE = "sklearn.tree._tree.Tree"
_HARMLESS = (
    _TREE,
    "numpy.dtype",
    "numpy.number",
    "sklearn._loss.loss.HalfTweedieLossIdentity",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.feature_selection._univariate_selection.f_classif",
    "sklearn.feature_selection._univariate_selection.f_regression",
    "sklearn.metrics._scorer._PassthroughScorer",
    "sklearn.model_selection._split.KFold",
    "sklearn.model_selection._split.StratifiedKFold",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.utils._bunch.Bunch",
)
_LEAF = -1
# Of the words of a vocabulary: no row is made for more.
_MAX_WIDTH = 10_000_000
_SAVE = "save it with skops: skops.io.dump(model, 'model.skops')"


def load_estimator(source: Path) -> tuple[Any, tuple[str, ...]]:
    """The estimator, and what scikit-learn warned of.

    Raises:
        ForbiddenFileError: it holds types that are not known to be harmless.
        PackageError: it is no skops file, a damaged one, or one that would fill the memory.
    """
    import skops.io

    with one_line(f"'{source}' is not a skops file", hint=_SAVE):
        check_archive(source)
        found = skops.io.get_untrusted_types(file=source)
    if untrusted := sorted(set(found) - set(_HARMLESS)):
        raise ForbiddenFileError(
            f"'{source}' holds types that are not known to be harmless: "
            f"{', '.join(untrusted)[:300]}",
            hint="use scikit-learn's own estimators (neighbours: algorithm='brute'), or export it "
            "to ONNX",
        )
    with (
        one_line(f"'{source}' cannot be loaded", hint="save it again with this scikit-learn"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        estimator = skops.io.load(source, trusted=[*found])
    with one_line(f"'{source}' is damaged", hint=_SAVE):
        _check_trees(source, estimator)
    return estimator, tuple(dict.fromkeys(first_line(w.message) for w in caught))


@contextlib.contextmanager
def one_line(
    what: str, hint: str = "leave that step out, or write the ONNX graph yourself and import it"
) -> Iterator[None]:
    """skops, scikit-learn and its converter raise many types; a user needs the first sentence."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as error:
        raise PackageError(f"{what}: {first_line(error)}", hint=hint) from None


def _check_trees(source: Path, estimator: Any) -> None:
    found = [*_walk(estimator, None, set())]
    trees = all(_is_sound(value, width) for value, width in found if _is_tree(value))
    # Only with sound trees can its first prediction be made.
    if not trees or not all(_is_sound_boosting(value) for value, _ in found if not _is_tree(value)):
        raise PackageError(
            f"'{source}': a decision tree's nodes lead out of it",
            hint="the file is damaged or was tampered with; save the model again",
        )


def _walk(
    value: Any, width: int | None, seen: set[tuple[int, int | None]]
) -> Iterator[tuple[Any, int | None]]:
    """Every tree and estimator inside, with the number of features that a tree will be given."""
    from sklearn.base import BaseEstimator
    from sklearn.ensemble import BaseEnsemble
    from sklearn.tree import BaseDecisionTree

    if (id(value), width) in seen:
        return
    seen.add((id(value), width))
    if _is_tree(value):
        yield value, width
    elif isinstance(value, BaseEstimator):
        yield value, None
        own = getattr(value, "n_features_in_", None)
        # These pass rows on without checking their width again.
        passes_on = isinstance(value, BaseEnsemble | BaseDecisionTree)
        widths = [w for w in (own, width) if w is not None] if passes_on else []
        for inner in vars(value).values():
            yield from _walk(inner, min(widths, default=None), seen)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _walk(inner, width, seen)
    elif isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype == object
    ):
        for inner in np.ravel(value) if isinstance(value, np.ndarray) else value:
            yield from _walk(inner, width, seen)
    elif hasattr(value, "__dict__"):
        for inner in vars(value).values():
            yield from _walk(inner, width, seen)


def _is_tree(value: Any) -> bool:
    return f"{type(value).__module__}.{type(value).__qualname__}" == _TREE


def _is_sound_boosting(estimator: Any) -> bool:
    """Each stage has as many trees as there are scores: their compiled sum does not look."""
    from sklearn.ensemble._gb import BaseGradientBoosting

    if not isinstance(estimator, BaseGradientBoosting) or not hasattr(estimator, "estimators_"):
        return True
    with one_line("the gradient boosting is not whole", hint=_SAVE):
        if not 0 < estimator.n_features_in_ <= _MAX_WIDTH:
            return False
        row = np.zeros((1, estimator.n_features_in_), np.float32)
        return bool(estimator._raw_predict_init(row).shape[1] == estimator.estimators_.shape[1])


def _is_sound(tree: Any, width: int | None) -> bool:
    """Children come after their parent and inside the tree, and splits are on what rows have."""
    # Beyond its capacity its arrays are somebody else's memory.
    if width is None or not 0 < tree.node_count <= tree.capacity:
        return False
    left, right, feature = tree.children_left, tree.children_right, tree.feature
    inner = left != _LEAF
    numbers = np.flatnonzero(inner)
    children = np.stack([left[inner], right[inner]])
    return bool(
        (children > numbers).all()
        and (children < len(left)).all()
        and (feature[inner] >= 0).all()
        and (feature[inner] < min(tree.n_features, width)).all()
    )
