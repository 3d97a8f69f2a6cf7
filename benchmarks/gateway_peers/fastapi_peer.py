"""FastAPI and torch in one process: parse, compute, answer."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.gateway_peers.mlp import make_mlp

app = FastAPI()
model = make_mlp()


class Query(BaseModel):
    inputs: list[float]


class Answer(BaseModel):
    output: float


@app.post("/predict")
async def predict(query: Query) -> Answer:
    with torch.inference_mode():
        return Answer(output=model(torch.tensor([query.inputs])).item())


if __name__ == "__main__":
    port = int(sys.argv[1])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
