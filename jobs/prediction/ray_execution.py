"""Ray Data as the executor: a pool of workers on the cluster, each with the model in its memory.

All knowledge of Ray in predicting is here.

    for done in on_cluster(job, plan.tasks()): …
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.errors import HeliostatError, JobFailedError, first_line
from jobs.prediction.work import Job, PartDone, Task, Worker

_MAX_TASK_RETRIES = 2
"""Of parts whose worker died: by default Ray Data would give it new ones for ever, though a row may
be what kills them."""


def on_cluster(job: Job, tasks: Sequence[Task]) -> Iterator[PartDone]:
    """See `jobs.prediction.work.Executor`. Ray must be connected.

    Raises what a worker raises, and JobFailedError if Ray itself fails.
    """
    from ray import cloudpickle, data

    # Plans and progress bars are no news to who asked for a prediction; what fails is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"task": cloudpickle.dumps(task)} for task in tasks]
    results = data.from_items(items, override_num_blocks=len(items)).map_batches(
        _PoolWorker,
        fn_constructor_args=(cloudpickle.dumps(job),),
        compute=data.ActorPoolStrategy(size=min(job.config.num_workers, len(tasks))),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=job.config.num_cpus,
        num_gpus=job.config.num_gpus,
        max_task_retries=_MAX_TASK_RETRIES,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
    )
    try:
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for pickled in table.column("result"):
                result = cloudpickle.loads(pickled.as_buffer())
                if isinstance(result, HeliostatError):
                    raise result
                yield result
    except HeliostatError:
        raise
    except Exception as error:
        raise _in_our_words(error) from error


class _PoolWorker:
    """A `Worker` as Ray Data calls it."""

    def __init__(self, job: bytes) -> None:
        from ray import cloudpickle

        self._worker = Worker(cloudpickle.loads(job))

    def __call__(self, batch: Any) -> Iterator[Any]:
        import pyarrow as pa
        from ray import cloudpickle

        def row(result: PartDone | HeliostatError) -> Any:
            return pa.table({"result": pa.array([cloudpickle.dumps(result)], pa.large_binary())})

        (task,) = batch.column("task").to_pylist()
        try:
            for done in self._worker.work(cloudpickle.loads(task)):
                yield row(done)
        except HeliostatError as error:
            # As a result, not as a failure: Ray would print its stack.
            yield row(error)


def _in_our_words(error: Exception) -> JobFailedError:
    from ray.data.exceptions import SystemException

    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        if isinstance(inner, SystemException):
            break  # Ray Data marks with it what it did not expect, and it says nothing
        cause = inner
    return JobFailedError(
        f"a worker of the prediction failed: {type(cause).__name__}: {first_line(cause)}",
        hint="its log is in the Ray dashboard; run the same command again to go on",
    )
