"""Validation of classifiers while they are trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from sparkmim.data import LabelledDataset, collate
from sparkmim.data.loading import leave_signals_to_the_parent
from sparkmim.evaluation.classification import ClassificationScores, score_classifier
from sparkmim.evaluation.scores import write_metrics
from sparkmim.training.callbacks import Ema, StepCallback
from sparkmim.training.modules import ScheduledModule

log = logging.getLogger("sparkmim")


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
        write_weights: Callable[[nn.Module, str, ClassificationScores], None],
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers if len(dataset) > 1000 else 0
        self.every_steps = every_steps
        self.ema = ema
        self.write_weights = write_weights
        self.last: dict[str, ClassificationScores] = {}
        self.best: dict[str, ClassificationScores] = {}
        self.history: list[dict[str, Any]] = []
        self._complained: set[str] = set()

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if step % self.every_steps and step != trainer.max_steps:
            return
        models = {"model": module.model, **({"ema": self.ema.average.module} if self.ema else {})}
        for name, model in models.items():
            with torch.random.fork_rng(devices=[]):
                scores = score_classifier(
                    model,
                    self._batches(trainer),
                    self.dataset.classes,
                    module.device,
                    trainer.precision_plugin.forward_context,
                )
            self.last[name] = scores
            prefix = "" if name == "model" else "ema_"
            shown = {f"val/{prefix}{key}": value for key, value in scores.figures.items()}
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
        self.best = {name: self._read_back(values) for name, values in state_dict["best"].items()}
        self.last = {name: self._read_back(values) for name, values in state_dict["last"].items()}
        self.history = list(state_dict["history"])

    def _read_back(self, values: dict[str, Any]) -> ClassificationScores:
        if isinstance(values["per_class"], list):  # as older checkpoints hold it
            values = {**values, "per_class": dict(zip(self.dataset.classes, values["per_class"], strict=True))}
        return ClassificationScores(**values)

    def write(self, folder: Path) -> None:
        """Writes `metrics.json`: last and best scores of the model and its average, and all top-1 so far."""
        content = {
            "classes": self.dataset.classes,
            "validation_images": len(self.dataset),
            **{f"last_{name}": scores.as_json() for name, scores in self.last.items()},
            **{f"best_{name}": scores.as_json() for name, scores in self.best.items()},
            "history": self.history,
        }
        write_metrics(folder, content)
