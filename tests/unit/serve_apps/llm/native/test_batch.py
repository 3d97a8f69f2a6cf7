"""Index tensors of a step: who attends together, and who sees what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.native.batch import Batch, BlockTables, make_batch
from serve_apps.llm.native.scheduler import Chunk, Sequence
from serve_apps.llm.native.shape import ModelShape

HEADS = 2


def shape(*windows: int | None) -> ModelShape:
    sizes: dict[str, Any] = dict.fromkeys(
        ("num_layers", "hidden_size", "num_heads", "head_size", "vocab_size"), 4
    )
    return ModelShape(
        **sizes,
        num_kv_heads=HEADS,
        max_context_tokens=512,
        norm_epsilon=1e-6,
        windows=windows or (None,),
    )


def batch_of(*lengths: int, windows: tuple[int | None, ...] = (None,)) -> Batch:
    """Sequences of so many tokens, each of which gets its next one."""
    chunks = []
    for place, length in enumerate(lengths):
        request = EngineRequest(str(place), tuple(range(length)), Sampling(max_tokens=9))
        sequence = Sequence(request, seed=0)
        sequence.place, sequence.num_computed = place, length - 1
        sequence.blocks = [100 * place + number for number in range(-(-length // 16))]
        chunks.append(Chunk(sequence, 1))
    tables = BlockTables(len(lengths), 512)
    return make_batch(chunks, tables, shape(*windows), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ((40,), [1]),
        ((40, 40, 33), [3]),
        ((512, 500, 300, 256, 40, 30, 1), [3, 1, 2, 1]),
        ((1, 512), [1, 1]),
    ],
)
def test_sequences_of_about_the_same_length_attend_together(
    lengths: tuple[int, ...], groups: list[int]
) -> None:
    found = batch_of(*lengths).decodes
    assert [part.rows.stop - part.rows.start for part in found] == groups
    for part in found:
        longest = max(lengths[part.rows])
        assert part.cache_rows.shape[1] == -(-longest // 16)


def test_each_row_sees_its_own_tokens_alone() -> None:
    batch = batch_of(40, 33, windows=(None, 5))
    (part,) = batch.decodes
    seen = {window: (mask == 0).sum(-1).flatten().tolist() for window, mask in part.masks.items()}
    assert seen == {None: [40, 40, 33, 33], 5: [5] * 4}
    assert part.masks[5][0, 0].nonzero().flatten().tolist() == [*range(35), *range(40, 48)]
    assert part.cache_rows.tolist()[:3] == [[0, 2, 4], [1, 3, 5], [200, 202, 204]]
    assert batch.positions.tolist() == [39, 32]
    # Head 1 of token 32 of the second: block 102, head 1, offset 0.
    assert batch.write_places.tolist()[3] == (102 * HEADS + 1) * 16
