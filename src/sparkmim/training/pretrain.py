"""Pretraining. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparkmim.data.arrays import WholeArray, array_transform
from sparkmim.data.augmentation import eval_transform, pretrain_transform
from sparkmim.data.dataset import HeldOutDataset, PretrainDataset
from sparkmim.data.held_out import hold_out, names_of
from sparkmim.data.inference import CROP, Preparation
from sparkmim.data.problems import counted
from sparkmim.data.source import open_source
from sparkmim.errors import UserError
from sparkmim.evaluation.reconstruction import ReconstructionScores, score_reconstruction
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights
from sparkmim.machine import check_compiles
from sparkmim.models.encoders import create_encoder
from sparkmim.models.spark import DECODER_WIDTH, SparK, encoder_norm
from sparkmim.results import PretrainResult
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.history import History
from sparkmim.terminal import Terminal
from sparkmim.training.callbacks import Pictures
from sparkmim.training.fit import Prepared, Training, millions, train
from sparkmim.training.modules import PretrainModule
from sparkmim.training.plan import Plan, plan_for
from sparkmim.training.probing import Probe
from sparkmim.training.recipes import PAPER_DROP_PATH, PRETRAIN_RECIPES, recipe_named
from sparkmim.training.scoring import ImageScorer
from sparkmim.training.settings import PretrainSettings, picked, settle

SHOWN = 6
"""Number of training images whose reconstructions are drawn."""


def run_pretraining(
    asked: Mapping[str, Any],
    given: frozenset[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
) -> PretrainResult:
    """Runs `sparkmim.pretrain`; for the arguments, see `train`."""
    finished = train(
        Pretraining(), asked, given, callbacks, loggers,
        draw=lambda run: [f"done: loss {run.monitor.epoch_loss:.4f}; weights in {run.folder.weights}"],
    )  # fmt: skip
    monitor = finished.monitor
    return PretrainResult(
        finished.folder.path, finished.step, finished.prepared.plan.steps, monitor.epoch_loss,
        monitor.images_per_second, finished.model,
    )  # fmt: skip


class Pretraining(Training[PretrainSettings]):
    """Masked image modelling with `SparK`."""

    kind = PretrainSettings

    def settle(self, asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> PretrainSettings:
        recipe: dict[str, Any] = asdict(recipe_named(asked["recipe"], PRETRAIN_RECIPES))
        del recipe["beta2"]  # depends on the network's norm
        if asked["decoder"] == "fcmae":
            recipe["decoder_width"] = DECODER_WIDTH["fcmae"]
        if asked["recipe"].startswith("paper") and isinstance(asked["model"], str):
            recipe["drop_path"] = PAPER_DROP_PATH.get(asked["model"])
        whole = {"val_split": 0.0} if before else {}  # of a run from before images were set apart
        settings = settle(PretrainSettings, asked, before, recipe, whole)
        if not isinstance(settings.model, str | nn.Module):
            raise UserError(f"model is a {type(settings.model).__name__}; pass a name or a torch.nn.Module")
        return settings

    def prepare(
        self, settings: PretrainSettings, batch_is_free: bool, start: Weights | None, console: Terminal
    ) -> Prepared[PretrainSettings]:
        if settings.compile:
            check_compiles(settings.accelerator)
        model, settings = build_model(settings)
        if start is not None:
            start.load_into(model)
        dataset, held_out, settings, arrays = build_datasets(settings, model)
        views = 2 if settings.contrast else 1
        plan = plan_for(settings, batch_is_free, len(dataset), views=views)
        settings = replace(settings, batch_size=plan.batch_size)
        if settings.channels_last and len(model.image_size) == 2:
            model = model.to(memory_format=torch.channels_last)
        assert settings.beta2 is not None
        optimizer = plan.optimizer(
            settings, 256, settings.warmup_epochs * plan.steps_per_epoch, settings.optimizer,
            (settings.beta1, settings.beta2), settings.weight_decay_end,
        )  # fmt: skip

        def pictures(history: History, folder: RunFolder) -> Pictures:
            samples = [dataset[0, index] for index in range(min(SHOWN, len(dataset)))]
            tones = (None, None) if arrays else (settings.mean, settings.std)  # arrays are not in 0..1
            return Pictures(history, folder, samples, settings.picture_every * plan.steps_per_epoch, *tones)

        probe = build_probe(settings, model, plan)
        if settings.keep_best == "probe" and probe is None:
            raise UserError("keep_best is probe, but there is none; name labelled images with --probe")
        if settings.keep_best == "val_loss" and held_out is None:
            raise UserError("keep_best is val_loss, but no images are held out; name some with --val-data")
        batch = 2 * plan.batch_size // (plan.parts * plan.world_size)
        return Prepared(
            settings=settings,
            module=PretrainModule(model, optimizer, settings.seed, settings.compile, settings.contrast),
            dataset=dataset,
            plan=plan,
            metadata=_metadata(settings, model),
            rows={
                **_rows(settings, model, len(dataset), len(held_out or ()), plan),
                **({} if probe is None else {"probe": str(probe)}),
            },
            scorer=None if held_out is None else ReconstructionScorer(held_out, batch, settings),
            probe=probe,
            keep_best=settings.keep_best == "probe",
            pictures=pictures if settings.picture_every and len(model.image_size) > 1 else None,
            repeats=views,
        )


def build_model(settings: PretrainSettings) -> tuple[SparK, PretrainSettings]:
    """Builds the model, and settles `beta2`, which depends on the network's norm, and sizes."""
    encoder = create_encoder(settings.model, settings.channels, settings.drop_path)
    recipe = recipe_named(settings.recipe, PRETRAIN_RECIPES)
    beta2 = recipe.beta2[encoder_norm(encoder)] if settings.beta2 is None else settings.beta2
    model = SparK(
        encoder,
        image_size=settings.image_size,
        mask_ratio=settings.mask_ratio,
        patch_size=settings.patch_size,
        decoder_width=settings.decoder_width,
        channels=settings.channels,
        decoder=settings.decoder,
        stages=settings.stages,
        feature_modules=settings.feature_modules,
        checkpoint_gradients=settings.checkpoint_gradients,
    )
    return model, replace(settings, beta2=beta2, patch_size=model.patch_size, image_size=list(model.image_size))


def build_datasets(
    settings: PretrainSettings, model: SparK
) -> tuple[PretrainDataset, HeldOutDataset | None, PretrainSettings, bool]:
    """Opens the data, and sets images apart.

    Returns:
        Training images; those to validate on, if any; settings with what the data decide; whether they are arrays.
    """
    size = model.image_size
    source = open_source(settings.data, settings.channels, len(size))
    names = names_of(source.items, settings.data)
    if settings.val_data is None:
        items, held, held_names = hold_out(source.items, names, settings.val_split)
        settings = replace(settings, val_split=len(held_names) / len(names))
    else:
        if settings.val_split:
            raise UserError("val_data and val_split both say what to validate on; give one")
        items, held = source.items, open_source(settings.val_data, settings.channels, len(size)).items
        held_names = names_of(held, settings.val_data)
    source.say_loss(size)
    mean, std = source.normalisation(settings.mean, settings.std)
    flip = settings.flip if settings.flip is not None else 0.5 if len(size) == 2 else 0.0
    settings = replace(settings, mean=mean, std=std, flip=flip)
    scale = (settings.crop_scale, 1.0)
    transform: Any
    whole: Any
    if source.arrays:
        if settings.jitter:
            raise UserError(f"jitter is {settings.jitter}, but arrays have no colours; use --jitter 0")
        transform, whole = array_transform(size, mean, std, scale, flip), WholeArray(size, mean, std)
    else:
        side = (size[0], size[1])
        transform = pretrain_transform(side, mean, std, scale, flip, settings.jitter)
        whole = eval_transform(side, mean, std, 1.0)
    rest = model.grid, settings.mask_ratio, settings.seed, settings.channels, source.read
    validation = HeldOutDataset(held, whole, *rest, names=held_names) if held_names else None
    return PretrainDataset(items, transform, *rest), validation, settings, source.arrays


def build_probe(settings: PretrainSettings, model: SparK, plan: Plan) -> Probe | None:
    """Opens the labelled images of the probe, if there is one."""
    if settings.probe is None:
        return None
    every = settings.probe_every
    steps = None if every is None else max(1, round(every * plan.steps_per_epoch))
    seen = Preparation(model.image_size, settings.channels, settings.mean, settings.std, CROP)
    return Probe(settings.probe, seen, steps, settings.seed)


class ReconstructionScorer(ImageScorer[ReconstructionScores]):
    """Computes the loss of a `SparK` model, and of its average, on images that it is not trained on."""

    scores_start = True

    def __init__(self, dataset: HeldOutDataset, batch_size: int, settings: PretrainSettings) -> None:
        super().__init__(ReconstructionScores, dataset, batch_size, settings.workers)
        self.keeps_best = settings.keep_best == "val_loss"
        self.floor = -math.inf

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[ReconstructionScores, dict[str, Tensor]]:
        assert isinstance(model, SparK)
        precision = trainer.precision_plugin.forward_context
        return score_reconstruction(model, self.batches(trainer), device, precision), {}


def _metadata(settings: PretrainSettings, model: SparK) -> WeightsMetadata:
    kept = picked(settings, "decoder", "decoder_width", "stages", "feature_modules", "channels", "mean", "std")
    return WeightsMetadata(
        model=settings.model_name,
        image_size=list(model.image_size),
        patch_size=model.patch_size,
        mask_ratio=model.mask_ratio,
        **kept,
    )


def _rows(settings: PretrainSettings, model: SparK, images: int, held_out: int, plan: Plan) -> dict[str, str]:
    """Returns settings in words."""
    rate = settings.learning_rate
    name = settings.model_name or type(settings.model).__name__
    side = "×".join(map(str, model.image_size))
    encoder, whole = millions(model.encoder), millions(model)
    batch = counted(plan.batch_size, "image")
    if settings.contrast:
        batch = f"2 views of {counted(plan.batch_size // 2, 'image')}"
    return {
        "model": f"{name}, {encoder:.1f} M parameters (decoder {whole - encoder:.1f} M)",
        "data": f"{counted(images, 'image')} at {side}, {'×'.join(map(str, model.grid))} patches of "
        f"{model.patch_size}, {settings.mask_ratio:.0%} hidden",
        **({"held out": f"{counted(held_out, 'image')} to validate on"} if held_out else {}),
        "loss": "1 is the best constant guess, the mean of each patch",
        **({"contrast": f"a contrastive loss of two views, times {settings.contrast:g}"} if settings.contrast else {}),
        "length": f"{settings.epochs:g} epochs × {counted(plan.steps_per_epoch, 'step')} of {batch}, "
        f"{counted(plan.steps, 'step')} in all",
        "optimiser": f"{settings.optimizer}, rate {rate:g} per 256 = {rate * plan.batch_size / 256:g}, betas "
        f"{settings.beta1} {settings.beta2}, decay {settings.weight_decay} to {settings.weight_decay_end}, clip "
        f"{settings.clip_grad or 'none'}",
    }
