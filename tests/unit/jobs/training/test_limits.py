"""Values that no machine could follow are refused before anything is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.errors import MachineError
from jobs.train import check_config
from jobs.training.worker import hang_text
from tests.unit.jobs.training.conftest import MakeConfig


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 10**12},
        {"threads_per_worker": 99_999_999_999_999},
        {"hang_timeout_s": 1e-9},
    ],
)
def test_a_field_has_its_limits(make_config: MakeConfig, values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValidationError, match=name):
        make_config(**values)


def test_a_row_is_no_longer_than_what_can_be_planned(
    make_config: MakeConfig, text_data: dict[str, Any]
) -> None:
    text_data["text"]["sequence_length"] = 10**9
    with pytest.raises(ValidationError, match="sequence_length"):
        make_config(data=text_data, model={"family": "causal_lm"})


def test_a_gpu_that_is_not_there_is_refused_in_this_process_too(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="device is 'gpu', and this machine has none"):
        check_config(make_config(launcher="local", device="gpu"), world_size=1)
    check_config(make_config(launcher="local"), world_size=1)


@pytest.mark.parametrize(
    ("launcher", "what_follows"),
    [("ray", "so that all are replaced"), ("local", "it ends; run it again to resume")],
)
def test_a_hung_worker_says_what_will_follow(
    make_config: MakeConfig, launcher: str, what_follows: str
) -> None:
    text = hang_text(make_config(launcher=launcher), rank=1, seconds=60.0)
    assert text.startswith("worker 1 has shown no sign of life for 60 s (hang_timeout_s); ")
    assert text.endswith(what_follows)
