"""`RunTracker`: one MLflow run, written without slowing or stopping the training it describes.

Metrics wait in a bounded queue for a background thread. A server that cannot be reached stops a run
before it begins; one that goes away later costs metrics and a warning, never the training. Knows
nothing of models and jobs. The only module that imports mlflow, on first use.

    with RunTracker.start(settings, "digits", "first try", params={"lr": 1e-3}) as tracker:
        tracker.log_metrics({"loss": 0.3}, step=10)
    print(tracker.url)
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.errors import NotRunningError, StartError, StoppedError, first_line
from cluster.observability.write_queue import WriteQueue
from cluster.settings import Settings

_REACHABLE_TIMEOUT_S = 3
_REQUEST_TIMEOUT_S = 30
# MLflow's own limits.
_MAX_METRICS = 1_000
_MAX_PARAMS = 100
_MAX_PARAM_CHARACTERS = 6_000
_MAX_DATASET_DIGEST = 36
_SAMPLING_INTERVAL_S = 5

_logger = logging.getLogger(__name__)


def open_client(settings: Settings) -> Any:
    """An `MlflowClient` of the server in `settings`, after asking whether it answers.

    Raises:
        NotRunningError: it does not.
    """
    uri = settings.tracking_uri
    require_server(settings)
    # mlflow's client sends usage data unless told otherwise before its first call.
    from mlflow.environment_variables import (
        MLFLOW_DISABLE_TELEMETRY,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
    )
    from mlflow.telemetry.client import set_telemetry_client

    MLFLOW_DISABLE_TELEMETRY.set(True)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    set_telemetry_client()
    # Seven retries over minutes by default: too long to wait for a server that has gone.
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(2)
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(_REQUEST_TIMEOUT_S)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def close_run(settings: Settings, run_id: str, status: str) -> None:
    """End a run whose own process could not; a server that is gone costs a warning."""
    try:
        open_client(settings).set_terminated(run_id, status)
    # Anything the client or the network raises: it is only the record.
    except Exception as error:
        _logger.warning("MLflow did not take the end of run %s: %s", run_id, first_line(error))


def has_run(settings: Settings, run_id: str) -> bool:
    """Whether a run is there that can be gone on with; one that was deleted cannot.

    Raises:
        StartError: the server does not answer.
    """
    with _start_errors(settings):
        client = open_client(settings)
        from mlflow.exceptions import MlflowException

        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise


def require_server(settings: Settings) -> None:
    """Ask whether the MLflow server answers, without loading mlflow.

    Raises:
        NotRunningError: it does not.
    """
    uri = settings.tracking_uri
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_REACHABLE_TIMEOUT_S):  # noqa: S310
            return
    except urllib.error.HTTPError:
        # It answers; what it thinks of the request shows with the first real one.
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NotRunningError(
            f"the MLflow server at {uri} does not answer ({reason})",
            hint="run `heliostat up`, or see `heliostat status`",
        ) from None


class RunTracker:
    """Writes to one run; make it with `start`, end it with `finish` or a `with` block."""

    def __init__(self, client: Any, run_id: str, url: str, monitor: Any) -> None:
        self._client = client
        self._monitor = monitor
        self._metrics: WriteQueue[Any] = WriteQueue(
            lambda batch: client.log_batch(run_id, metrics=batch),
            name=f"metric values of run {run_id}",
            max_batch=_MAX_METRICS,
        )
        self._finished = False
        self.run_id = run_id
        self.url = url
        """The run's page in the MLflow UI."""

    @classmethod
    def start(
        cls,
        settings: Settings,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
    ) -> RunTracker:
        """Begin a run, or go on with `run_id`; nested parameters are named `a.b`.

        Raises:
            StartError: the server does not answer or does not accept the run.
        """
        all_tags = {**(tags or {})}
        if settings.git_commit:
            all_tags["mlflow.source.git.commit"] = settings.git_commit
        if parent_run_id:
            all_tags["mlflow.parentRunId"] = parent_run_id
        with _start_errors(settings):
            client = open_client(settings)
            if run_id is None:
                experiment_id = _experiment_id(client, experiment)
                run = client.create_run(experiment_id, tags=all_tags, run_name=run_name)
            else:
                client.update_run(run_id, status="RUNNING")
                run = client.get_run(run_id)
                _set_tags(client, run_id, all_tags)
            _log_params(client, run, params or {})
        monitor = _start_monitor(run.info.run_id, settings.tracking_uri, resume=run_id is not None)
        page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return cls(client, run.info.run_id, f"{settings.tracking_uri.rstrip('/')}/{page}", monitor)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue metrics; returns at once, also when the server is gone."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for name, value in metrics.items():
            self._metrics.put(Metric(name, float(value), now_ms, step))

    def flush(self) -> None:
        """Wait until the queued metrics are written: before this process may be ended."""
        self._metrics.flush()

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep a text with the run."""
        self._try(artifact_file, lambda: self._client.log_text(self.run_id, text, artifact_file))

    def log_dict(self, values: Mapping[str, Any], artifact_file: str) -> None:
        """Keep values with the run, as JSON or YAML by the name's ending."""
        self._try(
            artifact_file, lambda: self._client.log_dict(self.run_id, dict(values), artifact_file)
        )

    def log_dataset(self, name: str, digest: str, *, source: str, context: str) -> None:
        """Link a dataset, so that the run's page shows it.

        Args:
            source: where it lies.
            context: what it is used for: 'training', 'evaluation'.
        """
        self._try("the dataset", lambda: self._link_dataset(name, digest, source, context))

    def log_figure(self, figure: Any, artifact_file: str) -> None:
        """Keep a matplotlib figure with the run, drawn in the format of the name's ending."""
        self._try(
            artifact_file, lambda: self._client.log_figure(self.run_id, figure, artifact_file)
        )

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keep a (small) file with the run."""
        self._try(
            str(path), lambda: self._client.log_artifact(self.run_id, str(path), artifact_path)
        )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._try("tags", lambda: _set_tags(self._client, self.run_id, tags))

    def finish(self, status: str = "FINISHED") -> None:
        """Write what is queued and end the run; `status` is FINISHED, FAILED or KILLED."""
        if self._finished:
            return
        self._finished = True
        if self._monitor is not None:
            self._monitor.finish()
        self._metrics.close()
        self._try("the final status", lambda: self._client.set_terminated(self.run_id, status))

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            failed = issubclass(kind, Exception) and not issubclass(kind, StoppedError)
            self.finish("FAILED" if failed else "KILLED")

    def _link_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        short = digest.removeprefix("sha256:")[:_MAX_DATASET_DIGEST]
        where = json.dumps({"uri": source, "digest": digest})
        dataset = Dataset(name, short, source_type="heliostat", source=where)
        tags = [InputTag("mlflow.data.context", context)]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def _try(self, what: str, write: Callable[[], Any]) -> None:
        try:
            write()
        # Anything the client or the network raises: the training matters more than its record.
        except Exception as error:
            _logger.warning("MLflow did not take %s: %s", what, first_line(error))


def _experiment_id(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    for last_try in (False, True):
        if (found := client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            # Another process may have made it in between.
            if last_try:
                raise
    raise AssertionError("unreachable")


def _log_params(client: Any, run: Any, params: Mapping[str, Any]) -> None:
    """Parameters that the run does not have yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    new = [
        Param(name, text[:_MAX_PARAM_CHARACTERS])
        for name, text in _flatten("", params)
        if name not in run.data.params
    ]
    for start in range(0, len(new), _MAX_PARAMS):
        client.log_batch(run.info.run_id, params=new[start : start + _MAX_PARAMS])


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(f"{prefix}{name}.", value)
        elif isinstance(value, list | tuple | dict):
            yield prefix + name, json.dumps(value, default=str)
        else:
            yield prefix + name, str(value)


def _set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


def _start_monitor(run_id: str, uri: str, *, resume: bool) -> Any:
    """System metrics of this machine; they are a courtesy, so no failure here counts."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            run_id,
            sampling_interval=_SAMPLING_INTERVAL_S,
            resume_logging=resume,
            tracking_uri=uri,
        )
        monitor.start()
    except Exception as error:
        _logger.warning("no system metrics for run %s: %s", run_id, first_line(error))
        return None
    return monitor


@contextlib.contextmanager
def _start_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except NotRunningError as error:
        raise StartError(error.message, hint=error.hint) from None
    # mlflow and requests raise many types; before training any of them is a reason not to begin.
    except Exception as error:
        raise StartError(
            f"MLflow at {settings.tracking_uri} does not accept the run: {first_line(error)}",
            hint="see its log with `heliostat status`",
        ) from None
