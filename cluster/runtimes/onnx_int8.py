"""A graph in 8 bits, by ONNX Runtime's own quantiser.

Dynamic: weights in 8 bits, activations scaled as they come. Static: both, activations by ranges
seen on sample inputs. Knows nothing of packages.

    quantise_dynamic(path, stage / "model.onnx", per_channel=False)
    quantise_static(path, stage / "model.onnx", samples, per_channel=True)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from cluster.errors import InputError, PackageError, as_full_disk, first_line
from cluster.processing import Array

# With 7 bits of weight no product overflows on CPUs without VNNI, so every machine computes alike.
_REDUCE_RANGE = True


def quantise_dynamic(source: Path, target: Path, *, per_channel: bool) -> None:
    """Raises InputError if the graph has nothing to quantise."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _one_line():
        quantize_dynamic(
            _load(source),
            target,
            per_channel=per_channel,
            reduce_range=_REDUCE_RANGE,
            weight_type=QuantType.QInt8,
        )
    _require_int8(target)


def quantise_static(
    source: Path, target: Path, samples: Iterable[Mapping[str, Array]], *, per_channel: bool
) -> None:
    """`samples` are what the graph takes, a batch each.

    Raises:
        InputError: the graph has nothing to quantise.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with _one_line():
        quantize_static(
            _load(source),
            target,
            _Samples(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=_REDUCE_RANGE,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    _require_int8(target)


def library() -> str:
    """What did it, for the record."""
    return f"onnxruntime {onnxruntime.__version__}"


class _Samples:
    """A CalibrationDataReader."""

    def __init__(self, samples: Iterable[Mapping[str, Array]]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._samples, None)


def _load(path: Path) -> Any:
    """The graph without the shapes that its exporter noted: they are inferred again, and those of
    matrices that the quantiser transposes would contradict what it finds."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


def _require_int8(path: Path) -> None:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    if not any(weight.data_type == onnx.TensorProto.INT8 for weight in graph.initializer):
        raise InputError(
            "the graph has no convolutions or matrix products with constant weights to quantise",
            hint="serve it as it is",
        )


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Its many exceptions as one of ours, and without its advice to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    # Else it is about this graph, which ONNX Runtime could load before.
    except Exception as error:
        if (full := as_full_disk(error)) is not None:
            raise full from None
        raise PackageError(
            f"the graph cannot be quantised: {first_line(error)}", hint="try another method"
        ) from None
    finally:
        root.setLevel(level)
