"""Validation of classifiers while they are trained, and the account of how good they were."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from sparkmim.data import LabelledDataset, collate
from sparkmim.data.loading import leave_signals_to_the_parent
from sparkmim.errors import UnusableData
from sparkmim.files import replacing
from sparkmim.training.callbacks import Ema, StepCallback
from sparkmim.training.modules import ScheduledModule

log = logging.getLogger("sparkmim")


@dataclass(frozen=True)
class Scores:
    """How good a classifier is.

    Attributes:
        top1: share of the images whose class is the likeliest.
        top5: share of those whose class is among the five likeliest; among all, where there are fewer than five.
        per_class: accuracy on each class; NaN for classes without images.
        confusion: long `[classes, classes]`, true class by row.
        loss: mean cross-entropy.
    """

    top1: float
    top5: float
    per_class: list[float]
    confusion: list[list[int]]
    loss: float

    def better_than(self, other: Scores) -> bool:
        """By top-1; of two alike, by loss."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)

    def as_json(self, classes: list[str]) -> dict[str, Any]:
        """For `metrics.json`: accuracies by the name of each class."""
        known = {name: value for name, value in zip(classes, self.per_class, strict=True) if value == value}
        return {**asdict(self), "per_class": known}


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterator[dict[str, Any]],
    classes: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Scores:
    """Scores a classifier, with the help of all processes of a distributed run.

    Args:
        model: maps images to logits; in evaluation mode for the call.
        batches: with `image`, `label` and `skipped`, of this process; images that stand in for others do not count.
        classes: how many.
        device: of the model.
        precision: a context for the forward pass.
    """
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            "confusion": MulticlassConfusionMatrix(classes),
        },
        compute_groups=False,
    ).to(device)
    training = model.training
    model.eval()
    total = torch.zeros(2, device=device)  # of losses, and their number
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
    per_class = confusion.diagonal() / confusion.sum(1)
    loss = (total[0] / total[1]).item()
    return Scores(found["top1"].item(), found["top5"].item(), per_class.tolist(), confusion.tolist(), loss)


class Validator(StepCallback):
    """Scores the model, and its average, every few epochs; keeps the best weights of both.

    Args:
        dataset: validation images.
        batch_size: images at once on each process.
        workers: loader processes.
        every_steps: optimiser steps between scorings; the end is always scored.
        ema: the average, if there is one.
        write_weights: writes a model's weight file, given the model, a suffix and its scores.

    Attributes:
        last: scores of the last scoring, by `model` and `ema`.
        best: best scores so far.
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        batch_size: int,
        workers: int,
        every_steps: int,
        ema: Ema | None,
        write_weights: Callable[[nn.Module, str, Scores], None],
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers if len(dataset) > 1000 else 0
        self.every_steps = every_steps
        self.ema = ema
        self.write_weights = write_weights
        self.last: dict[str, Scores] = {}
        self.best: dict[str, Scores] = {}
        self.history: list[dict[str, Any]] = []
        self._complained: set[str] = set()

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if step % self.every_steps and step != trainer.max_steps:
            return
        models = {"model": module.model, **({"ema": self.ema.average.module} if self.ema else {})}
        for name, model in models.items():
            with torch.random.fork_rng(devices=[]):
                scores = score(
                    model,
                    self._batches(trainer),
                    len(self.dataset.classes),
                    module.device,
                    trainer.precision_plugin.forward_context,
                )
            self.last[name] = scores
            prefix = "" if name == "model" else "ema_"
            shown = {f"val/{prefix}{key}": getattr(scores, key) for key in ("top1", "top5", "loss")}
            self.history.append({"step": step, "of": name, "top1": scores.top1, "loss": scores.loss})
            for logger in trainer.loggers:
                logger.log_metrics(shown, step)
            log.info(
                "step %d  %s: top-1 %.2f %%  top-5 %.2f %%  loss %.4f",
                step, "average" if prefix else "validation", 100 * scores.top1, 100 * scores.top5, scores.loss,
            )  # fmt: skip
            if name not in self.best or scores.better_than(self.best[name]):
                self.best[name] = scores
                if trainer.is_global_zero:
                    self.write_weights(model, "_best" if name == "model" else "_ema_best", scores)

    def _batches(self, trainer: pl.Trainer) -> Iterator[dict[str, Any]]:
        own = range(trainer.global_rank, len(self.dataset), trainer.world_size)
        keys = [[(0, index) for index in own[first : first + self.batch_size]]
                for first in range(0, len(own), self.batch_size)]  # fmt: skip
        loader = DataLoader(
            self.dataset, batch_sampler=keys, collate_fn=collate, num_workers=self.workers,
            worker_init_fn=leave_signals_to_the_parent,
        )  # fmt: skip
        for batch in loader:
            for complaint in batch["unreadable"]:
                if complaint not in self._complained:
                    self._complained.add(complaint)
                    log.warning("unreadable validation image left out: %s", complaint)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": {name: asdict(scores) for name, scores in self.best.items()},
            "last": {name: asdict(scores) for name, scores in self.last.items()},
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = {name: Scores(**values) for name, values in state_dict["best"].items()}
        self.last = {name: Scores(**values) for name, values in state_dict["last"].items()}
        self.history = list(state_dict["history"])

    def write(self, folder: Path) -> None:
        """Writes `metrics.json`: last and best scores of the model and its average, and all top-1 so far."""
        classes = self.dataset.classes
        content = {
            "classes": classes,
            "validation_images": len(self.dataset),
            **{f"last_{name}": scores.as_json(classes) for name, scores in self.last.items()},
            **{f"best_{name}": scores.as_json(classes) for name, scores in self.best.items()},
            "history": self.history,
        }
        with replacing(folder / "metrics.json") as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
