"""Can a detector learn ten pictures by heart? Mask R-CNN from scratch, trained and scored on the same ten.

    python benchmarks/detection_overfit.py --data tiny-coco/ --json benchmarks/results/detection_overfit.json

`--data` is a folder in COCO's form. The ten training images with the fewest small objects are taken: on images of 128
pixels, small ones are a few pixels large.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import sparkmim
from measure import provenance
from sparkmim.data.coco import find_coco, read_coco

IMAGES = 10
SMALL = 64**2
"""Area in pixels of an object that counts as small."""


def fewest_small(content: dict[str, Any]) -> dict[str, Any]:
    """The part of an annotation file that is about the ten images with the fewest small objects, and some others."""
    objects = content["annotations"]
    small = Counter(one["image_id"] for one in objects if one["area"] < SMALL or one["iscrowd"])
    shown = {one["image_id"] for one in objects} - {one["image_id"] for one in objects if one["iscrowd"]}
    chosen = sorted(shown, key=lambda image: (small[image], image))[:IMAGES]
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [one for one in objects if one["image_id"] in chosen],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--steps", type=int, default=100, help="of five images each")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = find_coco(args.data, "train")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "ten.json"
        part.write_text(json.dumps(fewest_small(read_coco(files.annotations))))
        result = sparkmim.detect(
            annotations=part, images=files.images, val_annotations=part, val_images=files.images, model=args.model,
            out=Path(folder) / "run", iterations=args.steps, batch_size=IMAGES // 2, learning_rate=2e-3, flip=0.0,
            warmup_iterations=args.steps // 3, weight_decay=1e-4, short_sides=[128], eval_short_side=128,
            long_side=214, regions=64, eval_every=args.steps, workers=0, precision="32-true",
        )  # fmt: skip
    report = {
        **provenance(), "model": args.model, "steps": result.step,
        "bbox/AP": result.figures["bbox/AP"], "segm/AP": result.figures["segm/AP"],
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
