"""Training detectors, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from sparkmim.data import IMAGENET_MEAN, IMAGENET_STD, TargetDataset
from sparkmim.data.coco import (
    CocoFiles,
    CocoImages,
    check_coco,
    collate_detection,
    find_coco,
    open_coco,
)
from sparkmim.data.detection import detection_resize, detection_transform
from sparkmim.data.labelled import Part
from sparkmim.data.loading import one_by_one
from sparkmim.drawing.annotated import SURE, draw_detections
from sparkmim.errors import UserError
from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco, mask_at
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.models import create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.models.encoders import own_module
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
        return predict_detections(settings, console)
    if settings["eval_only"]:
        return score_detector(settings, console)
    settings = begun(settings, given, RunFolder(settings["out"]), MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_parts(settings)
    for part in (train, val):
        downstream.say_notes(console, _notes(part))
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


def open_parts(settings: dict[str, Any], wanted: Sequence[Part] = ("train", "val")) -> list[CocoImages]:
    """Images to train on, and to validate on.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    parts = downstream.parts_named(settings, CocoFiles, ("annotations", "images"), find_coco, wanted)
    return [open_coco(*files, masks=settings["masks"]) for files in parts]


def _notes(images: CocoImages) -> list[str]:
    """What is worth knowing of images that nothing is wrong with."""
    return [f"{images.annotations.name}: {note}" for note in check_coco(images)]


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> Any:
    """The detector that settings in force describe, with the pretrained encoder in it."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, 3, settings["drop_path"])
    detector: Any = create_detector(
        encoder, classes, settings["masks"], mean=settings["mean"], std=settings["std"], box_head=settings["box_head"],
        norm=settings["norm"], short_side=settings["eval_short_side"], long_side=settings["long_side"],
        feature_modules=settings["feature_modules"], box_batch_size_per_image=settings["regions"],
    )  # fmt: skip
    if start is not None:
        start.load_into_encoder(encoder, detector.backbone.hierarchy)
    detector.backbone.freeze(settings["frozen_stages"])
    return detector


def _metadata(settings: dict[str, Any], train: CocoImages) -> WeightsMetadata:
    kept = ("masks", "mean", "std", "feature_modules", "box_head", "norm", "eval_short_side", "long_side")
    return WeightsMetadata(
        task="detection",
        model=settings["model"] if isinstance(settings["model"], str) else None,
        channels=3,
        classes=train.classes,
        category_ids=train.category_ids,
        **{name: settings[name] for name in kept},
    )


# Validation


def _resizing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """To the size that a detector evaluates at, which its own resizing then leaves: that one does not filter."""
    prepares: Any = model.transform
    return detection_resize(prepares.min_size[0], prepares.max_size)


class _Seen(torch.utils.data.Dataset[Any]):
    """Images as a detector sees them, and the sizes that they had."""

    def __init__(self, images: CocoImages, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int]]:
        image = self.images.read(place)
        return self.transform(image), (int(image.shape[1]), int(image.shape[2]))


@torch.no_grad()
def detections_of(
    model: nn.Module, images: CocoImages, places: Sequence[int], workers: int, device: torch.device,
    see: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a detector finds on images, in COCO's result format; unreadable images are logged.

    Args:
        model: of `create_detector`; in evaluation mode for the call.
        images: to look at.
        places: which of them.
        workers: loader processes.
        device: of the model.
        see: given the place, the image `[3, H, W]`, and torchvision's output.
    """
    training = model.training
    model.eval()
    found: list[dict[str, Any]] = []
    try:
        for place, (image, size) in one_by_one(_Seen(images, _resizing(model)), places, workers):
            (output,) = model([image.to(device)])
            seen = (int(image.shape[1]), int(image.shape[2]))
            found += coco_results(output, int(images.image_ids[place]), size, seen, images.category_ids)
            if see is not None:
                see(place, image, output)
    finally:
        model.train(training)
    return found


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
        found = detections_of(model, self.images, own, self.workers, device, see)
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [detection for part in parts for detection in part]
        detector: Any = model
        return _scores_of(self.images, found, bool(detector.roi_heads.has_mask())), pictures


def _scores_of(images: CocoImages, found: list[dict[str, Any]], masks: bool) -> CocoScores:
    """Of boxes and, where detector and images have them, masks."""
    return evaluate_coco(images.annotations, found, ("bbox", "segm") if masks and images.has_masks else ("bbox",))


# Using a detector


def opened(settings: dict[str, Any]) -> tuple[Any, Weights, dict[str, Any], torch.device, Path]:
    """The detector, its weights, settings in force, the device, and the folder to write into.

    Raises:
        ValueError: if masks are asked of a detector that has none.
    """
    found, device, out = downstream.opened_for_use(settings, "detector")
    model: Any = found.detector(own_module(settings["model"])).to(device)
    if settings["masks"] and not found.metadata.masks:
        raise UserError(f"{found.path} finds boxes alone; leave out --masks")
    settings = dict(settings)
    downstream.fill_from_weights(settings, found, ("mean", "std", "eval_short_side", "long_side"))
    settle_machine(settings)
    prepares = model.transform
    prepares.min_size, prepares.max_size = (settings["eval_short_side"],), settings["long_side"]
    prepares.image_mean, prepares.image_std = list(settings["mean"]), list(settings["std"])
    model.backbone.low_precision = settings["precision"] == "bf16-mixed"
    if settings["masks"] is False:
        model.roi_heads.mask_predictor = None  # and so the others are not called
    return model, found, settings, device, out


def score_detector(settings: dict[str, Any], console: Console) -> DetectResult:
    """Scores a detector on the validation images; writes `metrics.json` and `detections.json`."""
    model, detector_weights, settings, device, out = opened(settings)
    masks = bool(model.roi_heads.has_mask())
    (val,) = open_parts({**settings, "masks": None if masks else False}, ("val",))
    downstream.say_notes(console, _notes(val))
    known = detector_weights.metadata
    val.take_categories(list(known.category_ids or ()), list(known.classes or ()), detector_weights.path)
    found = detections_of(model, val, range(len(val)), settings["workers"], device)
    scores = _scores_of(val, found, masks)
    downstream.say_scores(console, out, scores)
    (out / "detections.json").write_text(json.dumps(found) + "\n")
    return DetectResult(out, 0, 0, scores.figures, model)


@torch.no_grad()
def predict_detections(settings: dict[str, Any], console: Console) -> DetectResult:
    """Draws what a detector finds on images, and lists it in COCO's format in `detections.json`."""
    model, detector_weights, settings, device, out = opened(settings)
    known = detector_weights.metadata
    category_ids, classes = list(known.category_ids or ()), list(known.classes or ())
    transform = _resizing(model)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, path, image in downstream.images_read(console, settings["predict"], known.channels):
        size = (int(image.shape[1]), int(image.shape[2]))
        seen = transform(image)  # [3, h, w]
        (output,) = model([seen.to(device)])
        number = len(records) + 1
        records.append({"id": number, "file_name": path, "height": size[0], "width": size[1]})
        annotations += coco_results(output, number, size, (int(seen.shape[1]), int(seen.shape[2])), category_ids)
        picture = draw_detections(image / 255, _at_size(output, seen, size), classes)  # [3, H, W]
        out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / f"{name}.jpg", quality=92)
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)]
    content = {"images": records, "categories": categories, "annotations": annotations}
    (out / "detections.json").write_text(json.dumps(content) + "\n")
    sure = sum(annotation["score"] > SURE for annotation in annotations)
    console.print(f"{len(records):,} images, {sure:,} detections above {SURE:.0%}: {out}", markup=False)
    return DetectResult(out, 0, 0, {}, model)


def _at_size(output: dict[str, Tensor], seen: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """What was found on an image as it was seen, `[3, h, w]`, on that image at its own size; only what is drawn."""
    sure = output["scores"] > SURE
    scale = output["boxes"].new_tensor([size[1] / seen.shape[2], size[0] / seen.shape[1]] * 2)
    found = {name: output[name][sure] for name in output}
    found["boxes"] = found["boxes"] * scale
    if "masks" in found and len(found["masks"]):
        found["masks"] = torch.stack([mask_at(mask, size)[None] for mask in found["masks"]])  # bool [n, 1, H, W]
    return found


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
