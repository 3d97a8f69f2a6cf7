"""LitServe with its dynamic batching: up to 64 requests, which wait at most 5 ms for each other."""

import sys
from typing import Any

import litserve
import torch

from benchmarks.gateway_peers.mlp import make_mlp


class Mlp(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.model = make_mlp()

    def decode_request(self, request: dict[str, Any]) -> torch.Tensor:
        return torch.tensor(request["inputs"])

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(x)  # type: ignore[no-any-return]

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, float]:
        return {"output": output.item()}


if __name__ == "__main__":
    server = litserve.LitServer(Mlp(max_batch_size=64, batch_timeout=0.005), accelerator="cpu")
    port = int(sys.argv[1])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
