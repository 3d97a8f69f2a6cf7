"""How much of a GPU's matrix speed training uses: skipped where there is no GPU or no DeepSpeed."""

from __future__ import annotations

import time

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ROWS, TOKENS, VOCABULARY = 8, 2048, 32_000
WARM_UP_STEPS, STEPS = 5, 20


def test_a_model_of_350_million_parameters_uses_45_percent_of_the_matmul_peak(
    record_property: pytest.RecordProperty,
) -> None:
    pytest.importorskip("deepspeed")
    from jobs.models.causal_lm import CausalLm
    from jobs.models.family import DataShape
    from jobs.training.batching import BatchPlan
    from jobs.training.config import TrainConfig
    from jobs.training.deepspeed_config import make_deepspeed_config
    from jobs.training.deepspeed_setup import start_deepspeed
    from jobs.training.flops import flops_per_token
    from jobs.training.matmul_peak import measure_matmul
    from jobs.training.parallelism import Layout
    from jobs.training.process_group import start_process_group

    config = TrainConfig.model_validate(
        {
            "name": "mfu",
            "data": {"name": "any", "source": {"kind": "python_topics"}},
            "model": {
                "family": "causal_lm",
                "hidden_size": 1024,
                "num_layers": 26,
                "num_heads": 16,
                "loss_chunk_tokens": 4096,
            },
            "steps": STEPS,
            "batch_size": ROWS,
            "precision": "bf16",
            "compile": True,
        }
    )
    group, layout = start_process_group(), Layout(1)
    peak = measure_matmul(group.device, "bf16")
    family = CausalLm(config.model, DataShape({}, vocab_size=VOCABULARY, sequence_length=TOKENS))
    model = family.build().to(group.device)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 350_000_000
    flops = flops_per_token(model, TOKENS)
    assert flops is not None
    plan = BatchPlan.make(batch_size=ROWS, micro_batch_size=None, world_size=1)
    engine = start_deepspeed(
        model, family, config, make_deepspeed_config(config, plan), group, layout
    )
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), device=group.device)

    def step() -> None:
        engine.train_step(
            lambda module, batch: family.loss(module, batch) / (ROWS * TOKENS),
            [{"tokens": tokens}],
            1e-4,
        )

    for _ in range(WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    tokens_per_s = STEPS * ROWS * TOKENS / (time.perf_counter() - began)
    share = flops * tokens_per_s / peak
    record_property("mfu", share)
    print(f"{tokens_per_s:,.0f} tokens/s, {share:.1%} of {peak / 1e12:.0f} TFLOP/s")
    assert share >= 0.45
