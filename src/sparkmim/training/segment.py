"""Training of segmenters. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparkmim.data.dataset import TargetDataset
from sparkmim.data.label_maps import SegmentationFiles, SegmentationImages, find_segmentation, open_segmentation
from sparkmim.data.parts import find_part
from sparkmim.data.segmentation_transforms import segmentation_resize, segmentation_transform
from sparkmim.drawing.annotated import draw_classes, side_by_side, with_legend
from sparkmim.errors import UserError
from sparkmim.evaluation.segmentation import SegmentationScores, evaluate_segmentation
from sparkmim.evaluation.segmenter import checked_classes, class_names, run_segmenter, tones_of
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import SEGMENTER_FILE, Weights
from sparkmim.models.encoders import create_encoder
from sparkmim.models.segmenter import Segmenter, create_segmenter
from sparkmim.results import SegmentResult
from sparkmim.terminal import Terminal
from sparkmim.training.fit import Prepared, Training, network_text, scored, train
from sparkmim.training.modules import SegmentModule
from sparkmim.training.plan import Plan, plan_for
from sparkmim.training.recipes import SEGMENT_RECIPES, recipe_named
from sparkmim.training.scoring import DRAWN, Scorer, share_of
from sparkmim.training.settings import SegmentSettings, downstream_recipe, known_of, picked, settle


def run_segmentation(
    asked: Mapping[str, Any],
    given: frozenset[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
) -> SegmentResult:
    """Runs `sparkmim.segment` where it trains; for the arguments, see `train`."""
    finished = train(Segmentation(), asked, given, callbacks, loggers, draw=scored)
    steps, model = finished.prepared.plan.steps, finished.model
    return SegmentResult(finished.folder.path, finished.step, steps, finished.figures, model)


class Segmentation(Training[SegmentSettings]):
    """Training of a pyramid with Panoptic FPN's head."""

    kind = SegmentSettings

    def settle(self, asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> SegmentSettings:
        recipe = downstream_recipe(asked, SEGMENT_RECIPES, start)
        known = known_of(asked, before, start)
        return settle(SegmentSettings, asked, before, recipe, known, {"channels": 3, "ignore": 255})

    def prepare(
        self, settings: SegmentSettings, batch_is_free: bool, start: Weights | None, console: Terminal
    ) -> Prepared[SegmentSettings]:
        train_images, val_images = open_parts(settings)
        named = class_names(settings.data, settings.classes)
        classes = checked_classes(console, [train_images, val_images], named)
        mean, std = train_images.source.normalisation(settings.mean, settings.std)
        settings = replace(settings, mean=mean, std=std)
        model = build_model(settings, len(classes), start)
        transform = segmentation_transform(
            settings.short_side, settings.crop, mean, std, settings.flip, settings.jitter, train_images.arrays
        )
        dataset = TargetDataset(train_images, transform, settings.seed)
        plan = plan_for(settings, batch_is_free, len(dataset), settings.iterations)
        usual = recipe_named(settings.recipe, SEGMENT_RECIPES).warmup_iterations
        settings = replace(settings, batch_size=plan.batch_size, warmup_iterations=plan.warmup(settings, usual))
        return Prepared(
            settings=settings,
            module=SegmentModule(model, plan.adamw(settings), settings.seed, settings.layer_decay, settings.schedule),
            dataset=dataset,
            plan=plan,
            metadata=_metadata(settings, classes, train_images.label_values),
            file=SEGMENTER_FILE,
            rows=_rows(settings, model, train_images, val_images, classes, plan),
            scorer=SegmentationScorer(val_images, classes, settings),
        )


def open_parts(settings: SegmentSettings) -> tuple[SegmentationImages, SegmentationImages]:
    """Opens the images to train on, and to validate on."""
    named = {"images": settings.images, "labels": settings.labels}
    val_named = {"val_images": settings.val_images, "val_labels": settings.val_labels}
    files = [find_part("train", settings.data, named, SegmentationFiles, find_segmentation)]
    try:
        files.append(find_part("val", settings.data, val_named, SegmentationFiles, find_segmentation))
    except UserError:
        if settings.val_split is None or any(val_named.values()):
            raise
    channels, ignore, reduced = settings.channels, settings.ignore, settings.reduce_labels
    train_images, *others = (open_segmentation(*part, channels, ignore, reduced) for part in files)
    if settings.val_split is None:
        return train_images, others[0]
    if others:
        raise UserError("val_split was given, but there are validation images already; leave it out")
    return train_images.split(settings.val_split, settings.seed)


def build_model(settings: SegmentSettings, classes: int, start: Weights | None) -> Segmenter:
    """Builds the segmenter, with the pretrained encoder in it."""
    encoder = create_encoder(settings.model, settings.channels, settings.drop_path)
    segmenter = create_segmenter(
        encoder, classes, settings.channels, settings.norm, [settings.crop] * 2, settings.feature_modules
    )
    if start is not None:
        start.load_into_encoder(encoder, segmenter.backbone.hierarchy)
    segmenter.backbone.freeze(settings.frozen_stages)
    return segmenter


class SegmentationScorer(Scorer[SegmentationScores]):
    """Scores a segmenter.

    Args:
        images: validation images.
        classes: names.
        settings: of the training.
    """

    def __init__(self, images: SegmentationImages, classes: Sequence[str], settings: SegmentSettings) -> None:
        super().__init__(SegmentationScores)
        self.images, self.classes, self.settings = images, classes, settings

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[SegmentationScores, dict[str, Tensor]]:
        pictures: dict[str, Tensor] = {}
        settings = self.settings
        mean, std = settings.mean, settings.std
        assert mean is not None
        assert std is not None
        tones = tones_of(settings.channels, mean, std, self.images.arrays)

        def see(place: int, image: Tensor, found: Tensor, truth: Tensor) -> None:
            if len(pictures) < DRAWN and trainer.is_global_zero:
                pixels = tones(image[None])[0]  # [3, h, w]
                maps = [_at_size(labels, pixels) for labels in (truth, found)]
                drawn = [(255 * pixels).round().to(torch.uint8), *(draw_classes(pixels, labels) for labels in maps)]
                name = f"image, truth, prediction/{self.images.name(place)}"
                pictures[name] = with_legend(side_by_side(drawn), maps, self.classes)

        maps = run_segmenter(
            model, self.images, share_of(trainer, self.images),
            segmentation_resize(settings.eval_short_side, mean, std), settings.workers, device,
            settings.precision == "bf16-mixed", see, self.complain,
        )  # fmt: skip
        return evaluate_segmentation(maps, self.classes, device), pictures


def _at_size(labels: Tensor, picture: Tensor) -> Tensor:
    """Resizes a label map `[H, W]` to the size of a picture `[C, h, w]`."""
    return nn.functional.interpolate(labels[None, None].float(), picture.shape[1:], mode="nearest-exact")[0, 0].long()


def _metadata(settings: SegmentSettings, classes: list[str], label_values: Sequence[int] | None) -> WeightsMetadata:
    kept = picked(
        settings, "channels", "mean", "std", "feature_modules", "norm", "eval_short_side", "ignore", "reduce_labels"
    )
    return WeightsMetadata(
        task="segmentation",
        model=settings.model_name,
        image_size=[settings.crop] * 2,
        classes=classes,
        label_values=label_values,
        **kept,
    )


def _rows(
    settings: SegmentSettings, model: nn.Module, train_images: SegmentationImages, val_images: SegmentationImages,
    classes: Sequence[str], plan: Plan,
) -> dict[str, str]:  # fmt: skip
    """Returns settings in words."""
    return {
        "model": f"Panoptic FPN's head on {network_text(settings, model)}; norm {settings.norm}",
        "data": f"{len(train_images):,} images of {len(classes)} classes, {len(val_images):,} for validation",
        "length": str(plan),
        "optimiser": f"{plan.adamw_text(settings)}, then {settings.schedule}",
        "sizes": f"shorter side 0.5 to 2 times {settings.short_side}, crops of {settings.crop}; validation "
        f"{settings.eval_short_side}",
    }
