"""A raw ds_config drops in; only contradictions are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigError, MissingToolError
from jobs.training.batching import BatchPlan
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_section import zero_stage
from jobs.training.toolchain import require_compiler
from tests.unit.jobs.training.conftest import MakeConfig

PLAN = BatchPlan.make(batch_size=16, micro_batch_size=4, world_size=2)

# As users of transformers write it.
WITH_AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
}


def test_without_a_section_our_fields_decide(make_config: MakeConfig) -> None:
    made = make_deepspeed_config(make_config(gradient_clipping=0.5), PLAN)
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert zero_stage(made) == 1


def test_every_auto_is_filled_or_left_to_deepspeed(make_config: MakeConfig) -> None:
    config = make_config(
        deepspeed=WITH_AUTO, precision="bf16", optimizer={"learning_rate": 0.01}, steps=50
    )
    made = make_deepspeed_config(config, PLAN)
    assert "auto" not in str(made)
    assert made["bf16"]["enabled"] is True
    assert made["fp16"]["enabled"] is False
    assert made["optimizer"]["params"]["lr"] == 0.01
    assert made["scheduler"]["params"]["total_num_steps"] == 50
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": True}


def test_unknown_keys_pass_through_untouched(make_config: MakeConfig) -> None:
    raw = {"flops_profiler": {"enabled": True, "profile_step": 3}, "wall_clock_breakdown": False}
    made = make_deepspeed_config(make_config(deepspeed=raw), PLAN)
    assert raw.items() <= made.items()


def test_equal_values_are_no_contradiction(make_config: MakeConfig) -> None:
    config = make_config(deepspeed={"train_batch_size": 16, "gradient_clipping": 2.0})
    made = make_deepspeed_config(config, PLAN)
    assert made["train_batch_size"] == 16
    assert made["gradient_clipping"] == 2.0


@pytest.mark.parametrize(
    ("raw", "fields", "key", "field"),
    [
        ({"train_batch_size": 64}, {}, "train_batch_size", "batch_size"),
        ({"train_micro_batch_size_per_gpu": 1}, {}, "per_gpu", "micro_batch_size"),
        ({"gradient_accumulation_steps": 7}, {}, "gradient_accumulation_steps", "batch_size"),
        (
            {"gradient_clipping": 2.0},
            {"gradient_clipping": 0.5},
            "gradient_clipping",
            "gradient_clipping",
        ),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "bf16.enabled", "precision"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}},
            {"optimizer": {"learning_rate": 0.1}},
            "optimizer.params.lr",
            "optimizer.learning_rate",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {"schedule": {"kind": "constant"}},
            "scheduler",
            "schedule",
        ),
    ],
)
def test_a_contradiction_names_both_in_one_line(
    make_config: MakeConfig, raw: dict[str, Any], fields: dict[str, Any], key: str, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_deepspeed_config(make_config(deepspeed=raw, **fields), PLAN)
    text = str(caught.value)
    assert key in text
    assert field in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("part", "section", "message"),
    [
        ("offload_param", {"device": "nvme"}, "offload_param.device is 'nvme', .* set it to cpu"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "ratio is 0.5, .* set it to 1"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused(
    make_config: MakeConfig, part: str, section: dict[str, Any], message: str
) -> None:
    raw = {"zero_optimization": {"stage": 3, part: section}}
    with pytest.raises(ConfigError, match=message):
        make_deepspeed_config(make_config(deepspeed=raw), PLAN)


def test_our_config_is_not_changed(make_config: MakeConfig) -> None:
    config = make_config(deepspeed=WITH_AUTO)
    identity = config.identity
    make_deepspeed_config(config, PLAN)
    assert config.identity == identity


def test_a_compiled_operator_needs_a_compiler(make_config: MakeConfig) -> None:
    raw = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    made = make_deepspeed_config(make_config(deepspeed=raw), PLAN)
    with pytest.raises(MissingToolError, match=r"apt-get install -y g\+\+ ninja-build"):
        require_compiler(made, which=lambda _tool: None)
    require_compiler(made, which=lambda tool: f"/usr/bin/{tool}")


def test_the_default_compiles_nothing(make_config: MakeConfig) -> None:
    for raw in ({}, WITH_AUTO, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}):
        made = make_deepspeed_config(make_config(deepspeed=raw), PLAN)
        require_compiler(made, which=lambda _tool: None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 9, "micro_batch_size": None}, "batch_size 9 cannot be shared"),
        ({"batch_size": 12, "micro_batch_size": 4}, "choose one of: 1, 2, 3, 6"),
    ],
)
def test_batches_that_do_not_divide_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan.make(world_size=2, **values)
