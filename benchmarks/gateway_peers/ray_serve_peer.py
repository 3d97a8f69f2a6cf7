"""Ray Serve's defaults with @serve.batch, but room for more than 5 requests in a replica."""

from __future__ import annotations

import sys
import time

import numpy as np
import ray
import torch
from ray import serve
from starlette.requests import Request

from benchmarks.gateway_peers.mlp import make_mlp


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Mlp:
    def __init__(self) -> None:
        self.model = make_mlp()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def predict(self, inputs: list[list[float]]) -> list[float]:
        with torch.inference_mode():
            output = self.model(torch.from_numpy(np.array(inputs, dtype=np.float32)))
        return output[:, 0].tolist()  # type: ignore[no-any-return]

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"output": await self.predict((await request.json())["inputs"])}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Mlp.bind(), route_prefix="/predict")
    while True:
        time.sleep(3600)
