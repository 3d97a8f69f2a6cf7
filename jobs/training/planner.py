"""How much memory a worker needs, by kind, and which ZeRO stage and micro-batch fit a device.

Pure arithmetic on a `Footprint`; the sizes of DeepSpeed's buffers are those of its source (0.19)
and were compared with measured peaks, see tests/unit/jobs/training/test_planner.py. Memory peaks at
one of three moments: at the head, with all activations; at the end of the backward pass, with all
gradients; in the update.

    planner = Planner(footprint, workload)
    planner.memory(zero_stage=2, rows=4).peak_bytes
    planner.best(device, rows=[4, 2, 1])         # the smallest stage, its largest micro-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.training.devices import Device
from jobs.training.footprint import Footprint
from jobs.training.parallelism import Layout

_FLOAT_BYTES = 4
_GIB = 2**30
# CUDA context, libraries and NCCL's buffers.
_GPU_FRAMEWORK_BYTES = round(1.5 * _GIB)
CPU_BASELINE_BYTES = round(0.6 * _GIB)
"""Python and the imported libraries."""
_CPU_FIRST_USE_BYTES = 60_000_000
# Ray, Ray Train and what they import, and pages shared with others, which memory/peak_bytes counts
# too: a tiny model's workers peaked at 1.10 and 1.12 GB, and 0.71 GB was planned without it.
RAY_BYTES = 420_000_000
"""Of a worker's process under Ray."""
# What allocators keep beside what is in use: CUDA's in blocks; glibc's in a heap that is never
# given back, for speed (`jobs.training.allocator`): measured between 0.04 and 1 of small models'.
_ALLOCATOR_SHARE = {True: 0.06, False: 0.5}
# DeepSpeed's defaults for ZeRO 3.
_MAX_LIVE_PARAMETERS = 1_000_000_000
_PREFETCHED_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Workload:
    """What of a config decides memory beside the model."""

    layout: Layout
    weight_bytes: int
    """Of one number: 4, or 2 if weights are kept in half precision."""
    optimizer_states: int
    """Numbers kept for each one trained."""
    accumulates: bool
    """A step takes several micro-batches."""
    bucket_numbers: int
    """Gradients that are reduced at a time."""
    offloads_optimizer: bool
    is_gpu: bool
    under_ray: bool


@dataclass(frozen=True)
class Memory:
    """Bytes at one worker; each kind at its largest."""

    weights: int
    gradients: int
    optimizer: int
    """Its states, and the weights in float32 that it changes."""
    copies: int
    """Of weights, in bfloat16, by autocast."""
    activations: int
    head: int
    """Logits and losses, or a layer that is computed again."""
    buffers: int
    """Of DeepSpeed, for gradients on their way and weights that are gathered."""
    framework: int
    allocator: int
    """Kept by it beside what is in use."""
    peak_bytes: int
    """At most at any moment; kinds that never meet do not add up to it."""


@dataclass(frozen=True)
class Choice:
    """A way to run that fits."""

    zero_stage: int
    rows: int
    memory: Memory


class Planner:
    """For one model and workload."""

    def __init__(self, footprint: Footprint, workload: Workload) -> None:
        self._footprint = footprint
        self._workload = workload
        held = _share_held(footprint, workload.layout)
        self._weights = footprint.num_parameters * held
        self._trained = footprint.num_trained * held

    def memory(self, zero_stage: int, rows: int) -> Memory:
        """Of the worker that holds most, for micro-batches of so many rows."""
        parts = _Parts.of(self._workload, self._weights, self._trained, zero_stage)
        copies, activations, head = self._of_model(rows)
        kept = parts.weights + parts.optimizer + parts.standing
        carried = parts.gradients if self._workload.accumulates or zero_stage == 3 else 0.0
        live = max(
            kept + carried + parts.gathered + parts.gathering + copies + activations + head,
            kept + parts.gradients + parts.gathered + parts.reducing,
            kept + parts.gradients + parts.updating,
        )
        is_gpu = self._workload.is_gpu
        of_ray = RAY_BYTES if self._workload.under_ray else 0
        on_cpu = CPU_BASELINE_BYTES + _CPU_FIRST_USE_BYTES + of_ray
        framework = _GPU_FRAMEWORK_BYTES if is_gpu else on_cpu
        allocator = round(_ALLOCATOR_SHARE[is_gpu] * live)
        return Memory(
            weights=round(parts.weights),
            gradients=round(parts.gradients),
            optimizer=round(parts.optimizer),
            copies=round(copies),
            activations=round(activations),
            head=round(head),
            buffers=round(parts.buffers),
            framework=framework,
            allocator=allocator,
            peak_bytes=round(live) + framework + allocator,
        )

    def best(self, device: Device, rows: Sequence[int], stages: Sequence[int]) -> Choice | None:
        """The smallest stage that fits, with the largest of `rows`; None if none does."""
        for stage in sorted(stages):
            for count in sorted(rows, reverse=True):
                memory = self.memory(stage, count)
                if memory.peak_bytes <= device.memory_bytes:
                    return Choice(stage, count, memory)
        return None

    def _of_model(self, rows: int) -> tuple[float, float, float]:
        """Copies of weights, activations, and what the head takes."""
        layout, footprint = self._workload.layout, self._footprint
        layers = footprint.num_layers / layout.pipeline
        # The first stage of a pipeline has as many micro-batches under way as there are stages.
        under_way = layout.pipeline if self._workload.accumulates else 1
        activations = footprint.activation_bytes(rows, layers) * under_way
        # Norms and what goes around the layers stay whole: about a third of what a Llama keeps.
        divided = (1 + 2 / layout.tensor) / 3
        copies = footprint.copy_bytes(layers) / layout.tensor
        return copies, activations * divided, footprint.head_bytes(rows)


@dataclass(frozen=True)
class _Parts:
    """Bytes at one worker."""

    weights: float
    optimizer: float
    gradients: float
    standing: float = 0.0
    """Of buffers that are there all the time."""
    gathered: float = 0.0
    """Weights of other workers, while they are computed with."""
    gathering: float = 0.0
    """On top while they are fetched."""
    reducing: float = 0.0
    """On top while gradients are reduced."""
    updating: float = 0.0
    """On top in the update."""

    @property
    def buffers(self) -> float:
        gathered = self.gathered + max(self.gathering, self.reducing)
        return self.standing + max(gathered, self.updating)

    @classmethod
    def of(
        cls, workload: Workload, num_weights: float, num_trained: float, zero_stage: int
    ) -> _Parts:
        make = (_without_zero, _with_zero_1, _with_zero_2, _with_zero_3)[zero_stage]
        return make(workload, num_weights, num_trained)


def _without_zero(workload: Workload, num_weights: float, num_trained: float) -> _Parts:
    return _Parts(
        weights=num_weights * workload.weight_bytes,
        optimizer=num_trained * workload.optimizer_states * _FLOAT_BYTES,
        gradients=num_trained * workload.weight_bytes,
        reducing=_bucket(workload, num_trained),
    )


def _with_zero_1(workload: Workload, num_weights: float, num_trained: float) -> _Parts:
    share = num_trained / workload.layout.num_copies
    return _Parts(
        weights=num_weights * workload.weight_bytes,
        optimizer=_sharded_optimizer(workload, share),
        gradients=num_trained * workload.weight_bytes,
        standing=_reserved(workload) if workload.is_gpu else 0.0,
        # Gradients move into the bucket one by one; it is copied to be sent.
        reducing=_bucket(workload, num_trained),
        updating=2 * share * _FLOAT_BYTES - num_trained * workload.weight_bytes,
    )


def _with_zero_2(workload: Workload, num_weights: float, num_trained: float) -> _Parts:
    size, share = workload.weight_bytes, num_trained / workload.layout.num_copies
    bucket = _bucket(workload, num_trained)
    # What the last bucket holds is not yet in the worker's share.
    missing = share * bucket / num_trained if num_trained else 0.0
    return _Parts(
        weights=num_weights * size,
        optimizer=_sharded_optimizer(workload, share),
        gradients=share * size,
        standing=_reserved(workload) if workload.is_gpu else 0.0,
        reducing=(bucket if workload.is_gpu else 2 * bucket) - missing,
        updating=share * _FLOAT_BYTES,
    )


def _with_zero_3(workload: Workload, num_weights: float, num_trained: float) -> _Parts:
    size, copies = workload.weight_bytes, workload.layout.num_copies
    share, bucket = num_trained / copies, _bucket(workload, num_trained)
    is_shared = copies > 1
    return _Parts(
        weights=num_weights / copies * size,
        optimizer=_sharded_optimizer(workload, share),
        gradients=share * size,
        standing=_reserved(workload) if workload.is_gpu else bucket,
        gathered=min(num_weights, _MAX_LIVE_PARAMETERS) * size if is_shared else 0.0,
        gathering=min(num_weights, _PREFETCHED_PARAMETERS) * size if is_shared else 0.0,
        reducing=bucket if is_shared else 2 * bucket,
        updating=share * _FLOAT_BYTES,
    )


def _sharded_optimizer(workload: Workload, share: float) -> float:
    """Its states, and a copy of the worker's weights in float32."""
    if workload.offloads_optimizer and workload.is_gpu:
        return 0.0
    return share * (workload.optimizer_states + 1) * _FLOAT_BYTES


def _bucket(workload: Workload, num_trained: float) -> float:
    return min(workload.bucket_numbers, num_trained) * workload.weight_bytes


def _reserved(workload: Workload) -> float:
    """A GPU's bucket is there as a whole; of a CPU's memory, what is touched."""
    return workload.bucket_numbers * workload.weight_bytes


def _share_held(footprint: Footprint, layout: Layout) -> float:
    """Share of a model's parameters at the worker that holds most of a copy."""
    sizes = footprint.sizes
    if layout.tensor > 1:
        held = sum(
            size / layout.tensor if name.endswith("_proj.weight") or "lm_head" in name else size
            for name, size in sizes.items()
        )
        return held / footprint.num_parameters
    if layout.pipeline > 1:
        in_layers = sum(size for name, size in sizes.items() if ".layers." in name)
        share_of_layers = -(-footprint.num_layers // layout.pipeline) / footprint.num_layers
        # The first stage has the embedding; the last one the norm, and a head of the same size.
        outside = sum(
            size for name, size in sizes.items() if ".layers." not in name and "lm_head" not in name
        )
        return (in_layers * share_of_layers + outside) / footprint.num_parameters
    return 1.0
