"""A state that is divided into fragments comes together again, whatever kinds it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from jobs.training.fragments import FragmentFiles, HostBuffer, difference, needed_files
from jobs.training.manifest import Range
from jobs.training.sharded_state import Holding, ShardedState

MakeOptimizer = Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]


def make_module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))


def state_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> ShardedState:
    holdings = [Holding(name, 0, one.numel(), one) for name, one in module.named_parameters()]
    buffers = dict(module.named_buffers())
    return ShardedState(holdings, optimizer, lambda: None, is_divided=False, buffers=buffers)


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(7)
    optimizer.zero_grad()
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def save(state: ShardedState, directory: Path, num_copies: int) -> dict[str, dict[str, Range]]:
    held = {}
    buffer = HostBuffer(pin=False)
    for copy in range(num_copies):
        tensors, ranges = state.share(copy, num_copies)
        with (directory / str(copy)).open("wb") as file:
            file.writelines(buffer.fill(tensors).chunks())
        held[str(copy)] = ranges
    return held


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, fused=False),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.RMSprop(parameters, centered=True),
    ],
    ids=["fused adamw", "adamw", "sgd", "momentum", "rmsprop"],
)
@pytest.mark.parametrize("num_copies", [1, 3])
def test_training_goes_on_from_fragments_as_if_it_had_never_stopped(
    tmp_path: Path, make: MakeOptimizer, num_copies: int
) -> None:
    module = make_module(1)
    optimizer = make(module.parameters())
    step(module, optimizer)
    held = save(state_of(module, optimizer), tmp_path, num_copies)
    other = make_module(2)
    other_optimizer = make(other.parameters())
    # It has a state of its own, which must not shine through.
    step(other, other_optimizer)
    step(other, other_optimizer)
    state_of(other, other_optimizer).load(FragmentFiles(tmp_path, held))
    for _ in range(2):
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        step(module, optimizer)
        step(other, other_optimizer)


def test_only_files_that_hold_something_are_needed() -> None:
    held: dict[str, dict[str, Range]] = {"a": {"w": (0, 5)}, "b": {"w": (5, 9), "v": (0, 2)}}
    assert needed_files(held, {"w": (0, 5)}) == ["a"]
    assert needed_files(held, {"w": (4, 6)}) == ["a", "b"]
    assert needed_files(held, {"v": (1, 2)}) == ["b"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, 5), (5, 9)], ""),
        ([(5, 9), (0, 5)], ""),
        ([(0, 5), (6, 9)], "it lacks 1 parameters, 'w' for one"),
        ([(0, 5), (0, 5)], "it lacks 1 parameters, 'w' for one"),
        ([(0, 5), (5, 12)], "its 'w' has 12 values, and here it has 9"),
        ([(0, 5)], "its 'w' has 5 values, and here it has 9"),
    ],
)
def test_files_hold_a_parameter_whole_and_no_more(pieces: list[Range], expected: str) -> None:
    held = {str(number): {"w": piece} for number, piece in enumerate(pieces)}
    assert difference(held, {"w": 9}) == expected


def test_parameters_that_only_one_side_has_are_named() -> None:
    held: dict[str, dict[str, Range]] = {"a": {"w": (0, 5), "v": (0, 2)}}
    assert difference(held, {"w": 5, "u": 1}) == "it lacks 1 parameters, 'u' for one"
    assert difference(held, {"w": 5}) == "it has 1 parameters more, 'v' for one"


def test_a_buffer_is_filled_again_and_again_with_any_types() -> None:
    buffer = HostBuffer(pin=False)
    for size in (3, 100, 5):
        image = buffer.fill(
            {
                "a": torch.ones(size, dtype=torch.bfloat16),
                "b": torch.arange(size, dtype=torch.float64),
                "c": torch.tensor(4),
            }
        )
        data = b"".join(bytes(chunk) for chunk in image.chunks())
        assert len(data) == image.size_bytes
        found = load(data)
        assert torch.equal(found["b"], torch.arange(size, dtype=torch.float64))
        assert found["a"].dtype == torch.bfloat16
        assert found["c"].item() == 4
