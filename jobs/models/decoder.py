"""A decoder of transformers, made to answer losses instead of logits while it trains.

It keeps its class, its parameters and its answer to `model(input_ids).logits`; only where targets
are given does it compute losses, a chunk of tokens at a time, inside its own head, so that a head
that is shared out among workers is gathered as for any call. It knows nothing of batches.

Shapes: B rows, T tokens, D hidden size, V vocabulary.

    prepare_decoder(model, chunk_tokens=512)
    loss = summed_loss(model, input_ids_BT, labels_BT, weights_BT)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from jobs.models import attention
from jobs.models.chunked_loss import summed_cross_entropy, token_losses

# Those whose logits are the head's product and nothing more: no scaling, no cap.
_PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_MARK = "answers_losses"


def prepare_decoder(model: Any, *, chunk_tokens: int) -> None:
    """Give a model our attention and, if `chunk_tokens` is not 0, losses in chunks."""
    if model.config._attn_implementation == "sdpa":
        attention.register()
        model.set_attn_implementation(attention.NAME)
    head = model.get_output_embeddings()
    is_plain = type(head) is torch.nn.Linear and head.bias is None
    if chunk_tokens and is_plain and model.config.model_type in _PLAIN_HEADS:
        head.forward = functools.partial(_answer_of_head, head, chunk_tokens)
        setattr(head, _MARK, True)
        model.forward = functools.partial(_answer_of_model, model)
        setattr(model, _MARK, True)


def summed_loss(
    model: torch.nn.Module,
    input_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    weights_BT: torch.Tensor | None,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Sum over tokens of weight times cross-entropy, differentiable, whatever the model is."""
    if getattr(model, _MARK, False):
        loss: torch.Tensor = model(
            input_ids=input_ids_BT, targets=labels_BT, weights=weights_BT, **inputs
        )
        return loss
    logits_BTV = model(input_ids=input_ids_BT, **inputs).logits
    return _summed_from_logits(logits_BTV, labels_BT, weights_BT)


def losses_by_token(
    model: torch.nn.Module,
    input_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    **inputs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's cross-entropy, and whether the likeliest token is the label; no gradients."""
    if getattr(model, _MARK, False):
        losses_BT, correct_BT = model(
            input_ids=input_ids_BT, targets=labels_BT, by_token=True, **inputs
        )
        return losses_BT, correct_BT
    logits_BTV = model(input_ids=input_ids_BT, **inputs).logits
    return _losses_from_logits(logits_BTV, labels_BT)


def _answer_of_model(
    model: Any,
    *arguments: Any,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    by_token: bool = False,
    **inputs: Any,
) -> Any:
    if targets is None:
        return type(model).forward(model, *arguments, **inputs)
    hidden_BTD = model.base_model(*arguments, **inputs).last_hidden_state
    head = model.get_output_embeddings()
    if getattr(head, _MARK, False):
        return head(hidden_BTD, targets, weights, by_token)
    # A head that DeepSpeed has replaced by its own.
    logits_BTV = head(hidden_BTD)
    if by_token:
        return _losses_from_logits(logits_BTV, targets)
    return _summed_from_logits(logits_BTV, targets, weights)


def _answer_of_head(
    head: Any,
    chunk_tokens: int,
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor | None = None,
    weights_BT: torch.Tensor | None = None,
    by_token: bool = False,
) -> Any:
    if labels_BT is None:
        return functional.linear(hidden_BTD, head.weight)
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    if by_token:
        parts = token_losses(hidden_ND, head.weight, labels_N, chunk_tokens=chunk_tokens)
        return tuple(part.view_as(labels_BT) for part in parts)
    weights_N = None if weights_BT is None else weights_BT.flatten()
    return summed_cross_entropy(
        hidden_ND, head.weight, labels_N, weights_N, chunk_tokens=chunk_tokens
    )


def _summed_from_logits(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None
) -> torch.Tensor:
    logits_NV, labels_N = logits_BTV.float().flatten(0, 1), labels_BT.flatten()
    if weights_BT is None:
        return functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    losses_N = functional.cross_entropy(logits_NV, labels_N, reduction="none")
    return (losses_N * weights_BT.flatten()).sum()


def _losses_from_logits(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BTV = logits_BTV.float()
    losses_BT = functional.cross_entropy(logits_BTV.mT, labels_BT, reduction="none")
    return losses_BT, logits_BTV.argmax(-1) == labels_BT
