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
from sparkmim.evaluation.scores import evaluation_mode, readable, sum_over_processes


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of a classifier; top-5 is over all classes if there are fewer."""

    top1: float
    top5: float
    per_class: dict[str, float]  # accuracy by class name; NaN for classes without images
    confusion: list[list[int]]  # [classes, classes], true class by row
    loss: float  # mean cross-entropy

    @property
    def figures(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @property
    def main(self) -> float:
        return self.top1

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`, without classes that have no images."""
        known = {name: value for name, value in self.per_class.items() if not math.isnan(value)}
        return {**asdict(self), "per_class": known}

    def table(self) -> Table:
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

    Batches are dicts with `image`, `label` and `skipped`, for this process; skipped images do not count. `precision`
    returns the context of a forward pass.

    Raises:
        UnusableData: if no image can be read.
    """
    top1, top5 = (MulticlassAccuracy(len(classes), average="micro", top_k=min(k, len(classes))) for k in (1, 5))
    confusions = MulticlassConfusionMatrix(len(classes))
    metrics = MetricCollection({"top1": top1, "top5": top5, "confusion": confusions}, compute_groups=False).to(device)
    total = torch.zeros(2, device=device)  # sum of losses, number of images
    with evaluation_mode(model):
        for batch in readable(batches):
            images, labels = batch["image"].to(device), batch["label"].to(device)
            with precision():
                logits: Tensor = model(images)
            logits = logits.float()
            metrics.update(logits, labels)
            total += torch.stack(
                [nn.functional.cross_entropy(logits, labels, reduction="sum"), total.new_tensor(len(images))]
            )
    if not sum_over_processes(total)[1]:
        raise UnusableData("none of the validation images could be read")
    found = metrics.compute()
    confusion = found["confusion"].cpu()
    per_class = dict(zip(classes, (confusion.diagonal() / confusion.sum(1)).tolist(), strict=True))  # 0 / 0 is NaN
    loss = (total[0] / total[1]).item()
    return ClassificationScores(found["top1"].item(), found["top5"].item(), per_class, confusion.tolist(), loss)
