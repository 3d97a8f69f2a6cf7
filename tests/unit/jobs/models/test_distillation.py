"""What a teacher's distribution does to a student's loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cluster.model_package.language_model import load_reference
from jobs.models.config import DistillationConfig
from jobs.models.decoder import prepare_decoder
from jobs.models.distillation import Teacher
from tests.tiny_models import save_llama

TOKENS_BT = torch.arange(24).view(2, 12)
INPUTS_BT, LABELS_BT = TOKENS_BT[:, :-1], TOKENS_BT[:, 1:]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("teacher"), "text")


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("student"), "text", num_hidden_layers=1)


def student(directory: Path) -> torch.nn.Module:
    model: torch.nn.Module = load_reference(directory)
    prepare_decoder(model, chunk_tokens=8)
    return model


def log_probabilities(directory: Path, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = load_reference(directory)(INPUTS_BT).logits
    return functional.log_softmax(logits / temperature, -1)


def test_it_is_the_softened_divergence_beside_the_labels(
    teacher_dir: Path, other_dir: Path
) -> None:
    config = DistillationConfig(teacher=str(teacher_dir), temperature=3.0, weight=0.25)
    found = Teacher(config).loss(student(other_dir), INPUTS_BT, LABELS_BT, None)
    ours, theirs = (log_probabilities(path, 3.0) for path in (other_dir, teacher_dir))
    divergence = (theirs.exp() * (theirs - ours)).sum()
    plain = -log_probabilities(other_dir, 1.0).gather(-1, LABELS_BT.unsqueeze(-1)).sum()
    assert divergence > 0.01
    assert found.item() == pytest.approx((0.75 * plain + 0.25 * 9 * divergence).item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_it(teacher_dir: Path) -> None:
    config = DistillationConfig(teacher=str(teacher_dir), weight=1.0)
    model = student(teacher_dir)
    loss = Teacher(config).loss(model, INPUTS_BT, LABELS_BT, None)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert all(parameter.grad.abs().max() < 1e-4 for parameter in model.parameters())  # type: ignore[union-attr]


def test_tokens_of_no_weight_cost_nothing(teacher_dir: Path, other_dir: Path) -> None:
    teacher = Teacher(DistillationConfig(teacher=str(teacher_dir)))
    model, weights_BT = student(other_dir), torch.zeros(2, 11)
    weights_BT[1] = 2
    found = teacher.loss(model, INPUTS_BT, LABELS_BT, weights_BT)
    alone = teacher.loss(model, INPUTS_BT[1:], LABELS_BT[1:], None)
    assert found.item() == pytest.approx(2 * alone.item(), rel=1e-4)
