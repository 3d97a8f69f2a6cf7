"""Train on two Ray nodes, of which one goes and another one comes.

    python tests/soak/elastic_cluster.py CONFIG DATASET_DIR DIRECTORY

A process of its own: it starts a Ray cluster, without keys, that nobody else shall find.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.config import load_config
from cluster.settings import Settings
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Fault, Progress, Started
from jobs.training.ray_trainer import RayLauncher
from jobs.training.worker import WorkerJob


def main(config_file: str, dataset_dir: str, directory: str) -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    overrides = ["num_workers=2", "min_workers=1"]
    config = load_config(Path(config_file), TrainConfig, overrides)
    has_begun, is_small = threading.Event(), threading.Event()
    size = 0

    def tell(event: Event) -> None:
        nonlocal size
        if isinstance(event, Started | Fault):
            print(event, flush=True)
        if isinstance(event, Started):
            size = event.world_size
        if isinstance(event, Progress) and event.step >= 50:
            (is_small if size == 1 else has_begun).set()

    root = Path(directory)
    launcher = RayLauncher(config, Settings(home=root / "home"))
    job = WorkerJob(config, Path(dataset_dir), root / "run")
    with ThreadPoolExecutor(1) as pool:
        # Nodes can be added by the main thread alone.
        running = pool.submit(launcher.run, job, tell)
        has_begun.wait()
        cluster.remove_node(second)
        is_small.wait()
        cluster.add_node(num_cpus=1)
        running.result()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
