"""Which learning rates suit detection and segmentation of few images: three each, with the default recipes.

    python benchmarks/dense_rates.py --coco tiny-coco/ --runs dense-runs --json benchmarks/results/dense_rates.json

A ResNet-18 is pretrained on pictures of `shapes.py` without annotations. From its weights, a detector and a segmenter
are trained on pictures of shapes, and on images in COCO's form, once per rate; each is scored on validation pictures.
Label maps are drawn from the annotations: of several objects on a pixel, it belongs to the smallest.

What is done is kept in `--runs`, and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console
from rich.table import Table

import sparkmim
from fewshot import Jobs
from measure import provenance
from shapes import SIZE, write_part
from sparkmim.data.coco import find_coco
from sparkmim.files import replacing

MODEL = "resnet18"
RATES = (4e-4, 1e-3, 2e-3)
"""Candidates, per 16 images."""

UNLABELLED, TRAINING, VALIDATION = 1000, 200, 100
"""Pictures of shapes."""

SIDES = {"shapes": SIZE, "coco": 192}
"""Shorter sides of images, in pixels."""


def draw_label_maps(data: Path, out: Path) -> Path:
    """Writes images and label maps of a folder in COCO's form as `segment` reads them; 0 is the ground."""
    for name in ("train", "val"):
        files = find_coco(data, name)
        coco = COCO(str(files.annotations))
        labels = {category: label for label, category in enumerate(sorted(coco.getCatIds()), 1)}
        for kind in ("images", "labels"):
            (out / kind / name).mkdir(parents=True, exist_ok=True)
        for image in coco.loadImgs(coco.getImgIds()):
            found = np.zeros((image["height"], image["width"]), np.uint8)
            objects = coco.loadAnns(coco.getAnnIds(image["id"]))
            for one in sorted(objects, key=lambda one: -float(one["area"])):
                found[coco.annToMask(one) > 0] = labels[one["category_id"]]
            source = files.images / image["file_name"]
            target = out / "images" / name / source.name
            if not target.exists():
                target.symlink_to(source.resolve())
            Image.fromarray(found).save(out / "labels" / name / f"{source.stem}.png")
    names = ["ground", *(coco.cats[category]["name"] for category in sorted(coco.getCatIds()))]
    (out / "classes.txt").write_text("\n".join(names) + "\n")
    return out


def pretrain(images: Path, weights: Path, epochs: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = sparkmim.pretrain(
            data=images, out=f"{folder}/run", model=MODEL, image_size=SIZE, batch_size=64, epochs=epochs,
            warmup_epochs=epochs / 10, picture_every=0, workers=0,
        )  # fmt: skip
        if not result.finished:
            raise KeyboardInterrupt
        (Path(folder) / "run" / "weights" / "encoder.safetensors").rename(weights)
    return {"loss": result.loss}


def detect(data: Path, weights: Path, side: int, rate: float, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = sparkmim.detect(
            data=data, weights=weights, out=f"{folder}/run", masks=False, iterations=steps, learning_rate=rate,
            short_sides=[side], eval_short_side=side, long_side=2 * side, regions=64, eval_every=10_000, workers=0,
        )  # fmt: skip
        if not result.finished:
            raise KeyboardInterrupt
    return {"score": result.figures["bbox/AP"]}


def segment(data: Path, weights: Path, side: int, rate: float, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = sparkmim.segment(
            data=data, weights=weights, out=f"{folder}/run", iterations=steps, learning_rate=rate, short_side=side,
            crop=side, eval_short_side=side, eval_every=10_000, workers=0,
        )  # fmt: skip
        if not result.finished:
            raise KeyboardInterrupt
    return {"score": result.figures["mIoU"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, required=True, help="folder in COCO's form")
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--epochs", type=float, default=15, help="of pretraining")
    parser.add_argument("--steps", type=int, default=400, help="of each detector and segmenter")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    shapes = args.runs / "shapes"
    for seed, (name, count) in enumerate({"unlabelled": UNLABELLED, "train": TRAINING, "val": VALIDATION}.items()):
        if not (shapes / "annotations" / f"instances_{name}.json").is_file():
            write_part(shapes, name, count, seed)
    data = {"shapes": shapes, "coco": args.coco}
    maps = {name: draw_label_maps(folder, args.runs / f"maps-{name}") for name, folder in data.items()}
    weights = args.runs / "pretrained.safetensors"
    with Jobs(args.runs / "results", args.workers, {"epochs": args.epochs, "steps": args.steps}) as jobs:
        jobs.run({"pretrain": (pretrain, (shapes / "unlabelled", weights, args.epochs))})
        scores = jobs.run({
            f"{function.__name__} {name} {rate}": (function, (folders[name], weights, SIDES[name], rate, args.steps))
            for function, folders in ((detect, data), (segment, maps)) for name in data for rate in RATES
        })  # fmt: skip
    table = Table("task, data", *(f"{rate:g}" for rate in RATES), title="AP of boxes, mIoU; by learning rate")
    for task in ("detect", "segment"):
        for name in data:
            table.add_row(f"{task}, {name}", *(f"{scores[f'{task} {name} {rate}']['score']:.2%}" for rate in RATES))
    Console(width=100).print(table)
    if args.json:
        with replacing(args.json) as partial:
            partial.write_text(json.dumps({**provenance(), "steps": args.steps, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
