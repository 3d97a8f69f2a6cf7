"""Learning rates by step."""

from __future__ import annotations

import pytest

from jobs.training.config import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ReduceOnPlateauSchedule,
    WsdSchedule,
)
from jobs.training.schedule import learning_rate

CONSTANT = ConstantSchedule(kind="constant", warmup_steps=4)
COSINE = CosineSchedule(kind="cosine", warmup_steps=4, final_ratio=0.1)
LINEAR = LinearSchedule(kind="linear", warmup_steps=0, final_ratio=0.0)
WSD = WsdSchedule(kind="wsd", warmup_steps=3, decay_share=0.2, final_ratio=0.5)
PLATEAU = ReduceOnPlateauSchedule(kind="reduce_on_plateau", warmup_steps=4)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (CONSTANT, 0, 0.25),
        (CONSTANT, 3, 1.0),
        (CONSTANT, 103, 1.0),
        (COSINE, 1, 0.5),
        (COSINE, 4, 1.0),
        (COSINE, 53, 0.1 + 0.9 * 0.5 * (1 + 0.0158660)),
        (COSINE, 103, 0.1),
        (LINEAR, 0, 1.0),
        (LINEAR, 103, 0.0),
        (WSD, 0, 1 / 3),
        (WSD, 3, 1.0),
        (WSD, 83, 1.0),
        (WSD, 93, 0.75),
        (WSD, 103, 0.5),
        (PLATEAU, 1, 0.5),
        (PLATEAU, 103, 1.0),
    ],
)
def test_rates_of_104_steps(schedule: object, step: int, expected: float) -> None:
    rate = learning_rate(schedule, peak=2.0, step=step, steps=104)  # type: ignore[arg-type]
    assert rate == pytest.approx(2.0 * expected, rel=1e-4)


@pytest.mark.parametrize("schedule", [CONSTANT, COSINE, LINEAR, WSD, PLATEAU])
def test_a_single_step_has_a_rate(schedule: object) -> None:
    assert learning_rate(schedule, peak=1.0, step=0, steps=1) > 0  # type: ignore[arg-type]
