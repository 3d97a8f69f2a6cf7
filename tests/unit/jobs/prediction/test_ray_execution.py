"""Ray Data as the executor, on a Ray of this test's own: the same bytes as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.settings import Settings
from jobs.prediction.config import PredictConfig
from tests.unit.jobs.prediction.conftest import Predict, contents, read_errors, write_lines

ROOT = Path(__file__).parents[4]
SCRIPT = """
import sys, ray
from cluster.settings import Settings
from jobs.predict import predict
from jobs.prediction.config import PredictConfig
from cluster.errors import HeliostatError
from jobs.prediction.bill import Bill
from jobs.prediction.ray_execution import on_cluster
from jobs.prediction.work import Job

class Deadly:  # whoever reads it dies
    def __reduce__(self):
        return exec, ("import os; open(os.environ['DEATHS'], 'a').write('x'); os._exit(1)",)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=100 * 1024**2)
try:
    for text in sys.argv[1:]:
        predict(PredictConfig.model_validate_json(text), Settings())
except HeliostatError as error:
    print("error:", error)
try:
    config = PredictConfig.model_validate_json(text)
    job = Job("sha256:0", "jsonl", config, Settings(), Bill("", "", "", 0))
    list(on_cluster(job, [(Deadly(),)]))
except HeliostatError as error:
    print("error:", error)
finally:
    ray.shutdown()
"""


def test_a_pool_of_workers_writes_the_same_bytes_and_gives_up_what_kills_them(
    run: Predict, settings: Settings, tmp_path: Path
) -> None:
    rows = [{"x": [n % 3, 1]} if n % 5 else "oops" for n in range(40)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    values = {"rows_per_part": 5, "batch_size": 4}
    config = PredictConfig(
        model="colours/1",
        input=str(source),
        output=str(tmp_path / "cluster"),
        num_workers=2,
        num_cpus=0.5,
        nice=5,
        **values,
    )
    gone = config.model_copy(
        update={"output": str(tmp_path / "other"), "columns": {"nothing": "x"}}
    )
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, config.model_dump_json(), gone.model_dump_json()],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HELIOSTAT_HOME": str(settings.home),
            "HELIOSTAT_MLFLOW_TRACKING_URI": settings.tracking_uri,
            "RAY_TMPDIR": "/tmp",
            "DEATHS": str(tmp_path / "deaths"),
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "predicting on the cluster's 2 CPUs" in found.stdout
    assert "error: the model has no input 'nothing'" in found.stdout, found.stdout + found.stderr
    assert "error: a worker of the prediction failed: Actor" in found.stdout
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert "Traceback" not in found.stdout + found.stderr
    assert contents(tmp_path / "cluster") == contents(run("colours/1", source, **values))
    assert len(read_errors(tmp_path / "cluster")) == 8
