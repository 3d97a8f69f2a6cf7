"""Drawing a token where a temperature is as good as none."""

from __future__ import annotations

import pytest
import torch

from cluster.generation import Sampling
from cluster.sampling import perturb


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_lowest_temperatures_take_the_most_likely_token(
    temperature: float, top_p: float
) -> None:
    logits = torch.tensor([3.0, 5.0, -7.0, 4.0])
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p)
    for position in range(20):
        scores = perturb(logits.clone(), sampling, seed=1, position=position)
        assert int(scores.argmax()) == 1
