"""What detection and segmentation share: settings in force, training with scores, and using what was trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparkmim.data import SkipLog, UnreadableImage, collate
from sparkmim.data.labelled import PURPOSE, Part
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import device_named, is_main_process
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
    if settings["model"] is None:
        if start is None:
            raise UserError("no model given; --model names the network to train from scratch")
        settings["model"] = start.model
    for name in names:
        if settings[name] is None:
            settings[name] = None if start is None else getattr(start.metadata, name)


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


F = TypeVar("F", bound=NamedTuple)


def parts_named(
    settings: dict[str, Any], kind: Callable[..., F], pair: tuple[str, str],
    find: Callable[[Any, Part], F], wanted: Sequence[Part],
) -> list[F]:  # fmt: skip
    """Where the parts of a data set are, by the arguments that name them, or else in the folder `data`.

    Args:
        settings: with `data`, both names of `pair`, and both after `val_`.
        kind: makes the files of a part of two paths.
        pair: names of the arguments for these paths.
        find: looks a folder through for a part.
        wanted: which parts.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    parts = []
    for part in wanted:
        first, second = (f"val_{name}" if part == "val" else name for name in pair)
        named = settings[first], settings[second]
        if any(named):
            if not all(named):
                raise UserError(f"{first} and {second} go together; give both, or neither")
            parts.append(kind(Path(named[0]), Path(named[1])))
        elif settings["data"] is not None:
            parts.append(find(settings["data"], part))
        else:
            first, second = (name.replace("_", "-") for name in (first, second))
            raise UserError(
                f"there are no images to {PURPOSE[part]}; name them as --{first} and --{second}, or the folder of "
                "both parts as --data"
            )
    return parts


def say_notes(console: Console, notes: Sequence[str]) -> None:
    """What is worth knowing of the data."""
    for note in notes:
        console.print("[yellow]note:[/] ", end="")
        console.print(note, markup=False)


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


class Scores(Protocol):
    """How good something is: figures from 0 to 1, NaN where they are not known."""

    @property
    def figures(self) -> dict[str, float]:
        """By name."""

    @property
    def main(self) -> float:
        """That by which weights are compared."""

    def as_json(self) -> dict[str, Any]:
        """For `metrics.json`."""

    def table(self) -> Table:
        """For people."""


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


def known_figures(scores: Scores) -> dict[str, float]:
    """Those that are numbers."""
    return {name: value for name, value in scores.figures.items() if value == value}


def write_metrics(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `metrics.json`."""
    with replacing(folder / "metrics.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def train_scored(
    console: Console,
    settings: dict[str, Any],
    module: ScheduledModule,
    dataset: Dataset[Any],
    plan: Plan,
    scorer: Scorer[Any],
    file: str,
    metadata: WeightsMetadata,
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
        weights.write(what, folder.weights / file.replace(".", f"{suffix}."), replace(metadata, figures=figures))

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


# Using what was trained


def opened_for_use(settings: dict[str, Any], what: str) -> tuple[Weights, torch.device, Path]:
    """The weights of a detector or segmenter, the device, and the folder to write into, which is not made yet.

    Raises:
        ValueError: if there are none, or something stands in the folder.
    """
    if settings["weights"] == "none":
        raise UserError(f"no weights given; --weights names the run folder or the weight file of a {what}")
    out = Path(settings["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another --out")
    return open_weights(settings["weights"]), device_named(settings["accelerator"]), out


def say_scores(console: Console, out: Path, scores: Scores) -> None:
    """Writes `metrics.json` into a folder, which is made, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    write_metrics(out, scores.as_json())
    console.print(scores.table())


def images_read(console: Console, images: Any, channels: int) -> Iterator[tuple[str, str, Tensor]]:
    """Images to predict on: a name for what is written, the path, and the image, `[C, H, W]`, in turn.

    Images are uint8, arrays float32. Those that cannot be read are named.

    Args:
        console: to name them on.
        images: what `images_source` takes.
        channels: image channels.

    Raises:
        ValueError: if none can be read.
    """
    source = images_source(images, channels, 2)
    unreadable = 0
    for number, item in enumerate(source.items, 1):
        try:
            image = source.read(item, str(item))
        except UnreadableImage as error:
            unreadable += 1
            console.print(f"left out: {error}", markup=False)
            continue
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image, dtype=np.float32))
        yield f"{number:05d}-{Path(str(item)).stem}", str(item), image
    if unreadable == len(source.items):
        raise UserError(f"none of the {unreadable} images can be read")
