"""Small data sets of images with label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["ground", "disc", "box", "bar"]
"""Classes of `shapes`."""


def shapes(seed: int, height: int = 64, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A disc, a box and a bar of their own colours on grey ground: uint8 `[h, w, 3]`, and classes uint8 `[h, w]`."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for number in generator.permutation([1, 2, 3]):
        row, column, radius = generator.integers((8, 8, 8), (height - 8, width - 8, 16))
        down, right = abs(rows - row), abs(columns - column)
        where = (down**2 + right**2 < radius**2, np.maximum(down, right) < radius - 2, right < 3)[number - 1]
        labels[where] = number
    colours = np.array([[120, 120, 120], [210, 60, 50], [60, 90, 200], [90, 180, 60]])
    noise = generator.normal(0, 20, (height, width, 3)) + generator.normal(0, 15, 3)
    return (colours[labels] + noise).clip(0, 255).astype(np.uint8), labels


def write_shapes(root: Path, train: int = 4, val: int = 3, names: bool = True, **size: int) -> Path:
    """`images/` and `labels/`, with nested folders, JPEG and PNG images, and grey and palette label maps."""
    for part, numbers in (("train", range(train)), ("val", range(1000, 1000 + val))):
        for number in numbers:
            image, labels = shapes(number, **size)
            name = f"{part}/{'even' if number % 2 == 0 else 'odd/deep'}/{number:04d}"
            path = root / "images" / f"{name}.{'png' if number % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
            write_label_map(root / "labels" / f"{name}.png", labels, palette=number % 2 == 0)
    if names:
        (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def write_label_map(path: Path, labels: np.ndarray, palette: bool = False) -> None:
    """A PNG of 8 or 16 bits, by the type of the array, or with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([value for number in range(256) for value in (number * 37 % 256, 255 - number, 7)])
    image.save(path)
