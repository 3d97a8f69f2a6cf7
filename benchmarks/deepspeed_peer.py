"""The peer of `train_throughput`: a DeepSpeed loop as its users write it, after its own tutorial.

    torchrun --nproc-per-node 2 benchmarks/deepspeed_peer.py ROWS.npy COMPILE STEPS MICRO

Nothing of ours is used. Each line printed is a step's number and its tokens per second.
"""

from __future__ import annotations

import sys
import time

import deepspeed
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

rows_path, compiled, steps, micro_batch = sys.argv[1], sys.argv[2] == "yes", *map(int, sys.argv[3:])
torch.set_num_threads(1)
torch.manual_seed(0)
deepspeed.init_distributed("gloo")
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1408,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
    )
)
engine, _, _, _ = deepspeed.initialize(
    model=model,
    # DeepSpeed's own would be compiled first; torch's fused one is as fast.
    optimizer=torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    ),
    config={
        "train_micro_batch_size_per_gpu": micro_batch,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    },
)
if compiled:
    engine.compile()

rows = torch.from_numpy(np.load(rows_path).astype(np.int64))[rank::world_size]
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(rows), batch_size=micro_batch, shuffle=True, drop_last=True
)
batches = iter(loader)
for step in range(steps):
    began = time.perf_counter()
    (tokens,) = next(batches)
    tokens = tokens[:, :-1]
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    seconds = time.perf_counter() - began
    if rank == 0:
        print(f"step {step + 1} {tokens.numel() * world_size / seconds}", flush=True)
