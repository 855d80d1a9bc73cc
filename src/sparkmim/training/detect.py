"""Training of detectors. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparkmim.data.coco import CocoFiles, CocoImages, find_coco, open_coco
from sparkmim.data.dataset import TargetDataset, collate_detection
from sparkmim.data.detection_transforms import detection_transform
from sparkmim.data.parts import find_part
from sparkmim.data.problems import counted, print_notes
from sparkmim.data.source import Source
from sparkmim.drawing.annotated import draw_detections
from sparkmim.errors import UserError
from sparkmim.evaluation.coco import CocoScores
from sparkmim.evaluation.detector import coco_notes, run_detector, score_detections
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import DETECTOR_FILE, Weights
from sparkmim.models.detector import create_detector
from sparkmim.models.encoders import create_encoder
from sparkmim.results import DetectResult
from sparkmim.terminal import Terminal
from sparkmim.training.fit import Prepared, Training, network_text, scored, train
from sparkmim.training.modules import DetectModule
from sparkmim.training.plan import Plan, plan_for
from sparkmim.training.recipes import DETECT_RECIPES, recipe_named
from sparkmim.training.scoring import DRAWN, Scorer, share_of
from sparkmim.training.settings import DetectSettings, downstream_recipe, known_of, picked, settle

CHANNELS = 3
"""Channels of the images that torchvision's detectors take."""


def run_detection(
    asked: Mapping[str, Any],
    given: frozenset[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
) -> DetectResult:
    """Runs `sparkmim.detect` where it trains; for the arguments, see `train`."""
    finished = train(Detection(), asked, given, callbacks, loggers, draw=scored)
    steps, model = finished.prepared.plan.steps, finished.model
    return DetectResult(finished.folder.path, finished.step, steps, finished.figures, model)


class Detection(Training[DetectSettings]):
    """Training of a Faster or Mask R-CNN."""

    kind = DetectSettings

    def settle(self, asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> DetectSettings:
        if start is not None and start.channels != CHANNELS:
            raise UserError(
                f"{start.path} takes images of {counted(start.channels, 'channel')}, but detectors take colour images; "
                f"pretrain with --channels {CHANNELS}, which repeats grey images"
            )
        recipe = downstream_recipe(asked, DETECT_RECIPES, start)
        known = known_of(asked, before, start)
        settings = settle(DetectSettings, asked, before, recipe, known)
        mean, std = Source((), False, CHANNELS, rank=2).normalisation(settings.mean, settings.std)
        return replace(settings, mean=mean, std=std)

    def prepare(
        self, settings: DetectSettings, batch_is_free: bool, start: Weights | None, console: Terminal
    ) -> Prepared[DetectSettings]:
        train_images, val_images = open_parts(settings)
        for part in (train_images, val_images):
            print_notes(console, coco_notes(part))
        val_images.take_categories(train_images.category_ids, train_images.classes, train_images.annotations)
        masks = train_images.has_masks if settings.masks is None else settings.masks
        settings = replace(settings, masks=masks)
        model = build_model(settings, len(train_images.classes), start)
        transform = detection_transform(settings.short_sides, settings.long_side, settings.flip, settings.crop)
        dataset = TargetDataset(train_images, transform, settings.seed)
        plan = plan_for(settings, batch_is_free, len(dataset), settings.iterations)
        usual = recipe_named(settings.recipe, DETECT_RECIPES).warmup_iterations
        settings = replace(settings, batch_size=plan.batch_size, warmup_iterations=plan.warmup(settings, usual))
        module = DetectModule(
            model,
            plan.adamw(settings),
            settings.seed,
            settings.layer_decay,
            settings.warmup_start,
            settings.drops,
            settings.drop_factor,
        )
        model.backbone.low_precision = settings.precision == "bf16-mixed"
        return Prepared(
            settings=settings,
            module=module,
            dataset=dataset,
            plan=plan,
            metadata=_metadata(settings, train_images),
            file=DETECTOR_FILE,
            rows=_rows(settings, model, train_images, val_images, plan),
            scorer=DetectionScorer(val_images, settings.workers),
            collate=collate_detection,
            precision="32-true",  # encoder and pyramid alone compute in bfloat16
        )


def open_parts(settings: DetectSettings) -> tuple[CocoImages, CocoImages]:
    """Opens the images to train on, and to validate on."""
    named = {"annotations": settings.annotations, "images": settings.images}
    val_named = {"val_annotations": settings.val_annotations, "val_images": settings.val_images}
    files = [
        find_part("train", settings.data, named, CocoFiles, find_coco),
        find_part("val", settings.data, val_named, CocoFiles, find_coco),
    ]
    train_images, val_images = (open_coco(*part, masks=settings.masks) for part in files)
    return train_images, val_images


def build_model(settings: DetectSettings, classes: int, start: Weights | None) -> Any:
    """Builds the detector, with the pretrained encoder in it."""
    encoder = create_encoder(settings.model, CHANNELS, settings.drop_path)
    detector: Any = create_detector(
        encoder, classes, bool(settings.masks), mean=settings.mean, std=settings.std, box_head=settings.box_head,
        norm=settings.norm, short_side=settings.eval_short_side, long_side=settings.long_side,
        feature_modules=settings.feature_modules, box_batch_size_per_image=settings.regions,
    )  # fmt: skip
    if start is not None:
        start.load_into_encoder(encoder, detector.backbone.hierarchy)
    detector.backbone.freeze(settings.frozen_stages)
    return detector


class DetectionScorer(Scorer[CocoScores]):
    """Scores a detector.

    Args:
        images: validation images.
        workers: loader processes.
    """

    def __init__(self, images: CocoImages, workers: int) -> None:
        super().__init__(CocoScores)
        self.images, self.workers = images, workers

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[CocoScores, dict[str, Tensor]]:
        pictures: dict[str, Tensor] = {}

        def see(place: int, image: Tensor, output: dict[str, Tensor]) -> None:
            if len(pictures) < DRAWN and trainer.is_global_zero:
                name = f"detections/{self.images.path(place).name}"
                pictures[name] = draw_detections(image, output, self.images.classes)

        own = share_of(trainer, self.images)
        found = run_detector(model, self.images, own, self.workers, device, see, self.complain)
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [detection for part in parts for detection in part]
        detector: Any = model
        return score_detections(self.images, found, bool(detector.roi_heads.has_mask())), pictures


def _metadata(settings: DetectSettings, images: CocoImages) -> WeightsMetadata:
    kept = picked(
        settings, "masks", "mean", "std", "feature_modules", "box_head", "norm", "eval_short_side", "long_side"
    )
    return WeightsMetadata(
        task="detection",
        model=settings.model_name,
        channels=CHANNELS,
        classes=images.classes,
        category_ids=images.category_ids,
        **kept,
    )


def _rows(
    settings: DetectSettings, model: nn.Module, train_images: CocoImages, val_images: CocoImages, plan: Plan
) -> dict[str, str]:
    """Returns settings in words."""
    short = settings.short_sides
    return {
        "model": f"{'Mask' if settings.masks else 'Faster'} R-CNN on {network_text(settings, model)}; box head "
        f"{settings.box_head}, norm {settings.norm}",
        "data": f"{len(train_images):,} images of {len(train_images.classes)} classes, {len(val_images):,} for "
        "validation",
        "length": str(plan),
        "optimiser": plan.adamw_text(settings),
        "sizes": f"shorter side {min(short)}…{max(short)}, longer at most {settings.long_side}; validation "
        f"{settings.eval_short_side}",
    }
