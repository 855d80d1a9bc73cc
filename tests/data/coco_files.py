"""Small data sets in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A polygon of four points."""
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(
    image: int, category: int, box: tuple[float, float, float, float], segmentation: Any = None, **more: Any
) -> dict[str, Any]:
    """A box as left, top, width, height, and a mask as large as it unless another is given."""
    left, top, width, height = box
    if segmentation is None:
        segmentation = [rectangle(left, top, left + width, top + height)]
    return {
        "image_id": image, "category_id": category, "bbox": list(box), "segmentation": segmentation,
        "area": width * height, "iscrowd": 0, **more,
    }  # fmt: skip


def write_coco(
    root: Path, annotations: list[dict[str, Any]], images: int = 3, part: str = "train2017", **more: Any
) -> tuple[Path, Path]:
    """A file and its folder of images, with ids 10, 11, …, and categories 3 (cat), 7 (dog) and 12 (owl)."""
    folder = root / part
    folder.mkdir(parents=True)
    records = []
    for number in range(10, 10 + images):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        records.append({"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
    for number, record in enumerate(annotations):
        record.setdefault("id", number)
    categories = [{"id": 12, "name": "owl"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    content = {"images": records, "annotations": annotations, "categories": categories, **more}
    file = root / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file, folder


def change(file: Path, **parts: Any) -> None:
    """Replaces parts of an annotation file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
