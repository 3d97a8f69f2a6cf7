"""Family `cnn`: a small convolutional classifier, exported as an ONNX graph with a free batch size.

The graph takes scaled images and gives logits; scaling, decoding a PNG, softmax and class names are
processing, stored in the package as data. Shapes: B rows, H × W pixels, C classes.

    family = Cnn(CnnConfig(family="cnn"), DataShape.of(dataset.info))
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from cluster.errors import InputError
from cluster.processing import (
    ImageInput,
    Labels,
    Processing,
    Reshape,
    Scale,
    Softmax,
    TensorSpec,
)
from jobs.data.dataset import Dataset
from jobs.models.config import CnnConfig
from jobs.models.export_onnx import export_onnx, plain_copy
from jobs.models.family import Batch, DataShape, Exported
from jobs.models.measures import (
    CLASSIFICATION_METRICS,
    classification_sums,
    metrics_of_classification,
)
from jobs.models.weighting import num_rows, weighted_sum

_NUM_GOLDEN_ROWS = 8


class Cnn:
    """See `jobs.models.family.Family`."""

    unit = "samples"
    units_per_row = 1
    metric_names = CLASSIFICATION_METRICS

    def __init__(self, config: CnnConfig, shape: DataShape) -> None:
        column = shape.columns.get(config.feature)
        if column is None or len(column.shape) != 2 or config.label not in shape.columns:
            raise InputError(
                f"model.family 'cnn' needs a column '{config.feature}' of images and a column "
                f"'{config.label}', and the data has: {', '.join(sorted(shape.columns))}",
                hint="choose another data.source, or set model.feature and model.label",
                param="model.feature",
            )
        self._config = config
        self._height, self._width = column.shape
        self._class_names = shape.class_names
        self._num_classes = len(shape.class_names)

    def build(self) -> nn.Module:
        layers: list[nn.Module] = []
        num_channels = 1
        for width in self._config.channels:
            layers += [nn.Conv2d(num_channels, width, kernel_size=3, padding=1), nn.ReLU()]
            num_channels = width
        num_features = num_channels * (self._height // 2) * (self._width // 2)
        return nn.Sequential(
            *layers,
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(num_features, self._config.hidden_size),
            nn.ReLU(),
            nn.Dropout(self._config.dropout),
            nn.Linear(self._config.hidden_size, self._num_classes),
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return weighted_sum(self.row_losses(model, batch), batch)

    def num_units(self, batch: Batch) -> torch.Tensor:
        return num_rows(batch)

    def row_losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits_BC, labels_B = self._predict(model, batch)
        return functional.cross_entropy(logits_BC, labels_B, reduction="none")

    def measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits_BC, labels_B = self._predict(model, batch)
        return classification_sums(logits_BC, labels_B)

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return metrics_of_classification(sums)

    def export(self, model: nn.Module, dataset: Dataset, directory: Path) -> Exported:
        config = self._config
        example = torch.zeros(2, 1, self._height, self._width)
        export_onnx(
            plain_copy(model, self.build()),
            {config.feature: example},
            ["logits"],
            directory / "model.onnx",
        )
        ids = torch.arange(min(_NUM_GOLDEN_ROWS, len(dataset.rows("train")))).numpy()
        pixels = dataset.rows("train").read(ids)[config.feature]
        golden = {config.feature: pixels.reshape(len(pixels), -1).astype("float32")}
        return Exported("graph", directory, golden, self._processing())

    def _processing(self) -> Processing:
        """Clients send H * W values from 0 to `value_max`, or an image file of any size."""
        config = self._config
        spec = TensorSpec(
            name=config.feature, datatype="FP32", shape=(-1, self._height * self._width)
        )
        image = ImageInput(
            target=config.feature,
            width=self._width,
            height=self._height,
            scale=config.value_max / 255,
        )
        return Processing(
            inputs=(spec,),
            raw_inputs={"image": image},
            pre=(
                Scale(tensor=config.feature, factor=1 / config.value_max),
                Reshape(tensor=config.feature, shape=(1, self._height, self._width)),
            ),
            post=(
                Labels(tensor="logits", into="label", labels=self._class_names),
                Softmax(tensor="logits", into="probabilities"),
            ),
        )

    def _predict(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pixels_BHW = batch[self._config.feature] / self._config.value_max
        logits_BC: torch.Tensor = model(pixels_BHW.unsqueeze(1))
        return logits_BC.float(), batch[self._config.label].long()
