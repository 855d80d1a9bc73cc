"""Fine-tuning, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sparkmim.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LabelledDataset,
    SkipLog,
    classify_transform,
    eval_transform,
    open_labelled,
)
from sparkmim.data.arrays import WholeArray, array_transform, to_array
from sparkmim.data.labelled import Labelled, few_of
from sparkmim.drawing.confusion import draw_confusion
from sparkmim.errors import UserError
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import is_main_process
from sparkmim.models import PooledClassifier, create_classifier
from sparkmim.results import FinetuneResult
from sparkmim.runs.folder import RunFolder
from sparkmim.training.callbacks import Ema, Keeper, Monitor
from sparkmim.training.loop import Plan, begun, fit, network_text, plan_for, say_end, say_settings, settle_machine
from sparkmim.training.modules import ClassifyModule, OptimizerSettings
from sparkmim.training.recipes import FinetuneRecipe, finetune_recipe_named
from sparkmim.training.validation import Scores, Validator

log = logging.getLogger("sparkmim")

MAY_CHANGE = {
    "data", "val_data", "out", "workers", "devices", "accelerator", "num_nodes", "save_minutes",
    "log_every", "max_unreadable", "resume", "weights",
}  # fmt: skip
"""Arguments that a resumed run may be given anew: they change no result."""


def run_finetuning(settings: dict[str, Any], given: Set[str], callbacks: Sequence[pl.Callback]) -> FinetuneResult:
    """Runs `sparkmim.finetune`.

    Args:
        settings: its arguments.
        given: names of those that are no defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    folder, main = RunFolder(settings["out"]), is_main_process()
    settings = begun(settings, given, folder, MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_labelled(settings["data"], settings["val_data"], settings["val_split"], settings["seed"])
    if val is None:
        raise UserError(
            "there are no validation images; put them in a folder val/ beside train/, or set some apart with "
            "--val-split 0.2"
        )
    if warning := few_of(train.labels, train.classes):
        console.print(f"[yellow]note:[/] {warning}")

    torch.manual_seed(settings["seed"])
    model = build_model(settings, len(train.classes), start)
    train_set, val_set = build_datasets(settings, train, val)
    plan = plan_for(settings, batch_is_free, len(train_set))
    if settings["channels_last"] and len(settings["image_size"]) == 2:
        model = model.to(memory_format=torch.channels_last)

    module = ClassifyModule(
        model,
        OptimizerSettings(
            optimizer=settings["optimizer"],
            peak=settings["learning_rate"] * plan.batch_size / 256,
            betas=(settings["beta1"], settings["beta2"]),
            weight_decay=settings["weight_decay"],
            weight_decay_end=settings["weight_decay"],
            clip_grad=settings["clip_grad"],
            steps=plan.steps,
            warmup=min(round(settings["warmup_epochs"] * plan.steps_per_epoch), plan.steps - 1),
        ),
        seed=settings["seed"],
        classes=len(train.classes),
        layer_decay=settings["layer_decay"],
        mixup=settings["mixup"],
        cutmix=settings["cutmix"],
        smoothing=settings["smoothing"],
        loss=settings["loss"],
        freeze=settings["freeze"],
    )
    skipped = SkipLog(settings["max_unreadable"], epoch_size=len(train_set))
    monitor = Monitor(
        plan.batch_size, plan.steps_per_epoch, settings["log_every"], folder.checkpoint, skipped,
        console if console.is_terminal and main else None,
    )  # fmt: skip
    ema = Ema(module, settings["ema"]) if settings["ema"] else None
    metadata = _metadata(settings, model, train.classes)

    def write_classifier(classifier: nn.Module, suffix: str, scores: Scores | None) -> None:
        figures = {} if scores is None else {"top1": scores.top1, "top5": scores.top5}
        path = folder.weights / weights.CLASSIFIER_FILE.replace(".", f"{suffix}.")
        weights.write(classifier, path, replace(metadata, figures=figures))

    def write_weights(step: int) -> None:
        write_classifier(model, "", validator.last.get("model"))
        if ema is not None:
            write_classifier(ema.average.module, "_ema", validator.last.get("ema"))
        if validator.last:
            validator.write(folder.path)

    every_steps = max(1, round(settings["eval_every"] * plan.steps_per_epoch))
    validator = Validator(
        val_set, 2 * plan.batch_size // (plan.parts * plan.world_size), settings["workers"], every_steps, ema,
        write_classifier,
    )  # fmt: skip
    keeper = Keeper(folder, settings["save_minutes"], write_weights, monitor)
    every = [monitor, *([ema] if ema else []), validator, *callbacks, keeper]
    rows = _rows(settings, model, train, val, plan)
    trainer = fit(
        settings, module, train_set, plan, folder, every, say=lambda: say_settings(console, settings, rows),
        repeats=settings["repeats"],
    )  # fmt: skip
    return _finish(console, folder, trainer, plan, validator, skipped, model)


def _finish(
    console: Console, folder: RunFolder, trainer: pl.Trainer, plan: Plan, validator: Validator, skipped: SkipLog,
    model: nn.Module,
) -> FinetuneResult:  # fmt: skip
    """Says how it went, and draws the confusion matrix of the best weights."""
    best = max(validator.best.values(), key=lambda scores: scores.top1, default=None)
    result = FinetuneResult(
        out=folder.path,
        step=trainer.global_step,
        steps=plan.steps,
        top1={name: scores.top1 for name, scores in validator.last.items()},
        best_top1={name: scores.top1 for name, scores in validator.best.items()},
        model=model.eval(),
    )
    if not trainer.is_global_zero:
        return result
    if best is not None:
        title = f"top-1 {best.top1:.1%}, {len(validator.dataset):,} validation images"
        draw_confusion(best.confusion, validator.dataset.classes, folder.path / "confusion.png", title)
    table = Table("weights", "top-1", "top-5", "best top-1", box=None, padding=(0, 2, 0, 0))
    for name, scores in validator.last.items():
        label = "model" if name == "model" else "average"
        table.add_row(label, f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{validator.best[name].top1:.2%}")
    done = f"done: weights in {folder.weights}, figures in metrics.json and confusion.png beside them"
    say_end(console, folder, trainer, plan, skipped, table, done)
    return result


def in_force(settings: dict[str, Any], start: Weights | None) -> dict[str, Any]:
    """Fills what was left to the recipe, to the pretrained weights and to the machine.

    Raises:
        ValueError: if a setting is out of its range.
    """
    settings = dict(settings)
    recipe = finetune_recipe_named(settings["recipe"])
    if start is None and settings["layer_decay"] is None:
        settings["layer_decay"] = 1.0  # decay spares what was learnt before; random layers must all learn
    for field in fields(FinetuneRecipe):
        if settings[field.name] is None:
            settings[field.name] = getattr(recipe, field.name)
    known = WeightsMetadata() if start is None else start.metadata
    if settings["model"] is None:
        if start is None:
            raise UserError("no model given; --model names the network to train from scratch")
        settings["model"] = start.model
    for name, otherwise in (("channels", 3), ("image_size", 224), ("feature_modules", None)):
        if settings[name] is None:
            settings[name] = getattr(known, name) or otherwise
    size = settings["image_size"]
    settings["image_size"] = [size, size] if isinstance(size, int) else list(size)
    grey = settings["channels"] != 3
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        default = [sum(usual) / 3] * settings["channels"] if grey else list(usual)
        settings[name] = list(settings[name] or getattr(known, name) or default)
        if len(settings[name]) != settings["channels"]:
            raise UserError(f"{name} has {len(settings[name])} value(s) for {settings['channels']} channel(s)")
    settle_machine(settings)
    for name in ("out", "weights", "data", "val_data"):
        if isinstance(settings[name], Path):
            settings[name] = str(settings[name])
    for name in ("epochs", "batch_size", "learning_rate", "accumulate", "save_minutes", "log_every", "eval_every"):
        if settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}; it must be above 0")
    for name in ("mixup", "cutmix", "weight_decay", "warmup_epochs", "clip_grad"):
        if settings[name] < 0:
            raise UserError(f"{name} is {settings[name]}; it must be 0 or more")
    for name in ("smoothing", "ema"):
        if not 0 <= settings[name] < 1:
            raise UserError(f"{name} is {settings[name]}; it must be 0 or more, and below 1")
    if not 0 < settings["layer_decay"] <= 1:
        raise UserError(f"layer_decay is {settings['layer_decay']}; it is a factor above 0, at most 1 (none)")
    if settings["optimizer"] not in ("lamb", "adamw"):
        raise UserError(f"there is no optimizer {settings['optimizer']!r}; choose lamb or adamw")
    if settings["repeats"] < 1:
        raise UserError(f"repeats is {settings['repeats']}; it must be 1 (none) or more")
    if settings["freeze"] and start is None and not settings["resume"]:
        raise UserError("freeze trains the head alone, so it needs --weights; a random network has nothing to keep")
    return settings


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> nn.Module:
    """The classifier that settings in force describe, with the pretrained weights in it."""
    model = create_classifier(
        settings["model"], classes, settings["channels"], settings["drop_path"], settings["image_size"],
        settings["feature_modules"],
    )  # fmt: skip
    if start is not None:
        start.load_into_encoder(model, model.hierarchy if isinstance(model, PooledClassifier) else None)
    return model


def build_datasets(settings: dict[str, Any], train: Labelled, val: Labelled) -> tuple[LabelledDataset, LabelledDataset]:
    """Training images, augmented, and validation images, whole; of arrays where the channels or axes ask for it."""
    size, mean, std = settings["image_size"], settings["mean"], settings["std"]
    channels, seed = settings["channels"], settings["seed"]
    if len(size) == 2 and channels in (1, 3):
        side = (size[0], size[1])
        augmented = classify_transform(
            side, mean, std, (settings["crop_scale"], 1.0), settings["flip"], settings["augment"], settings["erase"]
        )
        return (
            LabelledDataset(train, augmented, seed, channels),
            LabelledDataset(val, eval_transform(side, mean, std, settings["eval_crop"] or None), seed, channels),
        )

    def read(item: Any, name: str) -> Any:
        return to_array(item, channels, len(size), name)

    flip = settings["flip"] if len(size) == 2 else 0.0
    return (
        LabelledDataset(
            train, array_transform(size, mean, std, (settings["crop_scale"], 1.0), flip), seed, channels, read
        ),
        LabelledDataset(val, WholeArray(size, mean, std), seed, channels, read),
    )


def _metadata(settings: dict[str, Any], model: nn.Module, classes: list[str]) -> WeightsMetadata:
    kept = ("image_size", "channels", "feature_modules", "mean", "std")
    return WeightsMetadata(
        model=settings["model"] if isinstance(settings["model"], str) else None,
        pooled=isinstance(model, PooledClassifier),
        classes=classes,
        crop=settings["eval_crop"] or 0.0,
        **{name: settings[name] for name in kept},
    )


def _rows(settings: dict[str, Any], model: nn.Module, train: Labelled, val: Labelled, plan: Plan) -> dict[str, str]:
    """Settings in words."""
    rate = settings["learning_rate"]
    side = "×".join(map(str, settings["image_size"]))
    return {
        "model": network_text(settings, model) + (", head alone" if settings["freeze"] else ""),
        "data": f"{len(train):,} images of {len(train.classes)} classes at {side}, {len(val):,} for validation",
        **recipe_rows(settings),
        "in all": f"{plan.steps:,} steps, {plan.steps_per_epoch} per epoch; peak rate {rate * plan.batch_size / 256:g}",
    }


def recipe_rows(settings: dict[str, Any]) -> dict[str, str]:
    """What a recipe decides, as it is printed."""
    drop = settings["drop_path"]
    dropped = "as the network has it" if drop is None else f"{drop:g}"
    whole = "whole image" if settings["eval_crop"] == 0 else f"crop {settings['eval_crop']:g}"
    return {
        "length": f"batch {settings['batch_size']}, {settings['epochs']:g} epochs, warm-up "
        f"{settings['warmup_epochs']:g}",
        "optimiser": f"{settings['optimizer']}, rate {settings['learning_rate']:g} per 256, layer decay "
        f"{settings['layer_decay']:g}, weight decay {settings['weight_decay']:g}, clip "
        f"{settings['clip_grad'] or 'none'}",
        "loss": f"{settings['loss']}, mixup {settings['mixup']:g}, cutmix {settings['cutmix']:g}, smoothing "
        f"{settings['smoothing']:g}",
        "regularisation": f"drop path {dropped}, EMA {settings['ema']:g}",
        "augmentation": f"{settings['augment']}, crops from {settings['crop_scale']:g}, erasing {settings['erase']:g}, "
        f"repeated {settings['repeats']} time(s); validation {whole}",
    }
