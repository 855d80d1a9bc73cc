"""Scoring and using trained detectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from sparkmim.data.coco import CocoFiles, CocoImages, check_coco, find_coco, open_coco
from sparkmim.data.detection_transforms import detection_resize
from sparkmim.data.loading import one_by_one
from sparkmim.data.parts import find_part
from sparkmim.data.problems import counted
from sparkmim.drawing.annotated import SURE, draw_detections
from sparkmim.errors import UserError
from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco, mask_at
from sparkmim.evaluation.trained import (
    in_bfloat16,
    open_trained,
    print_notes,
    read_images,
    report_scores,
    worker_count,
)
from sparkmim.files import replacing
from sparkmim.interop.weights import Weights
from sparkmim.models.encoders import own_module
from sparkmim.results import DetectResult


def score_detector(
    *,
    weights: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images: str | Path | None = None,
    model: str | nn.Module | None = None,
    masks: bool | None = None,
    eval_short_side: int | None = None,
    long_side: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    accelerator: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
) -> DetectResult:
    """Scores a detector on the validation images; writes `metrics.json` and `detections.json`.

    Arguments are those of `sparkmim.detect` with `eval_only`.
    """
    detector, opened, device = open_detector(
        weights, out, model, masks, eval_short_side, long_side, mean, std, accelerator, precision
    )
    console, out = Console(stderr=True), Path(out)
    known: Any = opened.metadata  # complete, or the file would have been refused
    with_masks = bool(detector.roi_heads.has_mask())
    named = {"val_annotations": val_annotations, "val_images": val_images}
    images = open_coco(*find_part("val", data, named, CocoFiles, find_coco), masks=None if with_masks else False)
    print_notes(console, coco_notes(images))
    images.take_categories(known.category_ids, known.classes, opened.path)
    found = run_detector(detector, images, range(len(images)), worker_count(workers, device), device)
    scores = score_detections(images, found, with_masks)
    report_scores(console, out, scores)
    _write_json(out, found)
    return DetectResult(out, 0, 0, scores.figures, detector)


@torch.no_grad()
def predict_detections(
    *,
    weights: str | Path,
    out: str | Path,
    predict: Any,
    model: str | nn.Module | None = None,
    masks: bool | None = None,
    eval_short_side: int | None = None,
    long_side: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    accelerator: str = "auto",
    precision: str = "auto",
) -> DetectResult:
    """Draws detections on images, and lists them in COCO's format in `detections.json`.

    Arguments are those of `sparkmim.detect` with `predict`.
    """
    detector, opened, device = open_detector(
        weights, out, model, masks, eval_short_side, long_side, mean, std, accelerator, precision
    )
    console, out = Console(stderr=True), Path(out)
    known: Any = opened.metadata  # complete, or the file would have been refused
    classes, category_ids = known.classes, known.category_ids
    resize = _resize_for(detector)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, path, image in read_images(console, predict, opened.channels):
        size = (int(image.shape[1]), int(image.shape[2]))
        seen = resize(image)  # [3, h, w]
        (output,) = detector([seen.to(device)])
        number = len(records) + 1
        records.append({"id": number, "file_name": path, "height": size[0], "width": size[1]})
        annotations += coco_results(output, number, size, (int(seen.shape[1]), int(seen.shape[2])), category_ids)
        picture = draw_detections(image / 255, _drawn_at(output, seen, size), classes)  # [3, H, W]
        out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / f"{name}.jpg", quality=92)
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)]
    _write_json(out, {"images": records, "categories": categories, "annotations": annotations})
    sure = sum(annotation["score"] > SURE for annotation in annotations)
    console.print(
        f"{counted(len(records), 'image')}, {counted(sure, 'detection')} above {SURE:.0%}: {out}", markup=False
    )
    return DetectResult(out, 0, 0, {}, detector)


def open_detector(
    weights: str | Path, out: str | Path, model: str | nn.Module | None, masks: bool | None,
    eval_short_side: int | None, long_side: int | None, mean: Sequence[float] | None, std: Sequence[float] | None,
    accelerator: str, precision: str,
) -> tuple[Any, Weights, torch.device]:  # fmt: skip
    """Builds the detector in a weight file; arguments left at None are taken from the file.

    Raises:
        UserError: if masks are wanted from a detector that has none.
    """
    opened, device = open_trained(weights, "detector", out, accelerator)
    known: Any = opened.metadata  # complete, or the file would have been refused
    detector: Any = opened.detector(own_module(model)).to(device)
    if masks and not known.masks:
        raise UserError(f"{opened.path} finds boxes alone; leave out --masks")
    transform = detector.transform
    transform.min_size = (eval_short_side or known.eval_short_side,)
    transform.max_size = long_side or known.long_side
    transform.image_mean, transform.image_std = list(mean or known.mean), list(std or known.std)
    detector.backbone.low_precision = in_bfloat16(precision, device)
    if masks is False:
        detector.roi_heads.mask_predictor = None  # `has_mask` is then false, and no part of the mask branch runs
    return detector, opened, device


class _Resized(torch.utils.data.Dataset[Any]):
    """Images resized for a detector, each with its original height and width."""

    def __init__(self, images: CocoImages, resize: Callable[[Tensor], Tensor]) -> None:
        self.images, self.resize = images, resize

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int]]:
        image = self.images.read(place)
        return self.resize(image), (int(image.shape[1]), int(image.shape[2]))


@torch.no_grad()
def run_detector(
    model: nn.Module, images: CocoImages, places: Sequence[int], workers: int, device: torch.device,
    see: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns a detector's detections in COCO's result format; unreadable images are logged.

    Args:
        model: as `create_detector` makes it; put into evaluation mode for the call.
        images: data set.
        places: indices of the images to use.
        workers: loader processes.
        device: of the model.
        see: called with the index, the image `[3, H, W]` and torchvision's output.
    """
    training = model.training
    model.eval()
    found: list[dict[str, Any]] = []
    try:
        for place, (image, size) in one_by_one(_Resized(images, _resize_for(model)), places, workers):
            (output,) = model([image.to(device)])
            seen = (int(image.shape[1]), int(image.shape[2]))
            found += coco_results(output, int(images.image_ids[place]), size, seen, images.category_ids)
            if see is not None:
                see(place, image, output)
    finally:
        model.train(training)
    return found


def score_detections(images: CocoImages, found: list[dict[str, Any]], masks: bool) -> CocoScores:
    """Scores boxes and, if `masks` is set and the images have them, masks."""
    return evaluate_coco(images.annotations, found, ("bbox", "segm") if masks and images.has_masks else ("bbox",))


def coco_notes(images: CocoImages) -> list[str]:
    """Checks annotations, and returns what is noteworthy about them."""
    return [f"{images.annotations.name}: {note}" for note in check_coco(images)]


def _resize_for(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Resizes with antialiasing to the size at which the detector's own resizing, which has none, does nothing."""
    transform: Any = model.transform
    return detection_resize(transform.min_size[0], transform.max_size)


def _drawn_at(output: dict[str, Tensor], seen: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Scales the detections to draw from the resized image `[3, h, w]` to the original size."""
    sure = output["scores"] > SURE
    scale = output["boxes"].new_tensor([size[1] / seen.shape[2], size[0] / seen.shape[1]] * 2)
    found = {name: output[name][sure] for name in output}
    found["boxes"] = found["boxes"] * scale
    if "masks" in found and len(found["masks"]):
        found["masks"] = torch.stack([mask_at(mask, size)[None] for mask in found["masks"]])  # bool [n, 1, H, W]
    return found


def _write_json(out: Path, content: Any) -> None:
    with replacing(out / "detections.json") as partial:
        partial.write_text(json.dumps(content) + "\n")
