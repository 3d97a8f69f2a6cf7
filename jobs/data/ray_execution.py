"""Ray Data as the executor: tasks run on the cluster's CPUs, results come back in order.

All knowledge of Ray in preparing data is here.

    for arrays in RayExecutor()(function, tasks): …
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cluster.errors import HeliostatError, JobFailedError
from jobs.data.execution import Arrays, TaskType


class RayExecutor:
    """See `jobs.data.execution.Executor`. Ray must be connected."""

    def __call__(
        self, function: Callable[[TaskType], Iterator[Arrays]], tasks: Sequence[TaskType]
    ) -> Iterator[Arrays]:
        """Raises what a task raises, and JobFailedError if Ray itself fails."""
        from ray import cloudpickle, data

        # Its plans and progress bars are no news to who asked for a dataset.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
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
            yield from _results(results.iter_batches(batch_size=None, batch_format="pyarrow"))
        except HeliostatError:
            raise
        except Exception as error:
            raise _in_our_words(error) from error


def _run(batch: Any, function: Callable[[Any], Iterator[Arrays]]) -> Iterator[Any]:
    import pyarrow as pa
    from ray import cloudpickle

    def row(result: Arrays | HeliostatError) -> Any:
        # One of any size: a list of arrays that differ in length is none of Arrow's types.
        return pa.table({"result": pa.array([cloudpickle.dumps(result)], pa.large_binary())})

    (task,) = batch.column("task").to_pylist()
    try:
        for arrays in function(cloudpickle.loads(task)):
            yield row(arrays)
    except HeliostatError as error:
        # As a result, not as a failure: Ray would print its stack.
        yield row(error)


def _results(tables: Iterable[Any]) -> Iterator[Arrays]:
    from ray import cloudpickle

    for table in tables:
        for pickled in table.column("result"):
            result = cloudpickle.loads(pickled.as_buffer())
            if isinstance(result, HeliostatError):
                raise result
            yield result


def _in_our_words(error: Exception) -> JobFailedError:
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    first = str(cause).strip().splitlines() or [""]
    return JobFailedError(
        f"a task of the preparation failed: {type(cause).__name__}: {first[0]}",
        hint="its log is in the Ray dashboard; run the same command again",
    )
