"""Open Inference Protocol requests from tritonclient's asyncio clients, closed loop.

    HELIOSTAT_API_KEY=… python -m benchmarks.triton_load grpc|http HOST:PORT MODEL TASKS SECONDS

Prints requests per second. Both clients send and get the same tensors in binary.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time

import numpy as np

from benchmarks.gateway_peers.mlp import NUM_FEATURES


async def main(protocol: str, url: str, model: str, num_tasks: int, seconds: float) -> float:
    triton = importlib.import_module(f"tritonclient.{protocol}.aio")
    connections = {} if protocol == "grpc" else {"conn_limit": num_tasks}
    headers = {"authorization": f"Bearer {os.environ['HELIOSTAT_API_KEY']}"}
    tensor = triton.InferInput("inputs", [1, NUM_FEATURES], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, NUM_FEATURES), np.float32))
    count = 0

    async with triton.InferenceServerClient(url, **connections) as client:

        async def repeat(until: float) -> None:
            nonlocal count
            while time.monotonic() < until:
                answer = await client.infer(model, [tensor], headers=headers)
                assert answer.as_numpy("output").shape == (1, 1)
                count += 1

        await asyncio.gather(*(repeat(time.monotonic() + 1) for _ in range(num_tasks)))
        count, started = 0, time.monotonic()
        await asyncio.gather(*(repeat(started + seconds) for _ in range(num_tasks)))
        return count / (time.monotonic() - started)


if __name__ == "__main__":
    arguments = sys.argv[1:4]
    print(asyncio.run(main(*arguments, int(sys.argv[4]), float(sys.argv[5]))))
