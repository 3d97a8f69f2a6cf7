"""The loss in chunks is torch's own, and the logits of all tokens never exist."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.models.chunked_loss import summed_cross_entropy, token_losses

TOKENS, HIDDEN, VOCABULARY, CHUNK = 50, 16, 211, 16


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made inside had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        made = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return result


def make_problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype)
    head_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype)
    labels_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), labels_N


@pytest.fixture(params=[False, True], ids=["all alike", "weighted"])
def weights(request: pytest.FixtureRequest) -> torch.Tensor | None:
    return (torch.arange(TOKENS) % 3).float() if request.param else None


def gradients_of(
    loss: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    # Scaled, as a mean over tokens is.
    return loss.detach(), torch.autograd.grad(loss * 0.37, tensors)


def expected_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    losses = functional.cross_entropy((hidden @ head.T).float(), labels, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def test_loss_and_gradients_are_those_of_torch(weights: torch.Tensor | None) -> None:
    hidden, head, labels = make_problem(torch.float32)
    ours = gradients_of(
        summed_cross_entropy(hidden, head, labels, weights, chunk_tokens=CHUNK), hidden, head
    )
    theirs = gradients_of(expected_loss(hidden, head, labels, weights), hidden, head)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_autocast_products_are_bf16_and_sums_are_not(weights: torch.Tensor | None) -> None:
    hidden, head, labels = make_problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden, head, labels, weights, chunk_tokens=CHUNK)
        reference = expected_loss(hidden, head, labels, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    ours, theirs = gradients_of(loss, hidden, head), gradients_of(reference, hidden, head)
    assert ours[1][0].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    _, table, labels = make_problem(torch.float32)

    def loss_of(compute: object) -> torch.Tensor:
        hidden = functional.embedding(labels.roll(1), table).tanh()
        return compute(hidden, table, labels, None)  # type: ignore[operator]

    ours = gradients_of(loss_of(lambda *a: summed_cross_entropy(*a, chunk_tokens=CHUNK)), table)
    torch.testing.assert_close(ours, gradients_of(loss_of(expected_loss), table))


def test_the_logits_of_all_tokens_never_exist() -> None:
    hidden, head, labels = make_problem(torch.float32)
    with LargestTensor() as chunked:
        summed_cross_entropy(hidden, head, labels, None, chunk_tokens=CHUNK).backward()
        token_losses(hidden, head, labels, chunk_tokens=CHUNK)
    with LargestTensor() as whole:
        expected_loss(hidden, head, labels, None).backward()
    assert whole.numel == TOKENS * VOCABULARY
    assert chunked.numel == max(CHUNK * VOCABULARY, HIDDEN * VOCABULARY)


def test_losses_by_token_and_what_was_right() -> None:
    hidden, head, labels = make_problem(torch.float32)
    logits = (hidden @ head.T).detach()
    labels[::2] = logits.argmax(1)[::2]
    losses, correct = token_losses(hidden, head, labels, chunk_tokens=CHUNK)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, labels, reduction="none"))
    assert correct.tolist() == (logits.argmax(1) == labels).tolist()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels = make_problem(torch.float32)
    loss = summed_cross_entropy(hidden, head.detach(), labels, None, chunk_tokens=CHUNK)
    reference = expected_loss(hidden, head.detach(), labels, None)
    torch.testing.assert_close(gradients_of(loss, hidden), gradients_of(reference, hidden))


def test_it_can_be_compiled() -> None:
    hidden, head, labels = make_problem(torch.float32)
    compiled = torch.compile(summed_cross_entropy, backend="aot_eager")
    ours = gradients_of(compiled(hidden, head, labels, None, chunk_tokens=CHUNK), hidden, head)
    theirs = gradients_of(expected_loss(hidden, head, labels, None), hidden, head)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
