"""Real worker processes over gloo, forked from one process that has loaded torch and DeepSpeed.

first, second = run_ranks(task, job, 2)      # task(job) in each
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

Task = Callable[[Any], Any]

PRELOADED = [
    "torch",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "jobs.training.worker",
]


def run_ranks(task: Task, argument: Any, world_size: int) -> list[Any]:
    """What `task(argument)` returns in each of `world_size` fresh processes, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_enter, args=(task, argument, rank, world_size, port, results))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    try:
        assert [worker.exitcode for worker in workers] == [0] * world_size
    finally:
        for worker in workers:
            worker.kill()
    found = dict(results.get() for _ in workers)
    return [found[rank] for rank in range(world_size)]


def _enter(task: Task, argument: Any, rank: int, world_size: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results.put((rank, task(argument)))
