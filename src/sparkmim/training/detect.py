"""Training detectors, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from sparkmim.data import IMAGENET_MEAN, IMAGENET_STD, TargetDataset
from sparkmim.data.coco import (
    CocoFiles,
    CocoImages,
    collate_detection,
    find_coco,
    open_coco,
)
from sparkmim.data.detection import detection_transform
from sparkmim.data.labelled import Part
from sparkmim.data.parts import find_part
from sparkmim.drawing.annotated import draw_detections
from sparkmim.errors import UserError
from sparkmim.evaluation.coco import CocoScores
from sparkmim.evaluation.detector import (
    coco_notes,
    predict_detections,
    run_detector,
    score_detections,
    score_detector,
)
from sparkmim.evaluation.trained import print_notes
from sparkmim.interop import weights
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.models import create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.results import DetectResult
from sparkmim.runs.folder import RunFolder
from sparkmim.training import downstream
from sparkmim.training.downstream import Scorer
from sparkmim.training.loop import Plan, begun, network_text, plan_for, settle_machine
from sparkmim.training.modules import DetectModule
from sparkmim.training.recipes import detect_recipe_named

MAY_CHANGE = downstream.MAY_CHANGE | {"annotations", "val_annotations"}
"""Arguments that a resumed run may be given anew: they change no result."""


def run_detection(settings: dict[str, Any], given: Set[str], callbacks: Sequence[pl.Callback]) -> DetectResult:
    """Runs `sparkmim.detect`.

    Args:
        settings: its arguments.
        given: names of those that are no defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    if settings["predict"] is not None:
        return predict_detections(**downstream.taken_by(predict_detections, settings))
    if settings["eval_only"]:
        return score_detector(**downstream.taken_by(score_detector, settings))
    settings = begun(settings, given, RunFolder(settings["out"]), MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_parts(settings)
    for part in (train, val):
        print_notes(console, coco_notes(part))
    val.take_categories(train.category_ids, train.classes, train.annotations)
    if settings["masks"] is None:
        settings["masks"] = train.has_masks

    torch.manual_seed(settings["seed"])
    model = build_model(settings, len(train.classes), start)
    transform = detection_transform(settings["short_sides"], settings["long_side"], settings["flip"], settings["crop"])
    dataset = TargetDataset(train, transform, settings["seed"])
    plan = plan_for(settings, batch_is_free, len(dataset))
    module = DetectModule(
        model,
        downstream.adamw(settings, plan),
        settings["seed"],
        settings["layer_decay"],
        settings["warmup_start"],
        settings["drops"],
        settings["drop_factor"],
    )
    backbone: Any = model.backbone
    backbone.low_precision = settings["precision"] == "bf16-mixed"
    scorer = DetectionScorer(val, settings["workers"])
    trainer = downstream.train_scored(
        console, settings, module, dataset, plan, scorer, weights.DETECTOR_FILE, _metadata(settings, train),
        _rows(settings, model, train, val, plan), callbacks, collate_detection, "32-true",
    )  # fmt: skip
    figures = {} if scorer.last is None else scorer.last.figures
    return DetectResult(Path(settings["out"]), trainer.global_step, plan.steps, figures, model.eval())


def in_force(settings: dict[str, Any], start: Weights | None) -> dict[str, Any]:
    """Fills what was left to the recipe, to the pretrained weights and to the machine.

    Raises:
        ValueError: if a setting is out of its range.
    """
    settings = dict(settings)
    downstream.fill_from_recipe(settings, detect_recipe_named(settings["recipe"]), start is None)
    for name in ("short_sides", "drops"):
        settings[name] = list(settings[name])
    downstream.fill_from_weights(settings, start, ("feature_modules", "mean", "std"))
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        settings[name] = list(settings[name] or usual)
        if len(settings[name]) != 3:
            raise UserError(f"{name} has {len(settings[name])} value(s); images for detection have 3 channels")
    settle_machine(settings)
    downstream.check_ranges(settings, ("long_side", "eval_short_side", "regions"))
    return settings


def open_parts(settings: dict[str, Any]) -> list[CocoImages]:
    """Images to train on, and to validate on.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    parts = []
    wanted: tuple[tuple[Part, str], ...] = ("train", ""), ("val", "val_")
    for part, prefix in wanted:
        named = {f"{prefix}{name}": settings[f"{prefix}{name}"] for name in ("annotations", "images")}
        parts.append(find_part(part, settings["data"], named, CocoFiles, find_coco))
    return [open_coco(*files, masks=settings["masks"]) for files in parts]


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> Any:
    """The detector that settings in force describe, with the pretrained encoder in it."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, 3, settings["drop_path"])
    if start is not None:
        start.load_into_encoder(encoder)
    detector: Any = create_detector(
        encoder, classes, settings["masks"], mean=settings["mean"], std=settings["std"], box_head=settings["box_head"],
        norm=settings["norm"], short_side=settings["eval_short_side"], long_side=settings["long_side"],
        feature_modules=settings["feature_modules"], box_batch_size_per_image=settings["regions"],
    )  # fmt: skip
    detector.backbone.freeze(settings["frozen_stages"])
    return detector


def _metadata(settings: dict[str, Any], train: CocoImages) -> dict[str, Any]:
    kept = ("masks", "mean", "std", "feature_modules", "box_head", "norm", "eval_short_side", "long_side")
    return {
        "task": "detection",
        "model": settings["model"] if isinstance(settings["model"], str) else None,
        "channels": 3,
        "classes": train.classes,
        "category_ids": train.category_ids,
        **{name: settings[name] for name in kept},
    }


# Validation


class DetectionScorer(Scorer[CocoScores]):
    """Scores a detector."""

    pictures = "detections"
    logged = ("bbox/AP", "segm/AP")
    read_back = CocoScores

    def __init__(self, images: CocoImages, workers: int) -> None:
        super().__init__()
        self.images, self.workers = images, workers

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[CocoScores, dict[str, Tensor]]:
        pictures: dict[str, Tensor] = {}

        def see(place: int, image: Tensor, output: dict[str, Tensor]) -> None:
            if len(pictures) < downstream.DRAWN and trainer.is_global_zero:
                pictures[self.images.path(place).name] = draw_detections(image, output, self.images.classes)

        own = range(trainer.global_rank, len(self.images), trainer.world_size)
        found = run_detector(model, self.images, own, self.workers, device, see)
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [detection for part in parts for detection in part]
        detector: Any = model
        return score_detections(self.images, found, bool(detector.roi_heads.has_mask())), pictures


def _rows(settings: dict[str, Any], model: nn.Module, train: CocoImages, val: CocoImages, plan: Plan) -> dict[str, str]:
    """Settings in words."""
    short = settings["short_sides"]
    return {
        "model": f"{'Mask' if settings['masks'] else 'Faster'} R-CNN on {network_text(settings, model)}; box head "
        f"{settings['box_head']}, norm {settings['norm']}",
        "data": f"{len(train):,} images of {len(train.classes)} classes, {len(val):,} for validation",
        "length": downstream.length_text(plan),
        "optimiser": downstream.optimizer_text(settings, plan),
        "sizes": f"shorter side {min(short)}…{max(short)}, longer at most {settings['long_side']}; validation "
        f"{settings['eval_short_side']}",
    }
