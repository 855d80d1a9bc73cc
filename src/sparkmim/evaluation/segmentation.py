"""Scores of label maps: intersection over union and pixel accuracy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from sparkmim.data.label_maps import IGNORED
from sparkmim.errors import UnusableData

_AT_ONCE = 16
"""Classes resized at a time, which bounds memory."""

_MOST_ROWS = 40
"""Maximum number of rows in a table of classes."""


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of label maps, from 0 to 1.

    `per_class` holds the intersection over union; NaN for classes that neither occur nor are predicted, which the mean
    leaves out.
    """

    figures: dict[str, float]  # `mIoU` and `pixel_accuracy`
    per_class: dict[str, float]

    @property
    def main(self) -> float:
        return self.figures["mIoU"]

    def table(self) -> Table:
        """Returns a table of the classes, in several columns if there are many, with the figures below."""
        cells = [(name, _percent(value)) for name, value in self.per_class.items()]
        columns = -(-len(cells) // _MOST_ROWS)
        rows = -(-len(cells) // columns)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for _ in range(columns):
            table.add_column("class")
            table.add_column("IoU", justify="right")
        for row in range(rows):
            table.add_row(*(cell for pair in cells[row::rows] for cell in pair))
        table.add_row("mean", _percent(self.figures["mIoU"]), style="bold")
        table.add_row("pixel accuracy", _percent(self.figures["pixel_accuracy"]))
        return table

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`; unknown values are null."""
        figures = {name: None if math.isnan(value) else value for name, value in self.figures.items()}
        classes = {name: None if math.isnan(value) else value for name, value in self.per_class.items()}
        return {**figures, "per_class": classes}


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def evaluate_segmentation(
    label_maps: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str], device: torch.device | None = None
) -> SegmentationScores:
    """Scores label maps by the confusion of all pixels; in a distributed run, over all processes.

    Takes predicted and true classes, long `[H, W]` each; true pixels of `IGNORED` do not count.

    Raises:
        UnusableData: if no pixel counts.
    """
    confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORED, validate_args=False).to(device)
    for found, truth in label_maps:
        confusion.update(found.flatten(), truth.flatten())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method")  # a process may have no images
        counts = confusion.compute().double().cpu()  # [classes, classes], true class by row
    if not counts.sum():
        raise UnusableData("none of the validation images could be read, or all of their pixels count for nothing")
    right = counts.diagonal()
    overlap = right / (counts.sum(0) + counts.sum(1) - right)  # 0 / 0 is NaN
    figures = {"mIoU": overlap.nanmean().item(), "pixel_accuracy": (right.sum() / counts.sum()).item()}
    return SegmentationScores(figures, dict(zip(classes, overlap.tolist(), strict=True)))


def classes_at(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Returns the most likely class of each pixel at another size, `[classes, h, w]` to long `[*size]`.

    Logits are resized bilinearly before the class is chosen.
    """
    best: Tensor | None = None
    found = torch.zeros(tuple(size), dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _AT_ONCE):
        part = logits[None, first : first + _AT_ONCE].float()
        if tuple(part.shape[2:]) != tuple(size):
            part = F.interpolate(part, list(size), mode="bilinear", align_corners=False)
        value, place = part[0].max(0)  # [*size]
        if best is None:
            best, found = value, place
        else:
            found = torch.where(value > best, place + first, found)
            best = torch.maximum(best, value)
    return found
