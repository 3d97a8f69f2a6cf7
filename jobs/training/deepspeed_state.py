"""Which ranges of which parameters a DeepSpeed engine keeps at this worker, and where.

One function per kind of engine, since each divides and flattens in its own way; read in DeepSpeed
0.19. Padding is left out, so that a state means the same at any number of workers.

    state = state_of(engine)
    common_of(engine)        # counters, rates and scales: the same at all workers
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import JsonValue
from torch import distributed

from cluster.config import StrictModel
from jobs.training.sharded_state import Holding, ShardedState

_Counter = Literal["global_steps", "global_samples", "skipped_steps"]
_Numbers = dict[str, float | list[float]]


class _Common(StrictModel):
    """What `common_of` gives."""

    counters: dict[_Counter, int]
    groups: list[_Numbers]
    scheduler: dict[str, JsonValue]
    loss_scaler: _Numbers


def state_of(engine: Any) -> ShardedState:
    """The weights, optimizer state and buffers of an engine, at this worker."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    holdings, refresh, is_divided = _FINDERS[_kind_of(optimizer)](optimizer, names)
    return ShardedState(
        holdings=[holding for holding in holdings if holding.numel],
        optimizer=getattr(optimizer, "optimizer", optimizer),
        refresh=refresh,
        is_divided=is_divided,
        buffers=_saved_buffers(engine.module),
    )


def common_of(engine: Any) -> dict[str, Any]:
    """All else that the next step depends on, as plain JSON."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    scheduler, scaler = engine.lr_scheduler, _scaler_of(engine)
    return {
        "counters": {name: getattr(engine, name) for name in get_args(_Counter)},
        "groups": [_numbers(group) for group in base.param_groups],
        "scheduler": scheduler.state_dict() if scheduler is not None else {},
        "loss_scaler": _numbers(vars(scaler)) if scaler is not None else {},
    }


def check_common(engine: Any, values: dict[str, Any]) -> None:
    """Raises ValueError if `common_of` gives nothing of this shape."""
    common = _Common.model_validate(values)
    wanted = len(getattr(engine.optimizer, "optimizer", engine.optimizer).param_groups)
    if len(common.groups) != wanted:
        raise ValueError(f"it has {len(common.groups)} groups of parameters, expected {wanted}")


def set_common(engine: Any, values: dict[str, Any]) -> None:
    """Take over what `common_of` gave."""
    for name, value in values["counters"].items():
        setattr(engine, name, value)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group, saved in zip(base.param_groups, values["groups"], strict=True):
        group.update({name: _like(group.get(name), value) for name, value in saved.items()})
    if engine.lr_scheduler is not None and values["scheduler"]:
        engine.lr_scheduler.load_state_dict(values["scheduler"])
    scaler = _scaler_of(engine)
    for name, value in values["loss_scaler"].items() if scaler is not None else ():
        setattr(scaler, name, value)


def _kind_of(optimizer: Any) -> str:
    """The attribute by which an engine's optimizer is known."""
    return next((name for name in _FINDERS if hasattr(optimizer, name)), "")


Found = tuple[Iterator[Holding], Any, bool]


def _plain(optimizer: Any, names: dict[int, str]) -> Found:
    """ZeRO 0 in fp32: the parameters themselves are stepped."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    found = (Holding(names[id(one)], 0, one.numel(), one) for one in parameters)
    return found, _nothing, False


def _separate_copies(optimizer: Any, names: dict[int, str]) -> Found:
    """ZeRO 0 in half precision: an fp32 copy of each parameter is stepped."""
    pairs = list(
        zip(
            itertools.chain(*optimizer.fp16_groups),
            itertools.chain(*optimizer.fp32_groups),
            strict=True,
        )
    )

    def refresh() -> None:
        for half, copy in pairs:
            half.data.copy_(copy.data)

    return (Holding(names[id(half)], 0, half.numel(), copy) for half, copy in pairs), refresh, False


def _flat_copies(optimizer: Any, names: dict[int, str]) -> Found:
    """The same with DeepSpeed's fused Adam: one flat fp32 copy per group."""

    def refresh() -> None:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            for half, start in zip(group, _starts(group), strict=True):
                half.data.copy_(flat.data[start : start + half.numel()].view_as(half))

    found = (
        holding
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        for holding in _within(group, _starts(group), flat, 0, names)
    )
    return found, refresh, False


def _stages_1_and_2(optimizer: Any, names: dict[int, str]) -> Found:
    """A flat tensor per group, of which every copy of the model steps one stretch."""
    found = (
        holding
        for number, flat in enumerate(optimizer.single_partition_of_fp32_groups)
        for holding in _within(
            optimizer.round_robin_bit16_groups[number],
            optimizer.round_robin_bit16_offsets[number],
            flat,
            distributed.get_rank(optimizer.real_dp_process_group[number]),
            names,
        )
    )
    return found, optimizer.update_lp_params, True


def _stage_1_in_bf16(optimizer: Any, names: dict[int, str]) -> Found:
    found = (
        holding
        for number, flat in enumerate(optimizer.fp32_groups_flat_partition)
        for holding in _within(
            optimizer.bf16_groups[number],
            _starts(optimizer.bf16_groups[number]),
            flat,
            distributed.get_rank(optimizer.real_dp_process_group[number]),
            names,
        )
    )
    return found, optimizer.update_lp_params, True


def _stage_3(optimizer: Any, names: dict[int, str]) -> Found:
    """Every parameter is divided; a flat tensor per sub-group holds this worker's pieces."""

    def holdings() -> Iterator[Holding]:
        groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        for group, flat in groups:
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = size * optimizer._get_param_partition_rank(parameter)
                # The last pieces may be padded, or nothing but padding.
                numel = max(0, min(size, parameter.ds_numel - start))
                yield Holding(names[id(parameter)], start, numel, flat, offset)
                offset += size

    def refresh() -> None:
        # What a step does after the optimizer's own.
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()

    return holdings(), refresh, True


def _nothing() -> None:
    """The model's weights are those that are stepped."""


_FINDERS = {
    "fp32_partitioned_groups_flat": _stage_3,
    "single_partition_of_fp32_groups": _stages_1_and_2,
    "fp32_groups_flat_partition": _stage_1_in_bf16,
    "fp32_groups_flat": _flat_copies,
    "fp32_groups": _separate_copies,
    "": _plain,
}


def _within(
    parameters: Sequence[torch.Tensor],
    starts: Sequence[int],
    flat: torch.Tensor,
    rank: int,
    names: dict[int, str],
) -> Iterator[Holding]:
    """What one of equal stretches of a flattened group holds of its parameters."""
    first, last = rank * flat.numel(), (rank + 1) * flat.numel()
    for parameter, start in zip(parameters, starts, strict=True):
        low, high = max(first, start), min(last, start + parameter.numel())
        if low < high:
            yield Holding(names[id(parameter)], low - start, high - low, flat, low - first)


def _starts(parameters: Sequence[torch.Tensor]) -> list[int]:
    """Where each parameter begins when they lie one after the other."""
    return list(itertools.accumulate((one.numel() for one in parameters), initial=0))[:-1]


def _saved_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to a module's state."""
    saved = set(module.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def _scaler_of(engine: Any) -> Any:
    """What scales the loss in fp16; None where nothing does."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", engine.optimizer)


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that are numbers, or pairs of them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if _is_number(value)
        or (isinstance(value, tuple) and value and all(_is_number(one) for one in value))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _like(current: object, value: Any) -> Any:
    return tuple(value) if isinstance(current, tuple) else value
