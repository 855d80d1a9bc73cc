"""Scoring of a model on validation data while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparkmim.data.dataset import AugmentedDataset
from sparkmim.data.loading import in_order
from sparkmim.evaluation.scores import Scores, known_figures, write_metrics
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.history import History
from sparkmim.training.callbacks import Ema, StepCallback, add_picture, add_unreadable
from sparkmim.training.modules import ScheduledModule

DRAWN = 4
"""Number of validation images that are drawn on."""

_FEW = 1000
"""Up to this many validation images, reading in-process beats starting workers."""


C = TypeVar("C", bound=Scores)


class Scorer(StepCallback, Generic[C]):
    """Scores the model, or its average, at intervals, and keeps the best weights.

    Args:
        read_back: makes scores of their fields, as `vars` gives them.

    Attributes:
        keeps_best: whether weights are written that are better than all before.
        scores_start: whether the model is scored before its first step.
        last: last scores, of `model` and `ema`.
        best: best scores so far, of both.
        history: figures so far, by `step`.
    """

    keeps_best = True
    scores_start = False

    def __init__(self, read_back: Callable[..., C]) -> None:
        super().__init__()
        self.read_back = read_back
        self.last: dict[str, C] = {}
        self.best: dict[str, C] = {}
        self.history: list[dict[str, Any]] = []
        self._complained: set[str] = set()
        self.floor = -1.0  # main figure that the best weights must exceed

    def attach(
        self,
        events: History,
        folder: RunFolder,
        every_steps: int,
        ema: Ema | None,
        write: Callable[[nn.Module, str, dict[str, float]], None],
    ) -> None:
        """Connects the scorer to a run.

        Args:
            every_steps: optimiser steps between scorings; the end is always scored.
            write: writes a weight file, given the model, a suffix and its figures.
        """
        self.events, self.folder, self.every_steps, self.ema, self.write_weights = (
            events, folder, every_steps, ema, write,
        )  # fmt: skip

    def score(self, trainer: pl.Trainer, model: nn.Module, device: torch.device) -> tuple[C, dict[str, Tensor]]:
        """Scores a model with the help of all processes.

        Returns:
            scores, and pictures uint8 `[3, H, W]` by name.
        """
        raise NotImplementedError

    def candidates(self, module: ScheduledModule) -> dict[str, nn.Module]:
        """Returns the models to score: the average where there is one, else the model."""
        return {"ema": self.ema.average.module} if self.ema else {"model": module.model}

    def complain(self, complaint: str) -> None:
        """Adds an unreadable validation image to the history, once."""
        if complaint not in self._complained:
            self._complained.add(complaint)
            add_unreadable(self.events, self._seen, complaint, "validation")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.scores_start and not trainer.global_step:
            assert isinstance(pl_module, ScheduledModule)
            self.score_all(trainer, pl_module, 0)

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self.score_all(trainer, module, step)

    def score_all(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        """Scores all candidates, and keeps those that are better than before."""
        models = self.candidates(module)
        beside = "model" in models
        for name, model in models.items():
            with torch.random.fork_rng(devices=[]):
                scores, pictures = self.score(trainer, model, module.device)
            self.last[name] = scores
            figures = known_figures(scores)
            self.history.append({"step": step, "of": name, **figures})
            self.events.add("validation", step, weights=name, figures=figures, beside_model=beside)
            prefix = "val/ema_" if name == "ema" and beside else "val/"
            shown = {f"{prefix}{key}": value for key, value in figures.items()}
            if step:  # Lightning takes no figures before
                module.log_dict(shown, on_step=True, on_epoch=False, logger=False)
            if trainer.is_global_zero:
                for title, picture in pictures.items():
                    add_picture(self.events, self.folder, step, title, picture)
            if scores.main > self.floor and (name not in self.best or better(scores, self.best[name])):  # NaN is not
                self.best[name] = scores
                if trainer.is_global_zero and self.keeps_best:
                    self.write_weights(model, "_ema_best" if prefix == "val/ema_" else "_best", figures)

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": {name: dict(vars(scores)) for name, scores in self.last.items()},
            "best": {name: dict(vars(scores)) for name, scores in self.best.items()},
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(state_dict["best"], float):  # as 0.1.0 wrote it: one figure, without scores
            last = {} if state_dict["last"] is None else {"ema" if self.ema else "model": state_dict["last"]}
            self.floor = state_dict["best"]
            state_dict = {**state_dict, "last": last, "best": {}}
        self.last = {name: self.read_back(**values) for name, values in state_dict["last"].items()}
        self.best = {name: self.read_back(**values) for name, values in state_dict["best"].items()}
        self.history = list(state_dict["history"])

    def metrics(self) -> dict[str, Any]:
        """Returns what `metrics.json` holds: the last figures, the best, and all so far."""
        last = next(iter(self.last.values()))
        best = max((scores.main for scores in self.best.values()), default=self.floor)
        return {**last.as_json(), "best": best, "history": self.history}

    def write(self, folder: Path) -> None:
        """Writes `metrics.json`, if anything was scored."""
        if self.last:
            write_metrics(folder, self.metrics())


class ImageScorer(Scorer[C]):
    """Scores a model and its average, by batches of validation images.

    Args:
        read_back: as for `Scorer`.
        dataset: validation images.
        batch_size: images at once on each process.
        workers: loader processes.
    """

    def __init__(self, read_back: Callable[..., C], dataset: AugmentedDataset, batch_size: int, workers: int) -> None:
        super().__init__(read_back)
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers if len(dataset) > _FEW else 0

    def candidates(self, module: ScheduledModule) -> dict[str, nn.Module]:
        return {"model": module.model, **super().candidates(module)}

    def batches(self, trainer: pl.Trainer) -> Iterator[dict[str, Any]]:
        """Yields batches of the images that this process scores."""
        for batch in in_order(self.dataset, share_of(trainer, self.dataset), self.batch_size, self.workers):
            for complaint in batch["unreadable"]:
                self.complain(complaint)
            yield batch


def better(scores: Scores, others: Scores) -> bool:
    """Tells whether scores are better than others; of two alike, a lower loss decides, where there is one."""
    return (scores.main, -getattr(scores, "loss", 0.0)) > (others.main, -getattr(others, "loss", 0.0))


def share_of(trainer: pl.Trainer, images: Sequence[Any] | Any) -> range:
    """Returns the places of the validation images that this process scores."""
    return range(trainer.global_rank, len(images), trainer.world_size)
