"""Scoring and using trained detectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.data.coco import CocoFiles, CocoImages, check_coco, find_coco, open_coco
from sparkmim.data.detection_transforms import detection_resize
from sparkmim.data.loading import log_unreadable, one_by_one
from sparkmim.data.parts import find_part
from sparkmim.data.problems import counted, print_notes
from sparkmim.drawing.annotated import SURE, draw_detections
from sparkmim.errors import UserError
from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco, mask_at
from sparkmim.evaluation.scores import evaluation_mode
from sparkmim.evaluation.trained import open_trained, read_images, report_scores, save_picture
from sparkmim.files import replacing
from sparkmim.models.encoders import own_module
from sparkmim.results import DetectResult
from sparkmim.terminal import Terminal


def use_detector(
    *, weights: str | Path, out: str | Path, predict: Any, data: str | Path | None,
    val_annotations: str | Path | None, val_images: str | Path | None, model: str | nn.Module | None,
    masks: bool | None, eval_short_side: int | None, long_side: int | None, mean: Sequence[float] | None,
    std: Sequence[float] | None, accelerator: str, precision: str, workers: int | None,
) -> DetectResult:  # fmt: skip
    """Runs `sparkmim.detect` where it draws on the images in `predict`, or scores a detector on the validation images.

    Writes `detections.json` and, with scores, `metrics.json`. Arguments left at None are taken from the weights.
    """
    console, out = Terminal(), Path(out)
    opened, device, low_precision, workers = open_trained("detector", weights, out, accelerator, precision, workers)
    known: Any = opened.metadata  # complete, or the file would have been refused
    detector: Any = opened.detector(own_module(model)).to(device)
    if masks and not known.masks:
        raise UserError(f"{opened.path} finds boxes alone; leave out --masks")
    transform = detector.transform
    transform.min_size = (eval_short_side or known.eval_short_side,)
    transform.max_size = long_side or known.long_side
    transform.image_mean, transform.image_std = list(mean or known.mean), list(std or known.std)
    detector.backbone.low_precision = low_precision
    if masks is False:
        detector.roi_heads.mask_predictor = None  # `has_mask` is then false, and no part of the mask branch runs
    if predict is not None:
        found = _draw(detector, read_images(console, predict, opened.channels), known, out, device)
        _write_json(out, found)
        sure = sum(annotation["score"] > SURE for annotation in found["annotations"])
        drawn, detections = counted(len(found["images"]), "image"), counted(sure, "detection")
        console.print(f"{drawn}, {detections} above {SURE:.0%}: {out}")
        return DetectResult(out, 0, 0, {}, detector)
    with_masks = bool(detector.roi_heads.has_mask())
    named = {"val_annotations": val_annotations, "val_images": val_images}
    images = open_coco(*find_part("val", data, named, CocoFiles, find_coco), masks=None if with_masks else False)
    print_notes(console, coco_notes(images))
    images.take_categories(known.category_ids, known.classes, opened.path)
    results = run_detector(detector, images, range(len(images)), workers, device)
    scores = score_detections(images, results, with_masks)
    report_scores(console, out, scores)
    _write_json(out, results)
    return DetectResult(out, 0, 0, scores.figures, detector)


@torch.no_grad()
def _draw(
    detector: Any, images: Iterable[tuple[str, str, Tensor]], known: Any, out: Path, device: torch.device
) -> dict[str, Any]:
    """Draws detections on images, and returns them as a data set in COCO's format."""
    resize = _resize_for(detector)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, path, image) in enumerate(images, 1):
        seen = resize(image)  # [3, h, w]
        (output,) = detector([seen.to(device)])
        size = _size(image)
        records.append({"id": number, "file_name": path, "height": size[0], "width": size[1]})
        annotations += coco_results(output, number, size, _size(seen), known.category_ids)
        picture = draw_detections(image / 255, _drawn_at(output, seen, size), known.classes)  # [3, H, W]
        save_picture(picture, out / f"{name}.jpg")
    names = zip(known.category_ids, known.classes, strict=True)
    categories = [{"id": number, "name": name} for number, name in names]
    return {"images": records, "categories": categories, "annotations": annotations}


class _Resized(torch.utils.data.Dataset[Any]):
    """Images resized for a detector, each with its original height and width."""

    def __init__(self, images: CocoImages, resize: Callable[[Tensor], Tensor]) -> None:
        self.images, self.resize = images, resize

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int]]:
        image = self.images.read(place)
        return self.resize(image), _size(image)


@torch.no_grad()
def run_detector(
    model: nn.Module, images: CocoImages, places: Sequence[int], workers: int, device: torch.device,
    see: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
    complain: Callable[[str], None] = log_unreadable,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns detections on the images at `places` in COCO's result format; unreadable images are logged.

    `see` is called with the place, the image `[3, H, W]` and torchvision's output.
    """
    found: list[dict[str, Any]] = []
    with evaluation_mode(model):
        for place, (image, size) in one_by_one(_Resized(images, _resize_for(model)), places, workers, complain):
            (output,) = model([image.to(device)])
            found += coco_results(output, int(images.image_ids[place]), size, _size(image), images.category_ids)
            if see is not None:
                see(place, image, output)
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


def _size(image: Tensor) -> tuple[int, int]:
    return int(image.shape[1]), int(image.shape[2])


def _write_json(out: Path, content: Any) -> None:
    with replacing(out / "detections.json") as partial:
        partial.write_text(json.dumps(content) + "\n")
