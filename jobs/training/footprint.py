"""What one micro-batch holds in memory while a model is trained, found without computing it.

The model's own forward and backward pass run on fake tensors, which have shapes and no content, and
every storage that comes and goes is counted; so whatever the model does (LoRA, losses in chunks,
activation checkpointing) is in the numbers. Decoder layers are alike: two of them are traced, and
the others counted. It knows nothing of workers and optimizers.

    footprint = trace_footprint(family, shape, autocast=True)
    footprint.activation_bytes(rows=4), footprint.head_bytes(rows=4)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.models.family import Batch, DataShape, Family

Prepare = Callable[[torch.nn.Module], None]
_TRACED_LAYERS = (1, 2)
_TRACED_ROWS = (1, 2)


@dataclass(frozen=True)
class Trace:
    """Bytes beside weights and their gradients."""

    activations: float
    """Kept for the backward pass when the head begins."""
    head_peak: float
    """At most, until the head's own backward pass has ended."""
    layers_peak: float
    """At most, while the backward pass goes through the layers."""


@dataclass(frozen=True)
class Footprint:
    """Of a whole model."""

    sizes: dict[str, int]
    """Numbers in each parameter, by its name."""
    num_trained: int
    """Numbers that gradients change."""
    num_layers: int
    """Decoder layers, all alike; 0 if the model has none."""
    traces: dict[tuple[int, int], Trace]
    """By number of layers and of rows."""

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes.values())

    def copy_bytes(self, num_layers: float | None = None) -> int:
        """Kept from the forward to the backward pass whatever the number of rows: autocast's copies
        of weights in bfloat16, by a worker that has so many of the layers (None: all)."""
        return round(self._at(0, num_layers, lambda trace: trace.activations))

    def activation_bytes(self, rows: int, num_layers: float | None = None) -> int:
        """Kept likewise, and growing with the rows."""
        both = self._at(rows, num_layers, lambda trace: trace.activations)
        return round(both) - self.copy_bytes(num_layers)

    def head_bytes(self, rows: int) -> int:
        """What comes on top for logits and losses, or for computing a layer again."""
        head = self._at(rows, None, lambda trace: trace.head_peak - trace.activations)
        layers = self._at(rows, None, lambda trace: trace.layers_peak - trace.activations)
        return round(max(head, layers, 0))

    def _at(self, rows: int, num_layers: float | None, of: Callable[[Trace], float]) -> float:
        """Every quantity grows in a straight line with layers, and with rows."""
        layers = self.num_layers if num_layers is None else num_layers
        first, second = (
            _line(_TRACED_LAYERS, [of(self.traces[count, row]) for count in _TRACED_LAYERS], layers)
            for row in _TRACED_ROWS
        )
        return _line(_TRACED_ROWS, [first, second], rows)


def trace_footprint(
    family: Family,
    shape: DataShape,
    *,
    autocast: bool,
    dtype: torch.dtype = torch.float32,
    prepare: Prepare = lambda _model: None,
) -> Footprint:
    """Trace a family's training.

    Args:
        autocast: products in bfloat16.
        dtype: of the weights.
        prepare: what is done to a model before it is trained, activation checkpointing say.
    """
    with torch.device("meta"):
        model = family.build()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    layers = _alike_layers(model)
    num_layers = len(layers) if layers is not None else 0
    traces = {}
    for count in reversed(_TRACED_LAYERS):
        # A model without such layers is traced as it is, and is the same for any number of them.
        if layers is not None:
            del layers[count:]
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model, dtype)
            prepare(model)
            for rows in _TRACED_ROWS:
                traces[count, rows] = _trace(model, family, _fake_batch(shape, rows), autocast)
    return Footprint(sizes, sum(trained), num_layers, traces)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators have made and that still exist."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # A view of what was there before is nothing new.
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = operator(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def take_peak(self) -> int:
        """The peak since it was last taken."""
        peak, self.peak = self.peak, self.now
        return peak

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _trace(model: torch.nn.Module, family: Family, batch: Batch, autocast: bool) -> Trace:
    live = _LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])
    # Without the model's word on them: the loss as a whole is the head.
    moments = {"head_begins": 0, "head_peak": 0, "layers_peak": 0}

    def begin_head(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        moments["head_begins"] = live.now
        if inputs[0].requires_grad:
            inputs[0].register_hook(end_head)  # type: ignore[no-untyped-call]

    def end_head(_gradient: torch.Tensor) -> None:
        moments["head_peak"] = live.take_peak()

    def end_embedding(_module: object, _inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(end_layers)  # type: ignore[no-untyped-call]

    def end_layers(_gradient: torch.Tensor) -> None:
        moments["layers_peak"] = live.take_peak()

    model.train()
    with contextlib.ExitStack() as hooks:
        for handle in _hooks(model, begin_head, end_embedding):
            hooks.callback(handle.remove)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = family.loss(model, batch)
            after_loss, forward_peak = live.now, live.peak
            loss.backward()  # type: ignore[no-untyped-call]
    return Trace(
        activations=moments["head_begins"] or after_loss,
        head_peak=moments["head_peak"] or forward_peak,
        layers_peak=moments["layers_peak"] or live.peak,
    )


def _hooks(model: Any, begin_head: Any, end_embedding: Any) -> Iterator[Any]:
    """On the passes through head and embedding, where there are such; and on gradients, counted
    elsewhere, to let them go."""
    if hasattr(model, "get_output_embeddings"):
        yield model.get_output_embeddings().register_forward_pre_hook(begin_head)
        yield model.get_input_embeddings().register_forward_hook(end_embedding)
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(_let_go)


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _alike_layers(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list of decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return module
    return None


def _make_fake(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace what has no device by fake tensors on a CPU; shared parameters stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                made[id(old)] = torch.nn.Parameter(
                    torch.empty(old.shape, dtype=dtype, device="cpu"), old.requires_grad
                )
            if old is not None:
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _fake_batch(shape: DataShape, rows: int) -> Batch:
    return {
        name: torch.zeros((rows, *column.shape), dtype=_tensor_dtype(column.dtype))
        for name, column in shape.columns.items()
    }


def _tensor_dtype(name: str) -> torch.dtype:
    # As `loop.to_batch` does it.
    dtype = np.dtype(name)
    if dtype.kind == "u":
        return torch.int64
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """The value at `x` of the straight line through two points."""
    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
    return ys[0] + slope * (x - xs[0])
