"""Scores of classifiers: accuracy, confusion and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from sparkmim.errors import UnusableData


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of a classifier.

    Attributes:
        top1: share of images whose class is predicted first.
        top5: share of images whose class is among the first five, or among all if there are fewer.
        per_class: accuracy by class name; NaN for classes without images.
        confusion: `[classes, classes]`, true class by row.
        loss: mean cross-entropy.
    """

    top1: float
    top5: float
    per_class: dict[str, float]
    confusion: list[list[int]]
    loss: float

    @property
    def figures(self) -> dict[str, float]:
        """`top1`, `top5` and `loss`."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @property
    def main(self) -> float:
        """Figure that weights are compared by."""
        return self.top1

    def better_than(self, other: ClassificationScores) -> bool:
        """Compares top-1 accuracies and, if they are equal, losses."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`, without classes that have no images."""
        known = {name: value for name, value in self.per_class.items() if not math.isnan(value)}
        return {**asdict(self), "per_class": known}

    def table(self) -> Table:
        """Returns a table of the figures."""
        table = Table("top-1", "top-5", "loss", box=None, padding=(0, 2, 0, 0))
        table.add_row(f"{self.top1:.2%}", f"{self.top5:.2%}", f"{self.loss:.4f}")
        return table


@torch.no_grad()
def score_classifier(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    classes: Sequence[str],
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ClassificationScores:
    """Scores a classifier; in a distributed run, on the images of all processes.

    Args:
        model: maps images to logits; put into evaluation mode for the call.
        batches: dicts with `image`, `label` and `skipped`, for this process; skipped images do not count.
        classes: names.
        device: of the model.
        precision: returns the context of a forward pass.

    Raises:
        UnusableData: if no image can be read.
    """
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(len(classes), average="micro"),
            "top5": MulticlassAccuracy(len(classes), average="micro", top_k=min(5, len(classes))),
            "confusion": MulticlassConfusionMatrix(len(classes)),
        },
        compute_groups=False,
    ).to(device)
    training = model.training
    model.eval()
    total = torch.zeros(2, device=device)  # sum of losses, number of images
    try:
        for batch in batches:
            real = batch["skipped"] == 0
            if not real.any():
                continue
            images, labels = batch["image"][real].to(device), batch["label"][real].to(device)
            with precision():
                logits: Tensor = model(images)
            logits = logits.float()
            metrics.update(logits, labels)
            total += torch.stack([nn.functional.cross_entropy(logits, labels, reduction="sum"), real.sum().to(device)])
    finally:
        model.train(training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    if not total[1]:
        raise UnusableData("none of the validation images could be read")
    found = metrics.compute()
    confusion = found["confusion"].cpu()
    per_class = confusion.diagonal() / confusion.sum(1)  # 0 / 0 is NaN
    return ClassificationScores(
        found["top1"].item(),
        found["top5"].item(),
        dict(zip(classes, per_class.tolist(), strict=True)),
        confusion.tolist(),
        (total[0] / total[1]).item(),
    )
