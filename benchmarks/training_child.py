"""One training of ours in a process of its own, for benchmarks: the real loop, and what it tells.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.training_child JOB.json
    python -m benchmarks.training_child JOB.json            # under Ray Train, if the job says so

Each line printed is an event as a JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from cluster.config import StrictModel
from cluster.settings import Settings
from jobs.training.config import TrainConfig
from jobs.training.events import Event
from jobs.training.worker import WorkerJob, run_worker


class ChildJob(StrictModel):
    """What is trained, and where."""

    config: TrainConfig
    dataset_dir: Path
    run_dir: Path
    compiled_dir: Path


def main(path: str) -> None:
    described = ChildJob.model_validate_json(Path(path).read_bytes())
    job = WorkerJob(
        config=described.config,
        dataset_dir=described.dataset_dir,
        run_dir=described.run_dir,
        compiled_dir=described.compiled_dir,
    )
    if job.config.launcher == "local":
        run_worker(job, tell)
    else:
        _train_under_ray(job)


def tell(event: Event) -> None:
    print(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}), flush=True)


def _train_under_ray(job: WorkerJob) -> None:
    import ray

    from jobs.training.ray_trainer import RayLauncher

    ray.init(num_cpus=job.config.num_workers, include_dashboard=False, log_to_driver=False)
    launcher = RayLauncher(job.config, Settings(home=job.run_dir / "home"))
    launcher.check()
    launcher.run(job, tell)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
