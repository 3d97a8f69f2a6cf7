"""What a run will take, from its config alone: parameters, memory by kind, steps, time.

Weights are never allocated. It puts together what `footprint`, `planner` and `devices` know.

    for line in estimate(config, world_size=2).lines(): print(line)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.models.config import LanguageModelConfig
from jobs.models.families import make_family
from jobs.models.family import DataShape, Family
from jobs.training.batching import BatchPlan, divisors
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_section import enabled, zero_stage
from jobs.training.devices import Device, find_device
from jobs.training.expected_shape import expected_shape
from jobs.training.flops import flops_per_token
from jobs.training.footprint import Footprint, trace_footprint
from jobs.training.matmul_peak import known_peak
from jobs.training.monitor import check_metrics
from jobs.training.parallelism import Layout
from jobs.training.planner import Choice, Memory, Planner, Workload
from jobs.training.reporter import format_duration

# Numbers that an optimizer keeps per parameter.
_OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "adagrad": 1, "sgd": 1, "muon": 2}
_DEFAULT_BUCKET_NUMBERS = 500_000_000
_ASSUMED_UTILISATION = 0.4
_MAX_WORKERS = 65_536
_SHOWN_BYTES = 50_000


@dataclass(frozen=True)
class Estimate:
    """What is printed; sizes are per worker."""

    footprint: Footprint
    memory: Memory
    zero_stage: int
    plan: BatchPlan
    layout: Layout
    device: Device
    best: Choice | None
    """The smallest ZeRO stage that fits the device on these workers, with its largest rows."""
    best_world_size: int
    """The workers that `best` is for: more than given where those do not suffice."""
    steps: int
    unit: str
    units_per_step: int
    flops_per_unit: float | None
    peak_flops: float | None
    """Of one worker's device, if it is known."""

    @property
    def fits(self) -> bool:
        return self.memory.peak_bytes <= self.device.memory_bytes

    @property
    def step_s(self) -> float | None:
        """Seconds for a step, at a usual share of the device's peak."""
        if self.flops_per_unit is None or self.peak_flops is None:
            return None
        speed = _ASSUMED_UTILISATION * self.peak_flops * self.layout.world_size
        return self.flops_per_unit * self.units_per_step / speed

    def lines(self) -> Iterator[str]:
        yield self._parameters()
        yield self._per_worker()
        yield from self._device()
        parts = self.layout.num_parts
        sharers = "workers" if parts == 1 else f"groups of {parts} workers"
        yield (
            f"per step    {self.plan.batch_size} rows ({self.units_per_step:,} {self.unit}) = "
            f"{self.plan.world_size} {sharers} * {self.plan.accumulation_steps} * "
            f"{self.plan.micro_batch_size} rows"
        )
        yield (
            f"in all      {self.steps:,} steps, {self.steps * self.units_per_step:,} {self.unit}"
        )
        yield from self._time()

    def _parameters(self) -> str:
        trained, total = self.footprint.num_trained, self.footprint.num_parameters
        rest = "" if trained == total else f", {trained:,} of them trained"
        return f"parameters  {total:,}{rest}"

    def _per_worker(self) -> str:
        memory = self.memory
        kinds = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "copies in bf16": memory.copies,
            "activations": memory.activations,
            "logits and loss": memory.head,
            "buffers": memory.buffers,
            "framework": memory.framework,
            "allocator": memory.allocator,
        }
        shown = ", ".join(
            f"{name} {_size(size)}" for name, size in kinds.items() if size >= _SHOWN_BYTES
        )
        return (
            f"per worker  {_size(memory.peak_bytes)} at most (ZeRO {self.zero_stage} over "
            f"{self.plan.world_size}): {shown}"
        )

    def _device(self) -> Iterator[str]:
        verdict = "fits" if self.fits else "does not fit"
        yield f"device      {self.device.name}, {_size(self.device.memory_bytes)} each: {verdict}"
        if not self.fits and self.memory.copies > self.memory.weights:
            yield (
                f"            autocast keeps all weights in bfloat16 once more "
                f"({_size(self.memory.copies)}); deepspeed.bf16.enabled=true does not"
            )
        if self.best is None:
            yield (
                "            at this precision no ZeRO stage and no number of workers makes it fit"
            )
            return
        workers = f"{self.best_world_size} workers" if self.best_world_size > 1 else "1 worker"
        yield (
            f"            smallest ZeRO stage that fits on {workers}: {self.best.zero_stage}, with "
            f"micro_batch_size up to {self.best.rows} ({_size(self.best.memory.peak_bytes)})"
        )

    def _time(self) -> Iterator[str]:
        if self.step_s is None or self.peak_flops is None:
            return
        duration = f"{self.step_s:,.2f} s" if self.step_s >= 1 else f"{self.step_s * 1e3:,.2g} ms"
        yield (
            f"time        {duration} a step, {format_duration(self.step_s * self.steps)} "
            f"in all, at {_ASSUMED_UTILISATION:.0%} of {self.peak_flops / 1e12:,.2f} TFLOP/s a "
            "worker"
        )


def estimate(config: TrainConfig, world_size: int, peaks: Path | None = None) -> Estimate:
    """Raises what the run itself would raise for a wrong config or a missing source.

    Args:
        peaks: file of measured peaks of this machine, if there is one.
    """
    layout = Layout.of(config, world_size)
    plan = BatchPlan.of(config, layout.num_copies)
    deepspeed_config = make_deepspeed_config(config, plan)
    stage = zero_stage(deepspeed_config)
    shape = expected_shape(config.data)
    family = make_family(config.model, shape)
    check_metrics(config, family)
    device = find_device(config.planner.device, world_size)
    footprint = _footprint(config, deepspeed_config, shape, device)
    workload = _workload(config, deepspeed_config, plan, layout, device)
    best, best_world_size = _best(config, footprint, workload, device)
    return Estimate(
        footprint=footprint,
        memory=Planner(footprint, workload).memory(stage, plan.micro_batch_size),
        zero_stage=stage,
        plan=plan,
        layout=layout,
        device=device,
        best=best,
        best_world_size=best_world_size,
        steps=config.steps,
        unit=family.unit,
        units_per_step=plan.batch_size * family.units_per_row,
        flops_per_unit=_flops_per_unit(family),
        peak_flops=_peak_flops(config, device, peaks),
    )


def _footprint(
    config: TrainConfig, deepspeed_config: dict[str, Any], shape: DataShape, device: Device
) -> Footprint:
    def prepare(model: Any) -> None:
        if config.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if device.is_gpu and hasattr(model, "set_attn_implementation"):
            # Fake tensors are on a CPU, where attention is our own.
            model.set_attn_implementation("sdpa")

    in_half = _is_in_half_precision(deepspeed_config)
    return trace_footprint(
        make_family(_without_masks(config).model, shape),
        shape,
        autocast=config.precision == "bf16" or in_half,
        dtype=torch.bfloat16 if in_half else torch.float32,
        prepare=prepare,
    )


def _without_masks(config: TrainConfig) -> TrainConfig:
    """Whether a mask is made depends on what is in a row, and fake rows are empty."""
    if not isinstance(config.model, LanguageModelConfig):
        return config
    model = config.model.model_copy(update={"mask_documents": False})
    return config.model_copy(update={"model": model})


def _workload(
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    plan: BatchPlan,
    layout: Layout,
    device: Device,
) -> Workload:
    zero: dict[str, Any] = deepspeed_config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {})
    return Workload(
        layout=layout,
        weight_bytes=2 if _is_in_half_precision(deepspeed_config) else 4,
        optimizer_states=_OPTIMIZER_STATES[config.optimizer.name],
        accumulates=plan.accumulation_steps > 1,
        bucket_numbers=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET_NUMBERS)),
        offloads_optimizer=str(offload.get("device", "none")) != "none",
        is_gpu=device.is_gpu,
        under_ray=config.launcher == "ray",
    )


def _is_in_half_precision(deepspeed_config: dict[str, Any]) -> bool:
    return bool(enabled(deepspeed_config, "bf16", "fp16"))


def _best(
    config: TrainConfig, footprint: Footprint, workload: Workload, device: Device
) -> tuple[Choice | None, int]:
    """On as many workers as given, or else on the fewest doublings of them."""
    layout = workload.layout
    while layout.world_size <= _MAX_WORKERS and config.batch_size % layout.num_copies == 0:
        rows = divisors(config.batch_size // layout.num_copies)
        planner = Planner(footprint, dataclasses.replace(workload, layout=layout))
        best = planner.best(device, rows, _possible_stages(config, layout))
        if best is not None:
            return best, layout.world_size
        layout = dataclasses.replace(layout, world_size=2 * layout.world_size)
    return None, workload.layout.world_size


def _possible_stages(config: TrainConfig, layout: Layout) -> range:
    if config.optimizer.name == "muon":
        return range(1)
    if layout.pipeline > 1:
        return range(2)
    return range(3 if config.compile or layout.tensor > 1 else 4)


def _flops_per_unit(family: Family) -> float | None:
    with torch.device("meta"):
        model = family.build()
    return flops_per_token(model, family.units_per_row)


def _peak_flops(config: TrainConfig, device: Device, peaks: Path | None) -> float | None:
    if device.matmul_flops:
        return device.matmul_flops[config.precision]
    if config.planner.device or peaks is None:
        return None
    here = torch.device("cuda" if device.is_gpu else "cpu")
    return known_peak(peaks, here, config.precision, config.threads_per_worker)


def _size(size_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if size_bytes >= size:
            return f"{size_bytes / size:,.1f} {unit}"
    return f"{size_bytes / 1e6:,.1f} MB"
