"""Another raylet for the cluster at an address, until it is ended.

    python -m tests.worker_raylet 127.0.0.1:6379 1

As `ray.cluster_utils.Cluster.add_node` does it. `ray start --address` refuses where Ray is told to
stay on loopback, as a local stack is.
"""

from __future__ import annotations

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.settings import LOOPBACK
from tests.worker_node import JOINED


def main(address: str, num_cpus: str) -> None:
    parameters = RayParams(
        gcs_address=address,
        node_ip_address=LOOPBACK,
        num_cpus=int(num_cpus),
        num_gpus=0,
        object_store_memory=80 * 1024**2,
        node_manager_port=0,
        dashboard_agent_listen_port=0,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
    )
    Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
    print(JOINED, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
