"""Sources: where documents and arrays come from, with a digest of what was read.

It knows nothing about splits, tokens or storage.

    read_documents(PythonTopicsSource(kind="python_topics"))   # → Documents(texts, digest)
    read_arrays(SklearnSource(kind="sklearn", dataset="digits"))
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from jobs.data.config import PythonTopicsSource, SklearnSource, TextSource


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, and a digest of their bytes."""

    texts: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Arrays:
    """Columns of equal length (first dimension = row), and what the labels are called."""

    columns: dict[str, npt.NDArray[Any]]
    class_names: tuple[str, ...]
    digest: str


def read_documents(source: PythonTopicsSource | TextSource) -> Documents:
    """Raises InputError for files that are missing, empty or not UTF-8."""
    if isinstance(source, PythonTopicsSource):
        return _documents(_python_topics())
    return _documents(_read_text(path) for path in _text_files(source))


def _documents(texts: Iterable[str]) -> Documents:
    kept = tuple(texts)
    return Documents(kept, _digest(text.encode("utf-8") for text in kept))


def _python_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _text_files(source: TextSource) -> list[Path]:
    found: list[Path] = []
    for pattern in source.paths:
        matches = sorted(
            Path(match)
            for match in glob.glob(pattern, recursive=True)  # noqa: PTH207 - may be absolute
            if Path(match).is_file()
        )
        if not matches:
            raise InputError(
                f"data file '{pattern}' does not exist (looked in {Path.cwd()})",
                hint="correct data.source.paths",
                param="data.source.paths",
            )
        found.extend(matches)
    return list(dict.fromkeys(found))


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file '{path}' is not UTF-8 text (byte {error.start})",
            hint="convert it to UTF-8, e.g. with iconv",
            param="data.source.paths",
        ) from None
    except OSError as error:
        raise InputError(
            f"data file '{path}' cannot be read: {error.strerror}",
            hint="check its permissions",
            param="data.source.paths",
        ) from None
    if not text.strip():
        raise InputError(f"data file '{path}' is empty", hint="remove it from data.source.paths")
    return text


def read_arrays(source: SklearnSource) -> Arrays:
    """Load one of scikit-learn's bundled sets."""
    columns, class_names = _SKLEARN_SETS[source.dataset]()
    parts = [name.encode() + array.tobytes() for name, array in columns.items()]
    return Arrays(columns, class_names, _digest(parts))


def _digits() -> tuple[dict[str, npt.NDArray[Any]], tuple[str, ...]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    columns: dict[str, npt.NDArray[Any]] = {
        "pixels": bunch.images.astype(np.float32),
        "label": bunch.target.astype(np.int64),
    }
    return columns, tuple(str(name) for name in bunch.target_names)


_SKLEARN_SETS: dict[str, Callable[[], tuple[dict[str, npt.NDArray[Any]], tuple[str, ...]]]] = {
    "digits": _digits
}


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        # Each part's own digest, so that moving a boundary changes the total.
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
