"""What is taken out of a model, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.errors import InputError
from cluster.model_package.language_model import load_reference
from jobs.compression.config import PruneConfig
from jobs.compression.pruning import check_prunable, prune_model
from jobs.models.sparsity import density_of, keep_zeros
from tests.tiny_models import save_llama


def pruning(structure: str, sparsity: float) -> PruneConfig:
    return PruneConfig.model_validate(
        {"method": "prune", "structure": structure, "sparsity": sparsity, "steps": 1}
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), "text", intermediate_size=96)


def test_the_smallest_weights_of_each_matrix_become_zero(model_dir: Path, tmp_path: Path) -> None:
    prune_model(model_dir, tmp_path, pruning("unstructured", 0.75))
    before, after = load_reference(model_dir), load_reference(tmp_path)
    old = before.model.layers[1].mlp.up_proj.weight
    new = after.model.layers[1].mlp.up_proj.weight
    assert (new == 0).float().mean() == pytest.approx(0.75, abs=0.001)
    there = new != 0
    assert torch.equal(new[there], old[there])
    assert old[there].abs().min() >= old[~there].abs().max()
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert density_of(model_dir) == 1 > density_of(tmp_path)


def test_the_neurons_with_the_smallest_way_out_go(model_dir: Path, tmp_path: Path) -> None:
    prune_model(model_dir, tmp_path, pruning("neurons", 0.4))
    before, after = load_reference(model_dir), load_reference(tmp_path)
    old, new = before.model.layers[0].mlp, after.model.layers[0].mlp
    kept = old.down_proj.weight.norm(dim=0).topk(64).indices.sort().values
    assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, kept])
    assert torch.equal(new.gate_proj.weight, old.gate_proj.weight[kept])
    assert after.config.intermediate_size == 64, "58 of 96, to the nearest multiple of 32"


def test_zeros_stay_where_they_are_and_all_else_moves() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[:4] = 0
    before = layer.weight.detach().clone()
    keep_zeros(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        layer(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight[:4], before[:4])
    assert (layer.weight[4:] != before[4:]).all()


def test_what_removes_nothing_is_refused(model_dir: Path) -> None:
    check_prunable(model_dir, pruning("neurons", 0.4))
    with pytest.raises(InputError, match=r"sparsity 0\.1 of 96 neurons, .* removes none"):
        check_prunable(model_dir, pruning("neurons", 0.1))
