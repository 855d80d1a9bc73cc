"""Classifying images into a CSV file. The public function is `sparkmim.predict`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.data.inference import still_batches
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models.encoders import own_module
from sparkmim.results import PredictResult
from sparkmim.terminal import printable, written

MOST_COLUMNS = 100
"""Maximum number of classes that get a column each; with more, only the `TOP` likeliest are named."""

TOP = 5


@torch.no_grad()
def run_prediction(
    *,
    images: Any,
    weights: str | Path,
    out: str | Path,
    top: int | None,
    model: str | nn.Module | None,
    image_size: int | Sequence[int] | None,
    crop: float | None,
    batch_size: int,
    workers: int | None,
    accelerator: str,
) -> PredictResult:
    """Runs `sparkmim.predict`."""
    out = Path(out)
    device = device_named(accelerator)
    opened = open_weights(weights)
    classes = opened.classes
    if top is not None and top > len(classes):
        raise UserError(f"top is {top}, but the classifier knows {len(classes)} classes; choose 1 to {len(classes)}")
    if top is None and len(classes) > MOST_COLUMNS:
        top = TOP
    preparation = opened.preparation(image_size, crop)
    source = images_source(images, preparation.channels, preparation.rank)
    classifier = opened.classifier(own_module(model)).to(device)
    batches = still_batches(source, preparation, batch_size, workers, device, "predicting")

    columns = ["path", "class", "probability", "error"]
    if top is None:
        columns += [f"p_{printable(name)}" for name in classes]
    else:
        columns += [f"{what}_{place}" for place in range(2, top + 1) for what in ("class", "probability")]
    read, unreadable = 0, []
    with replacing(out) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for batch in batches:
            rows: dict[int, list[str]] = {}
            for place, name, reason in batch.unreadable:
                unreadable.append(f"{name}: {reason}")
                rows[place] = [written(name), "", "", printable(reason), *[""] * (len(columns) - 4)]
            if batch.images is not None:
                probabilities = classifier(batch.images).float().softmax(1).cpu()  # [b, classes]
                for place, name, of_image in zip(batch.places, batch.names, probabilities, strict=True):
                    rows[place] = _row(name, of_image, classes, top)
                read += len(batch.places)
            table.writerows(rows[place] for place in sorted(rows))
        if not read:
            raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    return PredictResult(out, read, unreadable)


def _row(name: str, probabilities: Tensor, classes: list[str], top: int | None) -> list[str]:
    """Returns the cells of an image with class probabilities `[classes]`."""
    likeliest, order = probabilities.topk(top or 1)
    named = [text for p, place in zip(likeliest.tolist(), order.tolist(), strict=True)
             for text in (printable(classes[place]), _digits(p))]  # fmt: skip
    rest = [_digits(p) for p in probabilities.tolist()] if top is None else named[2:]
    return [written(name), *named[:2], "", *rest]


def _digits(probability: float) -> str:
    return f"{probability:.6f}"
