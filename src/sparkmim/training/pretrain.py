"""Pretraining, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn

from sparkmim.data import PretrainDataset, SkipLog, array_transform, normalisation, pretrain_transform
from sparkmim.data.source import Source, open_source
from sparkmim.errors import UserError
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import open_weights
from sparkmim.machine import is_main_process
from sparkmim.models import SparK, create_encoder
from sparkmim.models.spark import DECODER_WIDTH, encoder_norm
from sparkmim.results import PretrainResult
from sparkmim.runs.folder import RunFolder
from sparkmim.training.callbacks import Ema, Keeper, Monitor, Pictures
from sparkmim.training.loop import Plan, begun, fit, millions, plan_for, say_end, say_settings, settle_machine
from sparkmim.training.modules import OptimizerSettings, PretrainModule
from sparkmim.training.recipes import PAPER_DROP_PATH, recipe_named

log = logging.getLogger("sparkmim")

MAY_CHANGE = {
    "data", "out", "workers", "devices", "accelerator", "num_nodes", "save_minutes", "log_every",
    "picture_every", "max_unreadable", "resume", "init_weights",
}  # fmt: skip
"""Arguments that a resumed run may be given anew: they change no result."""


def run_pretraining(settings: dict[str, Any], given: Set[str], callbacks: Sequence[pl.Callback]) -> PretrainResult:
    """Runs `sparkmim.pretrain`.

    Args:
        settings: its arguments.
        given: names of those that are no defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    folder, main = RunFolder(settings["out"]), is_main_process()
    settings = begun(settings, given, folder, MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    settings = in_force(settings)

    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    if settings["init_weights"] and not settings["resume"]:
        open_weights(settings["init_weights"]).load_into(model)
    source = open_source(settings["data"], settings["channels"], len(model.image_size))
    dataset = build_dataset(settings, model, source)
    plan = plan_for(settings, batch_is_free, len(dataset))
    if settings["channels_last"] and len(model.image_size) == 2:
        model = model.to(memory_format=torch.channels_last)

    rate_scale = plan.batch_size / 256
    module = PretrainModule(
        model,
        OptimizerSettings(
            optimizer=settings["optimizer"],
            peak=settings["learning_rate"] * rate_scale,
            betas=(settings["beta1"], settings["beta2"]),
            weight_decay=settings["weight_decay"],
            weight_decay_end=settings["weight_decay_end"],
            clip_grad=settings["clip_grad"],
            steps=plan.steps,
            warmup=min(round(settings["warmup_epochs"] * plan.steps_per_epoch), plan.steps - 1),
        ),
        seed=settings["seed"],
    )

    skipped = SkipLog(settings["max_unreadable"], epoch_size=len(dataset))
    monitor = Monitor(
        plan.batch_size, plan.steps_per_epoch, settings["log_every"], folder.checkpoint, skipped,
        console if console.is_terminal and main else None,
    )  # fmt: skip
    ema = Ema(module, settings["ema"]) if settings["ema"] else None
    metadata = _metadata(settings, model)

    def write_weights(step: int) -> None:
        weights.save(model, folder.weights, replace(metadata, step=step))
        if ema is not None:
            weights.save(ema.average.module, folder.weights, replace(metadata, step=step), suffix="_ema")

    keeper = Keeper(folder, settings["save_minutes"], write_weights, monitor)
    every = [monitor, *([ema] if ema else []), *callbacks, keeper]
    if settings["picture_every"] and len(model.image_size) > 1:
        samples = [dataset[0, index] for index in range(min(6, len(dataset)))]
        tones = (None, None) if source.arrays else (settings["mean"], settings["std"])  # arrays are not in 0..1
        every.insert(0, Pictures(samples, settings["picture_every"] * plan.steps_per_epoch, *tones))

    trainer = fit(
        settings,
        module,
        dataset,
        plan,
        folder,
        every,
        lambda: say_settings(console, settings, _rows(settings, model, len(dataset), plan)),
    )
    result = PretrainResult(
        folder.path, trainer.global_step, plan.steps, monitor.epoch_loss, monitor.images_per_second, model.eval()
    )
    done = f"done: loss {result.loss:.4f}; weights in {folder.weights}"
    say_end(console, folder, trainer, plan, skipped, done)
    return result


def in_force(settings: dict[str, Any]) -> dict[str, Any]:
    """Fills what was left to the recipe and to the machine.

    Raises:
        ValueError: if a setting is out of its range.
    """
    settings = dict(settings)
    recipe = recipe_named(settings["recipe"])
    if settings["decoder"] == "fcmae" and settings["decoder_width"] is None:
        settings["decoder_width"] = DECODER_WIDTH["fcmae"]
    for name in (
        "epochs", "batch_size", "optimizer", "learning_rate", "warmup_epochs", "weight_decay", "weight_decay_end",
        "clip_grad", "mask_ratio", "decoder_width", "crop_scale",
    ):  # fmt: skip
        if settings[name] is None:
            settings[name] = getattr(recipe, name)
    if settings["drop_path"] is None and settings["recipe"].startswith("paper") and isinstance(settings["model"], str):
        settings["drop_path"] = PAPER_DROP_PATH.get(settings["model"])
    for name in ("mean", "std", "feature_modules"):
        if settings[name] is not None:
            settings[name] = list(settings[name])
    settle_machine(settings)
    settings["out"] = str(settings["out"])
    for name in ("data", "init_weights"):
        if isinstance(settings[name], Path):
            settings[name] = str(settings[name])
    for name in ("epochs", "batch_size", "learning_rate", "accumulate", "save_minutes", "log_every"):
        if settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}; it must be above 0")
    if settings["clip_grad"] < 0:
        raise UserError(f"clip_grad is {settings['clip_grad']}; it must be 0 (none) or more")
    if settings["optimizer"] not in ("lamb", "adamw"):
        raise UserError(f"there is no optimizer {settings['optimizer']!r}; choose lamb or adamw")
    for name in ("mean", "std"):
        if settings[name] is not None and len(settings[name]) != settings["channels"]:
            raise UserError(
                f"{name} has {len(settings[name])} value(s) for {settings['channels']} channel(s); `sparkmim "
                "statistics` measures them"
            )
    if settings["std"] is not None and min(settings["std"]) <= 0:
        raise UserError(f"std is {settings['std']}; all of its values must be above 0")
    sizes = settings["image_size"]
    if not isinstance(sizes, int) and not 1 <= len(sizes) <= 3:
        raise UserError(f"image_size is {list(sizes)}; give one number, or one per axis: 1, 2 or 3 of them")
    if settings["channels"] < 1:
        raise UserError(f"channels is {settings['channels']}; it must be above 0")
    if not 0 < settings["crop_scale"] <= 1:
        raise UserError(f"crop_scale is {settings['crop_scale']}; it is a share of the image, above 0 and at most 1")
    if settings["flip"] is not None and not 0 <= settings["flip"] <= 1:
        raise UserError(f"flip is {settings['flip']}; it is a probability between 0 and 1")
    if not 0 <= settings["ema"] < 1:
        raise UserError(f"ema is {settings['ema']}; it is a decay between 0 (off) and 1, such as 0.999")
    return settings


def build_model(settings: dict[str, Any]) -> SparK:
    """The model that settings in force describe; sets `beta2`, which depends on the network's norm."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, settings["channels"], settings["drop_path"])
    elif not isinstance(encoder, nn.Module):
        raise UserError(f"model is a {type(encoder).__name__}; pass a name or a torch.nn.Module")
    if settings["beta2"] is None:
        settings["beta2"] = recipe_named(settings["recipe"]).beta2[encoder_norm(encoder)]
    model = SparK(
        encoder,
        image_size=settings["image_size"],
        mask_ratio=settings["mask_ratio"],
        patch_size=settings["patch_size"],
        decoder_width=settings["decoder_width"],
        channels=settings["channels"],
        decoder=settings["decoder"],
        stages=settings["stages"],
        feature_modules=settings["feature_modules"],
    )
    settings["patch_size"] = model.patch_size
    settings["image_size"] = list(model.image_size)
    return model


def build_dataset(settings: dict[str, Any], model: SparK, source: Source) -> PretrainDataset:
    """Images with their masks; settles `mean`, `std` and `flip`, which depend on the data."""
    rank = len(model.image_size)
    if settings["mean"] is None or settings["std"] is None:
        if source.arrays:
            found = source.statistics()
            mean, std = found.mean, found.std
        else:
            mean, std = map(list, normalisation(settings["channels"]))
        settings["mean"] = settings["mean"] or mean
        settings["std"] = settings["std"] or std
    if settings["flip"] is None:
        settings["flip"] = 0.5 if rank == 2 else 0.0
    scale = (settings["crop_scale"], 1.0)
    transform: Any
    if source.arrays:
        transform = array_transform(model.image_size, settings["mean"], settings["std"], scale, settings["flip"])
    else:
        height, width = model.image_size
        transform = pretrain_transform((height, width), settings["mean"], settings["std"], scale, settings["flip"])
    return PretrainDataset(
        source.items, transform, model.grid, settings["mask_ratio"], settings["seed"], settings["channels"], source.read
    )


def _metadata(settings: dict[str, Any], model: SparK) -> WeightsMetadata:
    kept = ("decoder", "decoder_width", "stages", "feature_modules", "channels", "mean", "std")
    return WeightsMetadata(
        model=settings["model"] if isinstance(settings["model"], str) else None,
        image_size=list(model.image_size),
        patch_size=model.patch_size,
        mask_ratio=model.mask_ratio,
        **{name: settings[name] for name in kept},
    )


def _rows(settings: dict[str, Any], model: SparK, images: int, plan: Plan) -> dict[str, str]:
    """Settings in words."""
    rate = settings["learning_rate"]
    name = settings["model"] if isinstance(settings["model"], str) else type(settings["model"]).__name__
    side = "×".join(map(str, model.image_size))
    encoder, whole = millions(model.encoder), millions(model)
    return {
        "model": f"{name}, {encoder:.1f} M parameters (decoder {whole - encoder:.1f} M)",
        "data": f"{images:,} images at {side}, {'×'.join(map(str, model.grid))} patches of {model.patch_size}, "
        f"{settings['mask_ratio']:.0%} hidden",
        "length": f"{settings['epochs']:g} epochs × {plan.steps_per_epoch} steps of {settings['batch_size']} images, "
        f"{plan.steps:,} steps in all",
        "optimiser": f"{settings['optimizer']}, rate {rate:g} per 256 = {rate * settings['batch_size'] / 256:g}, "
        f"betas {settings['beta1']} {settings['beta2']}, decay {settings['weight_decay']} to "
        f"{settings['weight_decay_end']}, clip {settings['clip_grad'] or 'none'}",
    }
