"""Where tasks over shards run: here, one after the other, or on the cluster.

A task gives arrays as it goes; whoever asks gets them in the order of the tasks, whatever runs
them. It knows nothing about what tasks do.

    for arrays in in_process(count_characters, shards): total += arrays["characters"].sum()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
"""One-dimensional arrays by name; every task of a function gives the same names and types."""

TaskType = TypeVar("TaskType")


class Executor(Protocol):
    """`function` and `tasks` may be sent to other processes."""

    def __call__(
        self, function: Callable[[TaskType], Iterator[Arrays]], tasks: Sequence[TaskType]
    ) -> Iterator[Arrays]: ...


def in_process(
    function: Callable[[TaskType], Iterator[Arrays]], tasks: Sequence[TaskType]
) -> Iterator[Arrays]:
    """See `Executor`."""
    for task in tasks:
        yield from function(task)


def join_texts(texts: Sequence[str]) -> Arrays:
    """Texts as arrays."""
    encoded = [text.encode("utf-8") for text in texts]
    return {
        "lengths": np.array([len(data) for data in encoded], dtype=np.int64),
        "utf8": np.frombuffer(b"".join(encoded), dtype=np.uint8),
    }


def split_texts(arrays: Arrays) -> Iterator[str]:
    """What `join_texts` was given."""
    ends = np.cumsum(arrays["lengths"])
    data = arrays["utf8"].tobytes()
    for start, end in zip(ends - arrays["lengths"], ends, strict=True):
        yield data[start:end].decode("utf-8")
