"""Pictures of shapes on cloudy grounds, with boxes and masks in COCO's form: data to compare detectors on.

    python benchmarks/shapes.py --out shapes/ --train 400 --val 300

A class is a shape; colour, pattern, size, rotation and ground say nothing of it. Shapes may hide parts of one another.
The pictures depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track

Floats = NDArray[np.float64]
Generator = np.random.Generator

SIZE = 128
SMALLEST, LARGEST = 24, 56
"""Diameters in pixels."""

_HIDDEN = 0.6
"""Share of a shape that must be seen, for it to be in the annotations; else the picture is drawn again."""


def _polygon(corners: int, inner: float = 1.0) -> Callable[[Floats, Floats], NDArray[np.bool_]]:
    """Inside of a regular polygon, or of a star whose inner corners lie at a share of its radius."""
    count = corners if inner == 1 else 2 * corners
    radii = np.where(np.arange(count) % 2, inner, 1.0) if inner != 1 else np.ones(count)
    angles = 2 * np.pi * np.arange(count) / count
    xs, ys = radii * np.cos(angles), radii * np.sin(angles)

    def inside(x: Floats, y: Floats) -> NDArray[np.bool_]:
        crossings = np.zeros(x.shape, dtype=int)
        for i in range(count):
            j = (i + 1) % count
            over = (ys[i] > y) != (ys[j] > y)
            at = xs[i] + (y - ys[i]) / (ys[j] - ys[i] + 1e-12) * (xs[j] - xs[i])
            crossings += over & (x < at)
        return crossings % 2 == 1

    return inside


SHAPES: dict[str, Callable[[Floats, Floats], NDArray[np.bool_]]] = {
    "disc": lambda x, y: x**2 + y**2 < 0.8,
    "ring": lambda x, y: (x**2 + y**2 < 0.85) & (x**2 + y**2 > 0.3),
    "triangle": _polygon(3),
    "square": _polygon(4),
    "star": _polygon(5, 0.42),
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.9) & (np.minimum(abs(x), abs(y)) < 0.28),
}
"""Inside or not, in coordinates from -1 to 1."""


def _pattern(generator: Generator, size: int) -> Floats:
    """A pattern of two colours, `[size, size, 3]` in 0…1: plain, stripes, dots, chequers or clouds."""
    y, x = np.mgrid[:size, :size].astype(float)
    angle, period = generator.uniform(0, np.pi), generator.uniform(5, 16)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    phases = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    kind = generator.integers(5)
    share = (
        np.zeros_like(u), phases[0] > 0, phases[0] * phases[1] > 0.4, phases[0] * phases[1] > 0,
        _clouds(generator, size),
    )[kind].astype(float)  # fmt: skip
    first, second = generator.uniform(0, 1, (2, 3))
    return first + share[..., None] * (second - first)


def _clouds(generator: Generator, size: int) -> Floats:
    """Smooth noise in 0…1."""
    coarse = Image.fromarray(generator.uniform(0, 255, (size // 12 + 2,) * 2).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255


def _ground(generator: Generator) -> Floats:
    """Clouds of three colours, `[128, 128, 3]` in 0…1."""
    first, second, third = generator.uniform(0, 1, (3, 3))
    coarse, fine = (_clouds(generator, SIZE)[..., None] for _ in range(2))
    return coarse * first + (1 - coarse) * (fine * second + (1 - fine) * third)


def picture(generator: Generator) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]:
    """A picture `[128, 128, 3]`, and the class and mask `[128, 128]` of each shape in it, of which there are 1 to 5."""
    while True:
        pixels = _ground(generator)
        found: list[tuple[int, NDArray[np.bool_], int]] = []
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        for _ in range(generator.integers(1, 6)):
            radius = generator.uniform(SMALLEST, LARGEST) / 2
            centre = generator.uniform(radius, SIZE - radius, 2)
            angle = generator.uniform(0, 2 * np.pi)
            u, v = (x - centre[1]) / radius, (y - centre[0]) / radius
            label = int(generator.integers(len(SHAPES)))
            inside = list(SHAPES.values())[label](
                u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
            )
            pixels[inside] = _pattern(generator, SIZE)[inside]
            found = [(other, mask & ~inside, area) for other, mask, area in found]
            found.append((label, inside, int(inside.sum())))
        if all(mask.sum() > _HIDDEN * area for _, mask, area in found):
            break
    pixels += generator.normal(0, 0.04, pixels.shape)
    return (255 * pixels.clip(0, 1)).astype(np.uint8), [(label, mask) for label, mask, _ in found]


def write_part(folder: Path, name: str, count: int, seed: int) -> None:
    """Writes `folder/name/*.png` and `folder/annotations/instances_name.json`."""
    generator = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in track(range(1, count + 1), f"drawing {folder / name}"):
        pixels, shapes = picture(generator)
        file = f"{number:06d}.png"
        Image.fromarray(pixels).save(folder / name / file)
        images.append({"id": number, "file_name": file, "height": SIZE, "width": SIZE})
        for label, mask in shapes:
            run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0,
                "bbox": [float(value) for value in coco_mask.toBbox(run_lengths)], "area": float(mask.sum()),
                "segmentation": {"size": [SIZE, SIZE], "counts": run_lengths["counts"].decode()},
            })  # fmt: skip
    categories = [{"id": label, "name": shape} for label, shape in enumerate(SHAPES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_part(args.out, "train", args.train, args.seed)
    write_part(args.out, "val", args.val, args.seed + 1)


if __name__ == "__main__":
    main()
