"""Scoring and using trained segmenters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.data.label_maps import (
    SegmentationFiles,
    SegmentationImages,
    check_segmentation,
    find_segmentation,
    open_segmentation,
    read_class_names,
)
from sparkmim.data.labelled import Part
from sparkmim.data.loading import log_unreadable, one_by_one
from sparkmim.data.parts import find_part
from sparkmim.data.problems import counted, print_notes
from sparkmim.data.segmentation_transforms import segmentation_resize
from sparkmim.drawing.annotated import draw_classes, save_label_map, with_legend
from sparkmim.drawing.pixels import Tones
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import evaluation_mode
from sparkmim.evaluation.segmentation import classes_at, evaluate_segmentation
from sparkmim.evaluation.trained import open_trained, read_images, report_scores, save_picture
from sparkmim.models.encoders import own_module
from sparkmim.results import SegmentResult
from sparkmim.terminal import Terminal


def use_segmenter(
    *, weights: str | Path, out: str | Path, predict: Any, data: str | Path | None, images: str | Path | None,
    labels: str | Path | None, val_images: str | Path | None, val_labels: str | Path | None, val_split: float | None,
    classes: str | Path | None, ignore: int | None, reduce_labels: bool, model: str | nn.Module | None,
    eval_short_side: int | None, mean: Sequence[float] | None, std: Sequence[float] | None, seed: int,
    accelerator: str, precision: str, workers: int | None,
) -> SegmentResult:  # fmt: skip
    """Runs `sparkmim.segment` where it labels the images in `predict`, or scores a segmenter on the validation images.

    Writes label maps as PNG files and pictures of them over the images, or `metrics.json`. Arguments left at None are
    taken from the weights.
    """
    console, out = Terminal(), Path(out)
    opened, device, low_precision, workers = open_trained("segmenter", weights, out, accelerator, precision, workers)
    known: Any = opened.metadata  # complete, or the file would have been refused
    segmenter = opened.segmenter(own_module(model)).to(device)
    reduce_labels = reduce_labels or known.reduce_labels
    mean, std = mean or known.mean, std or known.std
    transform = segmentation_resize(eval_short_side or known.eval_short_side, mean, std)
    if predict is None:
        names = class_names(data, classes)
        if names is not None and names != known.classes:
            raise UserError(f"the data have other classes than {opened.path}: {len(names)} and {len(known.classes)} "
                            "names, which must be the same, in the same order")  # fmt: skip
        part: Part = "val" if val_split is None else "train"
        named = {"val_images": val_images, "val_labels": val_labels}
        if val_split is not None:
            named = {"images": images, "labels": labels}
        files = find_part(part, data, named, SegmentationFiles, find_segmentation)
        ignore = known.ignore if ignore is None else ignore
        scored = open_segmentation(*files, opened.channels, ignore, reduce_labels, known.label_values)
        if val_split is not None:
            _, scored = scored.split(val_split, seed)
        maps = run_segmenter(segmenter, scored, range(len(scored)), transform, workers, device, low_precision)
        listed = checked_classes(console, [scored], known.classes, numbered=True)
        scores = evaluate_segmentation(maps, listed, device)
        report_scores(console, out, scores)
        return SegmentResult(out, 0, 0, scores.figures, segmenter)

    values = known.label_values or range(reduce_labels, len(known.classes) + reduce_labels)
    means, deviations = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    present: set[int] = set()
    count = 0
    for name, _, image in read_images(console, predict, opened.channels):
        found = predict_classes(segmenter, transform(image).to(device), image.shape[1:], low_precision).cpu()  # [h, w]
        arrays = image.is_floating_point()
        normalised = ((image if arrays else image / 255) - means) / deviations  # [c, h, w]
        tones = tones_of(opened.channels, mean, std, arrays)
        picture = with_legend(draw_classes(tones(normalised[None])[0], found), [found], known.classes)  # [3, h, w]
        save_picture(picture, out / f"{name}.jpg")
        save_label_map(out / f"{name}.png", found, values)
        count += 1
        present.update(found.flatten().bincount().nonzero().flatten().tolist())
    said = f"{counted(count, 'image')}, {len(present)} of {len(known.classes)} classes found: {out}"
    console.print(said)
    return SegmentResult(out, 0, 0, {}, segmenter)


class _Resized(torch.utils.data.Dataset[Any]):
    """Whole images resized and normalised for a segmenter, each with its label map in its original size."""

    def __init__(self, images: SegmentationImages, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, labels = self.images[place]
        return self.transform(image.as_subclass(Tensor)), labels.as_subclass(Tensor).long()


def run_segmenter(
    model: nn.Module, images: SegmentationImages, places: Sequence[int], transform: Callable[[Tensor], Tensor],
    workers: int, device: torch.device, low_precision: bool,
    see: Callable[[int, Tensor, Tensor, Tensor], None] | None = None, complain: Callable[[str], None] = log_unreadable,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields predicted and true label maps, long `[H, W]`, of the images at `places`; unreadable images are logged.

    `transform` resizes and normalises an image, as `segmentation_resize`. `see` is called with the place, the
    normalised image `[C, h, w]`, the prediction and the truth.
    """
    with evaluation_mode(model):
        for place, (image, truth) in one_by_one(_Resized(images, transform), places, workers, complain):
            found = predict_classes(model, image.to(device), truth.shape, low_precision)
            if see is not None:
                see(place, image, found.cpu(), truth)
            yield found, truth.to(device)


@torch.no_grad()
def predict_classes(model: nn.Module, image: Tensor, size: Sequence[int], low_precision: bool) -> Tensor:
    """Returns the class of each pixel of a normalised image `[C, h, w]` at another size, long `[*size]`."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=low_precision):
        logits = model(image[None])[0]  # [classes, h, w]
    return classes_at(logits, size)


def class_names(data: str | Path | None, classes: str | Path | None) -> list[str] | None:
    """Reads class names from the file `classes` or, without one, from `classes.txt` in `data` if it exists."""
    if classes is not None:
        return read_class_names(classes)
    beside = Path(data or ".").expanduser() / "classes.txt"
    return read_class_names(beside) if data is not None and beside.is_file() else None


def checked_classes(
    console: Terminal, parts: Sequence[SegmentationImages], names: Sequence[str] | None, numbered: bool = False
) -> list[str]:
    """Checks data, as `check_segmentation`, prints what is noteworthy about them, and returns their classes."""
    classes, notes = check_segmentation(parts, names, numbered)
    print_notes(console, notes)
    return classes


def tones_of(channels: int, mean: Sequence[float], std: Sequence[float], arrays: bool) -> Tones:
    """Returns what turns normalised images, or arrays in their own units, into colours."""
    return Tones.of(channels, None if arrays else mean, None if arrays else std)
