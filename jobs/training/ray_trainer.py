"""Ray Train as the launcher: the thin shell that places workers and replaces lost ones.

All knowledge of Ray in training is here. Checkpoints are found on disk by the workers themselves,
since the controller forgets one that was reported just before a kill; so nothing is reported to it.

    launcher = RayLauncher(config, settings)
    launcher.check()
    outcome = launcher.run(WorkerJob(config, dataset_dir, run_dir), print)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from cluster.errors import HeliostatError, JobFailedError, MachineError, NotRunningError
from cluster.settings import Settings
from jobs.training.config import TrainConfig
from jobs.training.events import Sink
from jobs.training.stopping import StopRequest, stop_on_signals
from jobs.training.worker import Outcome, WorkerJob, run_worker

# Set by Ray for the process that a submitted job starts.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_CONNECT_TIMEOUT_S = 5
_RESIZE_INTERVAL_S = 30.0
_ELASTIC_START_TIMEOUT_S = 20.0


class RayLauncher:
    """See `jobs.training.launchers.Launcher`."""

    def __init__(self, config: TrainConfig, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._use_gpu = False

    @property
    def world_size(self) -> int:
        return self._config.num_workers

    def check(self) -> dict[str, str]:
        """Connect, and refuse more workers than the cluster has room for."""
        ray = connected(self._settings)
        resources = ray.cluster_resources()
        self._use_gpu = wants_gpu(self._config, int(resources.get("GPU", 0)))
        needed = self._config.min_workers or self._config.num_workers
        name = "num_workers" if self._config.min_workers is None else "min_workers"
        kind = "GPU" if self._use_gpu else "CPU"
        there = int(resources.get(kind, 0))
        if there < needed:
            smaller = f"set {name} to {there} or less" if there else "set device to cpu or auto"
            raise MachineError(
                f"{name} is {needed}, and the cluster has {there} {kind}s",
                hint=f"{smaller}, or add nodes",
                param=name if there else "device",
            )
        return {"ray_job_id": ray.get_runtime_context().get_job_id(), **_submission()}

    def run(self, job: WorkerJob, sink: Sink) -> Outcome:
        """Raises JobFailedError if workers fail more than `max_failures` times."""
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from jobs.training.ray_callbacks import OnLostWorkers

        scratch = self._settings.home / "ray_train"
        name = f"{job.run_dir.name}-{uuid.uuid4().hex[:8]}"
        os.environ.update(_watching(self._config))
        with _forwarded(sink) as queue, _stop_carried() as stop:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"job": job, "queue": queue, "stop": stop},
                torch_config=TorchConfig(backend="nccl" if self._use_gpu else "gloo"),
                scaling_config=self._scaling(),
                run_config=RunConfig(
                    # A name of its own: Train would otherwise take up its own record of the run.
                    name=name,
                    storage_path=str(scratch),
                    failure_config=FailureConfig(max_failures=self._config.max_failures),
                    callbacks=[OnLostWorkers(queue.put)],
                ),
            )
            # Ray's own answer to Ctrl-C aborts the workers where they are, without a checkpoint.
            trainer._register_sigint_handler = lambda _controller: None
            try:
                result = trainer.fit()
            except Exception as error:
                raise _in_our_words(error) from error
            finally:
                shutil.rmtree(scratch / name, ignore_errors=True)
        outcome: Outcome = result.return_value
        return outcome

    def _scaling(self) -> Any:
        from ray.train import ScalingConfig

        most = self._config.num_workers
        least = self._config.min_workers or most
        return ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=self._use_gpu,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        )


def _work(arguments: dict[str, Any]) -> Outcome:
    """A worker's whole life, in its own process."""
    request = StopRequest()
    threading.Thread(target=_listen, args=(arguments["stop"], request), daemon=True).start()
    return run_worker(arguments["job"], arguments["queue"].put, request.is_set)


def _watching(config: TrainConfig) -> dict[str, str]:
    """How soon Ray Train gives a worker up; its controller is told by these variables."""
    values = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.hang_timeout_s)}
    if config.min_workers is not None:
        # It waits so long for a lost node before it makes do with those that are left.
        values["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_ELASTIC_START_TIMEOUT_S)
    return values


def connected(settings: Settings) -> Any:
    """The ray module, connected to the cluster."""
    is_submitted = _JOB_CONFIG in os.environ
    if not is_submitted and "ray" not in sys.modules:
        # Read when Ray is imported. Without the last one it would take the machine's own address
        # for loopback's.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(settings.ray_token_path))
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return ray
    # A submitted job is told where its cluster is; a shell's RAY_ADDRESS may be the dashboard's.
    address = "auto"
    if not is_submitted:
        address = f"{settings.host}:{settings.ray_port}"
        _require_answer(settings.host, settings.ray_port)
    try:
        # Workers report through a queue; what else they print is in Ray's own logs.
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise _no_cluster(address, type(error).__name__) from error
    return ray


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our answer to SIGTERM; Ray's would print a C++ stack trace when a job is stopped."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _require_answer(host: str, port: int) -> None:
    """Ask the port first: Ray itself would wait for minutes."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(f"{host}:{port}", error.strerror or str(error)) from None


def _no_cluster(address: str, reason: str) -> NotRunningError:
    return NotRunningError(
        f"no Ray cluster answers at {address} ({reason})",
        hint="run `heliostat up`, or train in this process with --set launcher=local",
    )


def wants_gpu(config: TrainConfig, num_gpus: int) -> bool:
    if config.device == "auto":
        return num_gpus >= config.num_workers
    return config.device == "gpu"


def _submission() -> dict[str, str]:
    """Id under which this job was submitted, if it was."""
    metadata = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("metadata", {})
    job_id = metadata.get("job_submission_id", "")
    return {"submission_id": job_id} if job_id else {}


def _beside_the_driver() -> dict[str, Any]:
    """For small actors that must not be lost with a worker's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


@contextlib.contextmanager
def _forwarded(sink: Sink) -> Iterator[Any]:
    """A queue whose events a thread of this process hands to `sink`."""
    from ray.util.queue import Queue

    queue = Queue(actor_options=_beside_the_driver())
    thread = threading.Thread(target=_forward, args=(queue, sink), daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _forward(queue: Any, sink: Sink) -> None:
    while (event := queue.get()) is not None:
        sink(event)


class _StopSignal:
    """An actor that workers wait at, since signals reach the driver alone."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def make(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


@contextlib.contextmanager
def _stop_carried() -> Iterator[Any]:
    """A stop signal that SIGTERM or Ctrl-C at this process makes."""
    import ray

    signal_actor: Any = ray.remote(**_beside_the_driver())(_StopSignal)
    actor = signal_actor.remote()
    with stop_on_signals() as request:
        threading.Thread(target=_carry, args=(request, actor), daemon=True).start()
        try:
            yield actor
        finally:
            ray.kill(actor)


def _carry(request: StopRequest, actor: Any) -> None:
    # Not in the signal's handler, which may interrupt Ray anywhere.
    request.wait()
    actor.make.remote()


def _listen(actor: Any, request: StopRequest) -> None:
    """Wait at the driver's signal; where the driver is gone there is nothing to wait for."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actor.wait.remote())
        request.make()


def _in_our_words(error: Exception) -> HeliostatError:
    """The one error to show: ours if a worker raised it, else the first worker's own."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = [innermost(failure) for failure in failures.values()]
    for cause in causes:
        if isinstance(cause, HeliostatError):
            return cause
    first = str(causes[0]).strip().splitlines() or [""]
    return JobFailedError(
        f"a training worker failed: {type(causes[0]).__name__}: {first[0]}",
        hint="its log is in the Ray dashboard; run the same command again to resume",
    )


def innermost(error: BaseException) -> BaseException:
    """What was raised first: Ray wraps it, and keeps it under one of these names."""
    for name in ("_base_exc", "cause", "controller_failure", "health_check_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return innermost(inner)
    return error
