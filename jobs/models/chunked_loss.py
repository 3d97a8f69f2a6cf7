"""Cross-entropy of a language model's head, a chunk of tokens at a time.

The logits of all tokens never exist together: each chunk's are made, turned into losses and, where
gradients are wanted, at once into the gradients of the chunk's hidden states and of the head. It
knows nothing of models, batches or workers.

Shapes: N tokens, C tokens of a chunk, D hidden size, V vocabulary.

    loss = summed_cross_entropy(hidden_ND, head_VD, labels_N, weights_N, chunk_tokens=1024)
    losses_N, correct_N = token_losses(hidden_ND, head_VD, labels_N, chunk_tokens=1024)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional


def summed_cross_entropy(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    *,
    chunk_tokens: int,
) -> torch.Tensor:
    """Sum over tokens of weight times cross-entropy, in float32; differentiable.

    Products are in autocast's type if it is on; all sums over tokens are in float32.
    """
    dtype = _product_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss: torch.Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_ND.to(dtype), head_VD.to(dtype), labels_N, weights_N, chunk_tokens
        )
    return loss


@torch.no_grad()
def token_losses(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, *, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's cross-entropy (float32), and whether the likeliest token is the label."""
    dtype = _product_dtype(hidden_ND)
    hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    losses, correct = [], []
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for chunk in _chunks(len(labels_N), chunk_tokens):
            logits_CV = functional.linear(hidden_ND[chunk], head_VD).float()
            losses.append(functional.cross_entropy(logits_CV, labels_N[chunk], reduction="none"))
            correct.append(logits_CV.argmax(1) == labels_N[chunk])
    return torch.cat(losses), torch.cat(correct)


def _product_dtype(tensor: torch.Tensor) -> torch.dtype:
    device = tensor.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else tensor.dtype


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, so that no product is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor | None,
        chunk_tokens: int,
    ) -> torch.Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for chunk in _chunks(len(labels_N), chunk_tokens):
            hidden_CD = hidden_ND[chunk]
            weights_C = None if weights_N is None else weights_N[chunk]
            logits_CV = functional.linear(hidden_CD, head_VD).float()
            losses_C = _losses_into_gradient(logits_CV, labels_N[chunk], weights_C)
            total += losses_C.sum()
            gradient_CV = logits_CV.to(hidden_CD.dtype)
            if hidden_grad_ND is not None:
                torch.mm(gradient_CV, head_VD, out=hidden_grad_ND[chunk])
            if head_grad_VD is not None:
                head_grad_VD += gradient_CV.T @ hidden_CD
        ctx.save_for_backward(hidden_grad_ND, head_grad_VD)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = gradients
        hidden_grad_ND, head_grad_VD = ctx.saved_tensors
        if hidden_grad_ND is not None:
            hidden_grad_ND = hidden_grad_ND * scale
        if head_grad_VD is not None:
            head_grad_VD = (head_grad_VD * scale).to(ctx.head_dtype)
        return hidden_grad_ND, head_grad_VD, None, None, None


def _losses_into_gradient(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None
) -> torch.Tensor:
    """Weighted losses of a chunk; its logits (float32) are overwritten by their gradient."""
    labels_C1 = labels_C.unsqueeze(1)
    chosen_C = logits_CV.gather(1, labels_C1).squeeze(1)
    highest_C1 = logits_CV.amax(1, keepdim=True)
    logits_CV.sub_(highest_C1).exp_()
    sums_C1 = logits_CV.sum(1, keepdim=True)
    losses_C = (sums_C1.log() + highest_C1).squeeze(1) - chosen_C
    logits_CV.div_(sums_C1)
    logits_CV.scatter_add_(1, labels_C1, torch.full_like(highest_C1, -1.0))
    if weights_C is None:
        return losses_C
    logits_CV.mul_(weights_C.unsqueeze(1))
    return losses_C * weights_C
