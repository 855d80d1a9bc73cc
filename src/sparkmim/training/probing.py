"""Frozen features of labelled images, scored while a network is pretrained."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.labelled import Labelled, open_labelled
from sparkmim.data.problems import counted
from sparkmim.data.source import Source
from sparkmim.evaluation.features import StageFeatures, features_of
from sparkmim.evaluation.knn import knn_accuracy
from sparkmim.evaluation.linear import linear_probe
from sparkmim.evaluation.scores import evaluation_mode
from sparkmim.models import Hierarchy, SparK
from sparkmim.runs.history import History
from sparkmim.training.callbacks import Ema, StepCallback, add_unreadable
from sparkmim.training.modules import ScheduledModule

TRAIN_IMAGES, TEST_IMAGES = 2000, 1000
"""Most images that a probe learns from, and is tested on, over all classes."""

TIME_SHARE = 0.05
"""Share of the time of a run that its probes take, if nothing else is asked for."""

_TEST_SHARE = 1 / 3  # of labelled images without a part to test on
_MAPS = 2  # the deepest and the next


class Probe(StepCallback):
    """Scores frozen features by k-NN and a linear classifier: before the first step, at intervals, and at the end.

    Of the whole images' two deepest feature maps, averaged over positions, as `sparkmim.evaluate` does. The first
    process computes all of it.

    Args:
        data: labelled images, as for `open_labelled`; without a part to test on, a third of them is set apart.
        preparation: how images become the network's input.
        every_steps: optimiser steps between probes; None for as many as take a twentieth of the time.
        seed: draws the images, if there are more than needed.

    Attributes:
        figures: accuracies so far, by `step` and `of` (`model` or `ema`).
        cost: seconds that the last probe took.
    """

    def __init__(self, data: Any, preparation: Preparation, every_steps: int | None, seed: int) -> None:
        super().__init__()
        train, test = open_labelled(data, None, None, seed, preparation.channels, preparation.rank)
        if test is None:
            train, test = train.split(_TEST_SHARE, seed)
        generator = torch.Generator().manual_seed(seed)
        self.train, self.test = (
            _at_most(images, most, generator) for images, most in ((train, TRAIN_IMAGES), (test, TEST_IMAGES))
        )
        self.preparation = preparation
        self.every_steps = every_steps
        self.seed = seed
        self.figures: list[dict[str, Any]] = []
        self.cost = 0.0
        self._ended = 0.0
        self._complained: set[str] = set()
        # Connected by `attach`.
        self.history = History(None)
        self.ema: Ema | None = None
        self.steps_per_epoch = 1
        self.better: Callable[[nn.Module, str, dict[str, float]], None] | None = None

    def attach(
        self, history: History, ema: Ema | None, steps_per_epoch: int,
        better: Callable[[nn.Module, str, dict[str, float]], None] | None,
    ) -> None:  # fmt: skip
        """Connects the probe to a run.

        Args:
            better: called with the model, its kind and its figures whenever the linear probe of the deepest map exceeds
                all before.
        """
        self.history, self.ema, self.steps_per_epoch, self.better = history, ema, steps_per_epoch, better

    def __str__(self) -> str:
        often = f"as often as {TIME_SHARE:.0%} of the time allows"
        if self.every_steps is not None:
            often = f"every {counted(self.every_steps, 'step')}"
        classes = counted(len(self.train.classes), "class", "classes")
        return f"{counted(len(self.train), 'image')} of {classes} to learn from, {len(self.test):,} to test on; {often}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._ended = time.perf_counter()
        if trainer.is_global_zero and not trainer.global_step:
            assert isinstance(pl_module, ScheduledModule)
            self.probe(trainer, pl_module, 0)

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if trainer.is_global_zero and (self._due(step) or step == trainer.max_steps):
            self.probe(trainer, module, step)

    def _due(self, step: int) -> bool:
        if self.every_steps is not None:
            return step % self.every_steps == 0
        rested = time.perf_counter() - self._ended
        return step % self.steps_per_epoch == 0 and rested * TIME_SHARE >= self.cost * (1 - TIME_SHARE)

    def probe(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        """Scores the model, and its average where there is one."""
        begun = time.perf_counter()
        models = {"model": module.model, **({"ema": self.ema.average.module} if self.ema else {})}
        hierarchies: list[Hierarchy] = []
        for model in models.values():
            assert isinstance(model, SparK)
            hierarchies.append(model.hierarchy)
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            bank, queries = (self._features(hierarchies, images, module.device) for images in (self.train, self.test))
        with torch.random.fork_rng(devices=[]):
            every = [self._scores(*pair, module.device) for pair in zip(bank, queries, strict=True)]
        self.cost = time.perf_counter() - begun
        for name, model, figures in zip(models, models.values(), every, strict=True):
            earlier = [row for row in self.figures if row["of"] == name]
            best = max((row["linear"] for row in earlier), default=-1.0)
            start = earlier[0] if earlier else figures
            self.figures.append({"step": step, "of": name, **figures})
            self.history.add(
                "probe", step, weights=name, figures=figures, seconds=self.cost,
                start={key: start[key] for key in figures},
            )  # fmt: skip
            if self.better is not None and figures["linear"] > best:
                self.better(model, name, figures)
        self._ended = time.perf_counter()

    def _features(self, hierarchies: list[Hierarchy], images: Labelled, device: torch.device) -> list[StageFeatures]:
        seen = self.preparation
        source = Source.of(images.items, seen.channels, seen.rank)
        stages = list(range(1, len(hierarchies[0].strides) + 1))[-_MAPS:]
        batches = still_batches(source, seen, 64, None, device, doing=None)
        with ExitStack() as stack:
            for hierarchy in hierarchies:
                stack.enter_context(evaluation_mode(hierarchy))
            found = features_of([(hierarchy, stages) for hierarchy in hierarchies], batches)
        for complaint in set(found[0].unreadable) - self._complained:
            self._complained.add(complaint)
            add_unreadable(self.history, self._seen, complaint, "probe")
        return found

    def _scores(self, bank: StageFeatures, queries: StageFeatures, device: torch.device) -> dict[str, float]:
        """Returns accuracies: `knn` and `linear` of the deepest map, `knn_2` and `linear_2` of the next."""
        labels = self.train.labels[bank.places].to(device), self.test.labels[queries.places].to(device)
        figures = {}
        for place, stage in enumerate(sorted(bank.stages, reverse=True), 1):
            found = bank.stages[stage].to(device), labels[0], queries.stages[stage].to(device), labels[1]
            suffix = "" if place == 1 else f"_{place}"
            figures[f"linear{suffix}"] = linear_probe(*found, self.train.classes, seed=self.seed).accuracy
            figures[f"knn{suffix}"] = knn_accuracy(*found)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures, "cost": self.cost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.figures, self.cost = list(state_dict["figures"]), float(state_dict["cost"])


def _at_most(images: Labelled, most: int, generator: torch.Generator) -> Labelled:
    """Draws images evenly from all classes, if there are more than `most`."""
    return images if len(images) <= most else images.draw(max(2, most // len(images.classes)), generator)
