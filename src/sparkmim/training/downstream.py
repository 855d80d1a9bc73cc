"""What detection and segmentation share: settings in force, and training with scores."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparkmim.data import SkipLog, collate
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import Scores, known_figures, write_metrics
from sparkmim.interop import weights
from sparkmim.interop.weights import Weights
from sparkmim.machine import is_main_process
from sparkmim.runs.folder import RunFolder
from sparkmim.training.callbacks import Ema, Keeper, Monitor, StepCallback
from sparkmim.training.loop import Plan, fit, say_end, say_settings
from sparkmim.training.modules import OptimizerSettings, ScheduledModule

log = logging.getLogger("sparkmim")

MAY_CHANGE = {
    "data", "images", "val_images", "out", "workers", "devices", "accelerator", "num_nodes",
    "save_minutes", "log_every", "max_unreadable", "resume", "weights",
}  # fmt: skip
"""Arguments that a resumed run may be given anew: they change no result."""

DRAWN = 4
"""Validation images that are drawn on, in TensorBoard."""


# Settings


def fill_from_recipe(settings: dict[str, Any], recipe: Any, from_scratch: bool) -> None:
    """Fills what was left to a recipe, a dataclass; of `epochs` and `iterations`, one is None.

    Raises:
        ValueError: if both are given.
    """
    if from_scratch and settings["layer_decay"] is None:
        settings["layer_decay"] = 1.0  # decay spares what was learnt before; random layers must all learn
    lengths = "epochs", "iterations"
    given = [name for name in lengths if settings[name] is not None]
    if len(given) == 2:
        both = " and ".join(f"{name} {settings[name]}" for name in given)
        raise UserError(f"{both} both say how long to train; give one, and null for the other")
    for field in fields(recipe):
        if settings.get(field.name) is None and not (given and field.name in lengths):
            settings[field.name] = getattr(recipe, field.name)


def fill_from_weights(settings: dict[str, Any], start: Weights | None, names: Sequence[str]) -> None:
    """Fills the model and other settings from what pretrained weights say, where they do.

    Raises:
        ValueError: if no model is known.
    """
    known = {} if start is None else start.metadata
    if settings["model"] is None:
        if start is None:
            raise UserError("no model given; --model names the network to train from scratch")
        settings["model"] = start.model
    for name in names:
        if settings[name] is None:
            settings[name] = known.get(name)


def check_ranges(settings: dict[str, Any], above_zero: Sequence[str]) -> None:
    """Makes plain values of paths, which a file can hold, and checks numbers.

    Raises:
        ValueError: if one is out of its range.
    """
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = str(value)
    for name in ("batch_size", "learning_rate", "accumulate", "save_minutes", "log_every", "eval_every", "epochs",
                 "iterations", *above_zero):  # fmt: skip
        if settings[name] is not None and settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}; it must be above 0")
    for name in ("weight_decay", "warmup_iterations", "clip_grad"):
        if settings[name] < 0:
            raise UserError(f"{name} is {settings[name]}; it must be 0 or more")
    if not 0 < settings["layer_decay"] <= 1:
        raise UserError(f"layer_decay is {settings['layer_decay']}; it is a factor above 0, at most 1 (none)")
    if not 0 <= settings["ema"] < 1:
        raise UserError(f"ema is {settings['ema']}; it is a decay between 0 (off) and 1, such as 0.999")


def taken_by(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a function has arguments for."""
    return {name: settings[name] for name in inspect.signature(function).parameters}


def adamw(settings: dict[str, Any], plan: Plan) -> OptimizerSettings:
    """AdamW, with rates for 16 images per step."""
    return OptimizerSettings(
        optimizer="adamw",
        peak=settings["learning_rate"] * plan.batch_size / 16,
        betas=(0.9, 0.999),
        weight_decay=settings["weight_decay"],
        weight_decay_end=settings["weight_decay"],
        clip_grad=settings["clip_grad"],
        steps=plan.steps,
        warmup=min(settings["warmup_iterations"], plan.steps - 1),
    )


def length_text(plan: Plan) -> str:
    """How long it is, in words."""
    return f"batch {plan.batch_size}, {plan.steps / plan.steps_per_epoch:.4g} epochs, {plan.steps:,} steps in all"


def optimizer_text(settings: dict[str, Any], plan: Plan) -> str:
    """The same in words."""
    frozen = f"frozen stages {settings['frozen_stages']}, " if settings["frozen_stages"] else ""
    return (
        f"adamw, peak rate {settings['learning_rate'] * plan.batch_size / 16:g}, layer decay "
        f"{settings['layer_decay']:g}, weight decay {settings['weight_decay']:g}, {frozen}"
        f"warm-up {settings['warmup_iterations']} steps"
    )


# Scoring


S = TypeVar("S", bound=Scores)


class Scorer(StepCallback, Generic[S]):
    """Scores the model, or its average, every few epochs; keeps the best weights, and draws on some images.

    Attributes:
        last: the last scores.
        best: the highest main figure so far.
        history: all known figures so far, by `step`.
    """

    pictures: str
    """What TensorBoard calls them."""

    logged: Sequence[str]
    """Figures that stand in the log."""

    read_back: Callable[..., S]
    """Makes scores of their fields."""

    def __init__(self) -> None:
        super().__init__()
        self.last: S | None = None
        self.best = -1.0
        self.history: list[dict[str, Any]] = []

    def attach(self, every_steps: int, ema: Ema | None, write: Callable[[nn.Module, str, S], None]) -> None:
        """Says when to score, whether an average instead of the model, and how to write weights with a suffix."""
        self.every_steps, self.ema, self.write_weights = every_steps, ema, write

    def score(self, trainer: pl.Trainer, model: nn.Module, device: torch.device) -> tuple[S, dict[str, Tensor]]:
        """Scores, by all processes, and pictures uint8 `[3, H, W]` by the name of the image."""
        raise NotImplementedError

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if step % self.every_steps and step != trainer.max_steps:
            return
        model: nn.Module = self.ema.average.module if self.ema else module.model
        with torch.random.fork_rng(devices=[]):
            scores, pictures = self.score(trainer, model, module.device)
        self.last = scores
        figures = known_figures(scores)
        self.history.append({"step": step, **figures})
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in figures.items()}, step)
            if isinstance(logger, TensorBoardLogger):
                for name, picture in pictures.items():
                    logger.experiment.add_image(f"{self.pictures}/{name}", picture, step)
        said = "  ".join(f"{name} {figures[name]:.3f}" for name in self.logged if name in figures)
        log.info("step %d  validation: %s", step, said)
        if scores.main > self.best:  # NaN is not
            self.best = scores.main
            if trainer.is_global_zero:
                self.write_weights(model, "_best", scores)

    def state_dict(self) -> dict[str, Any]:
        last = None if self.last is None else dict(vars(self.last))
        return {"best": self.best, "history": self.history, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.history = state_dict["best"], list(state_dict["history"])
        self.last = None if state_dict["last"] is None else self.read_back(**state_dict["last"])

    def write(self, folder: Path) -> None:
        """Writes `metrics.json`: the last figures, and all so far."""
        if self.last is not None:
            write_metrics(folder, {**self.last.as_json(), "best": self.best, "history": self.history})


def train_scored(
    console: Console,
    settings: dict[str, Any],
    module: ScheduledModule,
    dataset: Dataset[Any],
    plan: Plan,
    scorer: Scorer[Any],
    file: str,
    metadata: Mapping[str, Any],
    rows: Mapping[str, str],
    callbacks: Sequence[pl.Callback],
    collate_fn: Callable[[Any], dict[str, Any]] = collate,
    precision: str | None = None,
) -> pl.Trainer:
    """Trains, as `fit`; leaves weights with metadata and figures, the best ones and averages too; says how it went.

    Args:
        console: to say it on.
        settings: in force.
        module: what is trained.
        dataset: with a length, indexed by `(epoch, index)`.
        plan: how much.
        scorer: scores and draws.
        file: name of the weight file.
        metadata: of it.
        rows: settings in words.
        callbacks: further ones.
        collate_fn: makes a batch of samples.
        precision: of everything; None for that of the settings.
    """
    folder, model = RunFolder(settings["out"]), module.model
    images: Any = dataset
    skipped = SkipLog(settings["max_unreadable"], epoch_size=len(images))
    monitor = Monitor(
        plan.batch_size, plan.steps_per_epoch, settings["log_every"], folder.checkpoint, skipped,
        console if console.is_terminal and is_main_process() else None,
    )  # fmt: skip
    ema = Ema(module, settings["ema"]) if settings["ema"] else None

    def write(what: nn.Module, suffix: str, scores: Scores | None) -> None:
        figures = {} if scores is None else known_figures(scores)
        weights.write(what, folder.weights / file.replace(".", f"{suffix}."), {**metadata, **figures})

    def write_weights(step: int) -> None:
        write(model, "", None if ema else scorer.last)
        if ema is not None:
            write(ema.average.module, "_ema", scorer.last)
        scorer.write(folder.path)

    scorer.attach(max(1, round(settings["eval_every"] * plan.steps_per_epoch)), ema, write)
    keeper = Keeper(folder, settings["save_minutes"], write_weights, monitor)
    every = [monitor, *([ema] if ema else []), scorer, *callbacks, keeper]
    trainer = fit(
        settings, module, dataset, plan, folder, every, say=lambda: say_settings(console, settings, rows),
        collate_fn=collate_fn, precision=precision,
    )  # fmt: skip
    table = [] if scorer.last is None else [scorer.last.table()]
    done = f"done: weights in {folder.weights}, figures in metrics.json beside them"
    say_end(console, folder, trainer, plan, skipped, *table, done)
    return trainer
