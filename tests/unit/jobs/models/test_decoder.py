"""Documents of a packed row see themselves alone; attention in blocks and the losses of a decoder
are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cluster.errors import InputError
from jobs.data.dataset import ColumnInfo
from jobs.models import attention
from jobs.models.causal_lm import CausalLm
from jobs.models.config import CausalLmConfig
from jobs.models.documents import document_positions
from jobs.models.family import Batch, DataShape

LENGTH, VOCABULARY = 24, 97
LENGTHS = ((7, 12, 6), (25,))
"""Of the documents in each row, its last token included, which is only predicted."""


def make_family(**values: Any) -> CausalLm:
    config = {"family": "causal_lm", "hidden_size": 32, "num_layers": 2, "num_heads": 4, **values}
    columns = {
        "tokens": ColumnInfo(dtype="uint16", shape=(LENGTH + 1,)),
        "document_starts": ColumnInfo(dtype="uint8", shape=(4,)),
    }
    shape = DataShape(columns, vocab_size=VOCABULARY, sequence_length=LENGTH)
    return CausalLm(CausalLmConfig.model_validate(config), shape)


def build(family: CausalLm) -> torch.nn.Module:
    torch.manual_seed(0)
    model = family.build()
    # Far from uniform, so that a token that sees too much shows.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


@pytest.fixture
def packed() -> Batch:
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    starts = np.zeros((2, LENGTH + 1), bool)
    for row, lengths in zip(starts, LENGTHS, strict=True):
        row[np.cumsum((0, *lengths[:-1]))] = True
    # A row's first token begins a document, said or not.
    starts[1, 0] = False
    return {"tokens": tokens, "document_starts": torch.from_numpy(np.packbits(starts, axis=1))}


def apart(packed: Batch) -> list[Batch]:
    """Each document alone, with the token after it, which it is to predict."""
    batches: list[Batch] = []
    for tokens, lengths in zip(packed["tokens"], LENGTHS, strict=True):
        ends = np.cumsum(lengths)
        batches += [
            {"tokens": tokens[None, end - length : end + 1]}
            for length, end in zip(lengths, ends, strict=True)
        ]
    return batches


@pytest.mark.parametrize("chunk_tokens", [0, 10])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_packed_row_has_the_loss_of_its_documents_run_apart(
    packed: Batch, chunk_tokens: int, precision: torch.dtype
) -> None:
    masked = make_family(mask_documents=True, loss_chunk_tokens=chunk_tokens)
    plain = make_family(loss_chunk_tokens=chunk_tokens)
    model = build(plain)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        together = masked.loss(model, packed)
        losses = [plain.loss(model, batch) for batch in apart(packed)]
        unmasked = plain.loss(model, packed)
    tolerance = 1e-5 if precision == torch.float32 else 5e-3
    assert together.item() == pytest.approx(sum(loss.item() for loss in losses), rel=tolerance)
    assert unmasked.item() != pytest.approx(together.item(), rel=2 * tolerance)
    (gradient,) = torch.autograd.grad(together, [model.model.embed_tokens.weight])  # type: ignore[union-attr]
    assert gradient.isfinite().all()


def test_positions_begin_anew_with_each_document() -> None:
    starts = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0]])
    assert document_positions(starts).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]


def test_masking_needs_a_dataset_that_says_where_documents_begin() -> None:
    shape = DataShape({}, vocab_size=VOCABULARY, sequence_length=LENGTH)
    config = CausalLmConfig(family="causal_lm", mask_documents=True)
    with pytest.raises(InputError, match=r"where documents begin.*jobs\.prepare"):
        CausalLm(config, shape)


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_attention_in_blocks_is_that_of_torch(key_value_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 40, 8) for heads in (4, key_value_heads, key_value_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = (torch.rand(2, 1, 40, 40, generator=generator) > 0.3) | torch.eye(40, dtype=torch.bool)
    for hidden in (None, mask.tril()):
        rounded = [tensor.bfloat16() for tensor in (query, key, value)]
        ours, _ = attention.attend(torch.nn.Identity(), *rounded, hidden)
        theirs = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=hidden, is_causal=hidden is None, enable_gqa=True
        )
        torch.testing.assert_close(ours.float(), theirs.transpose(1, 2), rtol=0.05, atol=0.05)
    scaled, repeat = query * 8**-0.5, 4 // key_value_heads
    exact = attention.attend_in_blocks(
        scaled,
        key.repeat_interleave(repeat, 1),
        value.repeat_interleave(repeat, 1),
        mask.tril(),
        block_tokens=16,
    )
    torch.testing.assert_close(exact, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_in_chunks_are_those_of_the_logits(packed: Batch, tied: bool) -> None:
    whole = make_family(loss_chunk_tokens=0, tie_embeddings=tied)
    chunked = make_family(loss_chunk_tokens=10, tie_embeddings=tied)
    models = build(whole), build(chunked)
    weighted = {**packed, "row_weight": torch.tensor([1.0, 0.5])}
    results = []
    for family, model in zip((whole, chunked), models, strict=True):
        loss = family.loss(model, weighted)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in model.parameters()]
        with torch.no_grad():
            sums, rows = family.measure(model, weighted), family.row_losses(model, weighted)
        results.append((loss.detach(), gradients, sums, rows))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    # A reader of logits, such as generation, is served as before.
    logits = [model(input_ids=packed["tokens"]).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0])
