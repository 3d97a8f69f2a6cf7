"""`VllmArguments`: what a serve config may say to vLLM. Nothing that opens a port, reads a path or
runs code of a model is among it.

    VllmArguments(tensor_parallel_size=2, max_model_len=8192)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel


class VllmArguments(StrictModel):
    """Named as vLLM names them; the other options of a deployment say the rest."""

    tensor_parallel_size: int = Field(1, ge=1, le=64)
    """GPUs that each layer is split over: those of one replica, all on one machine."""
    gpu_memory_utilization: float | None = Field(None, ge=0.01, le=1)
    """Share of a GPU's memory to fill with weights and cache, in place of max_cache_bytes."""
    max_model_len: int | None = Field(None, ge=1, le=2**31)
    """Tokens of a prompt with its answer; the model's own limit by default."""
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """What keys and values are kept in."""
    enable_prefix_caching: bool = True
    """Keep the keys and values of beginnings that prompts share."""
    max_num_batched_tokens: int | None = Field(None, ge=1, le=2**31)
    """Tokens of one step, those of prompts included."""
    cpu_offload_gb: float = Field(0, ge=0, le=4096)
    """GiB of weights to keep in the machine's memory, per GPU."""
    enforce_eager: bool = False
    """Compile nothing: starts sooner, runs slower."""
    max_loras: int = Field(0, ge=0, le=1024)
    """Adapters that share a batch with the model itself; with 0 it takes none."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Largest rank of such an adapter."""
