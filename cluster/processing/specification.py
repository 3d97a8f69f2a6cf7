"""What a package says about pre- and post-processing: data, never code.

A client sends `inputs`; each `raw_inputs` entry is another way to send one of them (a PNG instead
of its pixels). The `pre` steps turn them into what the graph takes, the `post` steps turn what the
graph gives into what the client sees. Knows nothing of arrays: `steps.py` carries these out.

    Processing(
        inputs=(TensorSpec(name="pixels", datatype="FP32", shape=(-1, 64)),),
        raw_inputs={"image": ImageInput(target="pixels", width=8, height=8, scale=16 / 255)},
        pre=(Scale(tensor="pixels", factor=1 / 16), Reshape(tensor="pixels", shape=(1, 8, 8))),
        post=(Softmax(tensor="logits", into="probabilities"),),
    )
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel
from cluster.processing.tensors import Datatype, TensorName, TensorSpec

Finite = Annotated[float, Field(allow_inf_nan=False)]


class ImageInput(StrictModel):
    """A PNG or JPEG file (BYTES) that stands for the input `target`.

    It is flattened over white, turned to `mode`, resized to `width` × `height`, and each 0–255
    value becomes `value * scale + offset`. The result takes the shape of the target's samples.
    """

    op: Literal["image"] = "image"
    target: str
    mode: Literal["L", "RGB"] = "L"
    width: int = Field(ge=1, le=4096)
    height: int = Field(ge=1, le=4096)
    layout: Literal["HWC", "CHW"] = "CHW"
    """Order of the values before they take the target's shape; for mode L both are the same."""
    invert: bool = False
    """Turn dark on light into light on dark first."""
    scale: Finite = 1.0
    offset: Finite = 0.0


RawInput = ImageInput


class Scale(StrictModel):
    """`x * factor + offset`, in the tensor's own type."""

    op: Literal["scale"] = "scale"
    tensor: str
    factor: Finite = 1.0
    offset: Finite = 0.0


class Standardize(StrictModel):
    """`(x - mean) / std`, feature by feature along `axis`."""

    op: Literal["standardize"] = "standardize"
    tensor: str
    mean: tuple[Finite, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(min_length=1)
    axis: int = Field(-1, ge=-8, le=8)
    """Axis of the batch, so 0 is the batch itself and 1 the channels of an image."""

    @model_validator(mode="after")
    def _same_length(self) -> Standardize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values, std has {len(self.std)}")
        return self


class Reshape(StrictModel):
    """Give each sample this shape; the batch dimension stays."""

    op: Literal["reshape"] = "reshape"
    tensor: str
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(max_length=15)


class Cast(StrictModel):
    """Change the number type."""

    op: Literal["cast"] = "cast"
    tensor: str
    datatype: Datatype


class Softmax(StrictModel):
    """Turn scores along the last axis into probabilities."""

    op: Literal["softmax"] = "softmax"
    tensor: str
    into: TensorName | Literal[""] = ""
    """Name of the result, which is added; empty replaces `tensor`."""


class Labels(StrictModel):
    """Add the label of the largest score along the last axis."""

    op: Literal["labels"] = "labels"
    tensor: str
    into: TensorName = "label"
    labels: tuple[str, ...] = Field(min_length=1)


class Rename(StrictModel):
    """Give a tensor another name."""

    op: Literal["rename"] = "rename"
    tensor: str
    into: TensorName


PreStep = Annotated[Scale | Standardize | Reshape | Cast | Rename, Field(discriminator="op")]
PostStep = Annotated[
    Scale | Standardize | Reshape | Cast | Rename | Softmax | Labels, Field(discriminator="op")
]


class Processing(StrictModel):
    """From what a client sends to what the graph takes, and back."""

    inputs: tuple[TensorSpec, ...] = ()
    """What a client sends; empty means: what the graph takes."""
    raw_inputs: dict[TensorName, RawInput] = Field(default_factory=dict)
    """Other ways to send an input, by the name a client uses for them."""
    pre: tuple[PreStep, ...] = Field((), max_length=64)
    post: tuple[PostStep, ...] = Field((), max_length=64)
