"""COCO's figures for detections, by pycocotools or faster-coco-eval, which agree."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from sparkmim.data.coco import box_of, category_names, coco_tools, mask_of, quiet_tools, read_coco
from sparkmim.data.problems import counted
from sparkmim.errors import UserError

Kind = Literal["bbox", "segm"]

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In COCO's order: average precision over thresholds of 0.5 to 0.95, at 0.5, at 0.75, of small, medium and large
objects; average recall with 1, 10 and 100 detections per image, and by size."""


@dataclass(frozen=True)
class CocoScores:
    """Scores of detections, from 0 to 1; NaN without objects to find, where pycocotools returns -1."""

    figures: dict[str, float]  # `bbox/AP`, `bbox/AP50`, …, `segm/AP`, …: twelve for each kind
    per_class: dict[str, dict[str, float]]  # average precision by kind and class name

    @property
    def main(self) -> float:
        return self.figures.get("segm/AP", self.figures["bbox/AP"])

    def table(self) -> Table:
        table = Table("", *FIGURES, box=None, padding=(0, 2, 0, 0))
        for kind, label in (("bbox", "boxes"), ("segm", "masks")):
            values = [self.figures.get(f"{kind}/{name}", math.nan) for name in FIGURES]
            if not all(map(math.isnan, values)):
                table.add_row(label, *("–" if math.isnan(value) else f"{100 * value:.1f}" for value in values))
        return table

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`: unknown figures are null, classes without objects are left out."""
        figures = {name: None if math.isnan(value) else value for name, value in self.figures.items()}
        per_class = {
            kind: {name: value for name, value in classes.items() if not math.isnan(value)}
            for kind, classes in self.per_class.items()
        }
        return {**figures, "per_class": per_class}


def evaluate_coco(
    ground_truth: str | Path | Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kinds: Sequence[Kind] = ("bbox", "segm"),
) -> CocoScores:
    """Scores detections on all images of an annotation file, as pycocotools does.

    Crowds and degenerate boxes are kept. Where pycocotools would fail, the ground truth is completed: missing areas and
    flags are filled in, and for `segm` an annotation without a mask becomes a crowd of the size of its box, so that
    detections on it are ignored. Annotations without a box of four numbers (for `segm`, without a mask either) are left
    out. For `segm`, the area of an object is that of its mask, as in Detectron2 and MMDetection. Detections are in
    COCO's result format, as `coco_results` makes them, and are not modified.

    Raises:
        UserError: if a detection belongs to an unknown image or lacks what a kind needs, or if the file is not in
            COCO's format.
        MissingPackage: if pycocotools is not installed.
    """
    index, scorer_of = _tools()
    content = ground_truth if isinstance(ground_truth, Mapping) else read_coco(ground_truth)
    names = category_names(content["categories"])
    known = {image["id"] for image in content["images"]}
    if unknown := {detection["image_id"] for detection in detections} - known:
        are, more = ("is", "") if len(unknown) == 1 else ("are", ", …")
        images = counted(len(unknown), "image")
        raise UserError(f"{images} of the detections {are} not in the ground truth: id {min(unknown)}{more}")
    figures: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    for kind in kinds:
        truth = _indexed(index(), content, _truth(content, kind))
        found = _indexed(index(), content, _found(detections, kind))
        with quiet_tools():
            scorer = scorer_of(truth, found, kind)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        for name, value in zip(FIGURES, scorer.stats.tolist(), strict=True):
            figures[f"{kind}/{name}"] = math.nan if value == -1 else value
        precision = scorer.eval["precision"][..., 0, -1]  # [thresholds, recalls, classes]: all sizes, 100 detections
        per_class[kind] = {
            names[number]: _mean(precision[..., place]) for place, number in enumerate(scorer.params.catIds)
        }
    return CocoScores(figures, per_class)


def coco_results(
    output: Mapping[str, Tensor], image_id: int, size: tuple[int, int], seen: tuple[int, int],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Converts the output of a torchvision detector for an image to COCO's result format, which JSON takes.

    Args:
        output: `boxes` `[n, 4]`, left, top, right, bottom, in pixels of the image that the detector saw;
            `labels` `[n]` from 1; `scores` `[n]`; and optionally `masks` `[n, 1, h, w]`, probabilities.
        image_id: in the annotation file.
        size: height and width of the image in the file, to which boxes and masks are scaled.
        seen: height and width of the image that the detector saw.
        category_ids: category id of each label, starting with label 1.
    """
    scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2, dtype=torch.float64)
    boxes = output["boxes"].detach().double().cpu() * scale  # [n, 4]
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = output["labels"].tolist(), output["scores"].double().tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes.tolist(), scores, strict=True)
    ]
    if "masks" in output:
        for result, mask in zip(results, output["masks"], strict=True):  # one at a time, as full-size masks need memory
            pixels = np.asfortranarray(mask_at(mask.detach(), size).numpy().astype(np.uint8))
            counts = coco_tools("mask").encode(pixels)["counts"]
            result["segmentation"] = {"size": list(size), "counts": counts.decode("ascii")}
    return results


def mask_at(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a mask of probabilities `[1, h, w]` and thresholds it at 0.5; returns bool `[H, W]` on the CPU."""
    if mask.shape[-2:] != size:
        mask = F.interpolate(mask[None].float(), size, mode="bilinear", align_corners=False)[0]
    return (mask[0] > 0.5).cpu()


def _tools() -> tuple[Any, Any]:
    """Returns the index and scorer classes of faster-coco-eval if it is installed, else those of pycocotools."""
    coco, cocoeval = coco_tools("coco"), coco_tools("cocoeval")
    if importlib.util.find_spec("faster_coco_eval") is None:
        return coco.COCO, cocoeval.COCOeval
    fast = importlib.import_module("faster_coco_eval")
    return fast.COCO, fast.COCOeval_faster


def _indexed(index: Any, content: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """Builds an index of annotations; pycocotools' own `loadRes` fails without detections."""
    index.dataset = {"images": content["images"], "categories": content["categories"], "annotations": annotations}
    with quiet_tools():
        index.createIndex()
    return index


def _truth(content: Mapping[str, Any], kind: Kind) -> list[dict[str, Any]]:
    """Completes the annotations of known images, as `evaluate_coco` describes."""
    sizes = {image["id"]: (image.get("height", 0), image.get("width", 0)) for image in content["images"]}
    truth: list[dict[str, Any]] = []
    for given in content["annotations"]:
        if given.get("image_id") not in sizes:
            continue
        box = box_of(given)
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        height, width = sizes[given["image_id"]]
        area = given.get("area")
        mask = mask_of(given, height, width) if kind == "segm" or not isinstance(area, int | float) else None
        if not all(map(math.isfinite, box)) and (kind == "bbox" or mask is None):
            continue
        # to pycocotools, id 0 means "unmatched", and equal ids mean the same annotation
        annotation = {**given, "id": len(truth) + 1, "iscrowd": int(bool(given.get("iscrowd")))}
        if not isinstance(area, int | float):
            annotation["area"] = box[2] * box[3] if mask is None else _area(mask, height, width)
        if kind == "segm":
            annotation["segmentation"] = mask or [[left, top, right, top, right, bottom, left, bottom]]
            annotation["iscrowd"] = annotation["iscrowd"] if mask else 1
        truth.append({**annotation, "bbox": box})
    return truth


def _area(mask: Any, height: int, width: int) -> float:
    tools = coco_tools("mask")
    if isinstance(mask, list):
        mask = tools.merge(tools.frPyObjects(mask, height, width))
    elif isinstance(mask["counts"], list):
        mask = tools.frPyObjects(mask, height, width)
    return float(tools.area(mask))


def _found(detections: Sequence[Mapping[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    area_of = coco_tools("mask").area
    needed = "bbox" if kind == "bbox" else "segmentation"
    found = []
    for number, detection in enumerate(detections, 1):
        if needed not in detection:
            raise UserError(f"detection {number} has no {needed}, without which {kind} cannot be scored")
        shape = detection[needed]
        area = shape[2] * shape[3] if kind == "bbox" else float(area_of(shape))
        found.append({**detection, "id": number, "iscrowd": 0, "area": area})
    return found


def _mean(precision: Any) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else math.nan
