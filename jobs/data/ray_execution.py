"""Ray Data as the executor: tasks run on the cluster's CPUs, results come back in order.

All knowledge of Ray in preparing data is here.

    for arrays in RayExecutor()(function, tasks): …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cluster.errors import HeliostatError, JobFailedError
from jobs.data.execution import Arrays, TaskType


class RayExecutor:
    """See `jobs.data.execution.Executor`. Ray must be connected."""

    def __call__(
        self, function: Callable[[TaskType], Iterator[Arrays]], tasks: Sequence[TaskType]
    ) -> Iterator[Arrays]:
        """Raises what a task raises, and JobFailedError if Ray itself fails."""
        from ray import cloudpickle, data

        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = [{"task": cloudpickle.dumps(task)} for task in tasks]
        results = data.from_items(items, override_num_blocks=len(items)).map_batches(
            _run,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"function": function},
            # Tasks share the machine by their number, not by their threads.
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        )
        try:
            for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from _arrays(table)
        except Exception as error:
            raise _in_our_words(error) from error


def _run(batch: Any, function: Callable[[Any], Iterator[Arrays]]) -> Iterator[Any]:
    import pyarrow as pa
    from ray import cloudpickle

    (task,) = batch.column("task").to_pylist()
    for arrays in function(cloudpickle.loads(task)):
        # One row of lists, since the arrays differ in length.
        yield pa.table(
            {
                name: pa.LargeListArray.from_arrays([0, len(values)], pa.array(values))
                for name, values in arrays.items()
            }
        )


def _arrays(table: Any) -> Iterator[Arrays]:
    for row in range(table.num_rows):
        yield {
            name: np.asarray(table.column(name)[row].values.to_numpy(zero_copy_only=False))
            for name in table.column_names
        }


def _in_our_words(error: Exception) -> HeliostatError:
    """Ours if a task raised it: Ray wraps it, and keeps it as a cause."""
    causes: list[BaseException] = [error]
    for found in causes:
        inner = (getattr(found, "cause", None), found.__cause__, found.__context__)
        causes += [one for one in inner if isinstance(one, BaseException) and one not in causes]
    for cause in causes:
        if isinstance(cause, HeliostatError):
            return cause
    first = str(causes[-1]).strip().splitlines() or [""]
    return JobFailedError(
        f"a task of the preparation failed: {type(causes[-1]).__name__}: {first[0]}",
        hint="its log is in the Ray dashboard; run the same command again",
    )
