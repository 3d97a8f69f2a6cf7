from typing import Any

import pytest

from jobs.training.deepspeed_section import check_shape


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"reduce_bucket_size": 5e8}, "gradient_clipping": 0},
        {"tensorboard": {"enabled": False}, "gradient_clipping": "auto"},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "train_batch_size": "auto"},
    ],
)
def test_what_deepspeed_takes_passes(section: dict[str, Any]) -> None:
    check_shape(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimization": 3}, "zero_optimization is 3, expected a mapping"),
        ({"zero_optimization": True}, "zero_optimization is True"),
        ({"zero_optimization": [1]}, "zero_optimization is"),
        ({"zero_optimization": {"offload_optimizer": None}}, "zero_optimization.offload_optimizer"),
        ({"zero_optimization": {"stage": "abc"}}, "stage is 'abc', expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 7}}, "stage is 7"),
        ({"zero_optimization": {"stage": 1.5}}, "stage is 1.5"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        ({"optimizer": "Adam"}, "optimizer is 'Adam'"),
        ({"optimizer": {"type": "Adam", "params": [1]}}, "optimizer.params"),
        ({"optimizer": {"params": {}}}, "optimizer.type is None"),
        ({"tensor_parallel": 2}, "tensor_parallel is 2"),
        ({"zero_optimization": {"reduce_bucket_size": "abc"}}, "reduce_bucket_size is 'abc'"),
        ({"zero_optimization": {"reduce_bucket_size": {"a": 1}}}, "reduce_bucket_size is {'a': 1}"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size is 0"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "reduce_bucket_size is True"),
        ({"gradient_clipping": "abc"}, "gradient_clipping is 'abc', expected a number from 0"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan"),
        ({"bf16": {"enabled": "no"}}, "bf16.enabled is 'no', expected true or false"),
        ({"flops_profiler": {"enabled": 1}}, "flops_profiler.enabled is 1"),
        ({"a": {"b": {"enabled": None}}}, "a.b.enabled is None"),
        ({"tensorboard": {"enabled": True}}, "MLflow gets the metrics: remove tensorboard"),
        ({"wandb": {"enabled": True}}, "remove wandb"),
        ({"curriculum_learning": {"enabled": True}}, "which rows a step sees"),
        ({"optimizer": {"type": "Muon"}}, "set optimizer.name to muon, with ZeRO stage 0"),
        (
            {
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": True,
            },
            "the optimizers here are torch's: remove it",
        ),
    ],
)
def test_a_value_of_the_wrong_form_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape(section)
