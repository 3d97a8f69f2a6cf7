"""What `jobs.export` is told.

ExportConfig(model="pydoc-lm@champion", name="pydoc-lm-graph", to="onnx")
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel
from jobs.data.config import Name


class ExportConfig(StrictModel):
    """One version to derive another from."""

    model: str = Field(min_length=1)
    """NAME, NAME@ALIAS or NAME/VERSION."""
    name: Name
    """Name the derived version is registered under; may be the model's own."""
    to: Literal["onnx", "merged"]
    """onnx: a graph with a free batch, of a language model or of another graph. merged: the whole
    language model that an adapter and its base make."""
    opset: int | None = Field(None, ge=13, le=26)
    """ONNX operator set of the graph; None leaves a graph's, and takes the exporter's own."""
    relative_tolerance: float | None = Field(None, gt=0, le=1)
    """Largest difference of any output from the parent's on its golden inputs, relative to the
    parent's largest; None means 1e-4 for onnx, 1e-3 for merged."""
