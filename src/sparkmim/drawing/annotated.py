"""What was found on images, drawn on them: boxes with names, masks, and a colour for each class of a label map."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sparkmim.data.label_maps import IGNORED
from sparkmim.drawing.figures import QUIET, shortened

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLOURS = ("#1f6f8b", "#c8553d", "#5a8f29", "#8e5ea2", "#c79a00", "#3b6fd4")
"""Of classes, in turn; dark enough for white letters on them."""

SURE = 0.5
"""Least score of a detection that is drawn."""

_OPACITY = 0.6

_SMALLEST = 320
"""Pixels of the shorter side of a picture with a legend, at least: smaller ones are shown larger."""

_LARGEST = 2000
"""Pixels of the longer side that they are not made larger than."""

_MOST_NAMES = 40
"""In a legend; the others, which have the fewest pixels, are counted."""


# Detections


def draw_detections(image: Tensor, output: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Detections of some certainty on an image: float `[3, H, W]` in 0…1 to uint8 `[3, H, W]`."""
    canvas = (255 * image.cpu()).round().to(torch.uint8)
    sure = (output["scores"] > SURE).cpu()
    labels = output["labels"].cpu()[sure]
    if not len(labels):
        return canvas
    names = [
        f"{classes[label - 1]} {score:.0%}"
        for label, score in zip(labels.tolist(), output["scores"].cpu()[sure].tolist(), strict=True)
    ]
    colours = [COLOURS[label % len(COLOURS)] for label in labels.tolist()]
    if "masks" in output:
        masks = output["masks"].cpu()[sure, 0] > 0.5
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colours)
    width = max(2, min(canvas.shape[1:]) // 200)
    boxed: Tensor = draw_bounding_boxes(
        canvas, output["boxes"].cpu()[sure], names, colours, width=width, fill_labels=True, label_colors="white",
        font=_font_file(), font_size=max(10, min(canvas.shape[1:]) // 32),
    )  # fmt: skip
    return boxed


def _font_file() -> str:
    """The path of a font that can be drawn in any size; matplotlib brings one."""
    from matplotlib.font_manager import findfont

    return str(findfont("DejaVu Sans"))


# Label maps


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, red, green and blue, which differs from those of its neighbours.

    Example:
        >>> class_colour(0), class_colour(1)
        ((31, 111, 139), (200, 85, 61))
    """
    if number < len(COLOURS):
        red, green, blue = ImageColor.getrgb(COLOURS[number])[:3]
        return red, green, blue
    hue = number * 0.618034 % 1  # the golden ratio: far from all hues before
    bright, full = ((0.95, 0.45), (0.6, 0.75), (0.8, 0.9))[number % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, full, bright))
    return red, green, blue


def draw_classes(image: Tensor, labels: Tensor) -> Tensor:
    """A label map in colours on its image, which is grey so that it does not change them; and as it is where a pixel
    counts for nothing.

    Args:
        image: float `[3, H, W]` in 0…1.
        labels: long `[H, W]`.

    Returns:
        uint8 `[3, H, W]`.
    """
    count = int(labels.max()) + 1
    colours = [class_colour(number) for number in range(max(1, count))]
    palette = torch.tensor(colours, dtype=torch.float32)  # [classes, 3]
    labels = labels.cpu()
    over = palette[labels.clamp(min=0)].permute(2, 0, 1)  # [3, h, w]
    pixels = 255 * image.cpu()
    grey = pixels.mean(0, keepdim=True)
    mixed = torch.where(labels == IGNORED, pixels, (1 - _OPACITY) * grey + _OPACITY * over)
    return mixed.round().to(torch.uint8)


def side_by_side(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures `[3, H, W]` of one height in a row, with white between them."""
    gap = max(2, pictures[0].shape[2] // 64)
    framed = [nn.functional.pad(picture, (0, gap), value=255) for picture in pictures]
    return torch.cat(framed, 2)[:, :, :-gap]


def with_legend(picture: Tensor, labels: Sequence[Tensor], classes: Sequence[str]) -> Tensor:
    """A picture with the colours and names of the classes in some label maps below it.

    Args:
        picture: uint8 `[3, H, W]`; a small one becomes a whole number of times as large.
        labels: long, of any shape.
        classes: names.

    Returns:
        uint8 `[3, H + rows, W]`.
    """
    larger = max(1, min(-(-_SMALLEST // min(picture.shape[1:])), _LARGEST // max(picture.shape[1:])))
    picture = picture.repeat_interleave(larger, 1).repeat_interleave(larger, 2)
    width = int(picture.shape[2])
    size = max(12, min(width, int(picture.shape[1])) // 36)
    font = ImageFont.truetype(_font_file(), size)
    entries = _entries(torch.cat([part.flatten().cpu() for part in labels]), classes, width, font)
    line = 2 * size
    rows: list[list[tuple[str, str, int]]] = [[]]
    left = size
    for colour, name in entries:
        extent = round(font.getlength(name)) + 3 * size
        if left + extent > width and rows[-1]:
            rows.append([])
            left = size
        rows[-1].append((colour, name, left))
        left += extent
    legend = Image.new("RGB", (width, line * len(rows) + size), "white")
    draw = ImageDraw.Draw(legend)
    for number, row in enumerate(rows):
        top = size // 2 + number * line
        for colour, name, left in row:
            draw.rectangle((left, top + size // 2, left + size, top + size // 2 + size), fill=colour)
            draw.text((left + 1.5 * size, top + size), name, fill="black" if colour != "white" else QUIET, font=font,
                      anchor="lm")  # fmt: skip
    below = torch.from_numpy(np.array(legend)).permute(2, 0, 1)  # [3, rows, w]
    return torch.cat([picture, below], 1)


def _entries(labels: Tensor, classes: Sequence[str], width: int, font: FreeTypeFont) -> list[tuple[str, str]]:
    """Colours and names, in the order of the classes; of too many, those with most pixels."""
    counts = torch.bincount(labels[labels >= 0], minlength=len(classes))
    order = counts.argsort(descending=True, stable=True).tolist()
    present = [number for number in order if counts[number]]
    shown = sorted(present[:_MOST_NAMES])
    most = max(8, int((width - 4 * font.size) / font.getlength("n")))
    entries = [(f"rgb{class_colour(number)}", shortened(classes[number], most)) for number in shown]
    if len(present) > len(shown):
        entries.append(("white", f"and {len(present) - len(shown)} more"))
    return entries


def save_label_map(path: Path, labels: Tensor, classes: int, reduced: bool = False) -> None:
    """Writes classes as PNG: with a palette of their colours or, with more than 256 of them, as 16-bit grey.

    Args:
        path: of the file.
        labels: long `[H, W]`, from 0 on.
        classes: how many there are.
        reduced: whether class 0 is written as 1, and so on, for in the maps learnt from 0 stood for nothing.
    """
    values = (labels.cpu() + reduced).numpy()
    if classes + reduced > 256:
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8))
        colours = [(0, 0, 0)] * reduced + [class_colour(number) for number in range(256 - reduced)]
        image.putpalette([part for colour in colours for part in colour])
    image.save(path)
